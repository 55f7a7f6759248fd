"""Documents gathered in bulk: what `mix` writes is what one document after the other gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llmkit.errors import LlmkitError
from llmkit.io.record import Lineage
from llmkit.mixing import gather
from llmkit.mixing.order import OrderedTokens
from llmkit.mixing.plan import Plan, PlannedSource
from llmkit.shards import writer as shards
from llmkit.shards.arrow import string_array
from llmkit.shards.reader import TokenStore
from llmkit.shards.writer import ShardWriter

Write = Callable[..., Path]


def ordered_of(paths: list[Path], budgets: list[int], length: int | None = None) -> OrderedTokens:
    stores = [TokenStore.open(str(path)) for path in paths]
    sources = [
        PlannedSource(path.name, store.inputs[0].digest, (budget,))
        for path, store, budget in zip(paths, stores, budgets, strict=True)
    ]
    return OrderedTokens(Plan(tuple(sources), 5, stores[0].tokenizer.digest, "global", length), stores, [])


def one_by_one(ordered: OrderedTokens, writer: ShardWriter, progress: object) -> None:
    for i in range(ordered.documents):
        writer.write(ordered.document(i), ordered.id(i), ordered.source(i), ordered.epoch(i))


def content(path: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in path.iterdir()}


@pytest.mark.parametrize("length", [None, 64])
def test_in_bulk_as_one_by_one(
    tmp_path: Path, write_shards: Write, monkeypatch: pytest.MonkeyPatch, length: int | None
) -> None:
    """Property: the same bytes, packed or not, over several stores, parts and batches, with empty and long documents, and epochs of an earlier mix."""
    monkeypatch.setattr(shards, "BATCH_TOKENS", 300)
    monkeypatch.setattr(shards, "BATCH_DOCUMENTS", 16)
    sizes = np.random.default_rng(0).integers(0, 40, 150).tolist()
    web = write_shards(tmp_path / "web", sizes, max_tokens_per_shard=900)
    wiki = write_shards(tmp_path / "wiki.arrow", [5, 700, 0, 0, 30], "ü")
    empty = write_shards(tmp_path / "empty", [])
    first = tmp_path / "first-one_by_one"
    for name, paths, budgets in (
        ("first", [web, wiki], [2_000, 3_000]),
        ("second", [first, wiki, empty], [9_000, 900, 0]),
    ):
        ordered = ordered_of(paths, budgets, length if name == "second" else None)
        for way in (one_by_one, gather.write_ordered):
            with ShardWriter(
                str(tmp_path / f"{name}-{way.__name__}"),
                ordered.tokenizer,
                Lineage("mix"),
                epochs=True,
                max_tokens_per_shard=2_000,
            ) as writer:
                told: list[int] = []
                way(ordered, writer, told.append)
                writer.finish({}, [])
        assert sum(told) == ordered.documents
        made = content(tmp_path / f"{name}-one_by_one")
        assert len(made) > 3 and content(tmp_path / f"{name}-write_ordered") == made
    store = TokenStore.open(str(tmp_path / "second-write_ordered"))
    assert max(store.epoch(i) for i in range(store.documents)) > 3


def test_memory_is_that_of_a_batch(tmp_path: Path, write_shards: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """Property: no more tokens are held at a time than a batch and one document, however many there are."""
    ordered = ordered_of([write_shards(tmp_path / "web", [100] * 500)], [400_000])
    monkeypatch.setattr(shards, "BATCH_TOKENS", 1_000)
    sizes = []
    joined = gather._joined
    monkeypatch.setattr(gather, "_joined", lambda *given: sizes.append(len(made := joined(*given))) or made)
    with ShardWriter(str(tmp_path / "m.arrow"), ordered.tokenizer, Lineage("mix"), epochs=True) as writer:
        gather.write_ordered(ordered, writer, lambda number: None)
        writer.finish({}, [])
    assert sum(sizes) > 800_000 and max(sizes) <= 2_200


def test_ids_beyond_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behaviour: ids that Arrow's 32-bit offsets cannot hold are one clear line, not wrapped around."""

    class Huge(bytes):
        def __len__(self) -> int:
            return 1 << 31

    with pytest.raises(LlmkitError, match="over 2 GiB of ids"):
        string_array(np.array([1 << 31]), Huge())

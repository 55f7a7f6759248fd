"""Documents gathered in bulk: what `mix` writes is what one document after the other gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llmkit.errors import LlmkitError
from llmkit.io import gather, shards
from llmkit.io.lineage import Lineage
from llmkit.io.order import OrderedTokens, Plan, PlannedSource
from llmkit.io.shard_part import text_array
from llmkit.io.shards import ShardWriter, TokenStore

Write = Callable[..., Path]


def ordered_of(paths: list[Path], budgets: list[int]) -> OrderedTokens:
    stores = [TokenStore.open(str(path)) for path in paths]
    sources = [
        PlannedSource(path.name, store.inputs[0].digest, budget)
        for path, store, budget in zip(paths, stores, budgets, strict=True)
    ]
    return OrderedTokens(Plan(tuple(sources), 5, stores[0].tokenizer.digest), stores, [])


@pytest.mark.parametrize("name", ["mix", "mix.arrow"])
def test_in_bulk_as_one_by_one(tmp_path: Path, write_shards: Write, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Property: the same bytes, over several stores, parts and batches, with empty and long documents, ids beyond ASCII, epochs of an earlier mix."""
    monkeypatch.setattr(shards, "BATCH_TOKENS", 300)
    monkeypatch.setattr(shards, "BATCH_DOCUMENTS", 16)
    random = np.random.default_rng(0)
    web = write_shards(tmp_path / "web", random.integers(0, 40, 150).tolist(), max_tokens_per_shard=900)
    wiki = write_shards(tmp_path / "ü-wiki.arrow", [5, 700, 0, 0, 30], "ü")
    empty = write_shards(tmp_path / "empty", [])
    writers = []
    for number, paths, budgets in (
        (0, [web, wiki], [2_000, 3_000]),
        (1, [tmp_path / "0-0", wiki, empty], [9_000, 900, 0]),
    ):
        ordered = ordered_of(paths, budgets)
        for way in (0, 1):
            path = tmp_path / f"{number}-{way}"
            target = str(path) + (".arrow" if name.endswith(".arrow") and number else "")
            with ShardWriter(
                target, ordered.tokenizer, Lineage("mix"), epochs=True, max_tokens_per_shard=2_000
            ) as writer:
                told: list[int] = []
                if way:
                    gather.write_ordered(ordered, writer, told.append)
                    assert sum(told) == ordered.documents
                else:
                    for i in range(ordered.documents):
                        writer.write(ordered.document(i), ordered.id(i), ordered.source(i), ordered.epoch(i))
                writer.finish({}, [])
            writers.append(Path(target))
    assert (
        TokenStore.open(str(writers[-1])).epoch(0) >= 0
        and max(TokenStore.open(str(writers[2])).epoch(i) for i in range(200)) > 2
    )
    for one, many in (writers[:2], writers[2:]):
        if one.is_dir():
            assert len(list(one.glob("*.arrow"))) > 1
            assert {p.name: p.read_bytes() for p in one.iterdir()} == {p.name: p.read_bytes() for p in many.iterdir()}
        else:
            assert one.read_bytes() == many.read_bytes()


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
        text_array(np.array([1 << 31]), Huge())

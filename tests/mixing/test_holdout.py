"""What is held out: no text on both sides in whatever form, the same in every mix, and a share of all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from llmkit.io.record import Lineage
from llmkit.mixing.holdout import grouped, held_out
from llmkit.shards.reader import TokenStore
from llmkit.shards.tokenizer_info import TokenizerInfo
from llmkit.shards.writer import ShardWriter

Documents = list[tuple[str, list[int]]]


def store_of(path: Path, documents: Documents) -> TokenStore:
    with ShardWriter(str(path), TokenizerInfo("xxh3:0", 300, 0), Lineage("tokenize", {"name": path.name})) as writer:
        for id, tokens in documents:
            writer.write(tokens, id, "s")
        writer.finish({}, [])
    return TokenStore.open(str(path))


def split(
    store: TokenStore, found: tuple[int, ...]
) -> tuple[set[str], set[str], set[tuple[int, ...]], set[tuple[int, ...]]]:
    """Ids held out and kept, token ids held out and kept."""
    out = set(found)
    ids: tuple[set[str], set[str]] = (set(), set())
    tokens: tuple[set[tuple[int, ...]], set[tuple[int, ...]]] = (set(), set())
    for i in range(store.documents):
        ids[i not in out].add(store.id(i))
        tokens[i not in out].add(tuple(store.document(i).tolist()))
    return *ids, *tokens


def test_no_document_is_on_both_sides(tmp_path: Path) -> None:
    """Property: neither an id nor a text is held out and trained on, over sources, with fill-in-the-middle (the same id, other tokens) and with
    copies under other ids; shares are as asked for; what has no copies is held out of every mix, and of one with a larger share."""
    draw = np.random.default_rng(0)
    documents = [(f"d{i}", draw.integers(1, 300, 9).tolist()) for i in range(4_000)]
    web = store_of(tmp_path / "web.arrow", documents)
    other_form = [(id, tokens[::-1]) for id, tokens in documents[:800]]
    other_name = [(f"copy-{id}", tokens) for id, tokens in documents[400:1200]]
    both = store_of(tmp_path / "both.arrow", [*other_form, *other_name, ("again", other_form[7][1])])
    (alone,) = held_out([web], 0.05)
    together = held_out([both, web], 0.05)
    assert 140 <= len(alone) <= 260 and 50 <= len(together[0]) <= 110
    assert {i for i in alone if i >= 1200} == {i for i in together[1] if i >= 1200}
    assert set(alone) <= set(held_out([web], 0.2)[0])
    sides = [split(store, found) for store, found in zip((both, web), together, strict=True)]
    out_ids, kept_ids, out_tokens, kept_tokens = (set().union(*parts) for parts in zip(*sides, strict=True))
    assert not out_ids & kept_ids and not out_tokens & kept_tokens


def test_documents_without_ids(tmp_path: Path) -> None:
    """Behaviour: documents whose id is empty go by their tokens, not all together."""
    store = store_of(tmp_path / "a.arrow", [("", [1, i, 0]) for i in range(250)])
    assert 10 <= len(held_out([store], 0.1)[0]) <= 45


@given(st.lists(st.tuples(st.integers(0, 25), st.integers(0, 25)), min_size=1, max_size=40))
def test_groups(rows: list[tuple[int, int]]) -> None:
    """Parity with a plain union of every two rows that share a key."""
    parent = list(range(len(rows)))

    def root(i: int) -> int:
        return i if parent[i] == i else root(parent[i])

    for i, one in enumerate(rows):
        for j, other in enumerate(rows[:i]):
            if one[0] == other[0] or one[1] == other[1]:
                low, high = sorted((root(i), root(j)))
                parent[high] = low
    keys = [np.array(column, np.uint64) for column in zip(*rows, strict=True)]
    assert grouped(keys).tolist() == [root(i) for i in range(len(rows))]

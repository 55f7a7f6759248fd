"""What a plan may choose beyond budgets: ways to shuffle, stages, copies, held-out documents, packing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.errors import LlmkitError
from llmkit.io.record import Lineage
from llmkit.mixing import order as orders
from llmkit.mixing.holdout import held_out
from llmkit.mixing.order import OrderedTokens, one_pass, resolve
from llmkit.mixing.plan import Plan, PlannedSource, plan_digest, plan_text
from llmkit.shards.reader import TokenStore
from llmkit.shards.shard import PADDING_SOURCE
from llmkit.shards.writer import ShardWriter

Write = Callable[..., Path]
LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=40)


def plan_of(*budgets: tuple[int, ...], **more: object) -> Plan:
    return Plan(tuple(PlannedSource(f"s{i}", f"d{i}", each) for i, each in enumerate(budgets)), 3, **more)  # type: ignore[arg-type]


@given(
    st.lists(st.tuples(LENGTHS, st.lists(st.integers(0, 900), min_size=3, max_size=3)), min_size=1, max_size=3).filter(
        lambda found: any(sum(budgets) for _, budgets in found)
    ),
    st.sampled_from(["global", "block", "none"]),
)
@settings(deadline=None)
def test_stages_go_on_where_the_last_one_stopped(sources: list[tuple[list[int], list[int]]], shuffle: str) -> None:
    """Property: a source's documents over all stages are those of one stage that takes the sum; each stage has what it asks for, to half a document."""
    lengths = [np.array(sizes, np.int64) for sizes, _ in sources]
    staged = resolve(plan_of(*(tuple(budgets) for _, budgets in sources), shuffle=shuffle), lengths)
    whole = resolve(plan_of(*((sum(budgets),) for _, budgets in sources), shuffle=shuffle), lengths)
    assert len(staged.ends) == 3 and staged.ends[-1] == len(staged.source)
    for s, (sizes, budgets) in enumerate(sources):
        for column in ("document", "epoch", "size"):
            one, other = (getattr(order, column)[order.source == s] for order in (staged, whole))
            assert np.array_equal(one, other)
        reached = np.cumsum(
            [
                staged.size[a:b][staged.source[a:b] == s].sum()
                for a, b in zip([0, *staged.ends], staged.ends, strict=False)
            ]
        )
        assert (np.abs(reached - np.cumsum(budgets)) <= max(sizes) / 2).all()


def test_ways_to_shuffle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behaviour: none keeps the stored order, block keeps runs of it in another order, other in each pass; sources mix all the same."""
    monkeypatch.setattr(orders, "BLOCK_TOKENS", 100)
    lengths = np.full(100, 7)
    assert one_pass(1, "none", lengths, None)[0].tolist() == list(range(100))
    first, second = (one_pass(seed, "block", lengths, None)[0] for seed in (1, 2))
    assert sorted(first) == list(range(100)) and not np.array_equal(first, second)
    jumps = np.flatnonzero(np.diff(first) != 1)
    assert 4 <= len(jumps) <= 6 and all(7 * first[i + 1] // 100 != 7 * (first[i + 1] - 1) // 100 for i in jumps)
    order = resolve(plan_of((1400,), (700,), shuffle="none"), [lengths, lengths])
    assert order.document[order.source == 0].tolist() == [*range(100), *range(100)]
    assert abs(int((order.source[:150] == 0).sum()) - 100) <= 2


@given(LENGTHS, st.data(), st.sampled_from(["global", "block", "none"]))
@settings(deadline=None)
def test_copies_are_whole_passes(sizes: list[int], data: st.DataObject, shuffle: str) -> None:
    """Property: a pass holds each document as often as it is to be, evenly spread, and `epoch` counts on from one to the next."""
    copies = np.array(data.draw(st.lists(st.integers(0, 4), min_size=len(sizes), max_size=len(sizes)).filter(any)))
    lengths = np.array(sizes, np.int64)
    a_pass = int((lengths * copies).sum())
    order = resolve(plan_of((2 * a_pass,), shuffle=shuffle), [lengths], [copies])
    for document, many in enumerate(copies.tolist()):
        mine = np.flatnonzero(order.document == document)
        assert order.epoch[mine].tolist() == list(range(2 * many))
        half = copies.sum()
        parts = (mine[mine < half] * many // half).tolist()  # in which n-th of the first pass each copy stands
        assert all(abs(part - i) <= 1 for i, part in enumerate(parts))


def test_packed_tokens(tmp_path: Path, write_shards: Write) -> None:
    """Property: followed by plan, a packed order gives every token taken once and end-of-text ids between; held-out documents and padding of an
    earlier packing never come; what the plan decides is in its digest."""
    web = write_shards(
        tmp_path / "web", np.random.default_rng(0).integers(1, 60, 90).tolist(), max_tokens_per_shard=500
    )
    store = TokenStore.open(str(web))
    (out,) = held_out([store], 0.1)
    kept = store.tokens - sum(len(store.document(i)) for i in out)
    plan = Plan((PlannedSource("web", store.inputs[0].digest, (kept,), out),), 1, store.tokenizer.digest, "block", 16)
    (tmp_path / "plan.toml").write_text(plan_text(plan))
    packed = OrderedTokens.open(str(tmp_path / "plan.toml"))
    assert packed.padding is not None and packed.sequence_length == 16 and packed.tokens % 16 == 0
    pieces: dict[str, list[int]] = {}
    for i in range(packed.documents):
        assert packed.padding[i] == (packed.source(i) == PADDING_SOURCE) and (packed.id(i) == "") == packed.padding[i]
        pieces.setdefault(packed.id(i), []).extend(packed.document(i).tolist())
    assert set(pieces.pop("")) == {store.tokenizer.eos_id}
    whole = {store.id(i): store.document(i).tolist() for i in range(store.documents) if i not in out}
    assert {name: sorted(tokens) for name, tokens in pieces.items()} == {name: sorted(t) for name, t in whole.items()}
    flat = np.concatenate([packed.document(i) for i in range(packed.documents)])
    assert np.array_equal(packed.span(7, len(flat) - 5), flat[7:-5])
    with ShardWriter(
        str(tmp_path / "p.arrow"), packed.tokenizer, Lineage("mix"), epochs=True, sequence_length=16
    ) as writer:
        for i in range(packed.documents):
            writer.write(packed.document(i), packed.id(i), packed.source(i), packed.epoch(i))
        writer.finish({}, [])
    stored = TokenStore.open(str(tmp_path / "p.arrow"))
    assert stored.sequence_length == 16 and np.array_equal(stored.padding, packed.padding)
    again = Plan((PlannedSource("p.arrow", stored.inputs[0].digest, (kept,)),), 1, stored.tokenizer.digest)
    remixed = OrderedTokens(again, [stored], [])
    assert PADDING_SOURCE not in {remixed.source(i) for i in range(remixed.documents)} and remixed.tokens == kept
    digests = set()
    for changed in (
        plan,
        replace(plan, shuffle="none"),
        replace(plan, sequence_length=None),
        replace(plan, sources=again.sources),
    ):
        (tmp_path / "plan.toml").write_text(plan_text(changed))
        digests.add(plan_digest(tmp_path / "plan.toml"))
    assert len(digests) == 4


def test_bad_choices_in_a_plan(tmp_path: Path, write_shards: Write) -> None:
    """Behaviour: refused by the name of the field."""
    store = TokenStore.open(str(write_shards(tmp_path / "web.arrow", [5] * 9)))
    plan = Plan(
        (PlannedSource("web.arrow", store.inputs[0].digest, (20, 5), (3,)),) * 2, 1, store.tokenizer.digest, "none", 8
    )
    text = plan_text(plan)
    for old, new, message in [
        ("[20, 5]", "20", "source 1: field 'tokens'"),
        ("[20, 5]", "[]", "source 1: field 'tokens'"),
        ("[20, 5]", "[true, 5]", "source 1: field 'tokens'"),
        ("[20, 5]\nheld_out = [3]\n\n", "[20]\n\n", "source 2: field 'tokens'"),
        ("[3]", "[-1]", "source 1: field 'held_out'"),
        ("[3]", "[99]", "web.arrow: document 99 is held out, of 9"),
        ('"none"', '"some"', "field 'shuffle'"),
        ("sequence_length = 8", "sequence_length = 0", "field 'sequence_length'"),
        ("version = 2", "version = 1", "no mix plan of version 2"),
        ("version = 2", "version = " + "[" * 3000, "invalid TOML"),
    ]:
        assert old in text
        (tmp_path / "plan.toml").write_text(text.replace(old, new, 1))
        with pytest.raises(LlmkitError, match=message):
            OrderedTokens.open(str(tmp_path / "plan.toml"))

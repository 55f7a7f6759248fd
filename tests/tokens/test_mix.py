"""Specs and budgets: what is typed becomes tokens of each source."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.errors import LlmkitError, UsageError
from llmkit.io.documents import Chunk, ReadOptions
from llmkit.io.order import resolve
from llmkit.io.plan import Plan, PlannedSource
from llmkit.tokens.mix import Spec, budgets, parse_spec
from llmkit.tokens.pool import DocumentPool, estimate, measure


def specs(*texts: str) -> list[Spec]:
    return [parse_spec(text) for text in texts]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("web/", Spec("web/")),
        ("web/:0.6", Spec("web/", "weight", 0.6, ":0.6")),
        ("web:3", Spec("web", "weight", 3.0, ":3")),
        ("web:.5", Spec("web", "weight", 0.5, ":.5")),
        ("web:1e-3", Spec("web", "weight", 1e-3, ":1e-3")),
        ("a.arrow:x6", Spec("a.arrow", "times", 6.0, ":x6")),
        ("web:x0.25", Spec("web", "times", 0.25, ":x0.25")),
        ("web:2B", Spec("web", "tokens", 2e9, ":2B")),
        ("web:1.5k", Spec("web", "tokens", 1500.0, ":1.5k")),
        ("/dev/stdin:0.5", Spec("-", "weight", 0.5, ":0.5")),
        ("a:b:0.5", Spec("a:b", "weight", 0.5, ":0.5")),
        ("s3://bucket/web", Spec("s3://bucket/web")),
    ],
)
def test_specs(text: str, expected: Spec) -> None:
    """Behaviour: the three amounts, and a path alone."""
    assert parse_spec(text) == expected


@pytest.mark.parametrize(
    "amount",
    ["0", "0.0", "x0", "0k", "-1", "nan", "inf", "x", "k", "", "1e999", "0.5x", "x2k", "x-1", "abc", "0.0001k"],
)
def test_amounts_that_are_none(amount: str) -> None:
    """Behaviour: refused with what was typed and the forms there are."""
    with pytest.raises(UsageError) as caught:
        parse_spec(f"web:{amount}")
    assert repr(amount) in caught.value.message and caught.value.hint


def test_an_existing_path_is_not_cut(tmp_path: Path) -> None:
    """Behaviour: a file whose name ends like an amount is a file."""
    (tmp_path / "run:0.5").touch()
    assert parse_spec(str(tmp_path / "run:0.5")) == Spec(str(tmp_path / "run:0.5"))


def test_budgets() -> None:
    """Behaviour: the table of the module, case by case."""
    assert budgets(specs("a:0.7", "b:0.2", "c:x6"), [900, 900, 10], 960) == [700, 200, 60]
    assert budgets(specs("a:3", "b:1k"), [900, 900], 1_900) == [900, 1_000]
    assert budgets(specs("a", "b"), [300, 100], 40) == [30, 10]
    assert budgets(specs("a", "b:x2"), [300, 100], None) == [300, 200]
    assert budgets(specs("a:1", "b:9"), [1_000, 90], None) == [10, 90]
    assert budgets(specs("a:1", "b:9"), [5, 900], None) == [5, 45]
    assert budgets(specs("a:x2", "b:1k"), [50, 10], None) == [100, 1_000]
    assert budgets(specs("a:x2"), [50], 100) == [100]


@pytest.mark.parametrize(
    ("given_specs", "total", "message"),
    [
        (["a", "b:0.5"], 100, "a: has no weight, while others have"),
        (["a:x2", "b:0.5"], 150, "the multipliers and budgets come to 200"),
        (["a:x2", "b:0.5"], 200, "come to 200"),
        (["a:x2", "b:x1"], 1_000, "come to 300"),
    ],
)
def test_contradictions(given_specs: list[str], total: int, message: str) -> None:
    """Behaviour: specs that cannot all hold are a usage error."""
    with pytest.raises(UsageError, match=message):
        budgets(specs(*given_specs), [100, 100], total)


def test_a_source_without_tokens() -> None:
    """Behaviour: refused by name rather than left out in silence."""
    with pytest.raises(LlmkitError, match="b: no tokens in this source"):
        budgets(specs("a", "b"), [10, 0], None)


SOURCES = st.lists(
    st.tuples(st.lists(st.integers(1, 400), min_size=1, max_size=60), st.floats(0.01, 100)), min_size=2, max_size=5
)


@given(SOURCES, st.integers(1_000, 10_000_000), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_realised_shares(sources: list[tuple[list[int], float]], total: int, seed: int) -> None:
    """Property: each source's tokens are within 0.01 % of what its weight asks of the total, or within one of its documents."""
    total = min(total, 200 * sum(sum(sizes) for sizes, _ in sources))
    asked = [Spec(f"s{i}", "weight", weight) for i, (_, weight) in enumerate(sources)]
    lengths = [np.array(sizes, np.int64) for sizes, _ in sources]
    wanted = budgets(asked, [int(sizes.sum()) for sizes in lengths], total)
    if max(budget / sizes.sum() for budget, sizes in zip(wanted, lengths, strict=True)) > 1_000:
        return
    plan = Plan(tuple(PlannedSource(f"s{i}", f"d{i}", (budget,)) for i, budget in enumerate(wanted)), seed)
    order = resolve(plan, lengths)
    weights = sum(weight for _, weight in sources)
    for s, (sizes, weight) in enumerate(sources):
        got = int(lengths[s][order.document[order.source == s]].sum())
        assert abs(got - total * weight / weights) <= max(1e-4 * total, max(sizes))


@given(
    st.lists(
        st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=9), max_size=8), min_size=1, max_size=3
    )
)
@settings(max_examples=40, deadline=None)
def test_pool_gives_back_every_line(sources: list[list[str]]) -> None:
    """Property: lines come back byte for byte in the order asked for, their lengths being a quarter of the text's bytes, rounded up."""
    import orjson

    pool, options = DocumentPool(), ReadOptions()
    lines = [[orjson.dumps({"text": text}) + b"\n" for text in texts] for texts in sources]
    lengths = [pool.add([measure(Chunk("x", 1, b"".join(part)), options, estimate)]) for part in lines]
    assert [sizes.tolist() for sizes in lengths] == [[-(-len(t.encode()) // 4) for t in texts] for texts in sources]
    plan = Plan(tuple(PlannedSource(f"s{i}", f"d{i}", (int(sizes.sum()),)) for i, sizes in enumerate(lengths)), 0)
    if not sum(source.tokens[0] for source in plan.sources):
        return
    order = resolve(plan, lengths)
    expected = [lines[s][d] for s, d in zip(order.source.tolist(), order.document.tolist(), strict=True)]
    blocks = list(pool.blocks(order))
    assert b"".join(block for block, _ in blocks) == b"".join(expected)
    assert sum(number for _, number in blocks) == len(expected)

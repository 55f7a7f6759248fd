"""Learning-rate schedules."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmkit.errors import UsageError
from llmkit.training.optim.schedule import (
    DECAY_SHAPES,
    SCHEDULES,
    Schedule,
    Segment,
    build_schedule,
    default_rate,
    warmup_tokens,
)

settings = st.fixed_dictionaries(
    {
        "name": st.sampled_from(tuple(SCHEDULES)),
        "peak": st.floats(1e-6, 1.0),
        "total": st.integers(1001, 10**12),  # more than the warm-up, whose end would be the floor
        "warmup": st.integers(0, 1000),
        "floor": st.floats(0, 1),
        "decay": st.floats(0, 1),
        "shape": st.sampled_from(DECAY_SHAPES),
    }
)


@given(settings, st.floats(0, 1.2))
def test_rate_lies_between_zero_and_peak(asked: dict[str, Any], share: float) -> None:
    """Property: 0 <= rate <= peak everywhere, and at least floor * peak after the warm-up."""
    tokens = share * asked["total"]
    rate = build_schedule(**asked).rate(tokens)
    assert 0 <= rate <= asked["peak"] * (1 + 1e-9)
    if tokens >= asked["warmup"]:
        assert rate >= asked["peak"] * asked["floor"] * (1 - 1e-9)


@given(settings, st.floats(0, 1), st.floats(0, 1))
def test_rises_then_never_rises(asked: dict[str, Any], a: float, b: float) -> None:
    """Property: the rate increases during the warm-up and does not increase after it."""
    schedule, warmup, rest = build_schedule(**asked), asked["warmup"], asked["total"] - asked["warmup"]
    low, high = sorted((a, b))
    assert schedule.rate(low * warmup) <= schedule.rate(high * warmup) * (1 + 1e-9)
    assert schedule.rate(warmup + high * rest) <= schedule.rate(warmup + low * rest) * (1 + 1e-9)


@given(settings)
def test_ends_at_the_floor(asked: dict[str, Any]) -> None:
    """Property: every decaying schedule ends at floor * peak and stays there."""
    schedule = build_schedule(**asked)
    if asked["name"] == "constant" or (asked["name"] == "wsd" and schedule.segments[-1].shape == "constant"):
        return
    end = schedule.rate(asked["total"])
    assert math.isclose(end, asked["peak"] * asked["floor"], abs_tol=1e-9 * asked["peak"])
    assert schedule.rate(2 * asked["total"]) == end


def test_values() -> None:
    """Behaviour: values calculated by hand."""
    cosine = build_schedule("cosine", 1.0, 1100, warmup=100, floor=0.1)
    assert cosine.rate(50) == 0.5
    assert cosine.rate(100) == 1.0
    assert math.isclose(cosine.rate(600), 0.55)
    wsd = build_schedule("wsd", 2.0, 1000, warmup=100, decay=0.2)
    assert wsd.rate(799) == 2.0
    assert math.isclose(wsd.rate(900), 1.0)
    long = build_schedule("wsd", 1.0, 1000, warmup=400, decay=0.9)  # the decay would begin before the warm-up ends
    assert long.rate(400) == 1.0 and math.isclose(long.rate(700), 0.5)
    assert build_schedule("linear", 1.0, 100).for_step(0, 10) == 0.95
    assert build_schedule("linear", 1.0, 100).for_step(90, 100) == pytest.approx(0.05)
    assert build_schedule("sqrt", 1.0, 100).rate(25) == 0.5
    root = build_schedule("wsd", 1.0, 1000, decay=0.4, shape="sqrt")
    assert root.rate(600) == 1.0 and root.rate(700) == 0.5 and root.rate(1000) == 0.0
    again = build_schedule("cosine", 1.0, 1000, warmup=100, floor=0.1, first=0.2)  # a warm-up from an earlier rate
    assert again.rate(0) == 0.2 and again.rate(50) == pytest.approx(0.6) and again.rate(100) == again.peak == 1.0


def test_a_segment_may_be_cut_by_the_next() -> None:
    """Behaviour: the next segment takes over at its start, before the previous one has ended."""
    schedule = Schedule((Segment(0, 100, 1.0, 0.0), Segment(40, 60, 5.0, 1.0)))
    assert schedule.rate(39) == pytest.approx(0.61)
    assert [schedule.rate(at) for at in (40, 50, 60, 99)] == [5.0, 3.0, 1.0, 1.0]


def test_default_rate_passes_through_common_practice() -> None:
    """Behaviour: capped for small models, 6e-4 at 124M, about 3e-4 at 1B."""
    assert default_rate(1_000_000) == 3e-3
    assert default_rate(124_000_000) == pytest.approx(6e-4)
    assert 2e-4 < default_rate(1_000_000_000) < 3.5e-4


def test_warmup_is_a_share_or_a_count() -> None:
    """Behaviour: below 1 a share of the tokens, else a number of tokens."""
    assert warmup_tokens(0.05, 2000) == 100
    assert warmup_tokens(500, 2000) == 500


@pytest.mark.parametrize(
    "changes",
    [{"name": "cosin"}, {"peak": 0.0}, {"floor": 1.5}, {"decay": -0.1}, {"warmup": 2000}, {"shape": "constant"}],
)
def test_refused(changes: dict[str, Any]) -> None:
    """Behaviour: values out of range are usage errors."""
    with pytest.raises(UsageError):
        build_schedule(**({"name": "cosine", "peak": 1.0, "total": 1000} | changes))


def test_every_schedule_has_help() -> None:
    """Behaviour: a row of the table has a help text."""
    assert all(kind.help for kind in SCHEDULES.values())


def test_unknown_name_suggests() -> None:
    """Behaviour: an unknown name gets a suggestion."""
    with pytest.raises(UsageError) as caught:
        build_schedule("cosin", 1.0, 10)
    assert "cosine" in caught.value.hint

"""Learning-rate schedules."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmkit.errors import UsageError
from llmkit.training.schedule import SHAPES, Schedule, default_rate, warmup_tokens

schedules = st.builds(
    Schedule,
    st.sampled_from(sorted(SHAPES)),
    peak=st.floats(1e-6, 1.0),
    total=st.integers(1001, 10**12),  # more than the warm-up, whose end would be the floor
    warmup=st.integers(0, 1000),
    floor=st.floats(0, 1),
    decay=st.floats(0, 1),
)


@given(schedules, st.floats(0, 1.2))
def test_rate_lies_between_zero_and_peak(schedule: Schedule, share: float) -> None:
    """Property: 0 <= rate <= peak everywhere, and at least floor * peak after the warm-up."""
    tokens = share * schedule.total
    rate = schedule.rate(tokens)
    assert 0 <= rate <= schedule.peak * (1 + 1e-9)
    if tokens >= schedule.warmup:
        assert rate >= schedule.peak * schedule.floor * (1 - 1e-9)


@given(schedules, st.floats(0, 1), st.floats(0, 1))
def test_rises_then_never_rises(schedule: Schedule, a: float, b: float) -> None:
    """Property: the rate grows during the warm-up and does not grow after it."""
    low, high = sorted((a, b))
    assert schedule.rate(low * schedule.warmup) <= schedule.rate(high * schedule.warmup) * (1 + 1e-9)
    rest = schedule.total - schedule.warmup
    before, after = schedule.rate(schedule.warmup + low * rest), schedule.rate(schedule.warmup + high * rest)
    assert after <= before * (1 + 1e-9)


@given(schedules)
def test_ends_at_the_floor(schedule: Schedule) -> None:
    """Property: every decaying schedule ends at floor * peak, and stays there."""
    if schedule.name == "constant" or (schedule.name == "wsd" and schedule.decay == 0):
        return
    assert math.isclose(schedule.rate(schedule.total), schedule.peak * schedule.floor, abs_tol=1e-9 * schedule.peak)
    assert schedule.rate(2 * schedule.total) == schedule.rate(schedule.total)


def test_values() -> None:
    """Behaviour: figures worked out by hand."""
    cosine = Schedule("cosine", 1.0, 1100, warmup=100, floor=0.1)
    assert cosine.rate(50) == 0.5
    assert cosine.rate(100) == 1.0
    assert math.isclose(cosine.rate(600), 0.55)
    wsd = Schedule("wsd", 2.0, 1000, warmup=100, decay=0.2)
    assert wsd.rate(799) == 2.0
    assert math.isclose(wsd.rate(900), 1.0)
    long = Schedule("wsd", 1.0, 1000, warmup=400, decay=0.9)  # the decay would begin before the warm-up ends
    assert long.rate(400) == 1.0 and math.isclose(long.rate(700), 0.5)
    assert Schedule("linear", 1.0, 100).for_step(0, 10) == 0.95
    assert Schedule("linear", 1.0, 100).for_step(90, 100) == pytest.approx(0.05)


def test_default_rate_passes_through_common_practice() -> None:
    """Behaviour: capped for small models, 6e-4 at 124M, about 3e-4 at 1B."""
    assert default_rate(1_000_000) == 3e-3
    assert default_rate(124_000_000) == pytest.approx(6e-4)
    assert 2e-4 < default_rate(1_000_000_000) < 3.5e-4


def test_warmup_is_a_share_or_a_count() -> None:
    """Behaviour: below 1 a share, else tokens."""
    assert warmup_tokens(0.05, 2000) == 100
    assert warmup_tokens(500, 2000) == 500


@pytest.mark.parametrize(
    "changes", [{"name": "cosin"}, {"peak": 0.0}, {"floor": 1.5}, {"decay": -0.1}, {"warmup": 2000}]
)
def test_refused(changes: dict[str, object]) -> None:
    """Behaviour: values that make no schedule are usage errors."""
    with pytest.raises(UsageError):
        Schedule(**({"name": "cosine", "peak": 1.0, "total": 1000} | changes))  # type: ignore[arg-type]


def test_unknown_name_suggests() -> None:
    """Behaviour: did you mean."""
    with pytest.raises(UsageError) as caught:
        Schedule("cosin", 1.0, 10)
    assert "cosine" in caught.value.hint

"""Learning rate as a pure function of the tokens seen, so that a resumed run needs no scheduler state.

    schedule = Schedule("wsd", peak=3e-3, total=10_000_000, warmup=500_000, decay=0.2)
    schedule.rate(5_000_000)  # 3e-3

| name | after the warm-up |
|---|---|
| cosine | half a cosine from the peak to `floor` × peak at the end |
| linear | a straight line from the peak to `floor` × peak at the end |
| wsd | constant, then over the last `decay` of all tokens a straight line to `floor` × peak (warmup, stable, decay) |
| constant | constant |

A step that covers the tokens [a, b) is given the rate at (a + b) / 2: neither the first step of a warm-up nor the last of a decay to zero is then lost.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from llmkit.errors import UsageError, unknown_name

LARGEST_RATE = 3e-3
# Learning rates of fine-tuning and of preference optimisation relative to pre-training: 1.2e-5 and 6e-7 at 7B, as commonly used.
FINE_TUNING = 0.1
PREFERENCE = 0.005


@dataclass(frozen=True, slots=True)
class Schedule:
    """Shape `name`, `peak` learning rate, `total` and `warmup` in tokens, `floor` relative to the peak, `decay` as a share of all tokens."""

    name: str
    peak: float
    total: int
    warmup: int = 0
    floor: float = 0.0
    decay: float = 0.2

    def __post_init__(self) -> None:
        if self.name not in SHAPES:
            raise unknown_name("schedule", self.name, SHAPES)
        if not (math.isfinite(self.peak) and self.peak > 0):
            raise UsageError(f"learning rate {self.peak} is not above 0", "usual values lie between 1e-5 and 1e-2")
        if not 0 <= self.floor <= 1:
            raise UsageError(
                f"--min-lr {self.floor} is not between 0 and 1", "it is the last learning rate over the peak"
            )
        if not 0 <= self.decay <= 1:
            raise UsageError(f"--decay {self.decay} is not between 0 and 1", "it is a share of all tokens")
        if not 0 <= self.warmup <= self.total:
            raise UsageError(
                f"a warm-up of {self.warmup:,} tokens does not fit into {self.total:,}", "give a smaller --warmup"
            )

    def rate(self, tokens: float) -> float:
        """Learning rate after `tokens` tokens; constant beyond the end."""
        if tokens < self.warmup:
            return self.peak * tokens / self.warmup
        span = self.total - self.warmup
        done = min((tokens - self.warmup) / span, 1.0) if span else 1.0
        return self.peak * (self.floor + (1 - self.floor) * SHAPES[self.name](self, done))

    def for_step(self, before: int, after: int) -> float:
        """Learning rate of the step that covers the tokens [before, after)."""
        return self.rate((before + after) / 2)


def _cosine(schedule: Schedule, done: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * done))


def _linear(schedule: Schedule, done: float) -> float:
    return 1 - done


def _wsd(schedule: Schedule, done: float) -> float:
    """`done` counts from the end of the warm-up, `decay` from the start of the run."""
    after_warmup = schedule.total - schedule.warmup
    decayed = min(schedule.decay * schedule.total, after_warmup)
    left = (1 - done) * after_warmup
    if left > decayed or not schedule.decay:
        return 1.0
    return left / decayed if decayed else 0.0


def _constant(schedule: Schedule, done: float) -> float:
    return 1.0


# Each maps the share of the way from warm-up to end, in [0, 1], to a factor between 1 and 0.
SHAPES: dict[str, Callable[[Schedule, float], float]] = {
    "cosine": _cosine,
    "linear": _linear,
    "wsd": _wsd,
    "constant": _constant,
}


def warmup_tokens(value: float, total: int) -> int:
    """`--warmup`: below 1 a share of all tokens, else a number of tokens."""
    return round(value * total) if value < 1 else round(value)


def default_rate(parameters: int) -> float:
    """Learning rate for pre-training a model of so many parameters: 6e-4 at 124M, with the power -0.4 of the size, at most 3e-3.

    The line passes through common practice (about 3e-4 at 1B); small models are kept below 3e-3, where a 2M model still trains without spikes.
    """
    return min(LARGEST_RATE, round(6e-4 * (parameters / 124e6) ** -0.4, 6))

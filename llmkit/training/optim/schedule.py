"""Learning rate as a pure function of the tokens seen, so that a resumed run needs no scheduler state.

A schedule is a list of segments, each with the token where it starts, the one where it ends, its first and last rate and a shape between them:

    linear, cosine, sqrt (1 - sqrt: most of the way at once), constant
    Schedule((Segment(0, 500_000, 0.0, 3e-3), Segment(500_000, 10_000_000, 3e-3, 3e-4, "cosine"))).rate(500_000)  # 3e-3

`named` makes the usual ones; recipes (recipe.py) put several behind each other:

| name | after the warm-up, which rises in a straight line |
|---|---|
| cosine | half a cosine from the peak to `floor` × peak at the end |
| linear | a straight line from the peak to `floor` × peak at the end |
| sqrt | along 1 - √(share that is done) from the peak to `floor` × peak at the end |
| wsd | constant, then over the last `decay` of all tokens to `floor` × peak by `shape` (warm-up, stable, decay; arXiv:2404.06395, 2405.18392) |
| constant | constant |

A step that covers the tokens [a, b) is given the rate at (a + b) / 2: neither the first step of a warm-up nor the last of a decay to zero is then lost.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass

from llmkit.errors import UsageError, unknown_name

LARGEST_RATE = 3e-3
# Learning rates of fine-tuning and of preference optimisation relative to pre-training: 1.2e-5 and 6e-7 at 7B, as commonly used.
FINE_TUNING = 0.1
PREFERENCE = 0.005

# Each maps the share of the segment that is done, in [0, 1], to the share of the way from its first rate to its last.
SHAPES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 0.0,
    "linear": lambda done: done,
    "cosine": lambda done: 0.5 * (1 - math.cos(math.pi * done)),
    "sqrt": math.sqrt,
}
RAMPS = ("linear", "sqrt", "cosine")
NAMES = ("cosine", "linear", "sqrt", "wsd", "constant")


@dataclass(frozen=True, slots=True)
class Segment:
    """Rates from token `start` on, `last` from token `end` on. What follows in a schedule may begin before `end`: the rest is then not run."""

    start: int
    end: int
    first: float
    last: float
    shape: str = "linear"

    def rate(self, tokens: float) -> float:
        """Learning rate after `tokens` tokens, which are at or after the start."""
        span = self.end - self.start
        done = SHAPES[self.shape](min((tokens - self.start) / span, 1.0) if span > 0 else 1.0)
        return self.first * (1 - done) + self.last * done


@dataclass(frozen=True, slots=True)
class Schedule:
    """Segments in the order of their starts, the first of which is at 0."""

    segments: tuple[Segment, ...]

    def rate(self, tokens: float) -> float:
        """Learning rate after `tokens` tokens; constant beyond the end of the last segment."""
        return self.segments[bisect_right(self.segments, tokens, key=lambda segment: segment.start) - 1].rate(tokens)

    def for_step(self, before: int, after: int) -> float:
        """Learning rate of the step that covers the tokens [before, after)."""
        return self.rate((before + after) / 2)

    @property
    def peak(self) -> float:
        """The highest rate."""
        return max(max(segment.first, segment.last) for segment in self.segments)


def named(
    name: str,
    peak: float,
    total: int,
    warmup: int = 0,
    floor: float = 0.0,
    decay: float = 0.2,
    shape: str = "linear",
    *,
    first: float = 0.0,
) -> Schedule:
    """The schedule `name` over `total` tokens: from rate `first` up to `peak` within `warmup` tokens, then as the table above says.

    `floor` is relative to the peak, `decay` a share of all tokens.
    """
    if name not in NAMES:
        raise unknown_name("schedule", name, NAMES)
    if shape not in RAMPS:
        raise unknown_name("shape of the decay", shape, RAMPS)
    if not (math.isfinite(peak) and peak > 0):
        raise UsageError(f"learning rate {peak} is no number above 0", "usual values lie between 1e-5 and 1e-2")
    if not 0 <= floor <= 1:
        raise UsageError(f"--min-lr {floor} is not between 0 and 1", "it is the last learning rate over the peak")
    if not 0 <= decay <= 1:
        raise UsageError(f"--decay {decay} is not between 0 and 1", "it is a share of all tokens")
    if not 0 <= warmup <= total:
        raise UsageError(f"a warm-up of {warmup:,} tokens does not fit into {total:,}", "give a smaller --warmup")
    return Schedule(tuple(segments(name, peak, peak * floor, 0, total, warmup, decay, shape, first=first)))


def segments(
    name: str,
    peak: float,
    last: float,
    start: int,
    end: int,
    warmup: int = 0,
    decay: float = 0.2,
    shape: str = "linear",
    *,
    first: float = 0.0,
) -> list[Segment]:
    """Segments of the schedule `name` from token `start` to `end`: `warmup` tokens from rate `first` up to `peak`, then down to `last`."""
    found = [Segment(start, start + warmup, first, peak)] if warmup else []
    falls = start + warmup
    if name == "wsd":
        # A decay longer than what the warm-up leaves takes all of that.
        falls = max(falls, end - round(decay * (end - start)))
        found += [Segment(start + warmup, falls, peak, peak, "constant")] if falls > start + warmup else []
        name = shape if falls < end else "constant"
    if name == "constant":
        last = peak
    return [*found, Segment(falls, end, peak, last, name)] if falls < end or not found else found


def warmup_tokens(value: float, total: int) -> int:
    """`--warmup`: below 1 a share of all tokens, else a number of tokens."""
    return round(value * total) if value < 1 else round(value)


def default_rate(parameters: int) -> float:
    """Learning rate for pre-training a model of so many parameters: 6e-4 at 124M, with the power -0.4 of the size, at most 3e-3.

    The line passes through common practice (about 3e-4 at 1B); small models are kept below 3e-3, where a 2M model still trains without spikes.
    """
    return min(LARGEST_RATE, round(6e-4 * (parameters / 124e6) ** -0.4, 6))

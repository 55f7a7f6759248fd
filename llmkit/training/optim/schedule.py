"""Learning rate as a pure function of the tokens seen, so that a resumed run needs no scheduler state.

A schedule is a list of segments, each with its first and last token, its first and last rate, and a shape
between them:

    linear, cosine, sqrt (1 - √x: most of the decay comes early), constant
    Schedule((Segment(0, 500_000, 0.0, 3e-3), Segment(500_000, 10_000_000, 3e-3, 3e-4, "cosine"))).rate(500_000)  # 3e-3

`build_schedule` makes those in SCHEDULES; recipes (recipe.py) concatenate several. To add one, add a row to
SCHEDULES: a help text and a function that returns the segments after the warm-up, which is linear for all.
No torch here.

A step that covers the tokens [a, b) gets the rate at (a + b) / 2, so that neither the first step of a warm-up
nor the last of a decay to zero has rate 0.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass

from llmkit.errors import UsageError, unknown_name

MAX_DEFAULT_RATE = 3e-3
# Learning rates of fine-tuning and of preference optimisation relative to pre-training: 1.2e-5 and 6e-7 at
# 7B, as commonly used.
FINE_TUNING = 0.1
PREFERENCE = 0.005
# Of adapters relative to all weights: the best rates are about ten times those of full fine-tuning, over models and
# ranks (https://thinkingmachines.ai/blog/lora/, 2025).
ADAPTERS = 10.0

# Each maps the completed share of the segment, in [0, 1], to the share of the way from its first rate to its last.
SHAPES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 0.0,
    "linear": lambda done: done,
    "cosine": lambda done: 0.5 * (1 - math.cos(math.pi * done)),
    "sqrt": math.sqrt,
}
DECAY_SHAPES = ("linear", "sqrt", "cosine")


@dataclass(frozen=True, slots=True)
class Segment:
    """The rate goes from `first` at token `start` to `last` at token `end`.

    The next segment of a schedule may start before `end` and cut this one short.
    """

    start: int
    end: int
    first: float
    last: float
    shape: str = "linear"

    def rate(self, tokens: float) -> float:
        """Learning rate after `tokens` tokens, which must not be before the start."""
        span = self.end - self.start
        done = SHAPES[self.shape](min((tokens - self.start) / span, 1.0) if span > 0 else 1.0)
        return self.first * (1 - done) + self.last * done


@dataclass(frozen=True, slots=True)
class Schedule:
    """Segments in order of their starts, the first of which is 0."""

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


@dataclass(frozen=True, slots=True)
class Span:
    """The part of a schedule after the warm-up: from rate `peak` at token `start` to `last` at token `end`.

    `total` are the tokens including the warm-up, of which the share `decay` is a decay of shape `decay_shape`
    where a schedule has one.
    """

    start: int
    end: int
    peak: float
    last: float
    total: int
    decay: float
    decay_shape: str


def _cosine(span: Span) -> list[Segment]:
    return [Segment(span.start, span.end, span.peak, span.last, "cosine")]


def _linear(span: Span) -> list[Segment]:
    return [Segment(span.start, span.end, span.peak, span.last, "linear")]


def _sqrt(span: Span) -> list[Segment]:
    return [Segment(span.start, span.end, span.peak, span.last, "sqrt")]


def _wsd(span: Span) -> list[Segment]:
    # A decay longer than what the warm-up leaves takes all of that.
    decay_start = max(span.start, span.end - round(span.decay * span.total))
    return [
        Segment(span.start, decay_start, span.peak, span.peak, "constant"),
        Segment(decay_start, span.end, span.peak, span.last, span.decay_shape),
    ]


def _constant(span: Span) -> list[Segment]:
    return [Segment(span.start, span.end, span.peak, span.peak, "constant")]


@dataclass(frozen=True, slots=True)
class ScheduleKind:
    """`segments` returns the segments after the warm-up."""

    segments: Callable[[Span], list[Segment]]
    help: str


SCHEDULES: dict[str, ScheduleKind] = {
    "cosine": ScheduleKind(_cosine, "half a cosine from the peak to the final rate"),
    "linear": ScheduleKind(_linear, "a straight line from the peak to the final rate"),
    "sqrt": ScheduleKind(_sqrt, "from the peak to the final rate along 1 - √(share of the tokens)"),
    "wsd": ScheduleKind(
        _wsd,
        "warm-up, stable, decay: constant, then a decay to the final rate over the last share of all tokens "
        "(arXiv:2404.06395, 2405.18392)",
    ),
    "constant": ScheduleKind(_constant, "constant at the peak"),
}


def build_schedule(
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
    """The schedule `name` of SCHEDULES over `total` tokens, after a linear warm-up of `warmup` tokens from rate
    `first` to `peak`.

    The final rate is `floor` × `peak`; `decay` is a share of all tokens. Raises UsageError for values out of
    range.
    """
    if name not in SCHEDULES:
        raise unknown_name("schedule", name, tuple(SCHEDULES))
    if shape not in DECAY_SHAPES:
        raise unknown_name("shape of the decay", shape, DECAY_SHAPES)
    if not (math.isfinite(peak) and peak > 0):
        raise UsageError(f"learning rate {peak} is not a number above 0", "usual values are between 1e-5 and 1e-2")
    if not 0 <= floor <= 1:
        raise UsageError(
            f"--final-lr-fraction {floor} is not between 0 and 1", "it is the final learning rate over the peak"
        )
    if not 0 <= decay <= 1:
        raise UsageError(f"--decay {decay} is not between 0 and 1", "it is a share of all tokens")
    if not 0 <= warmup <= total:
        raise UsageError(f"a warm-up of {warmup:,} tokens does not fit into {total:,}", "use a smaller --warmup")
    return Schedule(tuple(schedule_segments(name, peak, peak * floor, 0, total, warmup, decay, shape, first=first)))


def schedule_segments(
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
    """Segments of the schedule `name` from token `start` to `end`: `warmup` tokens from rate `first` up to
    `peak`, then to `last`."""
    rise = [Segment(start, start + warmup, first, peak)] if warmup else []
    rest = SCHEDULES[name].segments(Span(start + warmup, end, peak, last, end - start, decay, shape))
    return [*rise, *(segment for segment in rest if segment.start < segment.end)] or rest[:1]


def warmup_tokens(value: float, total: int) -> int:
    """`--warmup` in tokens: below 1 it is a share of all tokens."""
    return round(value * total) if value < 1 else round(value)


def default_rate(parameters: int) -> float:
    """Default learning rate for pre-training a model of this many parameters: 6e-4 at 124M, with the power -0.4
    of the size, at most 3e-3.

    The curve passes through common practice (about 3e-4 at 1B); small models are kept at 3e-3, where a 2M
    model still trains without spikes.
    """
    return min(MAX_DEFAULT_RATE, round(6e-4 * (parameters / 124e6) ** -0.4, 6))

"""Which sequences each step takes: batch size and sequence length as functions of the tokens seen.

Sequences partition the stream in order, whatever their length. A run is a few phases of equal steps; a phase
begins at the first step that starts at or after the token from which its sizes apply. So rows, length and
first token of a step are found by bisection, O(log phases), without state:

    # (from token, sequences per step, tokens per sequence)
    steps = BatchSchedule([(0, 16, 512), (1_000_000, 32, 1024)], total=10_000_000)
    steps.tokens(3), steps.rows(3), steps.length(3), steps.step_at(1_000_000)

`size_changes` makes such a list. It keeps the tokens per step constant where the length changes: half the
length, twice the sequences. So only a batch warm-up changes how noisy a gradient is (arXiv:2108.06084 warms
up the length for stability; 1812.06162 explains why small batches suffice early).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import typer

from llmkit.errors import UsageError
from llmkit.options import parse_count

SizeChange = tuple[int, int, int]  # from this token on: sequences per step, tokens per sequence
Sizes = Sequence[tuple[int, int]]  # a size, and the token until which it applies


@dataclass(frozen=True, slots=True)
class Phase:
    """From step `step` on, which starts at token `token`: `rows` sequences of `length` tokens each."""

    step: int
    token: int
    rows: int
    length: int


class BatchSchedule:
    """The steps of a run of `total` tokens, rounded up to whole sequences.

    `changes` are in order of tokens, the first at 0.
    """

    def __init__(self, changes: Sequence[SizeChange], total: int) -> None:
        self.phases: list[Phase] = []
        step = token = 0
        ends = [min(start, total) for start, _, _ in changes[1:]] + [total]
        for (_, rows, length), end in zip(changes, ends, strict=True):
            if end <= token:  # the previous phase ran beyond it
                continue
            self.phases.append(Phase(step, token, rows, length))
            step_tokens = rows * length
            steps = -(-(end - token) // step_tokens)
            if token + steps * step_tokens >= total:  # the last phase: whole sequences, but not a whole last step
                sequences = -(-(total - token) // length)
                step, token = step + -(-sequences // rows), token + sequences * length
                break
            step, token = step + steps, token + steps * step_tokens
        self.steps, self.total = step, token

    def _phase(self, step: int) -> Phase:
        return self.phases[bisect_right(self.phases, step, key=lambda phase: phase.step) - 1]

    def tokens(self, step: int) -> int:
        """Tokens before `step`."""
        phase = self._phase(step)
        return min(phase.token + (step - phase.step) * phase.rows * phase.length, self.total)

    def rows(self, step: int) -> int:
        """Sequences of `step`; the last may have fewer."""
        return (self.tokens(step + 1) - self.tokens(step)) // self.length(step) if step < self.steps else 0

    def length(self, step: int) -> int:
        """Tokens in each sequence of `step`."""
        return self._phase(step).length

    def step_at(self, tokens: int) -> int:
        """The step that covers token `tokens`; `steps` at and after the end of the run."""
        if tokens >= self.total:
            return self.steps
        phase = self.phases[bisect_right(self.phases, tokens, key=lambda phase: phase.token) - 1]
        return phase.step + (tokens - phase.token) // (phase.rows * phase.length)


def size_changes(
    rows: int, length: int, total: int, *, batches: Sizes = (), lengths: Sizes = (), stages: Sizes = ()
) -> list[SizeChange]:
    """The changes for a BatchSchedule with batches of `rows` sequences of `length` tokens.

    `batches` and `lengths` are warm-ups: smaller sizes with the token until which each applies. `stages` are
    lengths with the token until which each applies. Raises UsageError if a warm-up is longer than the run, or
    does not increase.
    """
    for option, sizes, most in (("--batch-warmup", batches, rows), ("--length-warmup", lengths, length)):
        rising = [(0, 0), *sizes, (most, max(total, 1))]
        for (size, until), (larger, later) in zip(rising, rising[1:], strict=False):
            if until >= later and (size, until) != (0, 0):
                raise UsageError(
                    f"{option}: {until:,} tokens is not before {later:,}", "sizes and tokens must increase"
                )
            if size >= larger:
                raise UsageError(f"{option}: {size} is not below {larger}", "sizes and tokens must increase")
    points = sorted({0, *(until for sizes in (batches, lengths, stages) for _, until in sizes)})
    result = []
    for token in points:
        if token < total:
            stage_length = next((size for size, until in stages if token < until), length)
            new_length = min(stage_length, next((size for size, until in lengths if token < until), stage_length))
            new_rows = next((size for size, until in batches if token < until), rows)
            result.append((token, max(1, new_rows * length // new_length), new_length))
    return result


def parse_sizes(text: str | None, option: str) -> list[tuple[int, int]]:
    """Parse `8:1M,16:4M` as sizes with the token until which each applies; raises UsageError for any other form."""
    sizes = []
    for part in text.split(",") if text else []:
        size, _, until = part.strip().partition(":")
        try:
            sizes.append((int(size), parse_count(until)))
        except (ValueError, typer.BadParameter):
            raise UsageError(f"{option}: {part!r} is not a size with its tokens", "such as 8:1M,16:4M") from None
    if any(size < 1 for size, _ in sizes):
        raise UsageError(f"{option}: a size below 1", "such as 8:1M,16:4M")
    return sizes

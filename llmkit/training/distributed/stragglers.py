"""Processes that keep pace: which one is slow, and garbage collected by all at the same step.

A step takes as long as its slowest process, and the others' waiting hides in the sum of the gradients. So each process measures its own passes up
to that point (on a GPU with events, which are read when the step is over), divided by its rows; the seconds travel in an all-reduce that is made
anyway. Under FSDP the processes wait for each other inside of the passes too, and the spread comes out smaller than it is. Python's garbage
collector stops one process at a time for up to a second whenever it likes, and all the others with it; here it runs every `GARBAGE` steps.

    with collected(): ...
    figures, late = pace.step(step, seconds)    # {"slowest_rank": 3, "rank_spread": 1.4}, rank 3 or None
"""

from __future__ import annotations

import gc
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median_low

import torch

GARBAGE = 50  # steps between collections
WINDOW = 20  # steps over which processes are compared
LATE = 1.3  # times the median from which a process counts as late


class Stopwatch:
    """Seconds that a device takes between `start` and `stop`, a row; read without making the host wait before it has to."""

    def __init__(self, device: torch.device) -> None:
        self._marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else None
        self._times, self._rows = [0.0, 0.0], 0

    def start(self, rows: int) -> None:
        self._rows = rows
        self._mark(0)

    def stop(self) -> None:
        self._mark(1)

    def _mark(self, which: int) -> None:
        self._times[which] = time.perf_counter()
        if self._marks:
            self._marks[which].record()

    def seconds(self) -> float:
        """Seconds a row between the last `start` and `stop`; 0 without rows."""
        if not self._rows:
            return 0.0
        if self._marks:
            self._marks[1].synchronize()
            return float(self._marks[0].elapsed_time(self._marks[1])) / 1000 / self._rows
        return (self._times[1] - self._times[0]) / self._rows


class StragglerDetector:
    """Compares the processes over the last steps."""

    def __init__(self) -> None:
        self._steps: deque[Sequence[float]] = deque(maxlen=WINDOW)
        self._late: int | None = None

    def step(self, step: int, seconds: Sequence[float]) -> tuple[dict[str, float], int | None]:
        """Take in one step's seconds a row by rank; every WINDOW steps the figures for the log, and a rank that has become late."""
        self._steps.append(seconds)
        if step % WINDOW or len(self._steps) < WINDOW or len(seconds) < 2:
            return {}, None
        mean = [sum(column) / max(1, sum(s > 0 for s in column)) for column in zip(*self._steps, strict=True)]
        busy = [value for value in mean if value > 0]  # a process may have had no row at all
        slowest = max(range(len(mean)), key=mean.__getitem__)
        spread = mean[slowest] / median_low(busy) if busy else 1.0
        before, self._late = self._late, slowest if spread > LATE else None
        news = self._late if self._late != before else None
        return {"slowest_rank": slowest, "rank_spread": round(spread, 3)}, news


@contextmanager
def collected() -> Iterator[Callable[[int], None]]:
    """Python's own garbage collection is off inside; the function that is given collects at every GARBAGE-th step."""

    def collect(step: int) -> None:
        if step % GARBAGE == 0:
            gc.collect()

    was = gc.isenabled()
    gc.disable()
    gc.freeze()  # modules and the model are never garbage: looking through them each time would take longer than the rest
    try:
        yield collect
    finally:
        gc.unfreeze()
        if was:
            gc.enable()

"""Keeping processes in step: detecting a slow one, and collecting garbage at the same step everywhere.

A step takes as long as its slowest process, and the others' waiting time is hidden in the sum of the
gradients. So each process measures its own passes up to that point (on a GPU with events that are read after
the step), divided by its rows; the timings travel in an all-reduce that is made anyway. Under FSDP the
processes also wait for each other during the passes, so the measured spread is smaller than the true one.
Python's garbage collector stops a process for up to a second at arbitrary times, and all the others with it;
here it runs every `COLLECT_EVERY` steps.

    with scheduled_garbage_collection() as collect: ...
    metrics, straggler = detector.update(step, seconds_per_row)
    # {"slowest_rank": 3, "rank_spread": 1.4}, rank 3 or None
"""

from __future__ import annotations

import gc
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median_low

import torch

COLLECT_EVERY = 50  # steps between garbage collections
WINDOW = 20  # steps over which processes are compared
STRAGGLER_RATIO = 1.3  # time over the median above which a process counts as slow


class Stopwatch:
    """Seconds per row that a device takes between `start` and `stop`.

    The host waits for the device only when they are read.
    """

    def __init__(self, device: torch.device) -> None:
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else None
        self._times, self._rows = [0.0, 0.0], 0

    def start(self, rows: int) -> None:
        self._rows = rows
        self._mark(0)

    def stop(self) -> None:
        self._mark(1)

    def _mark(self, index: int) -> None:
        self._times[index] = time.perf_counter()
        if self._events:
            self._events[index].record()

    def seconds_per_row(self) -> float:
        """Seconds per row between the last `start` and `stop`; 0 without rows."""
        if not self._rows:
            return 0.0
        if self._events:
            self._events[1].synchronize()
            return float(self._events[0].elapsed_time(self._events[1])) / 1000 / self._rows
        return (self._times[1] - self._times[0]) / self._rows


class StragglerDetector:
    """Compares the speed of the processes over the last steps."""

    def __init__(self) -> None:
        self._steps: deque[Sequence[float]] = deque(maxlen=WINDOW)
        self._straggler: int | None = None

    def update(self, step: int, seconds_per_row: Sequence[float]) -> tuple[dict[str, float], int | None]:
        """Add one step's timings by rank.

        Every WINDOW steps returns metrics for the log, and the rank of a process that has become slow.
        """
        self._steps.append(seconds_per_row)
        if step % WINDOW or len(self._steps) < WINDOW or len(seconds_per_row) < 2:
            return {}, None
        mean = [sum(column) / max(1, sum(s > 0 for s in column)) for column in zip(*self._steps, strict=True)]
        busy = [value for value in mean if value > 0]  # a process may have had no rows at all
        slowest = max(range(len(mean)), key=mean.__getitem__)
        spread = mean[slowest] / median_low(busy) if busy else 1.0
        previous, self._straggler = self._straggler, slowest if spread > STRAGGLER_RATIO else None
        new_straggler = self._straggler if self._straggler != previous else None
        return {"slowest_rank": slowest, "rank_spread": round(spread, 3)}, new_straggler


@contextmanager
def scheduled_garbage_collection() -> Iterator[Callable[[int], None]]:
    """Turn Python's automatic garbage collection off.

    Yields a function of the step that collects at every COLLECT_EVERY-th one.
    """

    def collect(step: int) -> None:
        if step % COLLECT_EVERY == 0:
            gc.collect()

    was_enabled = gc.isenabled()
    gc.disable()
    gc.freeze()  # modules and the model are never garbage: traversing them each time would take longer than the rest
    try:
        yield collect
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()

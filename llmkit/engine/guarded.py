"""Ordered map in worker processes that may be killed: for work on hostile input, in libraries that nothing else interrupts.

    for results in guarded_map(work, batches, jobs=2, seconds=10.0):
        for result in results:             # one an item: what `work` returned, or a Failure
            ...

A worker notes in shared memory which item it is at and since when. One that stays at an item for longer than `seconds` is killed, as is one that the
system kills or that crashes; the item becomes a Failure, the others of its batch are done again by a new worker. The order of the results, and what
they are, does not depend on the number of workers. At most two batches a worker are held: being worked on, or finished and waiting for their turn.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from ctypes import Structure, c_double, c_long
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar

from llmkit.engine.local import start_worker

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an item has no result: `time limit`, `memory limit` or `crashed`."""

    reason: str


class _Place(Structure):
    """Where a worker is, in memory that the parent sees: number of the item in its batch, and since when (monotonic clock, s)."""

    _fields_ = (("item", c_long), ("since", c_double))


@dataclass(slots=True)
class _Job(Generic[Item, Result]):
    """A batch on its way. `todo` holds the numbers of the items that have no result yet."""

    items: Sequence[Item]
    results: list[Result | Failure | None]
    todo: list[int]

    @property
    def done(self) -> bool:
        return not self.todo


@dataclass(slots=True)
class _Worker:
    """A process, its pipe, where it is, and the job that it works on."""

    process: Any
    pipe: Connection
    place: Any
    job: _Job[Any, Any] | None = None
    died: bool = False

    def give(self, job: _Job[Any, Any]) -> bool:
        """Send a job; whether the worker was there to take it (the system may kill one that waits, too)."""
        self.job = job
        self.place.item, self.place.since = 0, time.monotonic()
        try:
            self.pipe.send([job.items[number] for number in job.todo])
        except (BrokenPipeError, ConnectionResetError):
            return False
        return True

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def guarded_map(
    work: Callable[[Item], Result],
    batches: Iterable[Sequence[Item]],
    *,
    jobs: int = 1,
    seconds: float,
    memory: int = 0,
) -> Iterator[list[Result | Failure]]:
    """`work` of each item of each batch, in order, by `jobs` forked processes.

    `memory` bounds what a worker may allocate beyond what it was forked with, in bytes (0: no bound; Linux only). An exception of `work` other than
    MemoryError ends the map and is raised here.
    """
    waiting: deque[_Job[Item, Result]] = deque()  # in the order of the batches
    again: deque[_Job[Item, Result]] = deque()  # half done when their worker was killed
    workers: list[_Worker] = []
    source = iter(batches)
    ended = False
    try:
        while True:
            for number in range(jobs):
                if number == len(workers):
                    workers.append(_start(work, memory))
                if workers[number].job is not None:
                    continue
                job: _Job[Item, Result]
                if again:
                    job = again.popleft()
                elif not ended and len(waiting) < 2 * jobs:
                    items = next(source, None)
                    if items is None:
                        ended = True
                        break
                    job = _Job(items, [None] * len(items), list(range(len(items))))
                    waiting.append(job)
                else:
                    continue
                while job.todo and not workers[number].give(job):
                    workers[number].stop()
                    workers[number] = _start(work, memory)
            while waiting and waiting[0].done:
                yield [result for result in waiting.popleft().results if result is not None]
            if not waiting and ended:
                return
            for number, worker in enumerate(workers):
                if _look_after(worker, seconds):
                    if worker.job is not None and not worker.job.done:
                        again.append(worker.job)
                    worker.stop()
                    workers[number] = _start(work, memory)
            busy = [worker for worker in workers if worker.job is not None]
            if busy:
                left = min(seconds - (time.monotonic() - worker.place.since) for worker in busy)
                for pipe in wait([worker.pipe for worker in busy], max(0.0, left) + 0.01):
                    _take(next(worker for worker in busy if worker.pipe is pipe))
    finally:
        for worker in workers:
            worker.stop()


def _start(work: Callable[[Any], Any], memory: int) -> _Worker:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    place = context.RawValue(_Place)
    process = context.Process(target=_serve, args=(work, theirs, place, memory), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours, place)


def _serve(work: Callable[[Any], Any], pipe: Connection, place: Any, memory: int) -> None:
    """The life of a worker: batches in, results out."""
    start_worker()
    if memory and sys.platform == "linux":
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * os.sysconf("SC_PAGESIZE")
        resource.setrlimit(resource.RLIMIT_AS, (used + memory, used + memory))
    while True:
        try:
            items = pipe.recv()
        except EOFError:
            return
        results: list[Any] = []
        error: BaseException | None = None
        for number, item in enumerate(items):
            place.since, place.item = time.monotonic(), number
            try:
                results.append(work(item))
            except MemoryError:
                results.append(Failure("memory limit"))
            except Exception as raised:
                error = raised
                break
        place.since = time.monotonic()
        pipe.send((results, error))


def _take(worker: _Worker) -> None:
    """Put the results that a worker sends where they belong; a worker that died is left to `_look_after`."""
    assert worker.job is not None
    try:
        results, error = worker.pipe.recv()
    except (EOFError, ConnectionResetError):
        worker.died = True
        return
    if error is not None:
        raise error
    for number, result in zip(worker.job.todo, results, strict=True):
        worker.job.results[number] = result
    worker.job.todo, worker.job = [], None


def _look_after(worker: _Worker, seconds: float) -> bool:
    """Whether a worker has to be replaced, having noted a Failure for the item that it was at."""
    if worker.job is None:
        return False
    late = time.monotonic() - worker.place.since > seconds
    if not worker.died and (not late or worker.pipe.poll()):
        return False
    worker.process.kill()
    number = worker.job.todo.pop(min(worker.place.item, len(worker.job.todo) - 1))
    worker.job.results[number] = Failure("crashed" if worker.died else "time limit")
    return True

"""Ordered map in worker processes that may be killed, for libraries that hostile input can hang or crash.

    for results in guarded_map(work, batches, jobs=2, seconds=10.0):
        for result in results:             # one per item: the return value of `work`, or a Failure
            ...

A worker records in shared memory which item it is processing and since when. It is killed if an item takes longer than
`seconds`. When a worker is killed, by this module or by the system, or crashes, the item becomes a Failure and a new
worker processes the remaining items of the batch. The results and their order do not depend on the number of workers.
At most two batches per worker are held: in progress, or finished and waiting for their turn.
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

from llmkit.engine.local import deferred_signals, init_worker

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an item has no result: `time limit`, `memory limit` or `crashed`."""

    reason: str


class _Position(Structure):
    """A worker's position, in memory shared with the parent: index of its item, start time (monotonic, s)."""

    _fields_ = (("item", c_long), ("since", c_double))


@dataclass(slots=True)
class _Batch(Generic[Item, Result]):
    """A batch in progress. `todo` holds the indices of the items that have no result yet."""

    items: Sequence[Item]
    results: list[Result | Failure | None]
    todo: list[int]

    @property
    def done(self) -> bool:
        return not self.todo


@dataclass(slots=True)
class _Worker:
    """A process, its pipe, its position, and the batch that it is processing."""

    process: Any
    pipe: Connection
    position: Any
    batch: _Batch[Any, Any] | None = None
    died: bool = False

    def send(self, batch: _Batch[Any, Any]) -> bool:
        """Send a batch. Returns whether the worker was alive to take it: the system may also kill an idle worker."""
        self.batch = batch
        self.position.item, self.position.since = 0, time.monotonic()
        try:
            self.pipe.send([batch.items[index] for index in batch.todo])
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
    """`work` applied to each item of each batch, in order, by `jobs` forked processes.

    `memory` limits what a worker may allocate beyond its size at the fork, in bytes (0: no limit; Linux only).
    An exception in `work` other than MemoryError ends the map and is raised here.
    """
    pending: deque[_Batch[Item, Result]] = deque()  # in order
    retries: deque[_Batch[Item, Result]] = deque()  # partly done when their worker was killed
    workers: list[_Worker] = []
    source = iter(batches)
    exhausted = False
    try:
        while True:
            for number in range(jobs):
                if number == len(workers):
                    workers.append(_start(work, memory))
                if workers[number].batch is not None:
                    continue
                batch: _Batch[Item, Result]
                if retries:
                    batch = retries.popleft()
                elif not exhausted and len(pending) < 2 * jobs:
                    items = next(source, None)
                    if items is None:
                        exhausted = True
                        break
                    batch = _Batch(items, [None] * len(items), list(range(len(items))))
                    pending.append(batch)
                else:
                    continue
                while batch.todo and not workers[number].send(batch):
                    workers[number].stop()
                    workers[number] = _start(work, memory)
            while pending and pending[0].done:
                yield [result for result in pending.popleft().results if result is not None]
            if not pending and exhausted:
                return
            for number, worker in enumerate(workers):
                if _kill_if_failed(worker, seconds):
                    if worker.batch is not None and not worker.batch.done:
                        retries.append(worker.batch)
                    worker.stop()
                    workers[number] = _start(work, memory)
            busy = [worker for worker in workers if worker.batch is not None]
            if busy:
                remaining = min(seconds - (time.monotonic() - worker.position.since) for worker in busy)
                for pipe in wait([worker.pipe for worker in busy], max(0.0, remaining) + 0.01):
                    _receive(next(worker for worker in busy if worker.pipe is pipe))
    finally:
        for worker in workers:
            worker.stop()


def _start(work: Callable[[Any], Any], memory: int) -> _Worker:
    context = multiprocessing.get_context("fork")
    parent_end, worker_end = context.Pipe()
    position = context.RawValue(_Position)
    process = context.Process(target=_serve, args=(work, worker_end, position, memory), daemon=True)
    with deferred_signals():
        process.start()
    worker_end.close()
    return _Worker(process, parent_end, position)


def _serve(work: Callable[[Any], Any], pipe: Connection, position: Any, memory: int) -> None:
    """Main loop of a worker: receive batches, send results."""
    init_worker()
    if memory and sys.platform == "linux":
        with open("/proc/self/statm", encoding="utf-8") as file:
            used = int(file.read().split()[0]) * os.sysconf("SC_PAGESIZE")
        resource.setrlimit(resource.RLIMIT_AS, (used + memory, used + memory))
    while True:
        try:
            items = pipe.recv()
        except EOFError:
            return
        results: list[Any] = []
        error: BaseException | None = None
        for index, item in enumerate(items):
            position.since, position.item = time.monotonic(), index
            try:
                results.append(work(item))
            except MemoryError:
                results.append(Failure("memory limit"))
            except Exception as raised:
                error = raised
                break
        position.since = time.monotonic()
        pipe.send((results, error))


def _receive(worker: _Worker) -> None:
    """Store the results that a worker sends. A worker that died is left to `_kill_if_failed`."""
    assert worker.batch is not None
    try:
        results, error = worker.pipe.recv()
    except (EOFError, ConnectionResetError):
        worker.died = True
        return
    if error is not None:
        raise error
    for index, result in zip(worker.batch.todo, results, strict=True):
        worker.batch.results[index] = result
    worker.batch.todo, worker.batch = [], None


def _kill_if_failed(worker: _Worker, seconds: float) -> bool:
    """Kill a worker that died or exceeded the time limit and record a Failure for its item. Returns whether it was."""
    if worker.batch is None:
        return False
    late = time.monotonic() - worker.position.since > seconds
    if not worker.died and (not late or worker.pipe.poll()):
        return False
    worker.process.kill()
    index = worker.batch.todo.pop(min(worker.position.item, len(worker.batch.todo) - 1))
    worker.batch.results[index] = Failure("crashed" if worker.died else "time limit")
    return True

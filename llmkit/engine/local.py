"""Ordered map over chunks of work in local processes.

    for result in ordered_map(work, chunks, jobs=8):
        ...

Results are returned in the order of the items, whichever finishes first, so the output is the same for any number of
jobs. Memory is bounded: at most three items per worker are in flight. With one job, everything runs in this process.
Workers are forked, so `work` may be any callable and shares what the parent has loaded and compiled. An exception in a
worker ends the map and is raised in the parent.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from llmkit.engine.isolation import Isolated
from llmkit.errors import LlmkitError
from llmkit.io.documents import Chunk, DocumentReader

Item = TypeVar("Item")
Result = TypeVar("Result")

IN_FLIGHT = 3  # items per worker: one in progress, one queued, one result not yet taken

_work: Callable[[Any], Any] | None = None


class Engine(Protocol):
    """Maps a function over chunks of documents: `Local`, or `Cluster` in engine.cluster, with the same results."""

    def map(self, work: Callable[[Chunk], Result], reader: DocumentReader) -> Iterator[Result]:
        """`work` applied to each chunk of a reader, in order; documents at which it fails are bad lines."""
        ...


@dataclass(frozen=True, slots=True)
class Local:
    """An engine of `jobs` processes on this machine."""

    jobs: int = 1

    def map(self, work: Callable[[Chunk], Result], reader: DocumentReader) -> Iterator[Result]:
        """`work` applied to each chunk of a reader, in order."""
        return ordered_map(Isolated(work), reader.chunks(), self.jobs)


def ordered_map(work: Callable[[Item], Result], items: Iterable[Item], jobs: int = 1) -> Iterator[Result]:
    """`work` applied to each item, in order, by `jobs` forked processes (1: in this process)."""
    if jobs <= 1:
        yield from map(work, items)
        return
    global _work
    _work = work  # passed to the workers by fork, not by pickle
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("fork"), initializer=init_worker)
    pending: deque[Future[Result]] = deque()
    try:
        for item in items:
            with deferred_signals():
                pending.append(pool.submit(_call, item))
            if len(pending) >= jobs * IN_FLIGHT:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise LlmkitError("a worker process was killed", "probably out of memory: use fewer jobs (-j)") from error
    except BaseException:
        # An interrupted pool may fail to deliver its stop message to idle workers. It waits for the rest of a result
        # that a killed worker was sending, until no other process can write to that pipe.
        for process in list((pool._processes or {}).values()):
            process.kill()
        pool._result_queue._writer.close()  # type: ignore[attr-defined]
        raise
    finally:
        _work = None
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def background_process(work: Callable[[], object]) -> Iterator[None]:
    """Run `work` in a forked process while the block runs; kill it at the end of the block. Its errors are ignored."""
    process = multiprocessing.get_context("fork").Process(target=_run_quietly, args=(work,), daemon=True)
    with deferred_signals():
        process.start()
    try:
        yield
    finally:
        process.kill()
        process.join()


@contextmanager
def deferred_signals() -> Iterator[None]:
    """Let a signal take effect after the block. Within a fork Python drops its exception, or it leaves a worker that
    nobody ends."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    handlers = {number: handler for number, handler in handlers.items() if callable(handler)}
    for number in handlers:
        signal.signal(number, lambda number, frame: arrived.append(number))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if arrived:
            signal.raise_signal(arrived[0])


def _run_quietly(work: Callable[[], object]) -> None:
    init_worker()
    with suppress(Exception):
        work()


def _call(item: Any) -> Any:
    assert _work is not None
    return _work(item)


def init_worker() -> None:
    """Set up a worker process: the parent handles Ctrl-C, SIGHUP and SIGTERM, and the worker dies with its parent."""
    for number in (signal.SIGINT, signal.SIGHUP):  # which a terminal sends to all processes
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    die_with_parent()


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends, even by kill -9 (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG

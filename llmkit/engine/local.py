"""Ordered map over chunks of work in local processes.

    for result in ordered_map(work, chunks, jobs=8):
        ...

Results come in the order of the items, whatever finishes first, so that the output is the same for any number of jobs. At most three items a
worker are in flight, which bounds memory. With one job everything runs in this process. Workers are forked, so `work` may be any callable and
sees what the parent had loaded and compiled; an exception in one ends the map and is raised here.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from llmkit.errors import LlmkitError
from llmkit.io.documents import Chunk, DocumentReader

Item = TypeVar("Item")
Result = TypeVar("Result")

IN_FLIGHT = 3  # items a worker: one being worked on, one waiting, one result not yet taken

_work: Callable[[Any], Any] | None = None


class Engine(Protocol):
    """Where the chunks of documents are worked on: `Local` or engine.cluster's `Cluster`, with the same results."""

    def map(self, work: Callable[[Chunk], Result], reader: DocumentReader) -> Iterator[Result]:
        """`work` of each chunk of a reader, in order."""
        ...


@dataclass(frozen=True, slots=True)
class Local:
    """`jobs` processes of this machine."""

    jobs: int = 1

    def map(self, work: Callable[[Chunk], Result], reader: DocumentReader) -> Iterator[Result]:
        """`work` of each chunk of a reader, in order."""
        return ordered_map(work, reader.chunks(), self.jobs)


def ordered_map(work: Callable[[Item], Result], items: Iterable[Item], jobs: int = 1) -> Iterator[Result]:
    """`work` of each item, in order, computed by `jobs` forked processes (1: by this one)."""
    if jobs <= 1:
        yield from map(work, items)
        return
    global _work
    _work = work  # handed to the workers by fork, not by pickle
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("fork"), initializer=start_worker)
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(_call, item))
            if len(waiting) >= jobs * IN_FLIGHT:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise LlmkitError("a worker process was killed", "probably out of memory: give fewer jobs (-j)") from error
    except BaseException:
        # An interrupted pool may never get its message to stop to workers that wait for work.
        for process in list((pool._processes or {}).values()):
            process.kill()
        raise
    finally:
        _work = None
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def meanwhile(work: Callable[[], object]) -> Iterator[None]:
    """`work` in a forked process while the block runs, and no longer."""
    process = multiprocessing.get_context("fork").Process(target=_quietly, args=(work,), daemon=True)
    process.start()
    try:
        yield
    finally:
        process.kill()
        process.join()


def _quietly(work: Callable[[], object]) -> None:
    start_worker()
    with suppress(Exception):
        work()


def _call(item: Any) -> Any:
    assert _work is not None
    return _work(item)


def start_worker() -> None:
    """Ctrl-C and SIGTERM are the parent's to handle; a worker dies with its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    die_with_parent()


def die_with_parent() -> None:
    """This process ends when the one that started it does, even after kill -9 (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG

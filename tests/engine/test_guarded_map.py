"""The map in worker processes that may be killed."""

from __future__ import annotations

import multiprocessing
import os
import time

import pytest

from llmkit.engine.guarded import Failure, guarded_map


def work(x: int) -> int:
    if x == 13:
        time.sleep(60)
    if x == 17:
        os._exit(3)
    if x == 19:
        bytearray(1 << 40)
    return x * x


@pytest.mark.parametrize("jobs", [1, 3])
def test_failures_are_named_and_other_items_completed(jobs: int) -> None:
    """Behaviour: results in order; items that hang, crash or exhaust memory are failures."""
    batches = [list(range(start, start + 5)) for start in range(0, 30, 5)]
    results = [result for batch in guarded_map(work, batches, jobs=jobs, seconds=2, memory=1 << 28) for result in batch]
    failures = {13: Failure("time limit"), 17: Failure("crashed"), 19: Failure("memory limit")}
    assert results == [failures.get(x, x * x) for x in range(30)]


def test_an_exception_ends_the_map() -> None:
    """Behaviour: an exception in `work` is raised in the parent."""
    with pytest.raises(ZeroDivisionError):
        list(guarded_map(lambda x: 1 // x, [[1, 0]], jobs=2, seconds=5))


def test_no_batches_and_empty_batches() -> None:
    """Behaviour: without batches there are no results; a batch without items has an empty list."""
    assert list(guarded_map(work, [], seconds=5)) == []
    assert list(guarded_map(work, [[], [2], []], jobs=2, seconds=5)) == [[], [4], []]


def test_input_is_consumed_lazily() -> None:
    """Behaviour: an endless input is read no further than needed."""
    taken = 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield [1]

    results = guarded_map(work, endless(), jobs=2, seconds=5)
    for _ in range(5):
        next(results)
    results.close()
    assert taken <= 5 + 2 * 2 + 2


def test_a_worker_killed_while_idle_is_replaced() -> None:
    """Behaviour: no item fails, and the closed pipe to the worker is not mistaken for a closed stdout."""

    def batches():
        yield [os.getpid()]
        for child in multiprocessing.active_children():
            child.kill()
            child.join()
        yield [2]

    assert list(guarded_map(lambda x: x, batches(), jobs=1, seconds=5)) == [[os.getpid()], [2]]

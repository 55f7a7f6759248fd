"""The map whose workers may be killed."""

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
def test_what_hangs_or_crashes_is_named_and_the_rest_is_done(jobs: int) -> None:
    """Behaviour: results in order; an item that takes too long, one that crashes, and one that asks for too much memory are failures."""
    batches = [list(range(start, start + 5)) for start in range(0, 30, 5)]
    found = [
        result for results in guarded_map(work, batches, jobs=jobs, seconds=2, memory=1 << 28) for result in results
    ]
    bad = {13: Failure("time limit"), 17: Failure("crashed"), 19: Failure("memory limit")}
    assert found == [bad.get(x, x * x) for x in range(30)]


def test_an_exception_ends_the_map() -> None:
    """Behaviour: what `work` raises is raised here."""
    with pytest.raises(ZeroDivisionError):
        list(guarded_map(lambda x: 1 // x, [[1, 0]], jobs=2, seconds=5))


def test_nothing_and_empty_batches() -> None:
    """Behaviour: no batch, and batches without items, give what they hold."""
    assert list(guarded_map(work, [], seconds=5)) == []
    assert list(guarded_map(work, [[], [2], []], jobs=2, seconds=5)) == [[], [4], []]


def test_items_are_taken_as_they_are_needed() -> None:
    """Behaviour: an endless input is not swallowed."""
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


def test_a_worker_killed_while_it_waits_is_replaced() -> None:
    """Behaviour: no item is blamed for it, and a closed pipe to a worker is not taken for a closed stdout."""

    def batches():
        yield [os.getpid()]
        for child in multiprocessing.active_children():
            child.kill()
            child.join()
        yield [2]

    assert list(guarded_map(lambda x: x, batches(), jobs=1, seconds=5)) == [[os.getpid()], [2]]

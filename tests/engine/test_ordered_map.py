"""The ordered process map."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from waiting import wait_until

from llmkit.engine.local import background_process, ordered_map
from llmkit.errors import LlmkitError


def slow_square(x: int) -> int:
    time.sleep(random.random() / 500)
    return x * x


@pytest.mark.parametrize("jobs", [1, 2, 3])
def test_results_come_in_order(jobs: int) -> None:
    """Property: the results are those of map, in its order, for any number of jobs."""
    assert list(ordered_map(slow_square, range(200), jobs)) == [x * x for x in range(200)]


def test_input_is_consumed_lazily() -> None:
    """Behaviour: an endless input is read no further than three items in flight per worker."""
    taken = 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield taken

    results = ordered_map(slow_square, endless(), 2)
    for _ in range(5):
        next(results)
    results.close()
    assert taken <= 5 + 2 * 3


def test_closures_work_without_pickling() -> None:
    """Behaviour: the function is inherited by fork, so a lambda over local data works."""
    table = {i: i + 1 for i in range(10)}
    assert list(ordered_map(lambda i: table[i], range(10), 2)) == list(range(1, 11))


def test_an_error_in_a_worker_is_raised_in_the_parent() -> None:
    """Behaviour: LlmkitError keeps message and hint across the process boundary."""

    def fail(x: int) -> int:
        if x == 3:
            raise LlmkitError("bad item", "a hint")
        return x

    with pytest.raises(LlmkitError) as caught:
        list(ordered_map(fail, range(10), 2))
    assert (caught.value.message, caught.value.hint) == ("bad item", "a hint")


def test_signals_wait_for_a_fork() -> None:
    """Behaviour: Ctrl-C in the middle of starting a worker takes effect after it, so that the worker is known and ended;
    raised within the fork it would be dropped."""
    others = {*multiprocessing.active_children()}  # of what other tests have loaded
    started = []
    hooks = {"after_in_parent": lambda: started.append(signal.raise_signal(signal.SIGINT)) if not started else None}
    os.register_at_fork(**hooks)
    with pytest.raises(KeyboardInterrupt):
        list(ordered_map(slow_square, range(10), 2))
    deadline = time.monotonic() + 30
    while not {*multiprocessing.active_children()} <= others and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(started) == 1 and {*multiprocessing.active_children()} <= others


@pytest.mark.timeout(60)
def test_an_error_while_a_result_is_sent_is_not_a_hang() -> None:
    """Behaviour: an error ends the map although a worker is killed in the middle of sending its result."""

    def work(x: int) -> int:
        def send_half(self: Connection, data: Any) -> None:
            self._send(len(data).to_bytes(4, "big"))  # type: ignore[attr-defined]
            time.sleep(60)

        Connection._send_bytes = send_half  # type: ignore[attr-defined]
        return x

    def items() -> Iterator[int]:
        yield 0
        time.sleep(1)
        raise LlmkitError("bad line")

    with pytest.raises(LlmkitError, match="bad line"):
        list(ordered_map(work, items(), 2))


def test_a_killed_worker_is_an_error_not_a_hang() -> None:
    """Behaviour: a worker killed by the kernel (out of memory) ends the run with a clear message."""

    def die(x: int) -> int:
        if x == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return x

    with pytest.raises(LlmkitError, match="killed"):
        list(ordered_map(die, range(10), 2))


def test_background_process_ends_with_its_block(tmp_path: Path) -> None:
    """Behaviour: the work runs while the block does, its errors are ignored, and no process remains afterwards."""
    others = set(multiprocessing.active_children())
    with background_process(lambda: (tmp_path / "done").touch()):
        wait_until((tmp_path / "done").exists)
    with background_process(lambda: time.sleep(600)):
        pass
    with background_process(lambda: 1 // 0):
        pass
    assert not set(multiprocessing.active_children()) - others

"""Waiting for another thread or process: until a condition holds, not for a fixed time, which a busy machine exceeds."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable


def wait_until(
    condition: Callable[[], object], process: subprocess.Popen[bytes] | None = None, seconds: float = 400.0
) -> None:
    """Return once `condition` holds; fail after `seconds`, or as soon as `process` has ended without it."""
    deadline = time.monotonic() + seconds
    while not condition():
        if process is not None and process.poll() is not None and not condition():
            said = process.stderr.read().decode() if process.stderr else ""
            raise AssertionError(f"the process ended with exit code {process.returncode} first\n{said}")
        assert time.monotonic() < deadline, f"not within {seconds:g} s"
        time.sleep(0.01)


def wait_for_thread(name: str, seconds: float = 400.0) -> None:
    """Return once no thread of this name is running."""
    for thread in threading.enumerate():
        if thread.name == name:
            thread.join(seconds)
            assert not thread.is_alive(), f"the thread {name!r} is running after {seconds:g} s"

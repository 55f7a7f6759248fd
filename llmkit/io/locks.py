"""Advisory locks between runs: flock(2) on a file, released by the kernel even after kill -9."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmkit.errors import LockedError


@contextmanager
def lock(path: str | Path) -> Iterator[None]:
    """Hold the lock file `path` (created if missing). LockedError (exit code 75) where another run holds it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LockedError(f"{path} is locked by another run", "wait for it to end") from None
        yield
    finally:
        os.close(descriptor)

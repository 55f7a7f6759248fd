"""Signals that a run notes instead of obeying them: SIGTERM and SIGINT end it with a checkpoint, SIGUSR1 asks for one.

with watch_signals() as signals:
    with signals.breaking(alone=True):     # forward and backward passes, compilation, evaluation: nothing in it lasts
        ...
    if signals.number: ...
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from llmkit.errors import Terminated


class Interrupted(BaseException):
    """A signal came in the middle of what may be dropped."""


@dataclass(slots=True)
class Signals:
    """The first SIGTERM or SIGINT that arrived (0: none), and whether SIGUSR1 asks for a checkpoint."""

    number: int = 0
    save: bool = False
    breakable: bool = False
    own: bool = False  # this process got a SIGTERM or SIGINT itself

    def raise_it(self) -> None:
        """Let the signal take its course."""
        raise KeyboardInterrupt if self.number == signal.SIGINT else Terminated

    @contextmanager
    def breaking(self, alone: bool) -> Iterator[None]:
        """What runs in this block changes nothing that lasts: a signal ends it at once, where no other process waits for it."""
        self.breakable = alone
        try:
            if alone and self.number:
                raise Interrupted
            yield
        finally:
            self.breakable = False


@contextmanager
def watch_signals() -> Iterator[Signals]:
    """Note SIGTERM, SIGINT and SIGUSR1 instead of obeying them; a second SIGTERM or SIGINT is obeyed. Only the main thread can do this."""
    signals = Signals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return

    def note(number: int, frame: object) -> None:
        if number == signal.SIGUSR1:
            signals.save = True
            return
        if signals.own:  # `number` may have come from another process, which got the same signal a moment before
            signals.raise_it()
        signals.number, signals.own = number, True
        if signals.breakable:
            signals.breakable = False
            raise Interrupted

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})  # blocked until there is a handler
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # nothing is left to save: no reason to die of it

"""Signals that a run handles at its own pace: SIGTERM, SIGINT and SIGHUP end it with a checkpoint, SIGUSR1 requests
a checkpoint.

with watch_signals() as signals:
    with signals.interruptible(alone=True):     # passes, compilation, evaluation: no lasting effects
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
    """A signal arrived during work that may be abandoned."""


@dataclass(slots=True)
class Signals:
    """The first SIGTERM, SIGINT or SIGHUP that arrived (0: none), and whether SIGUSR1 requested a checkpoint."""

    number: int = 0
    save: bool = False
    may_interrupt: bool = False
    received_here: bool = False  # this process itself received one

    def raise_received(self) -> None:
        """Let the received signal take effect."""
        raise KeyboardInterrupt if self.number == signal.SIGINT else Terminated(self.number)

    @contextmanager
    def interruptible(self, alone: bool) -> Iterator[None]:
        """A block without lasting effects: a signal ends it at once with Interrupted, provided that no other
        process waits for this one."""
        self.may_interrupt = alone
        try:
            if alone and self.number:
                raise Interrupted
            yield
        finally:
            self.may_interrupt = False


@contextmanager
def watch_signals() -> Iterator[Signals]:
    """Record SIGTERM, SIGINT, SIGHUP and SIGUSR1 instead of obeying them; a second one of the first three is obeyed.

    An ignored SIGHUP stays ignored, as under nohup. Does nothing outside the main thread.
    """
    signals = Signals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return

    def handle(number: int, frame: object) -> None:
        if number == signal.SIGUSR1:
            signals.save = True
            return
        if (
            signals.received_here
        ):  # `number` may have come from another process, which got the same signal a moment before
            signals.raise_received()
        signals.number, signals.received_here = number, True
        if signals.may_interrupt:
            signals.may_interrupt = False
            raise Interrupted

    numbers = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1}
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        numbers.remove(signal.SIGHUP)
    previous = {number: signal.signal(number, handle) for number in numbers}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})  # it was blocked until there was a handler
    try:
        yield signals
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # nothing is left to save, and no reason to die of it

"""A watch-dog for processes that hang: it names the one that does, with its stack, and ends the process, so that the run can go on.

One process that hangs (a dead disk, a driver, a stopped process) makes all the others wait in their next collective. So every process counts its
passes and the collectives it has entered, and a thread publishes the counts in the group's store. Who has made no progress for `timeout` seconds
looks at the others: hung are those whose thread is silent too, else those that are behind in collectives. A hung process whose thread lives
reports itself, with its stack; one that is silent is named by another, which on the same machine makes it show its stack and kills it. The process
then ends with `ExitCode.LOST`, which `--max-restarts` answers with a new group; the run directory is never in danger: checkpoints are atomic.

    watchdog = Watchdog(rank=1, count=2, timeout=1800.0, event=directory.event)
    watchdog.start()
    watchdog.beat()      # a pass is done
    watchdog.meet()      # about to wait for the others

A group whose launcher was killed would hold the run, and nobody could stop it: each of its processes then sends itself SIGTERM.

Cost: a wake-up and one small message every 2 s, or every twentieth of the timeout.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from llmkit.errors import ExitCode

FRAMES = 12  # of the stack, in the event
LONGEST_PERIOD = 2.0
SHOW_STACK = signal.SIGUSR2
STACK_SECONDS = 0.5  # what a process gets to write its stack


@dataclass(slots=True)
class Sight:
    """What is known of a process: its counts, and since when they and its sign of life are what they are."""

    counts: tuple[int, ...] = ()
    sign: str = ""
    where: tuple[str, int] = ("", 0)  # host and process id
    counted: float = field(default_factory=time.monotonic)
    signed: float = field(default_factory=time.monotonic)


class Watchdog:
    """Watches this process, and with it its group. `event(name, **details)` writes a line of events.jsonl."""

    def __init__(self, rank: int, count: int, timeout: float, event: Callable[..., None]) -> None:
        self._rank, self._count, self.timeout, self._event = rank, count, timeout, event
        self._meetings = self._beats = self._signs = 0
        self.patient = False  # something takes as long as it likes
        self._last = time.monotonic()
        self._period = min(timeout / 20, LONGEST_PERIOD)
        self._sights = [Sight() for _ in range(count)]
        self._ended = threading.Event()
        self._parent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._store: Any = None
        self._key = (
            f"watchdog-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"  # a store outlives the group under torchrun
        )

    def beat(self) -> None:
        """This process has got on."""
        self._beats += 1
        self._last = time.monotonic()

    def meet(self) -> None:
        """This process enters a collective, as all do in the same order."""
        self._meetings += 1
        self.beat()

    def start(self) -> None:
        """Begin to watch."""
        self._store = _connect(self._count, self._period)
        faulthandler.register(SHOW_STACK, file=2, all_threads=True)
        self._last = time.monotonic()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def stop(self) -> None:
        """Watch no longer."""
        self._ended.set()
        faulthandler.unregister(SHOW_STACK)

    def _watch(self) -> None:
        while not self._ended.wait(self._period):
            if self.patient:
                self.beat()
            self._publish()
            if self._parent not in (None, os.getppid()):
                self._parent = None
                os.kill(os.getpid(), signal.SIGTERM)
            silent = time.monotonic() - self._last
            if silent < self.timeout / 2:
                continue
            self._look()
            hung = self._hung() if silent >= self.timeout else []
            # A hung process that is awake reports itself, with its stack: it is given the time to.
            if hung and (self._rank in hung or self._asleep(hung) or silent >= self.timeout + 3 * self._period):
                self._report(hung)

    def _publish(self) -> None:
        self._signs += 1
        text = f"{self._meetings} {self._beats} {self._signs} {os.getpid()} {socket.gethostname()}"
        if self._store is not None:
            with suppress(RuntimeError):
                self._store.set(f"{self._key}/{self._rank}", text)
        self._see(self._rank, text)

    def _look(self) -> None:
        """Read what the others have published; a store that does not answer leaves them as they were seen last."""
        for rank in range(self._count) if self._store is not None else ():
            with suppress(RuntimeError):
                if rank != self._rank and self._store.check([f"{self._key}/{rank}"]):
                    self._see(rank, self._store.get(f"{self._key}/{rank}").decode())

    def _see(self, rank: int, text: str) -> None:
        meetings, beats, sign, process, host = text.split(" ", 4)
        sight, now = self._sights[rank], time.monotonic()
        if sight.counts != (int(meetings), int(beats)):
            sight.counts, sight.counted = (int(meetings), int(beats)), now
        if sight.sign != sign:
            sight.sign, sight.signed = sign, now
        sight.where = (host, int(process))

    def _asleep(self, ranks: list[int]) -> bool:
        """Whether none of these processes gives signs of life."""
        return all(time.monotonic() - self._sights[rank].signed > self.timeout / 4 for rank in ranks)

    def _hung(self) -> list[int]:
        """The processes that the others wait for; none while one of them gets on."""
        if self._store is None:
            return [self._rank]
        silent = [rank for rank in range(self._count) if rank != self._rank and self._asleep([rank])]
        least = min(sight.counts[:1] for sight in self._sights)
        hung = silent or [rank for rank in range(self._count) if self._sights[rank].counts[:1] == least]
        moving = any(time.monotonic() - self._sights[rank].counted < self.timeout / 2 for rank in hung)
        return [] if moving else hung

    def _report(self, hung: list[int]) -> None:
        """Say who hangs, and end this process; a hung one that says nothing itself is killed."""
        names = "rank " + ", ".join(map(str, hung))
        line = f"{names} made no progress for {self.timeout:g} s"
        stack = [] if self._rank not in hung else _main_stack()
        first = True
        with suppress(RuntimeError):
            first = self._store is None or self._store.add(f"{self._key}/reported", 1) == 1
        with suppress(OSError):
            if first:
                self._event("hang", ranks=hung, seconds=self.timeout, reported_by=self._rank, stack=stack)
        with suppress(OSError):
            print(f"llmkit: error: {line}" + (f" ({stack[-1]})" if stack else ""), file=sys.stderr, flush=True)
            if stack:
                faulthandler.dump_traceback(file=2, all_threads=True)
            print(
                "hint: go on with --resume; --max-restarts does so by itself; --hang-timeout is the limit",
                file=sys.stderr,
            )
        for rank in hung:
            host, process = self._sights[rank].where
            if rank != self._rank and process and host == socket.gethostname():
                with suppress(OSError):
                    for number in (SHOW_STACK, signal.SIGCONT):  # a stopped process shows it when it runs again
                        os.kill(process, number)
                    time.sleep(STACK_SECONDS)
                    os.kill(process, signal.SIGKILL)
        os._exit(ExitCode.LOST)


def _connect(count: int, period: float) -> Any:
    """A connection of its own to the group's store; None without one (a single process, MPI)."""
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "")
    if count == 1 or not host or not port.isdigit():
        return None
    with suppress(RuntimeError):
        seconds = timedelta(seconds=max(5.0, period))
        return dist.TCPStore(host, int(port), is_master=False, wait_for_workers=False, timeout=seconds)
    return None


def _main_stack() -> list[str]:
    """Where the main thread is, innermost last."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return [f"{Path(f.filename).name}:{f.lineno} in {f.name}" for f in traceback.extract_stack(frame)[-FRAMES:]]

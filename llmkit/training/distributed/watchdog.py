"""A watchdog for hanging processes: it identifies the one that hangs, logs its stack, and ends the processes, so
that the run can resume.

One process that hangs (a dead disk, a driver, a stopped process) makes all others wait in their next
collective. So every process counts its passes and the collectives it has entered, and a thread publishes the
counts in the group's store. A process without progress for `timeout` seconds examines the others: hung are
those whose thread is silent too, otherwise those that are behind in collectives. A hung process whose thread
is alive reports itself, with its stack; a silent one is reported by another process, which on the same
machine makes it print its stack and kills it. The process then ends with `ExitCode.LOST`, to which
`--max-restarts` responds with a new group. The run directory is never at risk, since checkpoints are atomic.

    watchdog = Watchdog(rank=1, count=2, timeout=1800.0, event=directory.event)
    watchdog.start()
    watchdog.heartbeat()            # a pass is done
    watchdog.enter_collective()     # about to wait for the others

A group whose launcher was killed would keep the run locked with nobody to stop it: each of its processes then
sends itself SIGTERM.

Cost: one wake-up and one small message every 2 s, or every twentieth of the timeout if that is shorter.
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
MAX_PERIOD = 2.0  # seconds between messages
PRINT_STACK = signal.SIGUSR2
STACK_SECONDS = 0.5  # time a process gets to print its stack


@dataclass(slots=True)
class PeerStatus:
    """The last known counts and message number of a process, and when each last changed."""

    counts: tuple[int, ...] = ()  # collectives and heartbeats
    message: str = ""
    location: tuple[str, int] = ("", 0)  # host and process id
    counts_changed: float = field(default_factory=time.monotonic)
    message_changed: float = field(default_factory=time.monotonic)


class Watchdog:
    """Watches this process, and with it its group. `event(name, **details)` writes a line of events.jsonl."""

    def __init__(self, rank: int, count: int, timeout: float, event: Callable[..., None]) -> None:
        self._rank, self._count, self.timeout, self._event = rank, count, timeout, event
        self._collectives = self._heartbeats = self._messages = 0
        self.suspended = False  # during work that may take arbitrarily long
        self._last_progress = time.monotonic()
        self._period = min(timeout / 20, MAX_PERIOD)
        self._peers = [PeerStatus() for _ in range(count)]
        self._ended = threading.Event()
        self._parent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._store: Any = None
        # Under torchrun a store outlives the group.
        self._key = f"watchdog-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"

    def heartbeat(self) -> None:
        """This process has made progress."""
        self._heartbeats += 1
        self._last_progress = time.monotonic()

    def enter_collective(self) -> None:
        """This process enters a collective; all processes enter them in the same order."""
        self._collectives += 1
        self.heartbeat()

    def start(self) -> None:
        """Start watching."""
        self._store = _connect(self._count, self._period)
        faulthandler.register(PRINT_STACK, file=2, all_threads=True)
        self._last_progress = time.monotonic()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def stop(self) -> None:
        """Stop watching."""
        self._ended.set()
        faulthandler.unregister(PRINT_STACK)

    def _watch(self) -> None:
        while not self._ended.wait(self._period):
            if self.suspended:
                self.heartbeat()
            self._publish()
            if self._parent not in (None, os.getppid()):
                self._parent = None
                os.kill(os.getpid(), signal.SIGTERM)
            idle = time.monotonic() - self._last_progress
            if idle < self.timeout / 2:
                continue
            self._read_peers()
            hung = self._hung_ranks() if idle >= self.timeout else []
            # A hung process whose thread is alive reports itself, with its stack: give it the time to.
            if hung and (self._rank in hung or self._silent(hung) or idle >= self.timeout + 3 * self._period):
                self._report(hung)

    def _publish(self) -> None:
        self._messages += 1
        text = f"{self._collectives} {self._heartbeats} {self._messages} {os.getpid()} {socket.gethostname()}"
        if self._store is not None:
            with suppress(RuntimeError):
                self._store.set(f"{self._key}/{self._rank}", text)
        self._update_peer(self._rank, text)

    def _read_peers(self) -> None:
        """Read the messages of the others; if the store does not answer, their last known status stays."""
        for rank in range(self._count) if self._store is not None else ():
            with suppress(RuntimeError):
                if rank != self._rank and self._store.check([f"{self._key}/{rank}"]):
                    self._update_peer(rank, self._store.get(f"{self._key}/{rank}").decode())

    def _update_peer(self, rank: int, text: str) -> None:
        collectives, heartbeats, message, process, host = text.split(" ", 4)
        peer, now = self._peers[rank], time.monotonic()
        if peer.counts != (int(collectives), int(heartbeats)):
            peer.counts, peer.counts_changed = (int(collectives), int(heartbeats)), now
        if peer.message != message:
            peer.message, peer.message_changed = message, now
        peer.location = (host, int(process))

    def _silent(self, ranks: list[int]) -> bool:
        """Whether none of these processes has sent a message lately."""
        return all(time.monotonic() - self._peers[rank].message_changed > self.timeout / 4 for rank in ranks)

    def _hung_ranks(self) -> list[int]:
        """The processes that the others wait for; none while one of them makes progress."""
        if self._store is None:
            return [self._rank]
        silent = [rank for rank in range(self._count) if rank != self._rank and self._silent([rank])]
        least = min(peer.counts[:1] for peer in self._peers)
        hung = silent or [rank for rank in range(self._count) if self._peers[rank].counts[:1] == least]
        progressing = any(time.monotonic() - self._peers[rank].counts_changed < self.timeout / 2 for rank in hung)
        return [] if progressing else hung

    def _report(self, hung: list[int]) -> None:
        """Report the hung processes and end this one.

        A hung process on this machine that does not report itself is killed.
        """
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
                "hint: continue with --resume, or automatically with --max-restarts; --hang-timeout sets the limit",
                file=sys.stderr,
            )
        for rank in hung:
            host, process = self._peers[rank].location
            if rank != self._rank and process and host == socket.gethostname():
                with suppress(OSError):
                    for number in (PRINT_STACK, signal.SIGCONT):  # a stopped process prints it once it runs again
                        os.kill(process, number)
                    time.sleep(STACK_SECONDS)
                    os.kill(process, signal.SIGKILL)
        os._exit(ExitCode.LOST)


def _connect(count: int, period: float) -> Any:
    """A separate connection to the group's store; None if there is none (a single process, MPI)."""
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "")
    if count == 1 or not host or not port.isdigit():
        return None
    with suppress(RuntimeError):
        seconds = timedelta(seconds=max(5.0, period))
        return dist.TCPStore(host, int(port), is_master=False, wait_for_workers=False, timeout=seconds)
    return None


def _main_stack() -> list[str]:
    """The stack of the main thread, innermost frame last."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return [f"{Path(f.filename).name}:{f.lineno} in {f.name}" for f in traceback.extract_stack(frame)[-FRAMES:]]

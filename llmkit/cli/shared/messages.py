"""What a command says about its work: progress while it runs, and the words of its summary line."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any


def skipped(counts: Mapping[str, Any]) -> str:
    """What was skipped, for a summary line: ", 2 bad lines skipped"; empty if nothing was."""
    bad = [counted(counts[f"bad_{noun}s"], f"bad {noun}") for noun in ("line", "file") if counts.get(f"bad_{noun}s")]
    return "".join(f", {text} skipped" for text in bad)


def counted(count: int, noun: str) -> str:
    """A number of things: "1 bad file", "2,000 bad files"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


class Progress:
    """A progress bar on stderr, or lines for `say` (None: nothing); cheap to advance."""

    EVERY = 30.0  # seconds between lines where stderr is not a terminal

    def __init__(self, command: str, total: int | None, unit: str, say: Callable[[str], None] | None) -> None:
        self.done = 0
        self._total, self._unit, self._say = total, unit, say
        self._next = time.monotonic() + self.EVERY
        self._bar: Any = None
        if say and sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn(f"{command}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn(unit + " {task.fields[note]}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._task = self._bar.add_task(command, total=total, note="")
            self._bar.start()

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count `count` more units as done; `note` is shown beside them (a loss, a rate)."""
        self.done += count
        if self._bar:
            self._bar.update(self._task, advance=count, note=note)
        elif self._say and time.monotonic() >= self._next:
            self._next = time.monotonic() + self.EVERY
            of = f" of {self._total:,}" if self._total else ""
            self._say(f"{self.done:,}{of} {self._unit} {note}".rstrip())

    def close(self) -> None:
        if self._bar:
            self._bar.stop()

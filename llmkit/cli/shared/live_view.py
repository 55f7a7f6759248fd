"""Progress of a training command: a panel on a terminal, otherwise a line every 30 seconds.

    with live_view.display(run, session, total_tokens) as show:
        show(record)                        # each record of metrics.jsonl

The panel shows the loss curve, rates, the time left and the last events of the run; it is removed when the run ends.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit.cli.shared.options import Progress, Run

if TYPE_CHECKING:
    from rich.console import RenderableType

    from llmkit.training.session import Session

Record = dict[str, Any]
BARS = "▁▂▃▄▅▆▇█"
POINTS = 512  # points of the loss curve kept in memory
EVENTS = 3  # events shown
TAIL = 1 << 12  # bytes read from the end of events.jsonl


@contextmanager
def display(run: Run, session: Session, total: int) -> Iterator[Callable[[Record], None]]:
    """Yields a function that shows a record of metrics.jsonl."""
    if run.quiet or not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        with run.progress(total, "tokens") as bar:
            yield _lines(bar)
        return
    from rich.console import Console
    from rich.live import Live

    panel = Panel(f"llmkit {run.command} {run.output}", total, session.directory.path / "events.jsonl")
    with Live(get_renderable=panel.render, console=Console(stderr=True), refresh_per_second=2, transient=True):
        yield panel.add


def _lines(bar: Progress) -> Callable[[Record], None]:
    def show(record: Record) -> None:
        bar.advance(record["tokens"] - bar.done, _summary(record))

    return show


def _summary(record: Record) -> str:
    held_out = f" held-out {record['heldout_loss']:.4f}" if "heldout_loss" in record else ""
    loss = f"loss {record['loss']:.4f}" if isinstance(record.get("loss"), float) else "skipped"
    speed, time_left = f"{record['tokens_per_second']:,.0f} tok/s", _clock(record["eta_seconds"])
    return f"{loss}{held_out} lr {record['lr']:.2e} {speed} {time_left} left"


class Panel:
    """The state of the live view."""

    def __init__(self, title: str, total: int, events: Path) -> None:
        self._title, self._total, self._events = title, total, events
        self._losses: list[float] = []
        self._losses_per_point, self._pending = 1, [0.0]  # pending: a 0, then the losses of the next point
        self._record: Record = {}

    def add(self, record: Record) -> None:
        """Show this record from the next refresh onwards."""
        if isinstance(record.get("loss"), float):
            self._pending.append(record["loss"])
            if len(self._pending) > self._losses_per_point:
                self._losses.append(sum(self._pending[1:]) / self._losses_per_point)
                self._pending = [0.0]
            if len(self._losses) == POINTS:
                self._losses = [(a + b) / 2 for a, b in zip(self._losses[::2], self._losses[1::2], strict=True)]
                self._losses_per_point *= 2
        carried_over = {name: self._record[name] for name in ("heldout_loss", "mfu") if name in self._record}
        self._record = carried_over | record

    def render(self) -> RenderableType:
        """The current panel."""
        from rich.panel import Panel as Box
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        record = self._record
        if not record:
            return Box(Text("first step"), title=Text(self._title), title_align="left")
        figures = {
            "step": f"{record['step']:,}",
            "loss": f"{record['loss']:.4f}" if isinstance(record.get("loss"), float) else "skipped",
            "held-out": f"{record['heldout_loss']:.4f}" if "heldout_loss" in record else "",
            "lr": f"{record['lr']:.2e}",
            "grad": f"{record['grad_norm']:.3g}" if isinstance(record.get("grad_norm"), float) else "",
            "tok/s": f"{record['tokens_per_second']:,.0f}",
            "MFU": f"{record['mfu']:.1%}" if "mfu" in record else "",
            "left": _clock(record["eta_seconds"]),
        }
        lines: list[Any] = [
            ProgressBar(total=self._total, completed=record["tokens"]),
            Text("  ".join(f"{name}\u00a0{value}" for name, value in figures.items() if value)),
            Text(sparkline(self._losses, 60) or "▁", style="cyan"),
            *(Text(line, style="dim") for line in self._last_events()),
        ]
        grid = Table.grid(expand=True)
        for line in lines:
            grid.add_row(line)
        return Box(grid, title=Text(self._title), title_align="left")

    def _last_events(self) -> list[str]:
        try:
            with open(self._events, "rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL))
                lines = file.read().splitlines()[-EVENTS:]
        except OSError:
            return []
        return [text for line in lines if (text := _event(line))]


def _event(line: bytes) -> str:
    try:
        record = json.loads(line)
        text = f"{record['time'][11:16]} {record['event']} at step {record['step']:,}"
        text += f": {record['cause']}" if "cause" in record else ""
    except (ValueError, KeyError, TypeError):
        return ""
    return "".join(c if c.isprintable() else "?" for c in text)[:100]


def sparkline(values: Sequence[float], width: int) -> str:
    """`values` as at most `width` bars, scaled from the minimum to the maximum; more values are averaged."""
    if not values:
        return ""
    count = min(width, len(values))
    cuts = [i * len(values) // count for i in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in zip(cuts, cuts[1:], strict=False)]
    low, spread = min(means), (max(means) - min(means)) or 1.0
    return "".join(BARS[min(len(BARS) - 1, int((mean - low) / spread * len(BARS)))] for mean in means)


def _clock(seconds: float) -> str:
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"

"""Progress of a training command, and trackers."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from llmkit.cli.shared import live_view
from llmkit.errors import LlmkitError, UsageError


def record(step: int, **more: Any) -> dict[str, Any]:
    return {
        "step": step, "tokens": step * 100, "loss": 5.0 - step / 1000, "lr": 1e-3, "grad_norm": 0.5,
        "tokens_per_second": 1234.5, "mfu": 0.42, "eta_seconds": 3661.0,
    } | more  # fmt: skip


def rendered(panel: live_view.Panel, width: int = 120) -> str:
    from rich.console import Console

    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    console.print(panel.render())
    return console.file.getvalue().replace("\u00a0", " ")  # type: ignore[attr-defined]


def test_panel_shows_what_matters(tmp_path: Path) -> None:
    """Behaviour: loss curve, rates, time left and last events are shown; markup and control characters are shown as text."""
    events = tmp_path / "events.jsonl"
    panel = live_view.Panel("llmkit train [red]run", 100_000, events)
    assert "first step" in rendered(panel)
    for step in range(1, 2001):
        panel.add(record(step) | ({"heldout_loss": 4.5} if step == 1000 else {}))
    time = "2026-11-22T10:11:12Z"
    lines = [{"event": f"e{n}", "time": time, "step": n} for n in range(9)]
    lines.append({"event": "rollback\x1b[2J", "time": time, "step": 9, "cause": "[bold]broken"})
    events.write_text("{cut off\n" + "".join(json.dumps(line) + "\n" for line in lines))
    text = rendered(panel)
    for part in (
        "2,000",
        "loss 3.0000",
        "held-out 4.5000",
        "tok/s 1,23",
        "MFU 42.0%",
        "left 1:01:01",
        "e8",
        "[red]run",
    ):
        assert part in text, part
    assert "rollback?[2J at step 9: [bold]broken" in text
    assert "e6" not in text
    assert "█" in text
    assert len(panel._losses) < live_view.POINTS
    panel.add({key: value for key, value in record(2001).items() if key not in ("loss", "grad_norm")})
    assert "skipped" in rendered(panel, 60)


def test_sparkline() -> None:
    """Property: at most the requested number of bars, monotonic in the values, over the full range; equal values are level."""
    line = live_view.sparkline([10 - i / 50 for i in range(500)], 40)
    assert len(line) == 40
    assert list(line) == sorted(line, key=live_view.BARS.index, reverse=True)
    assert (line[0], line[-1]) == ("█", "▁")
    assert live_view.sparkline([2.0, 2.0], 40) == "▁▁"
    assert live_view.sparkline([], 40) == ""


def test_progress_lines_without_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Behaviour: one line at most every 30 seconds, with loss, rate and time left."""
    from types import SimpleNamespace

    from llmkit.cli.shared.invocation import Run
    from llmkit.cli.shared.messages import Progress

    monkeypatch.setattr(Progress, "EVERY", 0.0)
    values = dict.fromkeys(("output", "force", "dry_run", "quiet", "verbose", "json"), False) | {"jobs": 1, "seed": 0}
    session: Any = SimpleNamespace(directory=SimpleNamespace(path=Path()))
    with live_view.display(Run("train", values, {}, {}), session, 1000) as report:
        report(record(1, heldout_loss=4.25))
    line = capsys.readouterr().err
    assert "100 of 1,000 tokens loss 4.9990 held-out 4.2500 lr 1.00e-03 1,23" in line


class TestTrackers:
    """`--tracker`."""

    def test_a_failing_tracker_is_dropped(self) -> None:
        """Behaviour: a tracker whose disk is full is reported once and not called again; the others still are."""
        from llmkit.training.runner import report_to

        def full(record: Any) -> None:
            raise OSError(28, "No space left on device")

        shown: list[Any] = []
        warnings: list[str] = []
        report = report_to([full, shown.append], warnings.append)
        report(record(1))
        report(record(2))
        assert len(shown) == 2
        assert len(warnings) == 1 and "No space left on device" in warnings[0]

    @pytest.fixture
    def fake(self, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
        """The calls received by a tracker registered with Accelerate as `fake`."""
        from accelerate import tracking

        calls: list[Any] = []

        class Fake(tracking.GeneralTracker):
            name = "fake"
            requires_logging_directory = True

            def __init__(self, run_name: str, logging_dir: str, **more: Any) -> None:
                super().__init__()
                calls.append(("start", run_name, logging_dir))

            def start(self) -> None:
                """Nothing to open."""

            @property
            def tracker(self) -> None:
                return None

            def store_init_configuration(self, values: dict[str, Any]) -> None:
                calls.append(("options", values))

            def log(self, values: dict[str, Any], step: int | None = None, **more: Any) -> None:
                calls.append((step, values))

            def finish(self) -> None:
                calls.append("finish")

        from llmkit.training.metrics import tracker

        register = getattr(tracking, "register_tracker_class", None)
        if register is None:
            pytest.skip("this version of accelerate cannot register trackers")
        register(Fake)
        monkeypatch.setattr(tracker, "TRACKERS", ("fake",))
        yield calls
        tracking.LOGGER_TYPE_TO_CLASS.pop("fake", None)

    def test_every_number_arrives(self, fake: list[Any], tmp_path: Path) -> None:
        """Behaviour: options at first, then the finite numbers of each record at its step, then the end."""
        from llmkit.training.distributed.processes import start
        from llmkit.training.metrics.tracker import Tracker

        tracker = Tracker("fake", start("fp32").accelerator, tmp_path / "run", {"lr": 0.1, "data": ["a"]})
        tracker.log({"step": 3, "loss": 2.5, "grad_norm": float("inf"), "note": "text"})
        tracker.finish()
        assert fake == [("start", "run", str(tmp_path / "run")), ("options", {"lr": 0.1}), (3, {"loss": 2.5}), "finish"]

    def test_missing_packages_are_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Behaviour: an unknown name, and a package that is not installed, are one line each."""
        from accelerate import PartialState, tracking

        from llmkit.training.metrics.tracker import check_tracker

        PartialState._reset_state()  # as at the start of a process
        monkeypatch.setattr(tracking, "get_available_trackers", list)
        with pytest.raises(LlmkitError, match="the package wandb is not installed") as caught:
            check_tracker("wandb")
        assert caught.value.hint == "pip install 'llmkit[wandb]'"
        with pytest.raises(UsageError, match="unknown --tracker 'wanbd'"):
            check_tracker("wanbd")

    def test_tensorboard(self, tmp_path: Path) -> None:
        """Behaviour: TensorBoard reads back what was logged."""
        pytest.importorskip("tensorboard")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        from llmkit.training.distributed.processes import start
        from llmkit.training.metrics.tracker import Tracker

        tracker = Tracker("tensorboard", start("fp32").accelerator, tmp_path, {"lr": 0.1})
        for step in (1, 2):
            tracker.log(record(step))
        tracker.finish()
        events = EventAccumulator(str(tmp_path / "tracker"))
        events.Reload()
        assert [(e.step, round(e.value, 3)) for e in events.Scalars("loss")] == [(1, 4.999), (2, 4.998)]

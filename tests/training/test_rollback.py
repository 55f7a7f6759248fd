"""What a run rolls back to, and that nothing of the undone steps remains: gradients, checkpoints, lines of the log."""

from __future__ import annotations

import errno
import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from test_distributed import Clock
from test_guard import documents, events, log, train, weights
from test_loop import Train, at_step
from tiny import loop_settings
from waiting import wait_for_thread, wait_until

from llmkit.cli.shared.invocation import Run
from llmkit.errors import LlmkitError, Terminated
from llmkit.io.run_layout import find_checkpoints
from llmkit.training import loop
from llmkit.training import session as sessions
from llmkit.training.checkpoint import run_directory
from llmkit.training.checkpoint.trainer_state import load_trainer_state
from llmkit.training.distributed import processes, watchdog
from llmkit.training.metrics.log import MetricsLog, read_metrics
from llmkit.training.objectives import ObjectiveResult, next_token


def harmful(place: Path, after: int) -> Any:
    """An objective that ruins the embeddings in the step after the first `after` steps."""

    def objective(model: Any, batch: Any, scale: float) -> ObjectiveResult:
        if model.training and len(log(place)) == after:
            with torch.no_grad():
                embeddings = model.model.embed_tokens.weight
                embeddings.copy_(embeddings.sort(0).values)
        return next_token(model, batch, scale)

    return objective


def names(run: Path) -> list[str]:
    return [p.name for p in find_checkpoints(run)]


@pytest.fixture(scope="module")
def undone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that rolled back steps 41 to 45."""
    run, patch = tmp_path_factory.mktemp("undone") / "run", pytest.MonkeyPatch()
    accumulate = loop.accumulate

    def from_nothing(t: Any, *arguments: Any) -> Any:
        assert all(p.grad is None for p in t.model.parameters())
        return accumulate(t, *arguments)

    patch.setattr(loop, "accumulate", from_nothing)
    train(run, documents(False), harmful(run, 40), save_every=30, steps=56)
    patch.undo()
    return run


def test_rollback_leaves_no_gradient(undone: Path) -> None:
    """Property: every step starts without gradients, also after a rollback."""
    assert [e["skipped"] for e in events(undone, "rollback")] == [[41, 42, 43, 44, 45]]


def test_stopped_during_spikes(undone: Path, tmp_path: Path) -> None:
    """Property: SIGTERM during a series of spikes keeps a checkpoint before them too, regardless of --keep.

    The resumed run rolls back to it and ends in the same bytes.
    """
    run = tmp_path / "run"
    with pytest.raises(Terminated):
        stop = at_step(43, lambda: os.kill(os.getpid(), signal.SIGTERM))
        train(run, documents(False), harmful(run, 40), keep=1, save_every=30, steps=56, report=stop)
    assert names(run) == ["step-00000030", "step-00000043"]
    train(run, documents(False), harmful(run, 40), keep=1, save_every=30, steps=56)
    assert [(e["to"], e["skipped"]) for e in events(run, "rollback")] == [(30, [41, 42, 43, 44, 45])]
    assert weights(run) == weights(undone)
    assert names(run) == ["step-00000056"]


@pytest.fixture
def scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp16's loss scaler, on the CPU."""

    def start(*arguments: Any) -> processes.Processes:
        group = processes.start(*arguments)
        group.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
        return group

    monkeypatch.setattr(sessions, "start", start)


def breaking(run: Path, after: int, times: int) -> Any:
    """Objective and report of a run whose weights become NaN after step `after`, `times` times."""
    models: list[Any] = []

    def objective(model: Any, batch: Any, scale: float) -> ObjectiveResult:
        models[:] = [model]
        return next_token(model, batch, scale)

    def report(record: dict[str, Any]) -> None:
        nonlocal times
        if record["step"] == after and times and "skipped" not in record:
            times -= 1
            with torch.no_grad():
                models[0].model.embed_tokens.weight[7] = float("nan")

    return {"objective": objective, "report": report}


@pytest.mark.usefixtures("scaled")
def test_guard_with_a_loss_scaler(tmp_path: Path) -> None:
    """Behaviour: with fp16's scaler broken documents are skipped, and non-finite weights are rolled back."""
    train(tmp_path / "run", steps=66, **breaking(tmp_path / "run", 40, 1))
    causes = {e["step"]: e["cause"] for e in events(tmp_path / "run", "rollback")}
    assert causes == {
        31: "broken documents",
        41: "non-finite weights",
        47: "broken documents",
        62: "broken documents",
    }


def test_undone_checkpoints_are_removed(tmp_path: Path) -> None:
    """Property: checkpoints after the step that a run rolled back to are removed, so that neither --resume
    nor another rollback uses them."""
    run, seen = tmp_path / "run", []
    broken = breaking(run, 40, 1)

    def report(record: dict[str, Any]) -> None:
        broken["report"](record)
        if record["step"] == 21:
            wait_for_thread("checkpoint")  # it may still be writing that of step 20
            seen.append((names(run), os.readlink(run / "latest")))

    train(run, documents(False), broken["objective"], report=report)
    assert seen == [(["step-00000020"], "checkpoints/step-00000020")] * 2
    assert names(run) == [f"step-000000{n}" for n in (20, 40, 60, 70)]


def test_step_that_repeatedly_breaks_the_weights(tmp_path: Path) -> None:
    """Behaviour: if weights are non-finite again after the same steps, the step that left them and the one
    that detected them are skipped."""
    train(tmp_path / "run", documents(False), steps=40, **breaking(tmp_path / "run", 33, 9))
    assert [(e["step"], e["skipped"]) for e in events(tmp_path / "run", "rollback")] == [(34, []), (34, [33, 34])]


def test_rollback_target_was_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behaviour: if --keep has removed the state to roll back to, the run uses the oldest remaining
    checkpoint, not the start."""
    run = tmp_path / "run"
    monkeypatch.setattr(loop.Guard, "recently_rolled_back", lambda self, first: True)  # rolls back ten steps further
    train(run, documents(False), harmful(run, 40), keep=1, save_every=36, steps=50)
    assert [(e["to"], e["skipped"][0]) for e in events(run, "rollback")] == [(36, 31)]


def test_signal_while_a_checkpoint_is_under_way(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behaviour: SIGTERM in a step while the previous checkpoint is still being written ends the run normally."""
    run, calls, write = tmp_path / "run", 0, run_directory.write_safetensors
    signalled = threading.Event()

    def late(*arguments: Any) -> None:
        assert signalled.wait(60)
        write(*arguments)

    def objective(model: Any, batch: Any, scale: float) -> ObjectiveResult:
        nonlocal calls
        calls += 1
        if calls == 7:  # step 4
            signalled.set()
            os.kill(os.getpid(), signal.SIGTERM)
        return next_token(model, batch, scale)

    monkeypatch.setattr(run_directory, "write_safetensors", late)
    with pytest.raises(Terminated):
        train(run, objective=objective)
    assert names(run) == ["step-00000003"]


def test_sigusr1_is_never_lost_and_never_kills(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behaviour: SIGUSR1 during an all-reduce takes effect at the next one.

    Before the first step it waits, after the last one it is ignored.
    """
    add, signal_next = processes.Processes.all_reduce, []

    def late(self: Any, values: Any) -> list[float]:
        if signal_next:
            signal_next.clear()
            os.kill(os.getpid(), signal.SIGUSR1)
        return add(self, values)

    monkeypatch.setattr(processes.Processes, "all_reduce", late)
    train(tmp_path / "run", report=at_step(7, lambda: signal_next.append(1)))
    assert "step-00000008" in names(tmp_path / "run")
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN
    with sessions.session(loop_settings(str(tmp_path / "other"))):
        assert signal.SIGUSR1 in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_samples_on_a_full_disk(train: Train, tmp_path: Path) -> None:
    """Behaviour: samples that do not fit on the disk are reported; training continues."""
    messages: list[str] = []

    def act(model: Any, step: int) -> dict[str, float]:
        raise OSError(errno.ENOSPC, "No space left on device")

    train(tmp_path / "run", at_checkpoint=[act], say=messages.append)
    assert len(messages) == 6 and "No space left" in messages[0]


def test_warnings_on_a_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behaviour: if stderr is a file on a full disk, only the warning is lost."""
    with open("/dev/full", "w") as full:
        monkeypatch.setattr("sys.stderr", full)
        values = dict.fromkeys(("output", "force", "dry_run", "quiet", "verbose", "json"), False)
        Run("train", values | {"jobs": 1, "seed": 0}, {}, {}).warn("the disk is full")
        monkeypatch.undo()
        with pytest.raises(OSError, match="No space"):
            full.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())  # its buffer is discarded there


def test_suspended_watchdog(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behaviour: a suspended watchdog reports no hang; afterwards it does again."""
    clock = Clock(monkeypatch)
    dog, reported = watchdog.Watchdog(0, 1, 0.4, lambda *_, **__: None), []
    monkeypatch.setattr(dog, "_report", reported.append)
    dog.suspended = True
    dog.start()
    for _ in range(8):
        clock.pass_seconds(0.1)
        clock.wait_for_look(dog)
    assert not reported
    dog.suspended = False
    clock.pass_seconds(0.5)
    wait_until(lambda: reported)
    dog.stop()


def test_pending_lines_are_truncated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Property: lines of undone steps that were waiting for disk space are not written later."""
    log = MetricsLog(tmp_path / "metrics.jsonl", 0)
    log.write({"step": 1})
    file = log._file

    class Full:
        truncate = file.truncate

        def write(self, data: bytes) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(log, "_file", Full())
    for step in (2, 3, 4):
        log.write({"step": step})
    log.truncate_after(2)
    assert log.last == {"step": 2}
    monkeypatch.setattr(log, "_file", file)
    log.write({"step": 3, "skipped": True})
    log.close()
    assert list(read_metrics(tmp_path / "metrics.jsonl")) == [{"step": 1}, {"step": 2}, {"step": 3, "skipped": True}]


@pytest.mark.parametrize(
    "damage",
    [{"guard": {"history": [[10**400, 1, 1]]}}, {"noise": ["a", 1, 1]}, {"guard": {"reference": {}}}, {"step": 17}],
)
def test_hostile_state_is_one_line(train: Train, tmp_path: Path, damage: dict[str, Any]) -> None:
    """Behaviour: a state with correct digests but an invalid guard or noise state is refused without a traceback."""
    with pytest.raises(Terminated):
        train(tmp_path / "run", report=at_step(2, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    (checkpoint,) = find_checkpoints(tmp_path / "run")
    file = checkpoint / "state" / "trainer.json"
    file.write_text(json.dumps(json.loads(file.read_bytes()) | damage))
    load_trainer_state(checkpoint)
    (checkpoint / "state" / "digests.json").write_text(json.dumps(run_directory._file_digests(checkpoint)))
    with pytest.raises(LlmkitError, match="not a readable trainer state"):
        train(tmp_path / "run", resume=True)

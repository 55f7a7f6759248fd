"""The loop: accumulation, checkpoints, bit-exact resumption, signals."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llmkit.errors import LlmkitError, LockedError, Terminated, UsageError
from llmkit.io.atomic import lock
from llmkit.io.run_layout import find_checkpoints
from llmkit.training import loop, session, train_step
from llmkit.training.checkpoint import run_directory
from llmkit.training.checkpoint.run_directory import RunDirectory
from llmkit.training.checkpoint.trainer_state import load_trainer_state
from llmkit.training.metrics import log as metrics
from llmkit.training.metrics.log import MetricsLog, read_metrics
from llmkit.training.objectives import ObjectiveResult, next_token

Train = Callable[..., dict[str, Any]]


class Crash(Exception):
    """The process dies here."""


def at_step(number: int, act: Callable[[], None]) -> Callable[[dict[str, Any]], None]:
    """A report function that calls `act` after `number` steps."""

    def report(record: dict[str, Any]) -> None:
        if record["step"] == number:
            act()

    return report


def crash() -> None:
    raise Crash


def events(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]


def weights(run: Path) -> bytes:
    return (run / "final" / "model.safetensors").read_bytes()


def steps(run: Path) -> list[int]:
    return [record["step"] for record in read_metrics(run / "metrics.jsonl")]


def losses(run: Path) -> list[tuple[float, float | None]]:
    return [(record["loss"], record.get("heldout_loss")) for record in read_metrics(run / "metrics.jsonl")]


@pytest.fixture(scope="module")
def whole(train: Train, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run; tests only read it."""
    run = tmp_path_factory.mktemp("loop") / "whole"
    train(run, heldout=True, eval_every=4)
    return run


def test_run_learns_and_writes_its_files(whole: Path) -> None:
    """Behaviour: the loss falls; checkpoints, links, log and configuration exist; checkpoints load as models."""
    from llmkit.model.pretrained.checkpoint import load_model

    records = list(read_metrics(whole / "metrics.jsonl"))
    assert [r["step"] for r in records] == list(range(1, 17))
    assert records[-1]["loss"] < records[0]["loss"] - 0.3
    assert [r["step"] for r in records if "heldout_loss" in r] == [4, 8, 12, 16]
    assert {"loss", "lr", "grad_norm", "tokens", "tokens_per_second", "mfu", "eta_seconds"} <= records[3].keys()
    assert [p.name for p in find_checkpoints(whole)] == [f"step-{n:08d}" for n in (3, 6, 9, 12, 15, 16)]
    assert os.readlink(whole / "final") == os.readlink(whole / "latest") == "checkpoints/step-00000016"
    assert load_trainer_state(whole / "final").tokens == 16 * 4 * 32
    model, _ = load_model(whole)
    assert model.config.max_position_embeddings == 32
    events = [json.loads(line)["event"] for line in (whole / "events.jsonl").read_text().splitlines()]
    assert events == ["start", "end"]


def test_heldout_loss_is_the_mean_over_tokens(train: Train, tmp_path: Path) -> None:
    """Parity: the held-out loss is that of one forward pass over each whole sequence, summed by hand."""
    import torch.nn.functional as F
    from tiny import ListStream

    from llmkit.model.pretrained.checkpoint import load_model
    from llmkit.training.data import HeldOutSource

    outcome = train(tmp_path / "run", heldout=True)
    model, _ = load_model(tmp_path / "run")
    source = HeldOutSource(ListStream([50, 40], seed=3), 32)
    batch = source.batch(0, 0, source.rows(0))
    with torch.no_grad():
        logits = model(batch.input_ids, document_ids=batch.document_ids)
        each = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="none")
    assert outcome["heldout_loss"] == pytest.approx(float(each[batch.weights.flatten() > 0].mean()), abs=1e-5)


def test_micro_batches_do_not_change_the_step(train: Train, tmp_path: Path) -> None:
    """Property: losses with micro-batches of 1, 3 and 4 rows (unequal token counts) agree within 1e-5."""
    for size in (1, 3, 4):
        train(tmp_path / str(size), micro_batch_size=size)
    expected = losses(tmp_path / "4")
    for size in (1, 3):
        assert losses(tmp_path / str(size)) == [(pytest.approx(loss, abs=1e-5), None) for loss, _ in expected]


@pytest.mark.parametrize("steps_before", [(2,), (7,), (7, 7), (4, 12), (16,)])
def test_resumed_run_ends_in_the_same_bytes(
    train: Train, whole: Path, tmp_path: Path, steps_before: tuple[int, ...]
) -> None:
    """Property: a run that crashed after some step, twice or before the first checkpoint, ends like an
    undisturbed one; no step is missing or repeated in the log."""
    run = tmp_path / "run"
    for number in steps_before:
        with pytest.raises(Crash):
            train(run, resume=True, heldout=True, eval_every=4, report=at_step(number, crash))
        assert not (run / "final").exists()
    train(run, resume=True, heldout=True, eval_every=4)
    assert weights(run) == weights(whole)
    assert losses(run) == losses(whole)
    assert steps(run) == list(range(1, 17))


def kill_in(target: Any, name: str, call: int) -> Callable[[], None]:
    """Patch `target.name` so that its call number `call` kills the process with SIGKILL before it does anything."""
    original, count = getattr(target, name), 0

    def replacement(*arguments: Any, **named: Any) -> Any:
        nonlocal count
        count += 1
        if count == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **named)

    return lambda: setattr(target, name, replacement)


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param(kill_in(train_step, "clip_gradients", 6), id="in a step"),
        pytest.param(kill_in(run_directory, "write_safetensors", 2), id="in a checkpoint"),
        pytest.param(kill_in(RunDirectory, "_link", 2), id="between checkpoint and link"),
        pytest.param(kill_in(loop, "evaluate_held_out", 2), id="in an evaluation"),
        pytest.param(kill_in(RunDirectory, "link_final", 1), id="before the end"),
    ],
)
def test_killed_run_ends_in_the_same_bytes(
    train: Train, whole: Path, tmp_path: Path, moment: Callable[[], None]
) -> None:
    """Property: after SIGKILL at a critical moment and --resume, model and log equal those of the undisturbed run."""
    run = tmp_path / "run"
    child = os.fork()
    if child == 0:
        try:
            moment()
            train(run, heldout=True, eval_every=4)
        finally:
            os._exit(1)  # only if the process was not killed
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    train(run, resume=True, heldout=True, eval_every=4)
    assert weights(run) == weights(whole)
    assert losses(run) == losses(whole)
    assert not [p for p in (run / "checkpoints").iterdir() if p.name.startswith(".")]


def test_a_run_killed_before_it_began_can_be_started(tmp_path: Path) -> None:
    """Behaviour: a half-written configuration is what a killed run left, or another run is writing: the directory is still
    that of a run, which is refused while it is locked, and cleared of partial files and links when it is not."""
    path = tmp_path / "run"
    (path / "checkpoints").mkdir(parents=True)
    for name in (".lock", ".config.toml.partial"):
        (path / name).touch()
    (path / ".latest.partial").symlink_to("checkpoints/step-00000001")
    with lock(path / ".lock"), pytest.raises(LockedError), run_directory.open_run(str(path), resume=True, force=False):
        pass
    with run_directory.open_run(str(path), resume=True, force=False):
        assert sorted(p.name for p in path.iterdir()) == [".lock", "checkpoints"]


def test_a_killed_reset_leaves_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Property: -f removes the configuration last: killed before that, the directory is still a run that -f replaces."""
    names = ["config.toml", "metrics.jsonl", "events.jsonl", ".lock"]
    for name in names:
        (tmp_path / name).touch()
    removed = []
    monkeypatch.setattr(Path, "iterdir", lambda self: iter(tmp_path / name for name in names))
    monkeypatch.setattr(Path, "unlink", lambda self: removed.append(self.name))
    RunDirectory(tmp_path).remove_all_except(".lock")
    assert removed[-1] == "config.toml" and len(removed) == 3


@pytest.mark.parametrize(
    ("number", "error"),
    [(signal.SIGTERM, Terminated), (signal.SIGHUP, Terminated), (signal.SIGINT, KeyboardInterrupt)],
)
def test_signal_saves_and_ends(
    train: Train, whole: Path, tmp_path: Path, number: int, error: type[BaseException]
) -> None:
    """Behaviour: the step is finished and saved, the signal takes effect, and the resumed run ends in the
    same bytes."""
    run = tmp_path / "run"
    with pytest.raises(error):
        train(run, heldout=True, eval_every=4, report=at_step(5, lambda: os.kill(os.getpid(), number)))
    assert [p.name for p in find_checkpoints(run)] == ["step-00000003", "step-00000005"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    train(run, resume=True, heldout=True, eval_every=4)
    assert weights(run) == weights(whole)
    assert losses(run) == losses(whole)


def test_signal_in_an_evaluation(train: Train, whole: Path, tmp_path: Path) -> None:
    """Behaviour: an evaluation is abandoned at once, its step is saved, and the resumed run repeats the evaluation."""
    calls = 0

    def objective(model: Any, batch: Any, scale: float) -> Any:
        nonlocal calls
        if not model.training:
            calls += 1
            os.kill(os.getpid(), signal.SIGTERM)
        return next_token(model, batch, scale)

    run = tmp_path / "run"
    with pytest.raises(Terminated):
        train(run, heldout=True, eval_every=4, objective=objective)
    assert calls == 1
    assert steps(run) == [1, 2, 3, 4]
    assert losses(run)[-1][1] is None
    train(run, resume=True, heldout=True, eval_every=4)
    assert losses(run) == losses(whole)
    assert weights(run) == weights(whole)


def test_second_signal_ends_at_once(train: Train, tmp_path: Path) -> None:
    """Behaviour: an impatient second Ctrl-C does not wait for the step."""

    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", report=at_step(2, twice))
    assert not find_checkpoints(tmp_path / "run")


def test_finished_run_is_left_alone(train: Train, whole: Path) -> None:
    """Behaviour: --resume on a finished run does nothing."""
    before = {p: p.stat().st_mtime_ns for p in whole.rglob("*") if p.is_file() and p.name != ".lock"}
    assert train(whole, resume=True, heldout=True, eval_every=4) == {"finished": True}
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_resume_refuses_another_run(train: Train, whole: Path) -> None:
    """Behaviour: the error names the changed option, and nothing is modified."""
    with pytest.raises(LlmkitError, match="--seed was 0 when the run was started and is 1 now"):
        train(whole, resume=True, options={"seed": 1})
    assert steps(whole) == list(range(1, 17))


def test_existing_output(train: Train, whole: Path, tmp_path: Path) -> None:
    """Behaviour: an existing run is refused without --resume or -f.

    -f never deletes anything but a run; an active run is locked.
    """
    run = shutil.copytree(whole, tmp_path / "run", symlinks=True)
    with pytest.raises(LlmkitError, match="exists"):
        train(run)
    with pytest.raises(UsageError):
        train(run, resume=True, force=True)
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "thesis.tex").write_text("years of work")
    for how in ("force", "resume"):
        with pytest.raises(LlmkitError, match="is not a run"):
            train(other, **{how: True})
    assert (other / "thesis.tex").exists()
    with lock(run / ".lock"), pytest.raises(LockedError):
        train(run, resume=True)
    train(run, force=True)
    assert steps(run) == list(range(1, 17))


def test_keep_every(train: Train, tmp_path: Path) -> None:
    """Behaviour: --keep 1 --keep-every 6 leaves the last one and those of steps 6 and 12."""
    train(tmp_path / "run", keep=1, keep_every=6)
    assert [p.name for p in find_checkpoints(tmp_path / "run")] == [f"step-{n:08d}" for n in (6, 12, 16)]


def test_keep_removes_old_checkpoints(train: Train, tmp_path: Path) -> None:
    """Behaviour: --keep 2 leaves the last two."""
    train(tmp_path / "run", keep=2)
    assert [p.name for p in find_checkpoints(tmp_path / "run")] == ["step-00000015", "step-00000016"]


def test_run_with_only_nonfinite_losses_gives_up(train: Train, tmp_path: Path) -> None:
    """Behaviour: batches with a non-finite loss are skipped and reported, up to a limit.

    The error names the last good checkpoint.
    """
    run = tmp_path / "run"

    def objective(model: Any, batch: Any, scale: float) -> ObjectiveResult:
        result = next_token(model, batch, scale)
        bad = find_checkpoints(run) and model.training
        return result._replace(loss=result.loss * float("nan")) if bad else result

    with pytest.raises(LlmkitError, match="more than 8 rollbacks within 128 steps, the last at step 1[2-5]") as caught:
        train(run, objective=objective, save_every=3)
    assert "the last good checkpoint is" in caught.value.hint
    assert len([e for e in events(run) if e["event"] == "rollback"]) == 9


@pytest.mark.parametrize(
    ("file", "how"),
    [
        ("state/optimizer.safetensors", "cut"),
        ("model.safetensors", "flip"),
        ("model.safetensors", "remove"),
        ("config.json", "remove"),
        ("state/digests.json", "remove"),
    ],
)
def test_damaged_checkpoint_is_skipped(train: Train, whole: Path, tmp_path: Path, file: str, how: str) -> None:
    """Property: with a truncated file, a flipped bit or a missing file the run reports it, resumes from the
    previous checkpoint, and ends in the same bytes."""
    run, messages = tmp_path / "run", []
    with pytest.raises(Crash):
        train(run, heldout=True, eval_every=4, report=at_step(7, crash))
    damaged = run / "checkpoints" / "step-00000006" / file
    content = damaged.read_bytes()
    if how == "remove":
        damaged.unlink()
    else:
        damaged.write_bytes(content[:1000] if how == "cut" else content[:-5] + bytes([content[-5] ^ 4]) + content[-4:])
    train(run, resume=True, heldout=True, eval_every=4, say=messages.append)
    assert "step-00000006" in messages[0] and file in messages[0]
    assert weights(run) == weights(whole)
    assert [e["checkpoint"] for e in events(run) if e["event"] == "damaged checkpoint"] == ["step-00000006"]


def test_all_checkpoints_damaged(train: Train, tmp_path: Path) -> None:
    """Behaviour: if all checkpoints are damaged, the error says so, and nothing is trained."""
    with pytest.raises(Crash):
        train(tmp_path / "run", report=at_step(4, crash))
    file = tmp_path / "run" / "checkpoints" / "step-00000003" / "state" / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(LlmkitError, match="all 1 checkpoints are damaged"):
        train(tmp_path / "run", resume=True)


def test_full_disk(train: Train, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behaviour: a checkpoint that does not fit on the disk is reported and tried again after the next step.

    The previous one stays, the weights are the same.
    """
    run, messages, calls = tmp_path / "run", [], 0

    def full(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls in (2, 3):  # the second checkpoint, twice
            raise OSError(errno.ENOSPC, "No space left on device")
        write_safetensors(*arguments)

    write_safetensors = run_directory.write_safetensors
    monkeypatch.setattr(run_directory, "write_safetensors", full)
    train(run, heldout=True, eval_every=4, say=messages.append, keep=1)
    assert weights(run) == weights(whole)
    assert "No space left on device" in messages[0] and "step-00000003" in messages[0] and not messages[1:]
    failed = [e["step"] for e in events(run) if e["event"] == "save failed"]
    assert failed and 6 <= failed[0] <= 8 and not list((run / "checkpoints").glob(".*"))


def test_run_that_ends_worse_than_a_uniform_guess(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behaviour: the run ends with a warning and advice."""
    messages: list[str] = []
    fit = session.fit
    monkeypatch.setattr(session, "fit", lambda context: fit(replace(context, uniform_loss=1.0)))
    train(tmp_path / "run", max_rollbacks=0, say=messages.append)
    assert "lower the learning rate" in messages[-1]


def test_disk_full_at_the_last_checkpoint(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behaviour: if the last checkpoint does not fit on the disk, the run ends with an error that names the
    last good one, and can be resumed."""
    run = tmp_path / "run"
    original = run_directory.write_safetensors

    def full(path: Path, *arguments: Any) -> None:
        if "step-00000003" not in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        original(path, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(run_directory, "write_safetensors", full)
        with pytest.raises(LlmkitError, match="the checkpoint of step 16 could not be stored") as caught:
            train(run)
    assert "step-00000003 is the last good one" in caught.value.hint
    train(run, resume=True)
    assert steps(run) == list(range(1, 17))


def test_log_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Property: lines that did not fit on a full disk, in part or at all, are written later, in order and once."""
    log = MetricsLog(tmp_path / "metrics.jsonl", 0)
    log.write({"step": 1})

    class Full:
        def __init__(self, file: Any) -> None:
            self.file = file

        def write(self, data: bytes) -> int:
            self.file.write(data[:3])
            raise OSError(errno.ENOSPC, "No space left on device")

        def truncate(self, size: int) -> None:
            self.file.truncate(size)

    file = log._file
    monkeypatch.setattr(log, "_file", Full(file))
    log.write({"step": 2})
    log.write({"step": 3})
    log.write({"step": 3, "heldout_loss": 1.0})
    with pytest.raises(OSError, match="No space left"):
        log.sync()
    monkeypatch.setattr(log, "_file", file)
    log.write({"step": 4})
    log.sync()
    log.close()
    assert list(read_metrics(tmp_path / "metrics.jsonl")) == [
        {"step": 1},
        {"step": 2},
        {"step": 3, "heldout_loss": 1.0},
        {"step": 4},
    ]


def test_signal_in_a_step_drops_it(train: Train, whole: Path, tmp_path: Path) -> None:
    """Property: SIGTERM during a forward pass (where compilation happens) ends it at once.

    The steps before it are saved, and nothing is lost.
    """
    run, calls = tmp_path / "run", 0

    def objective(model: Any, batch: Any, scale: float) -> ObjectiveResult:
        nonlocal calls
        calls += model.training
        if calls == 9:  # step 5
            os.kill(os.getpid(), signal.SIGTERM)
            pytest.fail("the step continued")
        return next_token(model, batch, scale)

    with pytest.raises(Terminated):
        train(run, heldout=True, eval_every=4, objective=objective)
    assert [p.name for p in find_checkpoints(run)] == ["step-00000003", "step-00000004"]
    train(run, resume=True, heldout=True, eval_every=4)
    assert weights(run) == weights(whole)
    assert losses(run) == losses(whole)


def test_sigusr1_saves_and_training_continues(train: Train, whole: Path, tmp_path: Path) -> None:
    """Behaviour: SIGUSR1 saves a checkpoint of the step, and the run continues to the same bytes."""
    run = tmp_path / "run"
    train(run, heldout=True, eval_every=4, report=at_step(5, lambda: os.kill(os.getpid(), signal.SIGUSR1)))
    assert "step-00000005" in [p.name for p in find_checkpoints(run)]
    assert weights(run) == weights(whole)


def test_max_hours(train: Train, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behaviour: at the time limit the run is saved and ends with exit code 75; --resume continues it."""
    run, clock = tmp_path / "run", time.monotonic

    def an_hour_later() -> None:
        monkeypatch.setattr(time, "monotonic", lambda: clock() + 3600)

    with pytest.raises(LlmkitError, match="hours reached at step 5") as caught:
        train(run, heldout=True, eval_every=4, max_hours=1, report=at_step(5, an_hour_later))
    assert caught.value.code == 75
    assert find_checkpoints(run)[-1].name == "step-00000005"
    train(run, resume=True, heldout=True, eval_every=4)
    assert weights(run) == weights(whole)


def test_hostile_trainer_state_is_an_error(train: Train, tmp_path: Path) -> None:
    """Behaviour: a trainer.json with fields of the wrong type is refused."""
    train(tmp_path / "run")
    checkpoint = find_checkpoints(tmp_path / "run")[-1]
    file = checkpoint / "state" / "trainer.json"
    whole = json.loads(file.read_bytes())
    for changes in ({"rate": "fast"}, {"batch_size": 0}, {"step": True}, {"inputs": {}}, {"tokens": -1}):
        file.write_text(json.dumps(whole | changes))
        with pytest.raises(LlmkitError, match="not a readable trainer state"):
            load_trainer_state(checkpoint)


def test_nonfinite_values_are_null(tmp_path: Path) -> None:
    """Behaviour: a non-finite value, such as the gradient norm of a step that fp16 skips, is null."""
    log = MetricsLog(tmp_path / "metrics.jsonl", 0)
    log.write({"step": 1, "grad_norm": float("inf"), "loss": 2.0})
    log.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "grad_norm": null, "loss": 2.0}\n'


def test_log_is_cut_to_the_checkpoint(tmp_path: Path) -> None:
    """Property: lines after the checkpoint, and one truncated by a crash, are removed on a resumption."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join(json.dumps({"step": n, "loss": n / 3}).encode() + b"\n" for n in range(1, 6)) + b'{"st')
    log = MetricsLog(path, 3)
    assert log.last == {"step": 3, "loss": 1.0}
    log.write({"step": 3, "loss": 1.0, "heldout_loss": 2.0})
    log.write({"step": 4, "loss": 5.0})
    log.close()
    assert [r["step"] for r in read_metrics(path)] == [1, 2, 3, 4]
    assert list(read_metrics(path))[2]["heldout_loss"] == 2.0


@pytest.mark.parametrize("width", [1, 30_000])
def test_log_of_a_long_run_is_read_from_its_end(tmp_path: Path, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Property: the result does not depend on the length of lines; only the end of a long log is read."""
    path = tmp_path / "metrics.jsonl"
    count = 3000 if width == 1 else 20
    path.write_bytes(b"".join(json.dumps({"step": n, "x": "y" * width}).encode() + b"\n" for n in range(1, count + 1)))
    parsed, parse = [], metrics._parse
    monkeypatch.setattr(metrics, "_parse", lambda line: parsed.append(line) or parse(line))
    log = MetricsLog(path, count - 2)
    assert len(parsed) == 3 and log.last["step"] == count - 2
    log.close()
    monkeypatch.undo()
    assert [r["step"] for r in read_metrics(path)] == list(range(1, count - 1))
    MetricsLog(path, 0).close()
    assert path.read_bytes() == b""

"""The run directory, and checkpoints that are whole or not there.

    RUN/config.toml               resolved options; `-c RUN/config.toml` trains the same again
    RUN/metrics.jsonl             one line a step
    RUN/events.jsonl              starts, resumptions, stops; spikes, rollbacks and their documents; lost processes
    RUN/samples.jsonl, RUN/trace/     what the model said to prompts (samples.py); from steps to documents (trace.py)
    RUN/checkpoints/step-00000500/    a Hugging Face model directory, and
        state/optimizer.safetensors   the optimiser's moments by parameter
        state/trainer.json            step, tokens, learning rate, options, digests of the inputs, environment, the guard's memory
        state/digests.json            xxh3-128 of every other file
    RUN/latest, RUN/final         links to the last checkpoint and to the finished model

A checkpoint is written under a temporary name, synced and renamed, so what bears its name is complete; whether it still is, its digests say
before a run goes on from it. The state is safetensors and JSON because torch's own formats (DCP's metadata, torch.save) are pickles, which run code
when they are read. There is no random state: the order of the data is a function of the step, and nothing else is drawn after the start.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from llmkit.errors import LlmkitError, UsageError
from llmkit.io.atomic import atomic_file, check_output
from llmkit.io.locks import lock
from llmkit.io.run_layout import (
    CHECKPOINTS,
    FINAL,
    LATEST,
    STATE,
    checkpoint_name,
    find_checkpoints,
    resolve_model,
    step_of,
)
from llmkit.lineage.formats import digest_path
from llmkit.lineage.outputs import artefact_directory
from llmkit.model.pretrained.directory import WEIGHTS
from llmkit.model.pretrained.safetensors import layout_of, write_safetensors
from llmkit.options import former_names
from llmkit.training.options import RampOptions, ScheduleOptions

OPTIMIZER = "optimizer.safetensors"
TRAINER = "trainer.json"
DIGESTS = "digests.json"
CONFIG = "config.toml"
EVENTS = "events.jsonl"
LEFTOVERS = {".lock", CHECKPOINTS, "data"}  # of a run that was killed before it began


@dataclass(slots=True)
class TrainerState:
    """What a checkpoint knows besides tensors; everything in it is a function of the options and the data."""

    command: str
    options: dict[str, Any]
    inputs: list[str]  # digests
    step: int
    tokens: int
    rate: float
    batch_size: int
    length: int
    environment: dict[str, Any]  # see environment.py
    scaler: dict[str, Any]
    guard: dict[str, Any] = field(default_factory=dict)  # training.guard's state, the skipped steps in it
    noise: list[float] = field(default_factory=list)  # of the gradient: training.noise

    def to_json(self) -> bytes:
        return json.dumps({key: getattr(self, key) for key in self.__slots__}, indent=1, sort_keys=True).encode()


# What they have to be in a file, which may be anybody's.
FIELDS: dict[str, type | tuple[type, ...]] = {
    "command": str,
    **dict.fromkeys(("options", "environment", "scaler", "guard"), dict),
    **dict.fromkeys(("step", "tokens", "batch_size", "length"), int),
    **dict.fromkeys(("inputs", "noise"), list),
    "rate": (int, float),
}


class RunDirectory:
    """One run on disk. Only the main process writes."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.checkpoints_path = self.path / CHECKPOINTS
        self.metrics = self.path / "metrics.jsonl"

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return find_checkpoints(self.path)

    @property
    def finished(self) -> bool:
        """Whether the last step is done and its model is linked."""
        return (self.path / FINAL).exists()

    def event(self, name: str, **details: Any) -> None:
        """Append a line to events.jsonl."""
        record = {"event": name, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())} | details
        with suppress(OSError), open(self.path / EVENTS, "a") as file:  # a full disk is no reason to stop
            file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def save(
        self,
        state: TrainerState,
        tensors: Mapping[str, torch.Tensor],
        write_model: Callable[[Path], None],
        keep: int = 0,
        keep_every: int = 0,
    ) -> Path:
        """Store a checkpoint, point `latest` at it, and remove all but the last `keep` (0: remove none) and those of every `keep_every` steps."""
        target = self.checkpoints_path / checkpoint_name(state.step)
        with artefact_directory(target, force=True) as partial:
            write_model(partial)
            (partial / STATE).mkdir()
            write_safetensors(
                partial / STATE / OPTIMIZER, layout_of(tensors), lambda name: tensors[name], {"format": "pt"}
            )
            (partial / STATE / TRAINER).write_bytes(state.to_json())
            (partial / STATE / DIGESTS).write_text(json.dumps(_digests(partial), indent=1))
        self.point_at(target)
        since = state.guard.get("since", 0)  # a doubtful state may have to go back before that
        checkpoints = self.checkpoints()
        for old, newer in zip(checkpoints[:-keep] if keep else [], checkpoints[1:], strict=False):
            if (not keep_every or step_of(old) % keep_every) and not step_of(old) < since <= step_of(newer):
                self._remove(old)
        return target

    def forget(self, after: int) -> Path | None:
        """Remove the checkpoints of steps after this one, and return the last that is left."""
        left = [checkpoint for checkpoint in self.checkpoints() if step_of(checkpoint) <= after]
        with suppress(OSError):
            for checkpoint in self.checkpoints()[len(left) :]:
                self._remove(checkpoint)
            if left:
                self.point_at(left[-1])
            else:
                (self.path / LATEST).unlink(missing_ok=True)
        return left[-1] if left else None

    def set_aside(self, checkpoint: Path) -> None:
        """Let a damaged checkpoint bear another name, so that nothing takes it for one."""
        aside = checkpoint.with_name(f"damaged-{checkpoint.name}")
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(checkpoint, aside)

    def point_at(self, checkpoint: Path) -> None:
        """Link `latest`."""
        self._link(LATEST, checkpoint)

    def finish(self, checkpoint: Path) -> None:
        """Link `final`: the run is complete."""
        self._link(FINAL, checkpoint)

    def empty(self, *kept: str) -> None:
        """Remove everything but what is named."""
        for entry in self.path.iterdir():
            if entry.name in kept:
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()

    def start_anew(self, *kept: str) -> None:
        """Make room for another run: remove all but the lock, which is held, and what is named."""
        self.empty(".lock", *kept)
        self.checkpoints_path.mkdir(exist_ok=True)

    def clean(self) -> None:
        """Remove what a killed run left half-written."""
        for partial in self.checkpoints_path.glob(".*"):
            shutil.rmtree(partial, ignore_errors=True)

    def _link(self, name: str, target: Path) -> None:
        partial = self.path / f".{name}.partial"
        partial.unlink(missing_ok=True)
        partial.symlink_to(target.relative_to(self.path))
        os.replace(partial, self.path / name)

    def _remove(self, checkpoint: Path) -> None:
        # Under a hidden name first: half a checkpoint must never bear the name of a whole one.
        hidden = checkpoint.with_name(f".{checkpoint.name}.removed")
        os.rename(checkpoint, hidden)
        shutil.rmtree(hidden, ignore_errors=True)


@contextmanager
def open_run(path: str, *, resume: bool, force: bool, main: bool = True) -> Iterator[RunDirectory]:
    """The run directory at `path`, locked, new or to be resumed.

    Raises LlmkitError where something stands in its place, LockedError where another process trains there. Processes other than `main`
    look only: call it there after the main process has entered.
    """
    directory = RunDirectory(path)
    if not main:
        yield directory
        return
    check_run(path, resume=resume, force=force)
    given = directory.path.is_dir() and not (directory.path / ".lock").exists()  # empty, but somebody made it
    directory.path.mkdir(exist_ok=True)
    with lock(directory.path / ".lock"):
        directory.checkpoints_path.mkdir(exist_ok=True)
        directory.clean()
        try:
            yield directory
        except BaseException as error:
            begun = (directory.path / CONFIG).exists()
            failed = isinstance(error, Exception) and not resume and not (directory.path / EVENTS).exists()
            if not begun or failed:  # it did not come to a step: leave nothing that stands in the way
                with suppress(OSError):  # what went wrong is said already
                    directory.empty(".lock")
                    (directory.path / ".lock").unlink(missing_ok=True)
                    if not given:
                        directory.path.rmdir()
            raise


def check_run(path: str, *, resume: bool, force: bool) -> None:
    """Raise where a run at `path` may not begin: it exists and is neither to be resumed nor replaced, or is no run at all."""
    place = Path(path)
    if resume and force:
        raise UsageError("--resume and --force exclude each other", "--resume goes on, --force starts anew")
    names = {entry.name for entry in place.iterdir()} if place.is_dir() else {""} if place.exists() else set()
    if not names or (".lock" in names and names <= LEFTOVERS):
        check_output(place, force=True)
    elif CONFIG not in names and (resume or force):
        raise LlmkitError(f"{path} exists and is not a run", "choose another output")
    elif not (resume or force):
        hint = "--resume goes on with it, -f replaces it" if CONFIG in names else "choose another output"
        raise LlmkitError(f"{path} exists", hint)


def write_config(directory: RunDirectory, text: str) -> None:
    """Store the resolved options."""
    with atomic_file(directory.path / CONFIG, force=True) as sink:
        sink.write(text.encode())


def _digests(checkpoint: Path) -> dict[str, str]:
    """xxh3-128 of every file but the list itself, by its place in the checkpoint."""
    names = sorted(str(p.relative_to(checkpoint)) for p in checkpoint.rglob("*") if p.is_file() and p.name != DIGESTS)
    return {name: digest_path(checkpoint / name) for name in names}


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files; None where all are there and as they were written. Reads every byte."""
    try:
        expected = json.loads((checkpoint / STATE / DIGESTS).read_bytes())
        found = _digests(checkpoint)
    except (OSError, ValueError, RecursionError, LlmkitError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        return f"{STATE}/{DIGESTS} is not readable ({reason})"
    if not isinstance(expected, dict):
        return f"{STATE}/{DIGESTS} holds no table"
    for name, digest in expected.items():
        if found.get(name) != digest:
            return f"{name} is not what was written" if name in found else f"{name} is missing"
    return None


def starting_point(path: str, step: int | None) -> tuple[Path, TrainerState | None]:
    """The model directory to go on from and the state beside it: a run's checkpoint `step` (None: its last), a checkpoint, or a bare model (None)."""
    found = find_checkpoints(path)
    if not found:
        directory = resolve_model(path)
        if step is not None:
            raise LlmkitError(f"{path}: no checkpoints to choose step {step} from", "give the run, or leave --from out")
        return _intact(directory), load_trainer_state(directory) if (directory / STATE / TRAINER).exists() else None
    if step is not None:
        chosen = [checkpoint for checkpoint in found if step_of(checkpoint) == step]
        if not chosen:
            steps = ", ".join(str(step_of(checkpoint)) for checkpoint in found)
            raise LlmkitError(f"{path}: no checkpoint at step {step}", f"it has {steps}")
        return _intact(chosen[0]), load_trainer_state(chosen[0])
    return _intact(found[-1]), load_trainer_state(found[-1])


def _intact(directory: Path) -> Path:
    """A model directory to start from; LlmkitError where it is a checkpoint whose files are no longer what was written."""
    if (directory / STATE / DIGESTS).exists() and (wrong := damage(directory)):
        raise LlmkitError(
            f"{directory}: {wrong}",
            f"take a checkpoint before it; one changed on purpose goes without {STATE}/{DIGESTS}",
        )
    return directory


def load_trainer_state(checkpoint: Path) -> TrainerState:
    """trainer.json of a checkpoint; LlmkitError where it is missing or damaged."""
    path = checkpoint / STATE / TRAINER
    try:
        fields = {"environment": {}} | json.loads(path.read_bytes())
        state = TrainerState(**{key: fields[key] for key in TrainerState.__slots__})
        for name, kind in FIELDS.items():
            if not isinstance(getattr(state, name), kind) or isinstance(getattr(state, name), bool):
                raise TypeError(f"{name} is {getattr(state, name)!r}")
        if min(state.batch_size, state.length) < 1 or min(state.step, state.tokens, state.rate) < 0:
            raise ValueError("a size below 1, or a count below 0")
        renamed = former_names(RampOptions if state.command == "anneal" else ScheduleOptions)
        state.options = {renamed.get(name, name): value for name, value in state.options.items()}
        return state
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise LlmkitError(
            f"{path}: not a readable trainer state ({error})", "take another checkpoint, or start anew with -f"
        ) from error


def load_optimizer_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Tensors of the optimiser's state; LlmkitError where the file is missing or damaged."""
    return _load_file(checkpoint / STATE / OPTIMIZER, "optimiser state")


def _load_file(path: Path, what: str) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise LlmkitError(
            f"{path}: not a readable {what} ({error})", "take another checkpoint, or start anew with -f"
        ) from error


def load_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint by name; LlmkitError where the file is missing or damaged."""
    return _load_file(checkpoint / WEIGHTS, "weights")


def refuse_changes(old: TrainerState, new: TrainerState) -> None:
    """Raise LlmkitError where a resumed run would not be the run that was started; names what differs."""
    if old.command != new.command:
        raise LlmkitError(f"the run was started by `llmkit {old.command}`", "resume it with the same command")
    current = json.loads(json.dumps(new.options))
    for key in sorted(old.options.keys() | current.keys()):
        before, now = old.options.get(key), current.get(key)
        if before != now:
            was, is_ = ("not given" if value is None else repr(value) for value in (before, now))
            raise LlmkitError(
                f"--{key.rstrip('_').replace('_', '-')} was {was} when the run was started and is {is_} now",
                "resume with the options of its config.toml, or choose another output",
            )
    if old.inputs != new.inputs:
        raise LlmkitError("the inputs are not those that the run was started with", "choose another output")

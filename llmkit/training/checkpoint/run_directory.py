"""The run directory, whose checkpoints are either complete or absent.

    RUN/config.toml               resolved options; `-c RUN/config.toml` trains the same run again
    RUN/metrics.jsonl             one line per step
    RUN/events.jsonl              starts, resumptions, stops; spikes, rollbacks and their documents; lost processes
    RUN/samples.jsonl, RUN/trace/     completions of prompts (samples.py); the documents of each step (trace.py)
    RUN/checkpoints/STEP/         a Hugging Face model directory (its name: io/run_layout.py), and
        state/optimizer.safetensors   the optimizer's moments by parameter
        state/trainer.json            step, tokens, learning rate, options, input digests, environment, guard state
        state/digests.json            xxh3-128 of every other file
    RUN/latest, RUN/final         links to the last checkpoint and to the finished model
    RUN/digests.json              of a finished run: xxh3-128 of its files outside the checkpoints

A checkpoint is written under a temporary name, synced and renamed, so one with its final name was complete;
its digests are checked before a run resumes from it. The state is safetensors and JSON because torch's own
formats (DCP's metadata, torch.save) are pickles, which run code when they are read. There is no random state:
the order of the data is a function of the step, and nothing else is drawn after the start.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from llmkit.errors import LlmkitError, UsageError
from llmkit.io.atomic import atomic_file, check_output, full_disk_names, lock, own_file
from llmkit.io.digest import digest_stored
from llmkit.io.run_layout import (
    CHECKPOINTS,
    DIGESTS,
    FINAL,
    LATEST,
    SEALED,
    STATE,
    checkpoint_name,
    files_below,
    find_checkpoints,
    member,
    regular,
    resolve_model,
    step_of,
)
from llmkit.lineage.formats import digest_path, seal
from llmkit.lineage.outputs import HINT_NOT_OURS, artefact_directory
from llmkit.model.pretrained.safetensors import layout_of, write_safetensors
from llmkit.training.checkpoint.trainer_state import OPTIMIZER, TRAINER, TrainerState, load_trainer_state

CONFIG = "config.toml"
EVENTS = "events.jsonl"
HEAD = b"# llmkit "  # of config.toml
# All that a run may hold: -f replaces a directory that holds anything else.
LAYOUT = {*SEALED, CHECKPOINTS, LATEST, FINAL, DIGESTS, ".lock", "tracker", "wandb"}
LEFTOVERS = {".lock", CHECKPOINTS, "data"}  # of a run that was killed before it started
DIRECTORIES = (CHECKPOINTS, "data", "trace", "tracker", "wandb")
FILES = LAYOUT - {*DIRECTORIES, LATEST, FINAL}


class RunDirectory:
    """A run on disk. Only the main process writes."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.checkpoints_path = self.path / CHECKPOINTS
        self.metrics = self.path / "metrics.jsonl"

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return find_checkpoints(self.path)

    @property
    def finished(self) -> bool:
        """Whether the last step is finished and its model is linked."""
        return (self.path / FINAL).exists()

    def event(self, name: str, **details: Any) -> None:
        """Append a line to events.jsonl."""
        record = {"event": name, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())} | details
        # A full disk must not stop the run.
        with suppress(OSError), open(self.path / EVENTS, "a", encoding="utf-8", opener=own_file) as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def save(
        self,
        state: TrainerState,
        tensors: Mapping[str, torch.Tensor],
        write_model: Callable[[Path], None],
        keep: int = 0,
        keep_every: int = 0,
    ) -> Path:
        """Store a checkpoint and link it as `latest`; then remove all but the last `keep` (0: remove none) and
        those of every `keep_every` steps.

        A checkpoint before a current series of spikes stays too, since a rollback may need it.
        """
        target = self.checkpoints_path / checkpoint_name(state.step)
        with artefact_directory(target, force=True) as partial:
            write_model(partial)
            seal(partial)
            (partial / STATE).mkdir(exist_ok=True)
            write_safetensors(
                partial / STATE / OPTIMIZER, layout_of(tensors), lambda name: tensors[name], {"format": "pt"}
            )
            (partial / STATE / TRAINER).write_bytes(state.to_json())
            (partial / STATE / DIGESTS).write_text(json.dumps(_file_digests(partial), indent=1), encoding="utf-8")
        self.link_latest(target)
        spike_start = state.guard.get("since", 0)
        checkpoints = self.checkpoints()
        for old, newer in zip(checkpoints[:-keep] if keep else [], checkpoints[1:], strict=False):
            if (not keep_every or step_of(old) % keep_every) and not step_of(old) < spike_start <= step_of(newer):
                self._remove(old)
        return target

    def remove_checkpoints_after(self, step: int) -> Path | None:
        """Remove the checkpoints of steps after this one; returns the last remaining one."""
        remaining = [checkpoint for checkpoint in self.checkpoints() if step_of(checkpoint) <= step]
        with suppress(OSError):
            for checkpoint in self.checkpoints()[len(remaining) :]:
                self._remove(checkpoint)
            if remaining:
                self.link_latest(remaining[-1])
            else:
                (self.path / LATEST).unlink(missing_ok=True)
        return remaining[-1] if remaining else None

    def set_aside(self, checkpoint: Path) -> None:
        """Rename a damaged checkpoint, so that it is no longer taken for one."""
        aside = checkpoint.with_name(f"damaged-{checkpoint.name}")
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(checkpoint, aside)

    def link_latest(self, checkpoint: Path) -> None:
        """Link the checkpoint as `latest`."""
        self._link(LATEST, checkpoint)

    def link_final(self, checkpoint: Path) -> None:
        """Link the checkpoint as `final`: the run is complete."""
        self._link(FINAL, checkpoint)

    def seal(self) -> None:
        """Store the digests of the files beside the checkpoints of a finished run, for `lineage --check`."""
        digests = {name: digest_stored(str(self.path / name)) for name in files_below(self.path, SEALED)}
        with (
            suppress(OSError),  # a full disk must not fail a finished run
            atomic_file(self.path / DIGESTS, force=True, follow=False) as sink,
        ):
            sink.write(json.dumps(digests, indent=1).encode())

    def remove_all_except(self, *names: str) -> None:
        """Remove everything in the directory except these names; last what shows that it is a run."""
        for entry in sorted(self.path.iterdir(), key=lambda entry: entry.name == CONFIG):
            if entry.name in names:
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()

    def reset(self, *names: str) -> None:
        """Empty the directory for another run, except for these names and the lock, which is held."""
        self.remove_all_except(".lock", *names)
        self.checkpoints_path.mkdir(exist_ok=True)

    def remove_partial_files(self) -> None:
        """Remove half-written checkpoints, files and links of a killed run."""
        for partial in self.checkpoints_path.glob(".*"):
            shutil.rmtree(partial, ignore_errors=True)
        for entry in self.path.iterdir():
            if _is_partial(entry.name) and (entry.is_symlink() or entry.is_file()):
                entry.unlink()

    def _link(self, name: str, target: Path) -> None:
        partial = self.path / f".{name}.partial"
        partial.unlink(missing_ok=True)
        partial.symlink_to(target.relative_to(self.path))
        os.replace(partial, self.path / name)

    def _remove(self, checkpoint: Path) -> None:
        # Hidden first: an incomplete checkpoint must never have the name of a complete one.
        hidden = checkpoint.with_name(f".{checkpoint.name}.removed")
        os.rename(checkpoint, hidden)
        shutil.rmtree(hidden, ignore_errors=True)


@contextmanager
def open_run(path: str, *, resume: bool, force: bool, main: bool = True) -> Iterator[RunDirectory]:
    """The run directory at `path`, locked; a new one, or one to resume.

    Raises LlmkitError if something else exists at `path`, LockedError if another process trains there.
    Processes other than `main` only read: call it there after the main process has entered.
    """
    directory = RunDirectory(path)
    if not main:
        yield directory
        return
    check_run(path, resume=resume, force=force)
    preexisting = directory.path.is_dir() and not (directory.path / ".lock").exists()  # empty, but made by somebody
    directory.path.mkdir(exist_ok=True)
    with lock(directory.path / ".lock"):
        directory.checkpoints_path.mkdir(exist_ok=True)
        directory.remove_partial_files()
        try:
            with full_disk_names(path):
                yield directory
        except BaseException as error:
            started = (directory.path / CONFIG).exists()
            failed = isinstance(error, Exception) and not resume and not (directory.path / EVENTS).exists()
            if not started or failed:  # it did not reach a step: leave nothing behind
                with suppress(OSError):  # the error itself is reported already
                    directory.remove_all_except(".lock")
                    (directory.path / ".lock").unlink(missing_ok=True)
                    if not preexisting:
                        directory.path.rmdir()
            raise


def _is_partial(name: str) -> bool:
    """Whether a name is one under which a file is written, see io/atomic.py."""
    return name.startswith(".") and name.endswith(".partial")


def check_run(path: str, *, resume: bool, force: bool) -> None:
    """Raise if no run may start at `path`: one exists and is neither to be resumed nor replaced, or something
    else exists there."""
    directory = Path(path)
    if resume and force:
        raise UsageError("--resume and --force exclude each other", "--resume continues the run, --force replaces it")
    names = (
        {entry.name for entry in directory.iterdir()} if directory.is_dir() else {""} if directory.exists() else set()
    )
    leftovers = all(name in LEFTOVERS or _is_partial(name) for name in names)
    if (CONFIG in names and (resume or force)) or leftovers:
        _check_members(directory)
    if not names or (".lock" in names and leftovers):
        check_output(directory, force=True)
    elif CONFIG not in names and (resume or force):
        raise LlmkitError(f"{path} exists and is not a run", "choose another output")
    elif force and (foreign := sorted(name for name in names - LAYOUT if not name.endswith(".partial"))):
        raise LlmkitError(f"{path} holds {foreign[0]}, which is of no run; -f does not replace it", HINT_NOT_OURS)
    elif force and ".lock" not in names and not _begins(directory / CONFIG, HEAD):
        raise LlmkitError(f"{path}: {CONFIG} is not of a run; -f does not replace it", HINT_NOT_OURS)
    elif not (resume or force):
        hint = "--resume continues it, -f replaces it" if CONFIG in names else "choose another output"
        raise LlmkitError(f"{path} exists", hint)


def _check_members(run: Path) -> None:
    """Raise LlmkitError where a run, which somebody else may have made, would write or remove files outside of it."""
    directories = [*(run / name for name in DIRECTORIES), *find_checkpoints(run)]
    for path in (*directories, *(run / name for name in sorted(FILES))):
        is_right = path.is_dir() if path in directories else path.is_file()
        if path.is_symlink() or (path.exists() and not is_right):
            kind = "a symbolic link" if path.is_symlink() else "neither a regular file nor a directory of a run"
            raise LlmkitError(
                f"{path}: {kind}", "a run writes only inside its own directory: replace it, or choose another output"
            )
    for name in (LATEST, FINAL):  # links to checkpoints
        member(run, name)


def _begins(path: Path, head: bytes) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(len(head)) == head
    except OSError:
        return False


def write_config(directory: RunDirectory, text: str) -> None:
    """Store the resolved options."""
    with atomic_file(directory.path / CONFIG, force=True, follow=False) as sink:
        sink.write(text.encode())


def _file_digests(checkpoint: Path) -> dict[str, str]:
    """xxh3-128 of every file except the list itself, by its path in the checkpoint."""
    names = sorted(str(p.relative_to(checkpoint)) for p in checkpoint.rglob("*") if p.is_file() and p.name != DIGESTS)
    return {name: digest_path(checkpoint / name) for name in names}


def find_damage(checkpoint: Path) -> str | None:
    """The first problem with a checkpoint's files; None if all are present and unchanged. Reads every byte."""
    try:
        expected = json.loads(regular(checkpoint / STATE / DIGESTS).read_bytes())
        actual = _file_digests(checkpoint)
    except (OSError, ValueError, RecursionError, LlmkitError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        return f"{STATE}/{DIGESTS} is not readable ({reason})"
    if not isinstance(expected, dict):
        return f"{STATE}/{DIGESTS} holds no table"
    for name, digest in expected.items():
        if actual.get(name) != digest:
            return f"{name} is not what was written" if name in actual else f"{name} is missing"
    return None


def starting_point(path: str, step: int | None) -> tuple[Path, TrainerState | None]:
    """The model directory to start from and its trainer state (None for a bare model).

    `path` is a run (its checkpoint of `step`, None: the last), a checkpoint, or a model directory.
    """
    checkpoints = find_checkpoints(path)
    if not checkpoints:
        directory = resolve_model(path)
        if step is not None:
            raise LlmkitError(f"{path}: no checkpoints to choose step {step} from", "name the run, or leave out --step")
        has_state = (directory / STATE / TRAINER).exists()
        return _require_intact(directory), load_trainer_state(directory) if has_state else None
    if step is not None:
        matches = [checkpoint for checkpoint in checkpoints if step_of(checkpoint) == step]
        if not matches:
            steps = ", ".join(str(step_of(checkpoint)) for checkpoint in checkpoints)
            raise LlmkitError(f"{path}: no checkpoint at step {step}", f"it has {steps}")
        return _require_intact(matches[0]), load_trainer_state(matches[0])
    return _require_intact(checkpoints[-1]), load_trainer_state(checkpoints[-1])


def _require_intact(directory: Path) -> Path:
    """`directory` itself; raises LlmkitError if it is a checkpoint whose files have changed."""
    if (directory / STATE / DIGESTS).exists() and (problem := find_damage(directory)):
        raise LlmkitError(
            f"{directory}: {problem}",
            f"use an earlier checkpoint; if you changed it on purpose, remove {STATE}/{DIGESTS}",
        )
    return directory

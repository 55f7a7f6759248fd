"""Names inside a run directory, and the model directory that a user's path stands for. No other module spells
these names.

    RUN/checkpoints/step-00000500/      a Hugging Face model directory, and state/ of the trainer and the optimizer
    RUN/latest, RUN/final               links to the last checkpoint and to the finished model

    find_checkpoints("run/")            # complete checkpoints, oldest first
    resolve_model("run/")               # run/final

Lineage and token shards also treat a run as its final model, so this is here rather than beside the code that
writes runs (training/checkpoint/run_directory.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from llmkit.errors import LlmkitError
from llmkit.io.atomic import is_special

FINAL, LATEST = "final", "latest"
CHECKPOINTS = "checkpoints"
STATE = "state"
DIGESTS = "digests.json"  # in the state of a checkpoint: of its other files; in a finished run: of its own files
# What the latter lists, where it exists: files, and directories with all that is in them.
SEALED = (
    "config.toml",
    "events.jsonl",
    "metrics.jsonl",
    "samples.jsonl",
    "reference.safetensors",
    "trace",
    "data",
)
ADAPTER_CONFIG = "adapter_config.json"  # in place of the config.json of a model, whose adapters are in the directory
RUN_COMMANDS = ("train", "anneal", "sft", "dpo")  # commands that write runs
STEP_PREFIX = "step-"
STEP_DIGITS = 8  # at least; also what makes names sort by step
MAX_DIGITS = 18  # of a step that is read from a name

_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")  # the names of blobs
_NAME = re.compile(rf"{re.escape(STEP_PREFIX)}(\d{{{STEP_DIGITS},}})")


def checkpoint_name(step: int) -> str:
    """The directory name of the checkpoint after `step` steps, `step-00000500`."""
    return f"{STEP_PREFIX}{step:0{STEP_DIGITS}d}"


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    match = _NAME.fullmatch(checkpoint.name)
    assert match
    return int(match[1])


def parse_step(text: str) -> int | None:
    """The step that `step-00000500`, `step-500` or `500` means; None for any other text."""
    digits = text.removeprefix(STEP_PREFIX)
    return int(digits) if digits.isascii() and digits.isdigit() and len(digits.lstrip("0")) <= MAX_DIGITS else None


def find_checkpoints(run: str | Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    candidates = (Path(run) / CHECKPOINTS).glob(f"{STEP_PREFIX}*")
    return sorted((path for path in candidates if _NAME.fullmatch(path.name)), key=step_of)


def files_below(directory: Path, names: Iterable[str]) -> list[str]:
    """Relative paths of these files and of the files in these directories, sorted."""
    paths = (path for name in names for path in (directory / name, *(directory / name).rglob("*")) if path.is_file())
    return sorted(str(path.relative_to(directory)) for path in paths)


def is_run(path: Path) -> bool:
    """Whether this is a run directory, finished or not."""
    return (path / CHECKPOINTS).is_dir()


def final_model(path: Path) -> Path:
    """The final model of a finished run; any other path unchanged."""
    return path / FINAL if (path / FINAL).is_dir() else path


def member(directory: Path, name: str) -> Path:
    """The path of a file in somebody's model directory, whether it exists or not.

    LlmkitError for a symbolic link that leads out of the directory, since what it leads to would end up in outputs, and
    for what `regular` refuses. Links into the blobs of a cache of Hugging Face are followed.
    """
    file = directory / name
    if file.is_symlink():
        try:
            base, target = directory.resolve(), file.resolve()
        except RuntimeError:  # what Python makes of ELOOP
            raise LlmkitError(f"{file}: a symbolic link that leads to itself", "remove it") from None
        if not target.is_relative_to(base) and not _is_blob(target, base):
            raise LlmkitError(f"{file}: a symbolic link out of its directory", "replace it by a copy if you trust it")
    return regular(file)


def regular(path: Path) -> Path:
    """`path` itself, of a file that the user did not name, whether it exists or not.

    LlmkitError for a device, a pipe or a socket: it may be read without end.
    """
    if is_special(path):
        raise LlmkitError(f"{path}: not a regular file", "somebody put it there to be read without end: remove it")
    return path


def _is_blob(target: Path, base: Path) -> bool:
    """Whether `target` is in the blobs beside the snapshots that hold the directory `base`, both resolved.

    Blobs may be elsewhere, by a link of that name, and older versions linked to them from any --local-dir. A link of
    somebody else's making could lead anywhere, so there the name must be a digest.
    """
    blobs = [folder.parent / "blobs" for folder in base.parents if folder.name == "snapshots"]
    if target.parent in blobs:
        return True
    is_cache = target.parent.name == "blobs" and target.parent.parent.name.startswith("models--")
    is_cache = is_cache or target.parent in [folder.resolve() for folder in blobs]
    return is_cache and _DIGEST.fullmatch(target.name) is not None


def resolve_model(path: str | Path) -> Path:
    """The directory of a model or adapter that `path` stands for: itself, or the final one of a run.

    LlmkitError if there is none.
    """
    path = Path(path)
    if any((path / name).is_file() for name in ("config.json", ADAPTER_CONFIG)):
        return path
    if (final := final_model(path)) != path:
        return final
    if is_run(path):
        raise LlmkitError(
            f"{path}: the run has no final model yet", f"finish it with --resume, or name {path}/{LATEST}"
        )
    if not path.exists():
        raise LlmkitError(
            f"{path}: no such file or directory", "give a model directory or a run; nothing is downloaded"
        )
    raise LlmkitError(f"{path}: not a model directory (no config.json)", "give a Hugging Face directory or a run")

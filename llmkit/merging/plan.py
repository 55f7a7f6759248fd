"""What a call of `llmkit average` merges: the model directories, the resolved method, and the inputs of its
lineage record.

plan = plan_merge(["run/"], "uniform", last=3) plan.paths                                          # the last
three checkpoints of the run
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llmkit.errors import LlmkitError, UsageError
from llmkit.io.run_layout import resolve_model, step_of
from llmkit.merging.methods import Merge, Numbers, check_required, find_method, methods_with


@dataclass(frozen=True, slots=True)
class MergePlan:
    """`paths` are the model directories in order; `inputs` are (role, name as given, path) for lineage.

    A run stands for its last checkpoint in `inputs`. `steps` are those of the checkpoints, if they were
    selected by `last`.
    """

    merge: Merge
    paths: list[Path]
    inputs: list[tuple[str, str, Path]]
    steps: list[int] | None


def plan_merge(
    models: Sequence[str],
    method: str,
    numbers: Numbers,
    *,
    last: int | None = None,
    base: str | None = None,
    heldout: Sequence[str] = (),
) -> MergePlan:
    """Resolve models, checkpoints and numbers of a call. Raises UsageError for a wrong call, LlmkitError for
    missing files.
    """
    groups = [_model_directories(model, last) for model in models]
    paths = [path for group in groups for path in group]
    if len(paths) < 2 and method not in methods_with("base"):
        raise UsageError(
            "one model is not enough",
            "name several, the last checkpoints of a run with --last K, or an adapter with --merge-adapter",
        )
    merge = find_method(method).resolve(numbers, len(paths))
    check_required(method, {"base": base, "heldout": heldout})
    inputs = [("base", base, resolve_model(base))] if base else []
    inputs += [("input", model, group[-1]) for model, group in zip(models, groups, strict=True)]
    inputs += [("heldout", path, Path(path)) for path in heldout]
    for path in heldout:
        if not Path(path).exists():
            raise LlmkitError(f"{path}: no such file or directory", "name shards or documents, without wildcards")
    steps = None if last is None else [step_of(path) for path in paths]
    return MergePlan(merge, paths, inputs, steps)


def _model_directories(model: str, last: int | None) -> list[Path]:
    """The directories that `model` stands for: itself, or the `last` checkpoints of the run, oldest first."""
    if last is None:
        return [resolve_model(model)]
    from llmkit.io.run_layout import find_checkpoints

    checkpoints = find_checkpoints(model)
    if not checkpoints:
        raise LlmkitError(f"{model}: no checkpoints", "--last takes a run; give model directories without it")
    if len(checkpoints) < last:
        raise LlmkitError(
            f"{model}: {len(checkpoints)} checkpoints, not {last}",
            "save more often (--save-every), keep more (--keep), or train longer",
        )
    return checkpoints[-last:]

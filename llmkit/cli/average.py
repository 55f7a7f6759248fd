"""`llmkit average`: average the weights of models or checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmkit.cli.options import Run, command
from llmkit.errors import LlmkitError, UsageError


@command(
    examples=(
        "llmkit average run/ --last 3 -o averaged/",
        "llmkit average base/ sft/ --method weighted --weights 1,3 -o merged/",
    ),
)
def main(
    run: Run,
    models: Annotated[list[str], typer.Argument(metavar="MODEL", help="Model directories or runs, in order")],
    method: Annotated[
        str, typer.Option("--method", metavar="NAME", help="uniform, weighted, or exponential (the last count most)")
    ] = "uniform",
    last: Annotated[
        int | None, typer.Option("--last", metavar="K", min=1, help="The last K checkpoints of each run")
    ] = None,
    weights: Annotated[
        str | None, typer.Option("--weights", metavar="LIST", help="One a model, relative: 1,1,2 (weighted)")
    ] = None,
    decay: Annotated[
        float | None,
        typer.Option("--decay", help="What each step keeps of the mean so far; by default 0.9 (exponential)"),
    ] = None,
) -> None:
    """Average the weights of models of one architecture and size, or with --last those of the last checkpoints of a run.

    Computed in float32, one tensor at a time; stored in the first model's type, with its configuration and tokenizer. exponential starts with
    the first model and moves by 1 - DECAY towards each of the others. Whether an average is better than its parts, `llmkit eval` says.
    """
    for option, value, wanted in (("--weights", weights, "weighted"), ("--decay", decay, "exponential")):
        if value is not None and method != wanted:
            raise UsageError(f"{option} is of --method {wanted}", f"add --method {wanted}")
    if run.output is None:
        raise UsageError("no output", "name the directory of the averaged model with -o")
    from llmkit.io.atomic import atomic_directory
    from llmkit.io.lineage import Input, base_name, digest_path, read_lineage
    from llmkit.model.checkpoint import load_info, open_weights
    from llmkit.training import average
    from llmkit.training.state import step_of

    groups = [_checkpoints(model, last) for model in models]
    places = [place for group in groups for place in group]
    if len(places) < 2:
        raise UsageError("one model is no average", "name several, or the last checkpoints of a run with --last K")
    shares = average.shares(method, len(places), _numbers(weights), 0.9 if decay is None else decay)
    if last is not None:  # which checkpoints a run keeps is not part of its own record
        run.options["steps"] = [step_of(place) for place in places]
    if run.up_to_date([str(group[-1]) for group in groups]):
        return
    infos = [load_info(place) for place in places]
    average.check_alike(infos)
    for info in infos:
        open_weights(info)
        if info.quantization is not None:
            run.warn(f"{info.path} is quantised: the average takes its rounded weights, and is not quantised itself")
    if run.dry_run:
        run.note(f"would average {len(places)} models of {infos[0].config.parameters():,} weights")
        return
    lineage = run.lineage()
    for model, group in zip(models, groups, strict=True):
        lineage.inputs.append(Input("input", base_name(model), digest_path(group[-1]), read_lineage(group[-1])))
    lineage.counts = {"models": len(places), "parameters": infos[0].config.parameters()}
    with (
        atomic_directory(run.output, run.force) as partial,
        run.progress(infos[0].config.parameters(), "weights") as bar,
    ):
        average.write_average(infos, shares, partial, lineage.to_json(), bar.advance)
    names = ", ".join(place.name for place in places) if last else f"{len(places)} models"
    run.finish(lineage.counts, f"average of {names}: {run.output}")


def _checkpoints(model: str, last: int | None) -> list[Path]:
    """The directories that `model` stands for: itself, or with `last` that many checkpoints of the run, oldest first."""
    from llmkit.model.checkpoint import resolve_model
    from llmkit.training.state import find_checkpoints

    if last is None:
        return [resolve_model(model)]
    found = find_checkpoints(model)
    if not found:
        raise LlmkitError(f"{model}: no checkpoints", "--last takes a run; give model directories without it")
    if len(found) < last:
        raise LlmkitError(
            f"{model}: {len(found)} checkpoints, not {last}", "train with --save-every and --keep to have more"
        )
    return found[-last:]


def _numbers(text: str | None) -> list[float]:
    try:
        return [float(part) for part in text.split(",")] if text is not None else []
    except ValueError:
        raise UsageError(f"--weights {text!r} is not a list of numbers", "such as 1,1,2") from None

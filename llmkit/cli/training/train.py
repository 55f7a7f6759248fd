"""`llmkit train`: pre-train a decoder, from scratch or from another model."""

from __future__ import annotations

from typing import Annotated

import typer

from llmkit.cli.shared.options import Run, command
from llmkit.training.options import PretrainOptions, held_out_paths


@command(
    examples=(
        "llmkit train mix/ -m tiny --tokens 20k -o run/",
        "llmkit train mix/ -m tiny --tokens 20k -o run/ --resume",
        "llmkit train mix/ -m tiny --tokens 20k --schedule wsd --heldout heldout/ -o run2/",
        "llmkit train mix/ -m tiny --tokens 20k --recipe amber --sequence-length 256 -o run3/",
        "llmkit train --from run/ shards/ --tokens 20k --rewarm --lr 1e-3 -o continued/",
    ),
)
def main(
    run: Run,
    data: Annotated[
        str, typer.Argument(metavar="DATA", help="Token shards, a mix or its plan, or '-' for stdin")
    ] = "-",
    options: PretrainOptions = PretrainOptions(),
) -> None:
    """Train a decoder on token shards, in the order written by `mix`.

    The run directory holds a Hugging Face model directory per checkpoint, the log metrics.jsonl (its fields are
    explained in llmkit/training/metrics/curves.py) and, at the end, the link `final`. A killed run continues with
    --resume and ends with the same bytes. Each step reads the same tokens for any number of processes. They can also be
    started by torchrun or `accelerate launch -m llmkit train ...` instead of --processes (on CPU, Accelerate starts
    several only through MPI).

    --from starts from any model directory or run, with its optimizer state if it has one: at the run's last learning
    rate, or with --rewarm up to --lr and down again (arXiv:2403.08763). --recipe takes learning rates, sizes and
    defaults from a published model, scaled to --tokens, or from a TOML file of stages, each with its own learning
    rates, sequence length and rope_theta; in a recipe, final_lr is an absolute learning rate. If the data is a mix of
    as many --stages, these decide where each stage ends. --lr scales a recipe to another peak learning rate.
    """
    from llmkit.cli.shared.training_command import launch_processes, show_schedules, train_or_plan, training_request

    start = options.start.from_
    inputs = [data, *([start] if start else []), *held_out_paths(options.heldout.heldout)]
    if launch_processes(run, options, inputs):
        return
    from llmkit.training.pretraining import prepare_pretraining, resolve_pretraining
    from llmkit.training.runner import open_session

    request = training_request(run, options)
    resolved = resolve_pretraining(request)
    with open_session(request) as session:
        plan = prepare_pretraining(request, session, data, resolved)
        train_or_plan(run, request, session, plan.prepared, lambda: show_schedules(run, plan))

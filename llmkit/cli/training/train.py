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
        "llmkit train --from run/ shards/ --tokens 20k --rewarm --lr 1e-3 -o on/",
    ),
)
def main(
    run: Run,
    data: Annotated[
        str, typer.Argument(metavar="DATA", help="Token shards, a mix, its plan, or '-' for a stream")
    ] = "-",
    options: PretrainOptions = PretrainOptions(),
) -> None:
    """Train a decoder on token shards, in the order that `mix` gave them.

    The run directory holds a Hugging Face model directory per checkpoint, the log (metrics.jsonl, whose names
    llmkit/training/metrics/curves.py explains), and at the end the link `final`. A run that was killed continues with
    --resume and ends in the same bytes. Step s reads the same tokens whatever the number of processes. torchrun and
    `accelerate launch -m llmkit train ...` may start them instead of --processes (on CPU, Accelerate starts several
    only through MPI).

    --recipe takes learning rates, sizes and defaults from a published model, scaled to --tokens, or from a TOML of
    stages, each with its own learning rates, sequence length and rope_theta; in a recipe, final_lr is an absolute
    learning rate. Where the data is a mix of as many --stages, these decide where each ends. --lr scales the curve of
    a recipe to another peak. --from starts from any model directory or run: at the run's last learning rate, or with
    --rewarm up to --lr and down again (arXiv:2403.08763). Optimizer state is kept where the start has it.
    """
    from llmkit.cli.shared.training_command import launched, request_of, show_course, train_or_show

    start = options.start.from_
    inputs = [data, *([start] if start else []), *held_out_paths(options.heldout.heldout)]
    if launched(run, options, inputs):
        return
    from llmkit.training.pretraining import prepare_pretraining, resolve_pretraining
    from llmkit.training.runner import open_session

    request = request_of(run, options)
    resolved = resolve_pretraining(request)
    with open_session(request) as session:
        plan = prepare_pretraining(request, session, data, resolved)
        train_or_show(run, request, session, plan.prepared, lambda: show_course(run, plan))

"""`llmkit anneal`: continue a run while its learning rate decays to zero."""

from __future__ import annotations

from typing import Annotated

import typer

from llmkit.cli.shared.options import Run, command
from llmkit.training.options import AnnealOptions, held_out_paths


@command(
    examples=(
        "llmkit anneal run/ shards/ --tokens 10k -o annealed/",
        "llmkit anneal run/ shards/ --tokens 10k --step 2 --ramp sqrt -o annealed2/",
    ),
)
def main(
    run: Run,
    start: Annotated[
        str, typer.Argument(metavar="RUN", help="Run, one of its checkpoints, or a model directory (which needs --lr)")
    ],
    data: Annotated[
        str, typer.Argument(metavar="DATA", help="Token shards, a mix or its plan, or '-' for stdin")
    ] = "-",
    options: AnnealOptions = AnnealOptions(),
) -> None:
    """Continue from a checkpoint, including its optimizer state, on new data, while the learning rate decays to zero.

    The learning rate starts at that of the checkpoint's step. One run can be annealed any number of times, on different
    data and from different steps; `llmkit average` merges the branches. A model directory without optimizer state
    starts with zero moments and needs --lr.
    """
    from llmkit.cli.shared.training_command import launch_processes, train_or_plan, training_request

    if launch_processes(run, options, [start, data, *held_out_paths(options.heldout.heldout)]):
        return
    from llmkit.training.pretraining import check_annealing, prepare_annealing
    from llmkit.training.runner import open_session

    check_annealing(options)
    request = training_request(run, options)
    with open_session(request) as session:
        train_or_plan(run, request, session, prepare_annealing(request, session, start, data))

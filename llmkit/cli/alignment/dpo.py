"""`llmkit dpo`: align a model with preference pairs."""

from __future__ import annotations

from typing import Annotated

import typer

from llmkit.alignment.options import DpoOptions
from llmkit.chat.rows import PREFERENCES, schema_names
from llmkit.cli.shared.options import ModelPath, Run, command


@command(
    examples=(
        "llmkit dpo sft/ pairs.jsonl --beta 0.1 -o chat/",
        "llmkit dpo sft/ pairs.jsonl --lr 1e-4 --batch-size 4 -o chat2/ --resume",
    ),
    reads=True,
)
def main(
    run: Run,
    model: ModelPath,
    rows: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="ROWS",
            help=f"JSON lines or Parquet with two answers to a prompt: {schema_names(PREFERENCES)}; PATH, or PATH with"
            " a weight (:0.6), multiplier (:x2) or token budget (:2M) (default: stdin)",
        ),
    ] = None,
    options: DpoOptions = DpoOptions(),
) -> None:
    """Align a model by direct preference optimization (DPO): make chosen answers more probable and rejected ones less
    probable, relative to the initial model.

    Of OASST trees, the best-ranked answer to each question is paired with each of the others. Ties, and other parts of
    rows that make no pair, are left out and counted.

    Files with amounts make a mixture, as in `llmkit sft`; the tokens are those of both answers with their prompts.

    The log-probabilities of the reference model are computed once, before the first step, and stored in the run. The
    log shows the rewards of chosen and rejected answers, their margin, and how often the chosen answer wins.
    """
    from llmkit.cli.shared.training_command import (
        launch_processes,
        paths_of,
        sources_of,
        train_or_plan,
        training_request,
    )

    if launch_processes(run, options, [model, *paths_of(rows)]):
        return
    from llmkit.alignment.fine_tuning import prepare_alignment
    from llmkit.training.runner import open_session

    request = training_request(run, options)
    with open_session(request) as session:
        prepared = prepare_alignment(request, session, model, sources_of(run, rows))
        train_or_plan(run, request, session, prepared)

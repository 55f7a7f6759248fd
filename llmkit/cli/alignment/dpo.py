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
            help=f"JSON lines or Parquet with `chosen` and `rejected`: {schema_names(PREFERENCES)}; "
            "'-' or nothing is stdin",
        ),
    ] = None,
    options: DpoOptions = DpoOptions(),
) -> None:
    """Align a model by direct preference optimization: make chosen answers more probable and rejected ones less,
    relative to the initial model.

    The reference log-probabilities are computed once before the first step and stored in the run. The log shows the
    rewards of both sides, their margin, and how often the chosen one is ahead.
    """
    from llmkit.cli.shared.training_command import launched, request_of, train_or_show

    if launched(run, options, [model, *(rows or [])]):
        return
    from llmkit.alignment.fine_tuning import prepare_alignment
    from llmkit.training.runner import open_session

    request = request_of(run, options)
    with open_session(request) as session:
        prepared = prepare_alignment(request, session, model, run.inputs(rows))
        train_or_show(run, request, session, prepared)

"""`llmkit sft`: fine-tune a model on conversations, with the loss on the assistant's tokens."""

from __future__ import annotations

from typing import Annotated

import typer

from llmkit.alignment.options import SftOptions
from llmkit.chat.rows import CONVERSATIONS, schema_names
from llmkit.cli.shared.options import ModelPath, Run, command


@command(
    examples=(
        "llmkit sft run/ chat.jsonl --epochs 2 -o sft/",
        "llmkit sft run/ chat.jsonl --lr 1e-3 --batch-size 4 --too-long truncate -o sft2/",
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
            help=f"JSON lines or Parquet with {schema_names(CONVERSATIONS)} (default: stdin)",
        ),
    ] = None,
    options: SftOptions = SftOptions(),
) -> None:
    """Fine-tune a model on conversations, instructions or plain text, with the loss on the assistant's tokens.

    Rows are formatted with the model's own chat template. The loss covers only the assistant's content, tool calls and
    stop token; the loss of a step is the mean over these tokens. Rows are packed into sequences without attending to
    each other. A message may have a `weight`, or `train: false`. The resulting model stops at the end of its turn
    (generation_config.json).
    """
    from llmkit.cli.shared.training_command import launch_processes, train_or_plan, training_request

    if launch_processes(run, options, [model, *(rows or []), *(options.heldout.heldout or [])]):
        return
    from llmkit.alignment.fine_tuning import prepare_fine_tuning
    from llmkit.training.runner import open_session

    request = training_request(run, options)
    with open_session(request) as session:
        prepared = prepare_fine_tuning(request, session, model, run.inputs(rows))
        train_or_plan(run, request, session, prepared)

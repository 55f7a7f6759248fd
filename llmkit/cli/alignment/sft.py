"""`llmkit sft`: fine-tune a model on conversations, with the loss on what the assistant says."""

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
            help=f"JSON lines or Parquet with {schema_names(CONVERSATIONS)}; '-' or nothing is stdin",
        ),
    ] = None,
    options: SftOptions = SftOptions(),
) -> None:
    """Fine-tune a model on conversations, instructions or plain text, with the loss on the assistant's part.

    The chat template is the model's own; the loss covers the assistant's content, its tool calls and its stop token,
    and nothing else. Rows are packed into sequences in which none attends to another, and the loss of a step is the
    mean over its trained tokens. A message may carry its own `weight`, or `train: false`. The resulting model stops at
    its end of turn (generation_config.json).
    """
    from llmkit.cli.shared.training_command import launched, request_of, train_or_show

    if launched(run, options, [model, *(rows or []), *(options.heldout.heldout or [])]):
        return
    from llmkit.alignment.fine_tuning import prepare_fine_tuning
    from llmkit.training.runner import open_session

    request = request_of(run, options)
    with open_session(request) as session:
        prepared = prepare_fine_tuning(request, session, model, run.inputs(rows))
        train_or_show(run, request, session, prepared)

"""`llmkit trace`: the documents of a training step, and the steps of a document."""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmkit.cli.shared.options import Run, command
from llmkit.errors import LlmkitError, UsageError
from llmkit.io.run_layout import FINAL, LATEST

if TYPE_CHECKING:
    from llmkit.training.trace import Trace


@command(
    examples=(
        "llmkit trace run/ --step 3",
        "llmkit trace run/ --step 3 --text --json",
    )
)
def main(
    run: Run,
    directory: Annotated[str, typer.Argument(metavar="RUN", help="Run of train or anneal, finished or not")],
    step: Annotated[int | None, typer.Option("--step", min=1, help="Show the documents of this step")] = None,
    find: Annotated[
        str | None, typer.Option("--find", metavar="ID", help="Show the steps that read this document")
    ] = None,
    text: Annotated[bool, typer.Option("--text", help="Also show the decoded text")] = False,
) -> None:
    """Show which documents a step read, or which steps read a document.

    A line gives the row of the batch, the positions in it, the document's source and id, the range of its tokens, and
    how often it was seen before. Steps count from 1, as in metrics.jsonl. --find lists all occurrences of a document so
    far. --json prints one JSON object per line. The shards must still be where the run read them. Steps skipped by the
    training guard are marked.
    """
    if (step is None) == (find is None):
        raise UsageError("either --step or --find is required", "see --help")
    from llmkit.training.trace import Trace, skipped_steps, steps_done

    trace, done, skipped = Trace(directory), steps_done(directory), skipped_steps(directory)
    pieces = trace.step(step) if step is not None else trace.find(str(find), done)
    decode = _decoder(trace, Path(directory)) if text else None
    count = 0
    for piece in pieces:
        count += 1
        record: dict[str, Any] = piece.to_json()
        if piece.step in skipped:
            record["skipped"] = skipped[piece.step] or True
        if decode:
            record["text"] = decode(piece.tokens.tolist())
        print(jsonlib.dumps(record, ensure_ascii=False) if run.as_json else _line(record))
    if step is not None and step in skipped:
        run.note(f"step {step:,} was skipped by the guard: {skipped[step] or 'see events.jsonl'}")
    elif step is not None and step > done:
        run.note(f"step {step:,} has not run yet: {done:,} of {trace.steps:,} steps are done")
    elif find is not None:
        if not count:
            raise LlmkitError(
                f"{find!r} is in the data of {directory}, but in none of its {done:,} steps", "see --help"
            )
        run.note(f"{find!r} was read in {count:,} pieces")


def _line(record: dict[str, Any]) -> str:
    """A record as a line of text; control characters in ids, sources and texts are escaped."""
    name, source = (jsonlib.dumps(record[key], ensure_ascii=False)[1:-1] for key in ("id", "source"))
    line = f"step {record['step']} row {record['row']} [{record['first']}:{record['last']}] {source} {name}"
    line += f" tokens [{record['start']}:{record['stop']}]" + (f" seen {record['epoch']}x" if record["epoch"] else "")
    line += " skipped" if "skipped" in record else ""
    return line + (f"  {jsonlib.dumps(record['text'], ensure_ascii=False)}" if "text" in record else "")


def _decoder(trace: Trace, run: Path) -> Any:
    """A function from token ids to text, with the tokenizer of the run or, failing that, of its data."""
    from llmkit.tokens.tokenizer_json import load

    files = [run / link / "tokenizer.json" for link in (LATEST, FINAL)]
    content = next((path.read_text(encoding="utf-8") for path in files if path.is_file()), None)
    content = content or trace.shard(0, 0).tokenizer().files.get("tokenizer.json")
    if content is None:
        raise LlmkitError(f"{run}: no tokenizer in the run or with its data", "omit --text")
    tokenizer = load(content, f"{run}: its tokenizer.json is damaged", "omit --text")
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=False)

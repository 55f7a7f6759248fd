"""`llmkit trace`: the documents of a training step, and the steps of a document."""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmkit.cli.shared.options import Run, command
from llmkit.errors import LlmkitError, UsageError

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
    directory: Annotated[str, typer.Argument(metavar="RUN", help="A run of train or anneal, finished or not")],
    step: Annotated[int | None, typer.Option("--step", min=1, help="Show what this step read")] = None,
    find: Annotated[str | None, typer.Option("--find", metavar="ID", help="Show where this document was read")] = None,
    text: Annotated[bool, typer.Option("--text", help="Show the text too, as the tokens give it")] = False,
) -> None:
    """Show which documents a step read: row of the batch, positions in it, source, id, tokens of the document, and how often it was seen before.

    Steps count from 1, as in metrics.jsonl. --find names every place where a document was read so far. --json prints a JSON object a line.
    The shards have to be where the run read them. A step that the guard passed over is named so.
    """
    if (step is None) == (find is None):
        raise UsageError("what is to be traced?", "give either --step or --find")
    from llmkit.training.trace import Trace, skipped_steps, steps_done

    trace, done, skipped = Trace(directory), steps_done(directory), skipped_steps(directory)
    spans = trace.step(step) if step is not None else trace.find(str(find), done)
    decode = _decoder(trace, Path(directory)) if text else None
    count = 0
    for span in spans:
        count += 1
        record: dict[str, Any] = span.to_json()
        if span.step in skipped:
            record["skipped"] = skipped[span.step] or True
        if decode:
            record["text"] = decode(span.tokens.tolist())
        print(jsonlib.dumps(record, ensure_ascii=False) if run.as_json else _line(record))
    if step is not None and step in skipped:
        run.note(f"step {step:,} was passed over by the guard: {skipped[step] or 'see events.jsonl'}")
    elif step is not None and step > done:
        run.note(f"step {step:,} is still to come: {done:,} of {trace.steps:,} are done")
    elif find is not None:
        if not count:
            raise LlmkitError(
                f"{find!r} is in the data of {directory}, but in none of its {done:,} steps", "see --help"
            )
        run.note(f"{find!r} was read in {count:,} pieces")


def _line(record: dict[str, Any]) -> str:
    """One line for people; what is strange in ids, sources and texts is escaped."""
    name, source = (jsonlib.dumps(record[key], ensure_ascii=False)[1:-1] for key in ("id", "source"))
    line = f"step {record['step']} row {record['row']} [{record['first']}:{record['last']}] {source} {name}"
    line += f" tokens [{record['start']}:{record['stop']}]" + (f" seen {record['epoch']}x" if record["epoch"] else "")
    line += " skipped" if "skipped" in record else ""
    return line + (f"  {jsonlib.dumps(record['text'], ensure_ascii=False)}" if "text" in record else "")


def _decoder(trace: Trace, run: Path) -> Any:
    """Token ids to text, by the tokenizer in the run, or the one beside its data."""
    from tokenizers import Tokenizer

    files = [run / "latest" / "tokenizer.json", run / "final" / "tokenizer.json"]
    found = next((path.read_text(encoding="utf-8") for path in files if path.is_file()), None)
    found = found or trace.shard(0, 0).tokenizer().files.get("tokenizer.json")
    if found is None:
        raise LlmkitError(f"{run}: no tokenizer in the run or beside its data", "leave out --text")
    try:
        tokenizer = Tokenizer.from_str(found)
    except Exception as error:  # the library raises plain Exception
        raise LlmkitError(f"{run}: its tokenizer.json is damaged ({error})", "leave out --text") from error
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=False)

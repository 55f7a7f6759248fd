"""A stage over documents, as `filter` and `dedup` are: documents in, the kept ones out, the dropped ones to --rejects."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer

from llmkit.cli.options import Run
from llmkit.errors import UsageError

if TYPE_CHECKING:
    from llmkit.io.documents import BadLine, DocumentReader

Rejects = Annotated[
    str | None,
    typer.Option("--rejects", metavar="FILE", help="Write the dropped documents here, each with its `reason`"),
]


class Outcome(Protocol):
    """What became of one chunk: whole lines to keep and to reject, bad lines, number of documents."""

    kept: bytes
    rejects: bytes
    bad: list[BadLine]
    documents: int


def run_stage(
    run: Run,
    inputs: list[str] | None,
    rejects: str | None,
    work: Callable[[DocumentReader], Iterable[Outcome]],
    count: Callable[[], dict[str, Any]],
) -> dict[str, Any] | None:
    """Run `work` over the inputs, write what it keeps and rejects, and return the counts; None if the output was up to date.

    `count` is asked once, at the end, for the counts that lineage and summary hold. With --dry-run everything is done but the writing.
    """
    from llmkit.io.documents import DocumentWriter
    from llmkit.io.lineage import Lineage

    if rejects is not None and rejects in (run.output, "-"):
        raise UsageError(f"--rejects {rejects}: this is where the kept documents go", "name another file")
    beside = {} if rejects is None else {rejects: Lineage(f"{run.command} --rejects", dict(run.options))}
    if not run.dry_run and run.up_to_date(run.inputs(inputs), beside):
        return None
    reader = run.reader(inputs)
    with ExitStack() as stack:
        writer = rejected = None
        if not run.dry_run:
            writer = stack.enter_context(run.writer())
            if rejects is not None:
                rejected = stack.enter_context(DocumentWriter(rejects, beside[rejects], force=run.force))
        with run.progress(None, "documents") as bar:
            for outcome in work(reader):
                reader.accept(outcome.bad)
                if writer:
                    writer.write(outcome.kept)
                if rejected:
                    rejected.write(outcome.rejects)
                bar.advance(outcome.documents)
        counts = count() | ({"bad_lines": reader.bad} if reader.bad else {})
        if rejected:
            rejected.finish({"documents": counts["dropped"]}, list(reader.inputs))
        if writer:
            writer.finish(counts, reader.inputs)
    return counts


def summary_line(run: Run, counts: dict[str, Any], verb: str) -> str:
    """`kept 90 of 100 documents, ...` for people."""
    share = f" ({100 * counts['kept'] / counts['documents']:.1f} %)" if counts["documents"] else ""
    bad = f", {counts['bad_lines']:,} bad lines passed over" if counts.get("bad_lines") else ""
    where = (
        "nothing written (--dry-run)"
        if run.dry_run
        else f"written to {run.output}"
        if run.output
        else "written to stdout"
    )
    return f"kept {counts['kept']:,} of {counts['documents']:,} documents{share}, {verb} {counts['dropped']:,}{bad}; {where}"

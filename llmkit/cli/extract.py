"""`llmkit extract`: text out of web archives and pages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmkit.cli.options import InputPaths, Run, command, count_option
from llmkit.cli.stage import Resume, added, jobs
from llmkit.errors import LlmkitError, UsageError, unknown_name
from llmkit.io.inputs import DOCUMENT_SUFFIXES, STDIN

if TYPE_CHECKING:
    from llmkit.corpus.extract.archives import Broken, Page
    from llmkit.io.lineage import Input

ROWS = (*DOCUMENT_SUFFIXES, ".parquet")  # rows with HTML in a field, by name; everything else says itself what it is
ARCHIVES = tuple(kind + packed for kind in (".warc", ".arc", ".wet") for packed in ("", ".gz", ".zst"))
SUFFIXES = (*ARCHIVES, ".html", ".htm", ".xhtml", ".pdf", ".html.gz", *ROWS)
SHOWN = 5  # broken records that get a line of their own


@command(
    reads=True,
    writes=True,
    neutral=("rejects", "resume"),
    examples=(
        "llmkit extract crawl/*.warc.gz -j 8 --rejects skipped.jsonl -o pages.jsonl.zst",
        "llmkit extract crawl/*.warc.gz | llmkit filter --preset fineweb -o clean.jsonl.zst",
        "cat page.html | llmkit extract --engine trafilatura --plain",
    ),
)
def main(
    run: Run,
    inputs: InputPaths = None,
    engine: Annotated[
        str, typer.Option("--engine", metavar="NAME", help="resiliparse, trafilatura, or plain (all visible text)")
    ] = "resiliparse",
    html_key: Annotated[
        str, typer.Option("--html-key", metavar="FIELD", help="Field of JSON rows that holds the page")
    ] = "html",
    verify: Annotated[bool, typer.Option("--verify", help="Leave out records whose digest is wrong")] = False,
    time_limit: Annotated[float, typer.Option("--time-limit", help="Seconds for one page, then it is given up")] = 10.0,
    max_page_bytes: Annotated[int, count_option("--max-page-bytes", help="Longest page that is read")] = 16 << 20,
    rejects: Annotated[
        str | None,
        typer.Option("--rejects", metavar="FILE", help="Write what gave no document here, with its `reason`"),
    ] = None,
    resume: Resume = False,
) -> None:
    """Extract text from WARC, WET and ARC files, HTML pages, PDFs, and JSON rows that hold HTML.

    What a file is, its first bytes say; directories are searched for names that end as such files do. A document has `id`, `text`, and where
    they are known `url`, `date`, `content_type`, `title`, `language`, `licence` (cc-by-4.0, or a link) and `opt_out`, a list of the signals
    by which a page declines to be used: robots directives (noai, noindex, ...) and tdm-reservation. Encodings are detected where none is
    declared or the declared one is wrong. Of PDFs the text layer is taken; pages without one are counted.

    Broken records are passed over, counted, and named with their offset. A page that takes longer than --time-limit, or more memory than 48
    times --max-page-bytes and 1 GB, is given up. Memory: three batches of about 1 MB for each worker, and one page.
    """
    from llmkit.corpus.extract.engines import ENGINES

    if engine not in ENGINES:
        raise unknown_name("--engine", engine, list(ENGINES))
    if not 0 < time_limit < 86_400:
        raise UsageError(f"--time-limit {time_limit} is not between 0 and a day", "give seconds")
    if run.options["text_key"] != "text":
        raise UsageError("--text-key is of no use here", "--html-key names the field that holds the page")
    _check_libraries(engine)
    from llmkit.corpus.extract.extractor import Extractor
    from llmkit.io.documents import DocumentWriter

    total: dict[str, Any] = {}
    made = passed = shown = 0
    reasons: Counter[str] = Counter()
    for job in jobs(run, run.inputs(inputs, suffixes=SUFFIXES), rejects, resume):
        if job.done:
            passed += 1
            continue
        made += 1
        extractor = Extractor(engine, run.jobs, time_limit, max_page_bytes)
        read: list[Input] = []
        with ExitStack() as stack:
            writer = rejected = None
            if not run.dry_run:
                writer = stack.enter_context(run.writer())
                for path, lineage in job.beside.items():
                    rejected = stack.enter_context(DocumentWriter(path, lineage, force=run.force or job.anew))
            bar = stack.enter_context(run.progress(None, "pages"))
            for outcome in extractor.run(_pages(run, job.inputs, html_key, max_page_bytes, verify, read)):
                for broken in outcome.broken[: max(0, SHOWN - shown)]:
                    run.warn(f"{broken.file}: offset {broken.offset:,}: {broken.reason}")
                shown += len(outcome.broken)
                if writer:
                    writer.write(outcome.kept)
                if rejected:
                    rejected.write(outcome.rejected)
                bar.advance(outcome.pages)
            counts = extractor.counts | {"skipped": dict(sorted(extractor.reasons.items()))}
            if rejected:
                rejected.finish({"documents": counts["pages"] + counts["broken"] - counts["documents"]}, read)
            if writer:
                writer.finish(counts, read)
        reasons.update(extractor.reasons)
        total = added(total, counts)
    if made == 0:
        run.finish({"up_to_date": True}, f"{run.output} is up to date: nothing to do")
        return
    counts = total | ({"files": made, "up_to_date": passed} if made + passed > 1 else {})
    skipped = ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common())
    line = f"{counts['documents']:,} documents of {counts['pages']:,} pages" + (f" (not: {skipped})" if skipped else "")
    line += f", {counts['broken']:,} broken records" if counts["broken"] else ""
    run.finish(
        counts, f"{line}; " + ("nothing written (--dry-run)" if run.dry_run else f"written to {run.output or 'stdout'}")
    )


def _pages(
    run: Run, paths: list[str], html_key: str, max_bytes: int, verify: bool, read: list[Input]
) -> Iterator[Page | Broken]:
    """The pages of all inputs; `read` takes the inputs for the lineage as they are done with."""
    from llmkit.corpus.extract.archives import Page, read_pages
    from llmkit.io.lineage import Input, base_name, digest_path

    for path in paths:
        if path.endswith(ROWS):
            reader = run.reader([path], text_key=html_key, files_from=None)
            for document in reader.documents():
                rest = {key: value for key, value in document.fields.items() if key not in (html_key, "id")}
                yield Page(document.id, document.text.encode("utf-8", "replace"), charset="utf-8", fields=rest)
            read += reader.inputs
            continue
        digest: list[str] | None = [] if path == STDIN else None  # a file's can be had later
        yield from read_pages(path, max_bytes=max_bytes, verify=verify, digest=digest)
        read.append(Input("input", base_name(path), digest[0] if digest else digest_path(path)))


def _check_libraries(engine: str) -> None:
    """LlmkitError where the libraries of the web extra are not installed."""
    from importlib.util import find_spec

    needed = ["fastwarc", "resiliparse", "pypdfium2"] + (["trafilatura"] if engine == "trafilatura" else [])
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        raise LlmkitError(f"{', '.join(missing)} not installed", "pip install 'llmkit[web]'")

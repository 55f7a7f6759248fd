"""`llmkit extract`: text out of web archives and pages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from llmkit.cli.shared.document_command import Job, Resume, jobs, make_all
from llmkit.cli.shared.options import InputPaths, Run, command, count_option
from llmkit.errors import LlmkitError, UsageError, unknown_name
from llmkit.io.inputs import DOCUMENT_SUFFIXES, STDIN

if TYPE_CHECKING:
    from llmkit.cli.shared.document_command import Made
    from llmkit.corpus.extract.extractor import Extracted, Extractor, Reading
    from llmkit.io.documents import DocumentReader, DocumentWriter
    from llmkit.io.record import Input

ARCHIVES = tuple(kind + packed for kind in (".warc", ".arc", ".wet") for packed in ("", ".gz", ".zst"))
SUFFIXES = (*ARCHIVES, ".html", ".htm", ".xhtml", ".pdf", ".html.gz", *DOCUMENT_SUFFIXES)
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
        str,
        typer.Option(
            "--engine",
            metavar="NAME",
            help="resiliparse, trafilatura, or plain (all visible text); ray: on a cluster; or both: plain,ray",
        ),
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

    engine, place = _parser_and_place(engine)
    if engine not in ENGINES:
        raise unknown_name("--engine", engine, [*ENGINES, "ray"])
    run.options["engine"] = engine
    if not 0 < time_limit < 86_400:
        raise UsageError(f"--time-limit {time_limit} is not between 0 and a day", "give seconds")
    if run.options["text_key"] != "text":
        raise UsageError("--text-key is of no use here", "--html-key names the field that holds the page")
    _check_libraries(engine)
    from llmkit.corpus.extract.extractor import Extractor, Reading

    paths = run.inputs(inputs, suffixes=SUFFIXES)
    if place == "ray" and STDIN in paths:
        raise UsageError("stdin cannot be read on a cluster", "name files, or leave out ray")
    extractor = Extractor(engine, time_limit, max_page_bytes)
    reading = Reading(run.read_options(html_key), max_page_bytes, verify)
    shown = 0

    def make(job: Job, writer: DocumentWriter | None, rejected: DocumentWriter | None) -> Made:
        nonlocal shown
        counts: Counter[str] = Counter(pages=0, documents=0, broken=0, characters=0)
        skipped: Counter[str] = Counter()
        read: list[Input] = []
        with run.progress(None, "pages") as bar:
            for outcome in _extracted(run, extractor, reading, job.inputs, read, place):
                for broken in outcome.broken[: max(0, SHOWN - shown)]:
                    run.warn(f"{broken.file}: offset {broken.offset:,}: {broken.reason}")
                shown += len(outcome.broken)
                counts.update(pages=outcome.pages, documents=outcome.documents, characters=outcome.characters)
                counts["broken"] += len(outcome.broken)
                skipped += outcome.skipped
                if writer:
                    writer.write(outcome.kept)
                if rejected:
                    rejected.write(outcome.rejected)
                bar.advance(outcome.pages + len(outcome.broken))
        none = counts["pages"] + counts["broken"] - counts["documents"]
        return dict(counts) | {"skipped": dict(sorted(skipped.items()))}, none, read

    spread = ("--engine", engine) if place == "ray" else None
    total = make_all(run, jobs(run, paths, rejects, resume), make, spread=spread)
    if total is None:
        return
    most = sorted(total["skipped"].items(), key=lambda item: -item[1])
    not_ = f" (not: {', '.join(f'{count:,} {reason}' for reason, count in most)})" if most else ""
    broken_ = f", {total['broken']:,} broken records" if total["broken"] else ""
    where = "nothing written (--dry-run)" if run.dry_run else f"written to {run.output or 'stdout'}"
    run.finish(total, f"{total['documents']:,} documents of {total['pages']:,} pages{not_}{broken_}; {where}")


def _parser_and_place(engine: str) -> tuple[str, str]:
    """What reads the pages, and where: `ray` and `trafilatura,ray` are on a cluster."""
    names = engine.split(",")
    if "ray" not in names:
        return engine, "local"
    names.remove("ray")
    return ",".join(names) or "resiliparse", "ray"


def _extracted(
    run: Run, extractor: Extractor, reading: Reading, paths: list[str], read: list[Input], place: str
) -> Iterator[Extracted]:
    """What becomes of the pages of all files; `read` takes their lineage."""
    from llmkit.corpus.extract.extractor import extract_files, tasks

    if place == "local":

        def reader_of(path: str) -> DocumentReader:
            return run.reader_of([path], text_key=reading.rows.text_key)

        yield from extractor.run((page for path in paths for page in reading.pages(path, read, reader_of)), run.jobs)
        return
    if reading.rows.quarantine:
        raise UsageError("a cluster has no one file for bad lines", "--on-bad-line skip, or stop")
    from llmkit.engine.cluster import Cluster

    for found in Cluster().streams(partial(extract_files, extractor, reading), tasks(paths)):
        if isinstance(found, list):
            read += found
        else:
            yield found


def _check_libraries(engine: str) -> None:
    """LlmkitError where the libraries of the web extra are not installed."""
    from importlib.util import find_spec

    needed = ["fastwarc", "resiliparse", "pypdfium2"] + (["trafilatura"] if engine == "trafilatura" else [])
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        raise LlmkitError(f"{', '.join(missing)} not installed", "pip install 'llmkit[web]'")

"""`llmkit extract`: text from web archives and pages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from llmkit.cli.shared.document_command import Job, Resume, is_directory, plan_jobs, run_jobs, summary_end
from llmkit.cli.shared.messages import counted
from llmkit.cli.shared.options import InputPaths, Run, command, count_option
from llmkit.errors import LlmkitError, UsageError, unknown_name
from llmkit.io.inputs import COMPRESSIONS, DOCUMENT_SUFFIXES, STDIN

if TYPE_CHECKING:
    from llmkit.cli.shared.document_command import JobResult
    from llmkit.corpus.extract.archives import BrokenRecord, PageRecord
    from llmkit.corpus.extract.extractor import ExtractionResult, Extractor, FilesRead, PageReader
    from llmkit.io.document_writer import DocumentWriter
    from llmkit.io.documents import DocumentReader

KINDS = (".warc", ".arc", ".wet", ".html", ".htm", ".xhtml", ".pdf", ".txt", ".text", ".md", ".rst")
SUFFIXES = (*(kind + packed for kind in KINDS for packed in COMPRESSIONS), *DOCUMENT_SUFFIXES)
MAX_WARNINGS = 5  # broken records that are reported individually


@command(
    reads=True,
    writes=True,
    neutral=("rejects", "resume", "allow_empty"),
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
            help="resiliparse, trafilatura, or plain (all visible text); ray for a cluster; or both: plain,ray",
        ),
    ] = "resiliparse",
    html_key: Annotated[
        str, typer.Option("--html-key", metavar="FIELD", help="Field of JSON rows with the page")
    ] = "html",
    verify: Annotated[bool, typer.Option("--verify", help="Skip records with a wrong digest")] = False,
    allow_empty: Annotated[
        bool, typer.Option("--allow-empty", help="Accept archives from which no page can be read")
    ] = False,
    time_limit: Annotated[float, typer.Option("--time-limit", help="Maximum seconds per page")] = 10.0,
    max_page_bytes: Annotated[int, count_option("--max-page-bytes", help="Maximum size of a page in bytes")] = 16 << 20,
    rejects: Annotated[
        str | None,
        typer.Option(
            "--rejects", metavar="FILE", help="Write pages that give no document to this file, each with its `reason`"
        ),
    ] = None,
    resume: Resume = False,
) -> None:
    """Extract text from WARC, WET and ARC files, HTML pages, plain text, PDFs, and JSON rows with HTML.

    The format of a file is recognised by its first bytes; directories are searched for the usual file name extensions,
    and other files in them are counted, but for hidden ones. Plain text is kept as it is.
    A document has `id`, `text` and, where known, `url`, `date`, `content_type`, `title`, `language`, `licence`
    (cc-by-4.0, or a link) and `opt_out`, a list of the signals by which a page opts out of being used: robots
    directives (noai, noindex, ...) and tdm-reservation. Encodings are detected if none is declared or the declared one
    is wrong; a byte that is invalid in it becomes U+FFFD. The text of a PDF is its text layer; pages without one are
    counted. Of a page, --engine resiliparse keeps the main content: menus, lists of links and short blocks before the
    first paragraph of text or after the last are left out. --engine plain keeps everything that is visible.

    Broken records are skipped, counted with their bytes, and reported with their offset; reading continues with the
    next intact record, also in a pipe. Segments of a record are joined. A document whose page is cut has `truncated`,
    the reason in the archive (WARC-Truncated), "segmented" where segments are missing, or "unspecified" where a
    Content-Length or the end of a coding (chunked, gzip, ...) shows it. An archive from which no page can be read is
    an error, unless --allow-empty is given. A page that takes longer than --time-limit, or more memory than 48 times
    --max-page-bytes plus 1 GB, is skipped. Memory: three batches of about 1 MB for each worker, one page, and a few
    megabytes of the archive.
    """
    from llmkit.corpus.extract.engines import ENGINES

    engine, backend = _parser_and_backend(engine)
    if engine not in ENGINES:
        raise unknown_name("--engine", engine, [*ENGINES, "ray"])
    run.options["engine"] = engine
    if not 0 < time_limit < 86_400:
        raise UsageError(f"--time-limit {time_limit} is not between 0 and a day", "use a number of seconds")
    if run.options["text_key"] != "text":
        raise UsageError("--text-key has no effect here", "--html-key names the field that contains the page")
    _check_libraries(engine)
    from llmkit.corpus.extract.extractor import Extractor, FilesRead, PageReader, distinct_names

    paths = run.inputs(inputs, suffixes=SUFFIXES)
    if backend == "ray" and STDIN in paths:
        raise UsageError("stdin cannot be read on a cluster", "name files, or omit ray")
    extractor = Extractor(engine, time_limit, max_page_bytes)
    page_reader = PageReader(run.read_options(html_key), max_page_bytes, verify, allow_empty, distinct_names(paths))
    warned = 0

    def make(job: Job, writer: DocumentWriter | None, rejected: DocumentWriter | None) -> JobResult:
        nonlocal warned
        counts: Counter[str] = Counter(pages=0, documents=0, broken=0, characters=0)
        skipped: Counter[str] = Counter()
        files = FilesRead()
        with run.progress(None, "pages") as bar:
            for outcome in _outcomes(run, extractor, page_reader, job.inputs, files, backend):
                for broken in outcome.broken[: max(0, MAX_WARNINGS - warned)]:
                    run.warn(
                        f"{broken.file}: offset {broken.offset:,}: {broken.reason} ({broken.size:,} bytes skipped)"
                    )
                warned += len(outcome.broken)
                counts.update(pages=outcome.pages, documents=outcome.documents, characters=outcome.characters)
                counts["broken"] += len(outcome.broken)
                if outcome.truncated:
                    counts["truncated"] += outcome.truncated
                if outcome.broken:
                    counts["broken_bytes"] += sum(broken.size for broken in outcome.broken)
                skipped += outcome.skipped
                if writer:
                    writer.write(outcome.kept)
                if rejected:
                    rejected.write(outcome.rejected)
                bar.advance(outcome.pages + len(outcome.broken))
        if files.replaced:
            run.warn(f"the text of the page replaces the field `text` of {counted(files.replaced, 'row')}")
        without_document = counts["pages"] + counts["broken"] - counts["documents"]
        bad = ({"bad_lines": files.bad_lines} if files.bad_lines else {}) | run.bad_file_counts()
        return dict(counts) | {"skipped": dict(sorted(skipped.items()))} | bad, without_document, files.inputs

    cluster_arguments = ("--engine", engine) if backend == "ray" else None
    total = run_jobs(run, plan_jobs(run, paths, rejects, resume), make, cluster_arguments=cluster_arguments)
    if total is None:
        return
    by_count = sorted(total["skipped"].items(), key=lambda item: -item[1])
    skipped_text = f" (not: {', '.join(f'{count:,} {reason}' for reason, count in by_count)})" if by_count else ""
    documents, pages = counted(total["documents"], "document"), counted(total["pages"], "page")
    broken = total.get("broken_bytes", 0)
    broken_text = f", {counted(total['broken'], 'broken record')} ({broken:,} bytes skipped)" if total["broken"] else ""
    truncated_text = f", {total['truncated']:,} truncated" if total.get("truncated") else ""
    line = f"{documents} of {pages}{skipped_text}{truncated_text}{broken_text}"
    run.finish(total, line + summary_end(run, total | run.bad_file_counts()))


def _parser_and_backend(engine: str) -> tuple[str, str]:
    """The extraction engine, and where it runs: `ray` and `trafilatura,ray` run on a cluster."""
    names = engine.split(",")
    if "ray" not in names:
        return engine, "local"
    names.remove("ray")
    return ",".join(names) or "resiliparse", "ray"


def _outcomes(
    run: Run, extractor: Extractor, page_reader: PageReader, paths: list[str], files: FilesRead, backend: str
) -> Iterator[ExtractionResult]:
    """The outcomes for the pages of all files; the files are added to `files`."""
    from llmkit.corpus.extract.extractor import FilesRead, extract_files, tasks
    from llmkit.io.digest import digest_damaged
    from llmkit.io.documents import unreadable_file
    from llmkit.io.record import Input, base_name

    if backend == "local":
        own_output = is_directory(run.output)

        def reader_of(path: str) -> DocumentReader:
            on_bad_file = "stop" if own_output else None
            return run.reader_of([path], text_key=page_reader.rows.text_key, on_bad_file=on_bad_file)

        def pages(path: str) -> Iterator[PageRecord | BrokenRecord]:
            try:
                yield from page_reader.pages(path, files, reader_of)
            except (LlmkitError, OSError) as error:
                unreadable = unreadable_file(path, error)
                if own_output or path == STDIN or not run.skips_bad_files:
                    raise unreadable from error
                run.bad_file(unreadable.bad, quarantine=True)
                files.inputs.append(Input("input", base_name(path), digest_damaged(path)))

        yield from extractor.run((page for path in paths for page in pages(path)), run.jobs)
        return
    if run.skips_bad_files:
        raise UsageError("bad files are not skipped on a cluster", "omit --on-bad-file")
    if any(page_reader.rows.quarantine_files()):
        raise UsageError("bad lines cannot be quarantined on a cluster", "use --on-bad-line skip or stop")
    from llmkit.engine.cluster import Cluster

    for result in Cluster().flat_map(partial(extract_files, extractor, page_reader), tasks(paths)):
        if isinstance(result, FilesRead):
            files.inputs += result.inputs
            files.bad_lines += result.bad_lines
            files.replaced += result.replaced
        else:
            yield result


def _check_libraries(engine: str) -> None:
    """Raise LlmkitError if libraries of the web extra are missing."""
    from importlib.util import find_spec

    needed = ["resiliparse", "pypdfium2"] + (["trafilatura"] if engine == "trafilatura" else [])
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        raise LlmkitError(f"{', '.join(missing)} not installed", "pip install 'llmkit[web]'")

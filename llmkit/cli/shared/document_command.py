"""A stage over documents, such as `filter` and `dedup`: reads documents, writes the kept ones, rejects to --rejects."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer

from llmkit.cli.shared.messages import counted, skipped
from llmkit.cli.shared.options import COMMON, Run
from llmkit.cli.shared.ray_files import call_per_file
from llmkit.errors import LlmkitError, UsageError
from llmkit.io.atomic import HINT_EXISTS
from llmkit.io.inputs import COMPRESSIONS, STDIN, exists, has_suffix, is_remote
from llmkit.io.run_layout import member

if TYPE_CHECKING:
    from llmkit.io.document_writer import DocumentWriter
    from llmkit.io.documents import BadLine, DocumentReader
    from llmkit.io.record import Input, Lineage

    JobResult = tuple[dict[str, Any], int, list[Input]]  # counts of the output, number of rejects, lineage of inputs

Rejects = Annotated[
    str | None,
    typer.Option("--rejects", metavar="FILE", help="Write the dropped documents to this file, each with its `reason`"),
    COMMON,
]
Resume = Annotated[
    bool, typer.Option("--resume", help="With -o DIR/ (one output per input), make only the missing outputs")
]


class Outcome(Protocol):
    """The outcome of one chunk: the lines to keep and to reject, bad lines, and the number of documents."""

    kept: bytes
    rejects: bytes
    bad: list[BadLine]
    documents: int


class Job:
    """One output to make, from its inputs, and a second output for the rejects, with its lineage.

    `replace_rejects` replaces rejects that exist without their output.
    """

    def __init__(
        self, run: Run, inputs: list[str], output: str | None, rejects: str | None, replace_rejects: bool = False
    ) -> None:
        from llmkit.io.record import Lineage

        self.run, self.inputs, self.output = run, inputs, output
        self.replace_rejects = replace_rejects
        self.rejects: dict[str, Lineage] = {}  # path -> record
        if rejects is not None:
            self.rejects[rejects] = Lineage(f"{run.command} --rejects", dict(run.options), run.lineage().inputs)

    def may_replace(self, path: str, lineage: Lineage) -> bool:
        """Whether existing rejects may be replaced.

        They may on request, or if the same command wrote them and was killed before its output was in place.
        """
        if self.run.force or self.replace_rejects:
            return True
        return self.output is not None and not exists(self.output) and self.run.made(path, lineage)

    def record_if_up_to_date(self) -> dict[str, Any] | None:
        """The record of the output, if the outputs exist and were made by the same command from the same inputs."""
        return None if self.run.dry_run else self.run.has_made(self.inputs, self.rejects, output=self.output)

    def arguments(self) -> list[str]:
        """The command-line arguments of a call that makes this output."""
        rejects = [word for path in self.rejects for word in ("--rejects", path)]
        force = ["-f"] if self.run.force or self.replace_rejects else []
        return [self.inputs[0], "-o", str(self.output), *rejects, *force]


def plan_jobs(run: Run, inputs: list[str], rejects: str | None, resume: bool) -> Iterator[Job]:
    """The jobs of a command: one for all inputs, or if -o is a directory, one per input, named like the input.

    Nothing in a directory is replaced: without --resume (or -f) it must contain none of the outputs, or all of them.
    Outputs made by the same command are skipped.
    """
    if rejects is not None and rejects in (run.output, STDIN):
        raise UsageError(f"--rejects {rejects}: this is the output of the documents", "name another file")
    run.check_quarantine({f"the input {path}": path for path in inputs if path != STDIN})
    target = run.output
    if target is None or not is_directory(target):
        yield Job(run, inputs, target, rejects)
        return
    if rejects is not None and not is_directory(rejects):
        raise UsageError(f"--rejects {rejects}: must be a directory too, since -o {target} is one", "end it in /")
    names: dict[str, str] = {}
    for path in inputs:
        name = _stem(path) + ".jsonl.zst"
        if path == STDIN or name in names:
            problem = f"{names[name]} and {path} would both become {name}" if name in names else "stdin has no name"
            raise LlmkitError(f"-o {target}: {problem}", "name a file as output, or rename the inputs")
        names[name] = path
    outputs = [os.path.join(target, name) for name in names]
    rejected = [] if rejects is None else [os.path.join(rejects, name) for name in names]
    run.check_quarantine({f"the output {path}": path for path in outputs + rejected})
    for path in filter(os.path.islink, outputs + rejected):  # whoever made the directory must not choose where to
        member(Path(path).parent, os.path.basename(path))
    existing = [path for path in outputs if exists(path)]
    if not resume and not run.force and 0 < len(existing) < len(outputs):
        raise LlmkitError(f"{existing[0]} exists", "--resume makes only the missing files, -f replaces all of them")
    for directory in (target, rejects):
        if directory is not None and not is_remote(directory) and not run.dry_run:
            Path(directory).mkdir(parents=True, exist_ok=True)
    for (name, path), output in zip(names.items(), outputs, strict=True):
        job_rejects = None if rejects is None else os.path.join(rejects, name)
        yield Job(run, [path], output, job_rejects, replace_rejects=resume and not exists(output))


def is_directory(path: str | None) -> bool:
    """Whether an output names a directory, existing or not."""
    return path is not None and (path.endswith("/") or os.path.isdir(path))


def run_on_cluster(run: Run, jobs: Iterable[Job], *arguments: str) -> tuple[int, dict[str, Any], int]:
    """Run each job as a command on a cluster, with additional `arguments`.

    Returns the number of outputs made, their total counts, and the number of outputs that were up to date.
    """
    if run.read_options().quarantine_files()[0]:
        raise UsageError("a cluster cannot write a single quarantine file", "use --on-bad-line skip, or stop")
    calls, results = [[*job.arguments(), *arguments] for job in jobs], []
    with run.progress(len(calls), "files") as bar:
        for counts in call_per_file(run, calls):
            bar.advance()
            if "up_to_date" not in counts:
                results.append(counts)
    return len(results), reduce(add_counts, results, {}), len(calls) - len(results)


def _stem(path: str) -> str:
    """Base name of an input without the suffixes of its format and compression."""
    name = os.path.basename(path)
    for suffix in COMPRESSIONS[1:]:
        name = name[: -len(suffix)] if has_suffix(name, suffix) else name
    return os.path.splitext(name)[0] or name


def run_jobs(
    run: Run,
    jobs: Iterable[Job],
    make: Callable[[Job, DocumentWriter | None, DocumentWriter | None], JobResult],
    is_finished: Callable[[Job], bool | None] | None = None,
    on_durable: Callable[[], None] | None = None,
    cluster_arguments: tuple[str, ...] | None = None,
) -> dict[str, Any] | None:
    """Run the jobs whose outputs are not up to date. Returns the total counts; None if everything was up to date.

    `make` gets the writers of kept and of rejected documents; both are None with --dry-run. If each input has an output
    of its own, one with an unreadable input is not made where --on-bad-file allows it. `on_durable` is called
    when an output is complete and in place. `is_finished` tells whether the call that made an existing output ran to
    its end: if not (False), the output is made again; None means that another call made it. With `cluster_arguments`,
    a cluster makes each of several outputs by a command with these additional arguments.
    """
    from llmkit.io.document_writer import DocumentWriter
    from llmkit.io.documents import UnreadableFile

    made, total, skipped = 0, dict[str, Any](), 0
    per_file = is_directory(run.output)
    if cluster_arguments is not None and per_file and not run.dry_run:
        if run.skips_bad_files:
            raise UsageError("-o DIRECTORY on a cluster stops at bad files", "omit --on-bad-file, or name one output")
        made, total, skipped = run_on_cluster(run, jobs, *cluster_arguments)
        jobs = ()
    stored = dict[str, Any]()  # counts of the outputs that are up to date
    for job in jobs:
        record = job.record_if_up_to_date()
        finished = (is_finished(job) if is_finished else True) if record is not None else None
        if record is not None and finished is None:
            raise LlmkitError(f"{job.output} exists, made with another state of the index", HINT_EXISTS)
        if finished and record is not None:
            skipped += 1
            run.warn_of_missing_quarantine(record["counts"])
            stored = add_counts(stored, record["counts"])
            continue
        replace = finished is False
        try:
            with ExitStack() as stack:
                writer = rejects = None
                json_only = not any(path == STDIN or has_suffix(path, ".parquet") for path in job.inputs)
                if not run.dry_run:
                    writer = stack.enter_context(run.writer(replace, job.output, json_only))
                    for path, lineage in job.rejects.items():
                        force = replace or job.may_replace(path, lineage)
                        how: dict[str, Any] = {"force": force, "json_only": json_only, "warn": run.warn}
                        rejects = stack.enter_context(DocumentWriter(path, lineage, **how))
                counts, dropped, read = make(job, writer, rejects)
                if rejects:
                    rejects.finish({"documents": dropped}, read)
                if writer:
                    writer.finish(counts, read)
        except UnreadableFile as error:
            if not (per_file and run.skips_bad_files):
                raise
            run.bad_file(error.bad, quarantine=True)
            continue
        made += 1
        if on_durable and not run.dry_run:
            on_durable()
        total = add_counts(total, counts)
    if made == 0 and not run.bad_files:
        files = {"files": 0, "up_to_date": skipped} if skipped > 1 else {"up_to_date": True}
        run.finish(stored | files, f"{run.output} is up to date: nothing to do")
        return None
    return (total or stored) | ({"files": made, "up_to_date": skipped} if made + skipped > 1 else {})


def run_stage(
    run: Run,
    inputs: list[str] | None,
    rejects: str | None,
    work: Callable[[DocumentReader], Iterable[Outcome]],
    count: Callable[[], dict[str, Any]],
    resume: bool = False,
    is_finished: Callable[[Job], bool | None] | None = None,
    on_durable: Callable[[], None] | None = None,
    cluster_arguments: tuple[str, ...] | None = None,
) -> dict[str, Any] | None:
    """Run `work` over the documents of the inputs and write what it keeps and rejects; otherwise like `run_jobs`.

    `count` returns the counts of an output for lineage and summary; `work` resets them.
    """

    def make(job: Job, writer: DocumentWriter | None, rejected: DocumentWriter | None) -> JobResult:
        reader = run.reader_of(job.inputs, on_bad_file="stop" if is_directory(run.output) else None)
        with run.progress(None, "documents") as bar:
            for outcome in work(reader):
                reader.accept(outcome.bad)
                if writer:
                    writer.write(outcome.kept)
                if rejected:
                    rejected.write(outcome.rejects)
                bar.advance(outcome.documents)
        counts = count() | reader.counts()
        return counts, counts["dropped"], reader.inputs

    jobs = plan_jobs(run, run.inputs(inputs), rejects, resume)
    return run_jobs(run, jobs, make, is_finished, on_durable, cluster_arguments)


@contextmanager
def announce_compilation(run: Run) -> Iterator[None]:
    """Print a note if the block takes more than 2 s, since kernels are then being compiled."""
    timer = threading.Timer(2.0, run.note, ["compiling text kernels, once on this machine ..."])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def add_counts(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """The sum of the counts of two outputs, nested counts included."""
    return a | {
        key: add_counts(a.get(key, {}), value) if isinstance(value, dict) else a.get(key, 0) + value
        for key, value in b.items()
    }


def summary_line(run: Run, counts: dict[str, Any], verb: str) -> str:
    """The summary as a line: `kept 90 of 100 documents (90.0 %), ...`."""
    share = f" ({100 * counts['kept'] / counts['documents']:.1f} %)" if counts["documents"] else ""
    kept = f"kept {counts['kept']:,} of {counted(counts['documents'], 'document')}{share}"
    return f"{kept}, {verb} {counts['dropped']:,}{summary_end(run, counts)}"


def summary_end(run: Run, counts: dict[str, Any]) -> str:
    """The end of a summary line: what was skipped, and where the output is."""
    up_to_date = f", {counted(counts['up_to_date'], 'file')} up to date" if counts.get("up_to_date") else ""
    where = "nothing written (--dry-run)" if run.dry_run else f"written to {run.output or 'stdout'}"
    return f"{skipped(counts)}{up_to_date}; {where}"

"""A stage over documents, as `filter` and `dedup` are: documents in, the kept ones out, the dropped ones to --rejects."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer

from llmkit.cli.shared.options import Run
from llmkit.cli.shared.ray_files import by_file
from llmkit.errors import LlmkitError, UsageError
from llmkit.io.inputs import COMPRESSIONS, STDIN, exists, is_remote

if TYPE_CHECKING:
    from llmkit.io.documents import BadLine, DocumentReader, DocumentWriter
    from llmkit.io.record import Input, Lineage

    Made = tuple[dict[str, Any], int, list[Input]]  # what an output counted, documents to its rejects, what was read

Rejects = Annotated[
    str | None,
    typer.Option("--rejects", metavar="FILE", help="Write the dropped documents here, each with its `reason`"),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="With -o DIR/, a file for each input: make only those that are missing")
]


class Outcome(Protocol):
    """What became of one chunk: whole lines to keep and to reject, bad lines, number of documents."""

    kept: bytes
    rejects: bytes
    bad: list[BadLine]
    documents: int


class Job:
    """What becomes one output: its inputs, and the further output for rejects with its record."""

    def __init__(self, run: Run, inputs: list[str], output: str | None, rejects: str | None) -> None:
        from llmkit.io.record import Lineage

        self.run, self.inputs, self.output = run, inputs, output
        self.anew = False  # whether rejects that are there without their output are to be replaced
        self.beside: dict[str, Lineage] = {}
        if rejects is not None:
            self.beside[rejects] = Lineage(f"{run.command} --rejects", dict(run.options), run.lineage().inputs)

    def replaces(self, path: str, lineage: Lineage) -> bool:
        """Whether a further output that is there is to be replaced: asked for, or left by this very call, killed before its output was there."""
        if self.run.force or self.anew:
            return True
        return self.output is not None and not exists(self.output) and self.run.made(path, lineage)

    @property
    def done(self) -> bool:
        """Whether its outputs are there, made by this very call."""
        self.run.output = self.output
        return not self.run.dry_run and self.run.has_made(self.inputs, self.beside)


def jobs(run: Run, inputs: list[str], rejects: str | None, resume: bool) -> Iterator[Job]:
    """What a call has to make: one output of all inputs, or where -o is a directory, one of each, under the input's name.

    In a directory nothing is replaced: without --resume (or -f) it must hold none of the outputs; with it, those that this very call made are
    passed over.
    """
    if rejects is not None and rejects in (run.output, STDIN):
        raise UsageError(f"--rejects {rejects}: this is where the documents go", "name another file")
    target = run.output
    if target is None or not is_directory(target):
        yield Job(run, inputs, target, rejects)
        return
    if rejects is not None and not is_directory(rejects):
        raise UsageError(f"--rejects {rejects}: -o {target} is a directory", "let this be one too: end it in /")
    names: dict[str, str] = {}
    for path in inputs:
        name = _stem(path) + ".jsonl.zst"
        if path == STDIN or name in names:
            both = f"{names[name]} and {path} would both be {name}" if name in names else "stdin has no name"
            raise LlmkitError(f"-o {target}: {both}", "give one file as output, or inputs of different names")
        names[name] = path
    outputs = [os.path.join(target, name) for name in names]
    if not resume and not run.force and (there := [path for path in outputs if exists(path)]):
        raise LlmkitError(f"{there[0]} exists", "--resume makes only what is missing, -f makes all of it anew")
    for directory in (target, rejects):
        if directory is not None and not is_remote(directory) and not run.dry_run:
            Path(directory).mkdir(parents=True, exist_ok=True)
    for (name, path), output in zip(names.items(), outputs, strict=True):
        job = Job(run, [path], output, None if rejects is None else os.path.join(rejects, name))
        job.anew = resume and not exists(output)
        yield job
    run.output = target


def is_directory(path: str | None) -> bool:
    """Whether an output is a directory, there already or not."""
    return path is not None and (path.endswith("/") or os.path.isdir(path))


def over_cluster(run: Run, todo: Iterable[Job], *more: str) -> tuple[int, dict[str, Any], int]:
    """Make outputs by calls on a cluster: how many were made, what they counted together, and how many were there already."""
    if run.read_options().quarantine:
        raise UsageError("a cluster has no one file for bad lines", "--on-bad-line skip, or stop")
    every, found = list(todo), []
    with run.progress(len(every), "files") as bar:
        for counts in by_file(run, every, *more):
            bar.advance()
            if "up_to_date" not in counts:
                found.append(counts)
    return len(found), reduce(added, found, {}), len(every) - len(found)


def _stem(path: str) -> str:
    """Base name of an input without the suffixes of its format and compression."""
    name = os.path.basename(path)
    for packed in COMPRESSIONS[1:]:
        name = name.removesuffix(packed)
    return os.path.splitext(name)[0] or name


def make_all(
    run: Run,
    todo: Iterable[Job],
    make: Callable[[Job, DocumentWriter | None, DocumentWriter | None], Made],
    known: Callable[[list[str]], bool | None] | None = None,
    durable: Callable[[], None] | None = None,
    spread: tuple[str, ...] | None = None,
) -> dict[str, Any] | None:
    """Make each output that is not there, and return the counts of all; None if everything was up to date.

    `make` writes what is kept and what is rejected; with --dry-run there are no writers. `durable` is called when an output is complete and in its
    place; `known` says of the inputs of an output that is there whether that call came to its end: if not (False), the output is made anew; None: it
    is another call's. `spread`: several outputs are made by as many calls on a cluster, with these arguments more.
    """
    from llmkit.io.documents import DocumentWriter

    made, total, passed = 0, dict[str, Any](), 0
    if spread is not None and is_directory(run.output) and not run.dry_run:
        made, total, passed = over_cluster(run, todo, *spread)
        todo = ()
    for job in todo:
        state = (known(job.inputs) if known else True) if job.done else None
        if state:
            passed += 1
            continue
        again = state is False
        made += 1
        with ExitStack() as stack:
            writer = rejected = None
            if not run.dry_run:
                writer = stack.enter_context(run.writer(force=again))
                for path, lineage in job.beside.items():
                    force = again or job.replaces(path, lineage)
                    rejected = stack.enter_context(DocumentWriter(path, lineage, force=force))
            counts, dropped, read = make(job, writer, rejected)
            if rejected:
                rejected.finish({"documents": dropped}, read)
            if writer:
                writer.finish(counts, read)
        if durable and not run.dry_run:
            durable()
        total = added(total, counts)
    if made == 0:
        run.finish({"up_to_date": True}, f"{run.output} is up to date: nothing to do")
        return None
    return total | ({"files": made, "up_to_date": passed} if made + passed > 1 else {})


def run_stage(
    run: Run,
    inputs: list[str] | None,
    rejects: str | None,
    work: Callable[[DocumentReader], Iterable[Outcome]],
    count: Callable[[], dict[str, Any]],
    resume: bool = False,
    known: Callable[[list[str]], bool | None] | None = None,
    durable: Callable[[], None] | None = None,
    spread: tuple[str, ...] | None = None,
) -> dict[str, Any] | None:
    """Run `work` over the documents of the inputs, and write what it keeps and rejects; the rest as `make_all`.

    `count` is asked at the end of each output for the counts that lineage and summary hold; `work` starts them anew.
    """

    def make(job: Job, writer: DocumentWriter | None, rejected: DocumentWriter | None) -> Made:
        reader = run.reader_of(job.inputs)
        with run.progress(None, "documents") as bar:
            for outcome in work(reader):
                reader.accept(outcome.bad)
                if writer:
                    writer.write(outcome.kept)
                if rejected:
                    rejected.write(outcome.rejects)
                bar.advance(outcome.documents)
        counts = count() | ({"bad_lines": reader.bad} if reader.bad else {})
        return counts, counts["dropped"], reader.inputs

    return make_all(run, jobs(run, run.inputs(inputs), rejects, resume), make, known, durable, spread)


@contextmanager
def announced(run: Run) -> Iterator[None]:
    """Say so if the block takes long: kernels are being compiled."""
    timer = threading.Timer(2.0, run.note, ["compiling text kernels, once on this machine ..."])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def added(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """The counts of two outputs together."""
    return a | {
        key: added(a.get(key, {}), value) if isinstance(value, dict) else a.get(key, 0) + value
        for key, value in b.items()
    }


def summary_line(run: Run, counts: dict[str, Any], verb: str) -> str:
    """`kept 90 of 100 documents, ...` for people."""
    share = f" ({100 * counts['kept'] / counts['documents']:.1f} %)" if counts["documents"] else ""
    bad = f", {counts['bad_lines']:,} bad lines passed over" if counts.get("bad_lines") else ""
    there = f", {counts['up_to_date']:,} files were there" if counts.get("up_to_date") else ""
    where = (
        "nothing written (--dry-run)"
        if run.dry_run
        else f"written to {run.output}"
        if run.output
        else "written to stdout"
    )
    return f"kept {counts['kept']:,} of {counts['documents']:,} documents{share}, {verb} {counts['dropped']:,}{bad}{there}; {where}"

"""Where a stage works: `--engine local`, or `ray`; and with -o DIRECTORY, one call of llmkit for each file, on the machines of a cluster."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmkit.cli.shared.options import SHARED, Run
from llmkit.errors import ExitCode, LlmkitError, LockedError, UsageError, unknown_name

if TYPE_CHECKING:
    from llmkit.cli.shared.document_command import Job
    from llmkit.engine.local import Engine

EngineName = Annotated[
    str,
    typer.Option("--engine", metavar="NAME", help="Where the work is done: local (with -j), or ray, a cluster"),
]
# Options that a call for one file has of its own.
OWN = {*SHARED, "files_from", "rejects", "resume", "engine"} - {"seed"}


def engine_of(run: Run, name: str) -> Engine:
    """The engine of that name."""
    if name == "ray":
        from llmkit.engine.cluster import Cluster

        return Cluster()
    if name != "local":
        raise unknown_name("--engine", name, ["local", "ray"])
    from llmkit.engine.local import Local

    return Local(run.jobs)


def by_file(run: Run, jobs: Iterable[Job], *more: str) -> Iterator[dict[str, Any]]:
    """Make each output by a call of its own, with `more` arguments, on a cluster; what each call counted, in order."""
    from llmkit.engine.cluster import Cluster

    def arguments(job: Job) -> list[str]:
        rejects = [word for path in job.beside for word in ("--rejects", path)]
        return [job.inputs[0], "-o", str(job.output), *rejects, *more, *(["-f"] if run.force or job.anew else [])]

    work = partial(_call, run.command, run.config(OWN), os.getcwd())
    for said, counts in Cluster().each(work, ((arguments(job),) for job in jobs)):
        sys.stderr.write(said)
        yield counts


def _call(command: str, config: str, directory: str, arguments: list[str]) -> tuple[str, dict[str, Any]]:
    """One call on the machine where this runs: what it said, and its summary. LlmkitError where it fails."""
    from llmkit.engine.local import die_with_parent

    with tempfile.TemporaryDirectory() as temporary:
        settings, summary = Path(temporary, "options.toml"), Path(temporary, "summary.json")
        settings.write_text(config)
        done = subprocess.run(
            [sys.executable, "-m", "llmkit", command, *arguments, "-q", "--config", settings, "--summary", summary],
            cwd=directory,
            env={name: value for name, value in os.environ.items() if not name.startswith("LLMKIT_")},
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            preexec_fn=die_with_parent,  # the call must not go on beside its repetition
        )
        lines = done.stderr.splitlines()
        if done.returncode:
            failed = [line.partition(": error: ")[2] for line in lines if ": error: " in line] or lines[-1:]
            hints = [line.removeprefix("hint: ") for line in lines if line.startswith("hint: ")]
            message = " ".join(failed) or f"exit code {done.returncode}"
            kind = {ExitCode.USAGE: UsageError, ExitCode.LOCKED: LockedError}.get(
                ExitCode(done.returncode), LlmkitError
            )
            raise kind(message if arguments[0] in message else f"{arguments[0]}: {message}", " ".join(hints))
        counts = json.loads(summary.read_bytes())
        return done.stderr, {key: value for key, value in counts.items() if key not in ("command", "seconds")}

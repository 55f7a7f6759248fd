"""The engine of a stage, `--engine local` or `ray`. With -o DIRECTORY, a cluster runs one llmkit call per file."""

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
    from llmkit.engine.local import Engine

EngineName = Annotated[
    str,
    typer.Option("--engine", metavar="NAME", help="Where to run: local (with -j processes) or ray (a cluster)"),
]
# Options that each call sets itself instead of inheriting them.
PER_CALL = {*SHARED, "files_from", "rejects", "resume", "engine"} - {"seed"}


def engine_of(run: Run, name: str) -> Engine:
    """The engine called `name`. Raises UsageError for an unknown name."""
    if name == "ray":
        from llmkit.engine.cluster import Cluster

        return Cluster()
    if name != "local":
        raise unknown_name("--engine", name, ["local", "ray"])
    from llmkit.engine.local import Local

    return Local(run.jobs)


def call_per_file(run: Run, calls: Iterable[list[str]]) -> Iterator[dict[str, Any]]:
    """Run the command on a cluster, once per list of arguments; yields the counts of each call, in order."""
    from llmkit.engine.cluster import Cluster

    work = partial(_call, run.command, run.config(PER_CALL), os.getcwd())
    for messages, counts in Cluster().starmap(work, ((arguments,) for arguments in calls)):
        sys.stderr.write(messages)
        yield counts


def _call(command: str, config: str, directory: str, arguments: list[str]) -> tuple[str, dict[str, Any]]:
    """Run one call on a worker. Returns its messages and summary; raises LlmkitError if it fails."""
    from llmkit.engine.local import die_with_parent

    with tempfile.TemporaryDirectory() as temporary:
        options, summary = Path(temporary, "options.toml"), Path(temporary, "summary.json")
        options.write_text(config, encoding="utf-8")
        result = subprocess.run(
            [sys.executable, "-m", "llmkit", command, *arguments, "-q", "--config", options, "--summary", summary],
            cwd=directory,
            env={name: value for name, value in os.environ.items() if not name.startswith("LLMKIT_")},
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            preexec_fn=die_with_parent,  # a call must not keep running alongside its retry
        )
        lines = result.stderr.splitlines()
        if result.returncode:
            errors = [line.partition(": error: ")[2] for line in lines if ": error: " in line] or lines[-1:]
            hints = [line.removeprefix("hint: ") for line in lines if line.startswith("hint: ")]
            message = " ".join(errors) or f"exit code {result.returncode}"
            kind = {ExitCode.USAGE: UsageError, ExitCode.LOCKED: LockedError}.get(
                ExitCode(result.returncode), LlmkitError
            )
            raise kind(message if arguments[0] in message else f"{arguments[0]}: {message}", " ".join(hints))
        counts = json.loads(summary.read_bytes())
        return result.stderr, {key: value for key, value in counts.items() if key not in ("command", "seconds")}

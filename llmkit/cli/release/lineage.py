"""`llmkit lineage`: show how an artefact was made, verify its digests, print the pipeline that reproduces it."""

from __future__ import annotations

import json as jsonlib
import re
import sys
from contextlib import suppress
from functools import cache, partial
from pathlib import Path, PurePath
from shutil import get_terminal_size
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from llmkit.cli.shared.messages import counted
from llmkit.cli.shared.options import Run, command
from llmkit.errors import LlmkitError, UsageError

if TYPE_CHECKING:
    from llmkit.lineage.script import Flag
    from llmkit.options import Field

WRITES = ("rejects", "temp_dir")  # options that name what is written, besides the shared ones
PATHS = {"PATH", "FILE", "DIR", "TOML", "MODEL", "DOCS", "INPUT"}


@command(
    examples=(
        "llmkit lineage clean.jsonl.zst",
        "llmkit lineage clean.jsonl.zst --check --inputs .",
        "llmkit lineage clean.jsonl.zst --script > again.sh",
    )
)
def main(
    run: Run,
    artefact: Annotated[
        str, typer.Argument(metavar="ARTEFACT", help="Documents, shards, a tokenizer, a model, or a run")
    ],
    script: Annotated[bool, typer.Option("--script", help="Print a shell script that reproduces it")] = False,
    allow_code: Annotated[
        bool, typer.Option("--allow-code", help="With --script: also run code that the record names")
    ] = False,
    digest: Annotated[
        bool, typer.Option("--digest", help="Print the digest of its content, computed from the file")
    ] = False,
    check: Annotated[bool, typer.Option("--check", help="Verify every digest that can be verified")] = False,
    inputs: Annotated[
        list[str] | None,
        typer.Option(
            "--inputs", metavar="DIR", help="Directory in which --check looks for inputs by name (repeatable)"
        ),
    ] = None,
) -> None:
    """Print the tree of commands that made an artefact, each with its options, inputs and counts.

    --script prints the pipeline as a shell script: run it as `bash again.sh INPUTS OUTPUT`, where INPUTS is the
    directory of the original inputs. The script stops where an original is missing, and at the first output that is not
    what was recorded. A step whose record could not be read is named there as unknown. --check computes the digests of
    the artefact, of every byte of its files and of its record, and of each input that it finds by name beside the
    artefact or in the directories given by --inputs, and prints where; if one differs, the exit code is 1. Artefacts of
    earlier versions that hold no digest of themselves are reported as unchecked. --digest prints the digest that such
    comparisons use. --json prints the record as stored.
    """
    from llmkit.lineage.formats import describe_part, own_digest, read_lineage
    from llmkit.lineage.script import as_script, unknown_steps
    from llmkit.lineage.tree import as_tree

    if digest:
        _print(run, own_digest(artefact) + "\n")
        return
    record = read_lineage(artefact)
    if record is None:
        raise LlmkitError(f"{artefact}: no lineage found", _where_else(Path(artefact)))
    if run.as_json:
        _print(run, jsonlib.dumps(record, ensure_ascii=False, sort_keys=True) + "\n")
    elif script:
        for line in unknown_steps(record):
            run.warn(line)
        _print(run, as_script(record, artefact, _flags, describe_part(artefact, record), allow_code))
    elif check:
        _check(run, artefact, record, inputs or [])
    else:
        is_terminal = sys.stdout.isatty() and not run.output
        _print(run, as_tree(record, artefact, get_terminal_size().columns if is_terminal else 0))


def _where_else(path: Path) -> str:
    """The hint for an artefact without a record."""
    from llmkit.io.inputs import DOCUMENT_SUFFIXES, has_suffix, holds_ids
    from llmkit.lineage.formats import read_lineage

    if path.is_dir():
        for file in sorted(path.iterdir()):
            with suppress(LlmkitError):
                if has_suffix(file.name, DOCUMENT_SUFFIXES) and file.is_file() and read_lineage(file):
                    return f"its files have their own, such as {file}"
    if path.suffix == ".duckdb":
        return f"the runs of an index: llmkit dedup --index {path} --stats"
    if holds_ids(path.name):
        return "exports for other trainers carry none: name the shards that they were made from"
    return "plain .jsonl files cannot hold it, and other tools do not write it"


def _print(run: Run, text: str) -> None:
    """Write text to the output; file names in it may have bytes that are not UTF-8, and a hostile record surrogates."""
    from llmkit.io.atomic import atomic_file

    try:
        data = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        data = text.encode("utf-8", "replace")
    if run.output:
        with atomic_file(run.output, run.force) as sink:
            sink.write(data)
        return
    sys.stdout.flush()
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


@cache
def _flags(name: str) -> dict[str, Flag]:
    """The options of a command that a script may give, by parameter name."""
    from importlib import import_module

    from llmkit.cli.shared.options import (
        NEUTRAL,
        RECORDED_IF_USED,
        click_command,
        neutral_options,
        renamed_options,
        signature,
    )
    from llmkit.cli.shared.table import COMMANDS, module_of
    from llmkit.lineage.script import Flag
    from llmkit.options import Field, NamesCode, NamesFiles

    if name not in COMMANDS:  # "cat" for concatenated streams, or another tool's record
        raise LlmkitError(
            f"the lineage contains the command {name!r}, which a script cannot run", "make that input by hand"
        )
    function = import_module(module_of(name)).main
    parameters, by_role = signature(function), neutral_options(function)
    flags = {}
    for p in click_command(function, name).params:
        # Shared options such as -f: a record must not make the script write elsewhere.
        if p.param_type_name != "option" or p.name in NEUTRAL - RECORDED_IF_USED or p.name not in parameters:
            continue
        negative = p.secondary_opts[0] if p.secondary_opts else ""
        field = Field(p.name, parameters[p.name].annotation, p.default)
        code = [re.compile(mark.pattern) for mark in field.marks() if isinstance(mark, NamesCode)]
        reads = _is_path(field) or any(isinstance(mark, (NamesCode, NamesFiles)) for mark in field.marks())
        flags[p.name] = Flag(
            p.opts[0],
            negative,
            p.default,
            by_role=p.name in by_role,
            writes=p.name in WRITES,
            reads=reads,
            takes=partial(_takes, field),
            runs=partial(_matches, code),
        )
    return flags | {old: flags[new] for old, new in renamed_options(function).items() if old not in flags}


def _takes(field: Field, value: object) -> bool:
    """Whether an option takes a value: of its type, within its bounds, and with paths below a directory only."""
    from llmkit.options import NamesFiles, checked_value

    try:
        checked = checked_value(field, value)
    except UsageError:
        return False
    values = list(map(str, checked if isinstance(checked, list) else [checked]))
    if not isinstance(checked, Path) and not _is_path(field):
        marks = [mark for mark in field.marks() if isinstance(mark, NamesFiles)]
        values = [path for mark in marks for each in values for path in mark.of(each)]
    paths = map(PurePath, values)
    return not any(path.is_absolute() or ".." in path.parts or "~" in str(path)[:1] for path in paths)


def _is_path(field: Field) -> bool:
    """Whether an option takes a path: by its type, or by what its help calls its value."""
    kind = get_args(field.annotation)[0] if field.marks() else field.annotation
    if Path in (kind, *get_args(kind)):
        return True
    return any(PATHS & set(re.findall("[A-Z]+", getattr(mark, "metavar", None) or "")) for mark in field.marks())


def _matches(patterns: list[re.Pattern[str]], value: str) -> bool:
    return any(pattern.search(value) for pattern in patterns)


def _check(run: Run, artefact: str, record: dict[str, object], directories: list[str]) -> None:
    from llmkit.io.names import one_line
    from llmkit.lineage.check import check

    results = list(check(record, artefact, directories))
    lines = (f"{state:<9} {one_line(name)}" + f"  ({one_line(path)})" * bool(path) for name, state, path in results)
    _print(run, "".join(f"{line}\n" for line in lines))
    if differing := [result for result in results if result.state == "DIFFERS"]:
        names = ", ".join(one_line(result.path or result.name) for result in differing)
        hint = "it was changed after it was made or used"
        if any(result.path for result in differing):
            hint += ", or is another file of that name: --inputs names the directory of the right one"
        raise LlmkitError(f"{names}: content differs from the lineage", hint)
    counts = {state: sum(result.state == state for result in results) for state in ("ok", "not found", "unchecked")}
    verified = f"{counted(counts['ok'], 'artefact')} verified"
    missing = f"{counts['not found']:,} not found, {counts['unchecked']:,} unchecked"
    itself = f"; {one_line(results[0].name)} itself was not checked" if results[0].state == "unchecked" else ""
    run.finish(counts, f"{verified}, {missing}{itself}")

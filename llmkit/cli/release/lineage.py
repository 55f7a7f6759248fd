"""`llmkit lineage`: show how an artefact was made, verify its digests, print the pipeline that reproduces it."""

from __future__ import annotations

import json as jsonlib
import sys
from typing import Annotated

import typer

from llmkit.cli.shared.options import Run, command
from llmkit.errors import LlmkitError


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
    directory of the original inputs. The script stops at the first output that is not what was recorded. --check
    computes the digests of the artefact, of its other files and of its record, and of each input that it finds by name
    beside the artefact or in the directories given by --inputs; if one differs, the exit code is 1. Artefacts of
    earlier versions that hold no digest of themselves are reported as unchecked. --digest prints the digest that such
    comparisons use. --json prints the record as stored.
    """
    from llmkit.io.inputs import holds_ids
    from llmkit.lineage.formats import describe_part, own_digest, read_lineage
    from llmkit.lineage.script import as_script
    from llmkit.lineage.tree import as_tree

    if digest:
        print(own_digest(artefact))
        return
    record = read_lineage(artefact)
    if record is None:
        hint = "plain .jsonl files cannot hold it, and other tools do not write it"
        if holds_ids(artefact):
            hint = "exports for other trainers carry none: name the shards that they were made from"
        raise LlmkitError(f"{artefact}: no lineage found", hint)
    if run.as_json:
        _print(jsonlib.dumps(record, ensure_ascii=False, sort_keys=True) + "\n")
    elif script:
        _print(as_script(record, artefact, _flags, describe_part(artefact, record)))
    elif check:
        _check(run, artefact, record, inputs or [])
    else:
        _print(as_tree(record, artefact))


def _print(text: str) -> None:
    """Print text in which file names may have bytes that are not UTF-8, and a hostile record lone surrogates."""
    try:
        data = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        data = text.encode("utf-8", "replace")
    sys.stdout.flush()
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def _flags(name: str) -> dict[str, tuple[str, str, object]]:
    """(flag, negative flag, default) of each option of a command, by parameter name."""
    from importlib import import_module

    from llmkit.cli.shared.options import NEUTRAL, RECORDED_IF_USED, click_command, renamed_options
    from llmkit.cli.shared.table import COMMANDS, module_of

    if name not in COMMANDS:  # "cat" for concatenated streams, or another tool's record
        raise LlmkitError(
            f"the lineage contains the command {name!r}, which a script cannot run", "make that input by hand"
        )
    function = import_module(module_of(name)).main
    built = click_command(function, name)
    # Outputs and other options that no record of ours holds: a record must not make the script write elsewhere.
    options = [p for p in built.params if p.param_type_name == "option" and p.name not in NEUTRAL - RECORDED_IF_USED]
    flags = {p.name: (p.opts[0], p.secondary_opts[0] if p.secondary_opts else "", p.default) for p in options}
    return flags | {old: flags[new] for old, new in renamed_options(function).items() if old not in flags}


def _check(run: Run, artefact: str, record: dict[str, object], directories: list[str]) -> None:
    from llmkit.io.names import one_line
    from llmkit.lineage.check import check

    results = list(check(record, artefact, directories))
    for name, state in results:
        _print(f"{state:<9} {one_line(name)}\n")
    differing = [name for name, state in results if state == "DIFFERS"]
    if differing:
        raise LlmkitError(
            f"{', '.join(map(one_line, differing))}: content differs from the lineage",
            "it was changed after it was made or used",
        )
    counts = {state: sum(1 for _, result in results if result == state) for state in ("ok", "not found")}
    itself = f"; {one_line(results[0][0])} itself was not checked" if results[0][1] == "unchecked" else ""
    run.finish(counts, f"{counts['ok']} digests verified, {counts['not found']} inputs not found{itself}")

"""Fields of a lineage record, which may come from an untrusted file: a value of the wrong type reads as an absent one.

A record is a tree: a command, its options, and its inputs with their own records (llmkit/io/record.py). An
input named `-` came through a pipe from the command of its record; one without a record is an original file.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import xxhash

from llmkit.errors import LlmkitError
from llmkit.io.record import record_digest, record_problem
from llmkit.io.run_layout import CHECKPOINTS, RUN_COMMANDS, STEP_PREFIX
from llmkit.io.sealed_file import BYTES

Record = dict[str, Any]
MAX_DEPTH = 200  # nested records beyond this depth are ignored
MAX_SHOWN, MAX_CHARACTERS = 3, 60  # names of options or inputs, and characters of a value, in a message
BAD = ("on_bad_line", "on_bad_file")
REJECTS = " --rejects"  # end of the command in the record of a stage's second output

_SHARD = re.compile(r"part-\d{5}\.arrow")


def options_of(node: Record) -> dict[str, Any]:
    options = node.get("options")
    return options if isinstance(options, dict) else {}


def present_options(node: Record) -> Record:
    """The options of a record as the commands have them today, so that they do what they did then.

    Earlier versions recorded the file of a quarantine, which must not be written by a script; and before minhash had
    `normalise` (and `shingle`), all numbers and operators were equal. Of a filter by the rules of a file they left out
    an option that these rules do not need.
    """
    options = dict(options_of(node))
    options |= {key: "skip" for key in BAD if str(options.get(key)).startswith("quarantine")}
    is_old = node.get("command") in ("dedup", f"dedup{REJECTS}") and "shingle" not in options
    if is_old and "minhash" in str(options.get("method")) and not options.get("key"):
        options.setdefault("normalise", "loose")
    reads_rules = any(item["role"].startswith("rule ") for item in inputs_of(node))
    if node.get("command") in ("filter", f"filter{REJECTS}") and not reads_rules:
        options.setdefault("respect_opt_out", False)
    return options


def differences(node: Record, header: Record) -> str:
    """How the call that made an artefact differs from the one with this header, in words; empty if they are equal."""
    header = json.loads(json.dumps(header))
    node = node | {"options": present_options(node)}
    for key, words in (("command", "another command"), ("llmkit", "another version"), ("part", "another part")):
        if key in header and node.get(key) != header[key]:
            return f"made by {words}: {_value(node, key)}, not {_value(header, key)}"
    made, options = node["options"], header["options"]
    names = [name for name in sorted({*made, *options}) if made.get(name) != options.get(name)]
    shown = [f"{name} {_value(made, name)}, not {_value(options, name)}" for name in names[:MAX_SHOWN]]
    return f"made with other options: {'; '.join(shown)}{' ...' * (len(names) > MAX_SHOWN)}" if names else ""


def other_inputs(made: list[tuple[str, str]], now: list[tuple[str, str]]) -> str:
    """How inputs, each a name and a digest, differ from those from which an artefact was made, in words."""
    known, present = ({digest for _, digest in items} for items in (made, now))
    names = {name: None for name, digest in now if digest not in known}
    names |= {name: None for name, digest in made if digest not in present}
    shown = ", ".join(list(names)[:MAX_SHOWN]) + " ..." * (len(names) > MAX_SHOWN)
    return f"made from other inputs: {shown}" if names else "made from the same inputs in another order"


def _value(fields: Record, name: str) -> str:
    return f"{fields[name]}"[:MAX_CHARACTERS] if fields.get(name) is not None else "unset"


def counts_of(node: Record) -> dict[str, Any]:
    counts = node.get("counts")
    return counts if isinstance(counts, dict) else {}


def inputs_of(node: Record) -> list[Record]:
    """The inputs of a record, each with a name, role, digest, part, lineage (or None) and runs (or None).

    `unreadable`: what is wrong with the record of an input that has one, but none that can be read; else "".
    """
    inputs = node.get("inputs")
    return (
        [_input(item) for item in inputs if isinstance(item, dict) and isinstance(item.get("name"), str)]
        if (isinstance(inputs, list))
        else []
    )


def _input(item: Record) -> Record:
    lineage, runs = item.get("lineage"), item.get("runs")
    problem = record_problem(lineage) if lineage is not None else ""
    texts = {key: item[key] if isinstance(item.get(key), str) else "" for key in ("name", "digest", "part")}
    return texts | {
        "role": item["role"] if isinstance(item.get("role"), str) else "input",
        "lineage": None if problem else lineage,
        "unreadable": problem,
        "runs": [run for run in runs if isinstance(run, dict)] if isinstance(runs, list) else None,
    }


def file_name(name: str) -> str:
    """The last component of an input's name, which leads out of no directory; "input" if it has none."""
    last = Path(name.replace("\0", "?")).name
    return "input" if last in ("", ".", "..") else last


def place_of(item: Record) -> tuple[str, str]:
    """(name of the artefact, path inside it or "") of an input: what it is a part of, if of anything."""
    name, part, node = file_name(item["name"]), item["part"], item["lineage"] or {}
    if not part:  # records of earlier versions do not tell
        if node.get("command") in RUN_COMMANDS and name.startswith(STEP_PREFIX):
            part = f"run/{CHECKPOINTS}/{name}"
        elif node.get("command") == "mix" and options_of(node).get("holdout") and set(counts_of(node)) == {"documents"}:
            part = "mix/heldout"
        elif _SHARD.fullmatch(name) and item["digest"] != node.get("digest"):
            part = f"shards/{name}"
    artefact, *inside = [file_name(piece) for piece in part.split("/")[:8]] if part else [name]
    return artefact, "/".join(inside)


def identity(node: Record, known: dict[int, str], depth: int = 0) -> str:
    """A digest of what a record was made by and from: equal for two outputs, and for all parts, of one command.

    `known` holds those of the records that were seen, by `id`. LlmkitError where records are nested too deeply.
    """
    if depth > MAX_DEPTH:
        raise LlmkitError("the lineage is nested too deeply", "it was not written by llmkit")
    if id(node) not in known:
        inputs = [
            [item["role"], item["name"], item["digest"], item["part"]]
            + ([identity(item["lineage"], known, depth + 1)] if item["lineage"] else [])
            for item in inputs_of(node)
        ]
        command = str(node.get("command")).removesuffix(REJECTS)
        try:
            text = json.dumps([command, options_of(node), inputs], sort_keys=True)
        except RecursionError:
            raise LlmkitError("the lineage is nested too deeply", "it was not written by llmkit") from None
        known[id(node)] = xxhash.xxh3_128_hexdigest(text.encode())
    return known[id(node)]


def is_well_formed(record: Record) -> bool:
    """Whether a complete record names its inputs, and each of its digests is text."""
    inputs = record.get("inputs")
    texts = [record.get(key, "") for key in ("digest", "files", BYTES)]
    for item in inputs if isinstance(inputs, list) else [None]:
        texts += [item.get("name"), item.get("digest")] if isinstance(item, dict) else [None]
    return all(isinstance(text, str) for text in texts)


def is_intact(record: Record) -> bool | None:
    """Whether a record is what was written; None for one of an earlier version, which cannot tell."""
    try:
        return record["record"] == record_digest(record) if "record" in record else None
    except RecursionError:
        return False

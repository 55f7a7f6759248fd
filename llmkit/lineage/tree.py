"""What a lineage record is good for: a tree to read, a check of every digest, a script that makes the artefact again.

A record is a tree: a command, its options, and its inputs with their own records (see lineage/record.py). An input named `-` came through a pipe
from the command of its record; one without a record is an original, which the script looks for by name.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llmkit.errors import LlmkitError
from llmkit.io.inputs import STDIN, STDIN_PATH
from llmkit.io.run_layout import CHECKPOINTS, STEP_PREFIX, parse_step
from llmkit.lineage.record import base_name, digest_path

Record = dict[str, Any]
# Parameter name -> (flag, negative flag or "", default) of one command's options.
Flags = Callable[[str], dict[str, tuple[str, str, Any]]]

_STREAM = "(standard input)"
RUNS = ("train", "anneal", "sft", "dpo")  # commands that leave checkpoints
MAX_DEPTH = 200  # records come from untrusted files


def as_tree(record: Record, name: str) -> str:
    """The record as an indented tree, the artefact first and its originals last."""
    lines: list[str] = []

    def show(node: Record, title: str, prefix: str, depth: int) -> None:
        options = " ".join(f"{key}={_short(value)}" for key, value in sorted(_options(node).items()))
        counts = ", ".join(
            f"{value:,} {key}" if isinstance(value, int) else f"{key} {value}" for key, value in _counts(node).items()
        )
        lines.append(f"{title}  <- {node.get('command')} {options}".rstrip())
        if counts:
            lines.append(f"{prefix}   [{counts}]")
        inputs = _inputs(node)
        for i, item in enumerate(inputs):
            last = i + 1 == len(inputs)
            label = (
                f"{prefix}{'└─ ' if last else '├─ '}{_role(item)}{'(pipe)' if item['name'] == STDIN else item['name']}"
            )
            below = prefix + ("   " if last else "│  ")
            if item.get("lineage") and depth < MAX_DEPTH:
                show(item["lineage"], label, below, depth + 1)
            else:
                lines.append(f"{label}  {item.get('digest', '')}")

    show(record, base_name(name), "", 0)
    return "\n".join(lines) + "\n"


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def _options(node: Record) -> dict[str, Any]:
    options = node.get("options")
    return options if isinstance(options, dict) else {}


def _counts(node: Record) -> dict[str, Any]:
    counts = node.get("counts")
    return counts if isinstance(counts, dict) else {}


def _inputs(node: Record) -> list[Record]:
    inputs = node.get("inputs")
    found = (
        [item for item in inputs if isinstance(item, dict) and isinstance(item.get("name"), str)]
        if isinstance(inputs, list)
        else []
    )
    return [item | {"lineage": item["lineage"] if isinstance(item.get("lineage"), dict) else None} for item in found]


def _role(item: Record) -> str:
    return "" if item.get("role") in (None, "input") else f"{item['role']}: "


def check(record: Record, path: str, places: list[str]) -> Iterator[tuple[str, str]]:
    """(name, "ok" | "DIFFERS" | "not found" | "unchecked") of the artefact itself and of every named input beneath it, each once.

    Inputs are looked for in `places` and beside the artefact; one name met with two digests counts as two inputs.
    """
    own = content_digest(path) if record.get("digest") else None
    yield base_name(path), "unchecked" if own is None else "ok" if own == record["digest"] else "DIFFERS"
    seen: set[tuple[str, str]] = set()
    searched = [Path(place) for place in places] + [Path(path).resolve().parent]

    def walk(node: Record, depth: int) -> Iterator[tuple[str, str]]:
        for item in _inputs(node):
            key = (item["name"], str(item.get("digest")))
            if item["name"] != STDIN and key not in seen:
                seen.add(key)
                grows = item.get("role") == "index"  # its digest is that of the runs before, not of the file
                yield item["name"], "unchecked" if grows else _find(item, searched)
            if item["lineage"] and depth < MAX_DEPTH:
                yield from walk(item["lineage"], depth + 1)

    yield from walk(record, 0)


def content_digest(path: str | Path) -> str | None:
    """Digest of an artefact's content, computed anew as its writer did; None for formats that are checked only as someone's input."""
    path = Path(path)
    if path.suffix == ".arrow" or (path.is_dir() and any(path.glob("*.arrow"))):
        from llmkit.shards.writer import shard_digest

        return shard_digest(path)
    if path.suffix == ".toml" or (path / "plan.toml").is_file():
        from llmkit.mixing.plan import plan_digest

        return plan_digest(path)
    return digest_path(path) if path.is_file() and path.suffix in (".zst", ".gz") else None


def _find(item: Record, places: list[Path]) -> str:
    name = Path(item["name"]).name  # a record must not lead us outside the places
    candidates = [place / name for place in places if (place / name).exists()]
    if not candidates:
        return "not found"
    return "ok" if any(digest_path(candidate) == item.get("digest") for candidate in candidates) else "DIFFERS"


def as_script(record: Record, name: str, flags: Flags) -> str:
    """A bash script that makes the artefact again: `bash SCRIPT [INPUTS] [OUTPUT]`.

    Pipes come back as pipes, since a stage records whether its input was a pipe or a file. Everything is made under OUTPUT with the base name
    it had, and the originals are taken from INPUTS, so that equal inputs give equal bytes.
    """
    script = _Script(flags, _originals(record))
    script.make(record, base_name(name))
    originals = [_comment(f"  {original}  {digest}") for original, digest in script.originals.items()]
    call = "bash SCRIPT [INPUTS] [OUTPUT]" + (" < STREAM" if _STREAM in script.originals else "")
    head = [
        "#!/usr/bin/env bash",
        _comment(f"Makes {base_name(name)} again, with llmkit {record.get('llmkit')}: {call}"),
        *(["# INPUTS (default: this directory) holds the originals", *originals] if originals else []),
        "set -euo pipefail",
        "IN=${1:-.}",
        "OUT=${2:-rebuilt}",
        'mkdir -p "$OUT"',
    ]
    return "\n".join(head + script.lines) + "\n"


def _originals(record: Record, depth: int = 0) -> dict[str, str]:
    """Digest -> name of every original that was read as a file."""
    found: dict[str, str] = {}
    for item in _inputs(record):
        if item["lineage"] and depth < MAX_DEPTH:
            found |= _originals(item["lineage"], depth + 1)
        elif not item["lineage"] and item["name"] != STDIN and item.get("role") in (None, "input"):
            found[str(item.get("digest"))] = Path(item["name"]).name or "input"
    return found


def _comment(text: str) -> str:
    """A comment of one line, whatever an untrusted record holds."""
    return "# " + "".join(c if c.isprintable() else "?" for c in text)


class _Script:
    """Lines that make artefacts, each once, in an order in which everything exists before it is used."""

    def __init__(self, flags: Flags, files: dict[str, str]) -> None:
        self.lines: list[str] = []
        self.originals: dict[str, str] = {}
        self._streams: list[str] = []
        self._flags = flags
        self._files = files  # digest -> name of an original: what came on stdin may be one of them
        self._made: dict[tuple[str, str], str] = {}
        self._places: set[str] = set()

    def make(self, node: Record, name: str, every: int = 0) -> str:
        """Append what makes `name`, and say where it lies. A run keeps the checkpoints of `every` so many steps where some of them are needed."""
        step = parse_step(name) if node.get("command") in RUNS and name.startswith(STEP_PREFIX) else None
        place = self._place("run" if step else name)
        every = step or every
        self.lines.append(f"{self._pipeline(node, 0)}{f' --save-every {every}' if every else ''} -o {place}")
        return f"{place}/{CHECKPOINTS}/{name}" if step else place

    def _place(self, name: str) -> str:
        """Where an artefact goes; a second one of the same name goes into a numbered directory, since its name is part of the lineage."""
        number, place = 1, f'"$OUT"/{shlex.quote(name)}'
        while place in self._places:
            number += 1
            place = f'"$OUT"/{number}/{shlex.quote(name)}'
        if number > 1:
            self.lines.append(f'mkdir -p "$OUT"/{number}')
        self._places.add(place)
        return place

    def _pipeline(self, node: Record, depth: int) -> str:
        """The command of `node`, with the commands that feed it through pipes in front."""
        if depth > MAX_DEPTH:
            raise LlmkitError("the lineage is nested too deeply", "it does not come from llmkit")
        command, options, inputs = str(node.get("command")), _options(node), _inputs(node)
        flags = self._flags(command)
        words, upstream, redirection = ["llmkit", command], "", ""
        positional: list[str] = []
        suffixes = options.get("specs", [])
        for item in inputs:
            if item["name"] == STDIN and item["lineage"]:
                upstream = self._pipeline(item["lineage"], depth + 1) + " |\n  "
                reference = STDIN
            elif item["name"] == STDIN and str(item.get("digest")) in self._files:
                file = self._original(self._files[str(item.get("digest"))], str(item.get("digest")))
                reference, redirection = STDIN, f' < "$IN"/{shlex.quote(file)}'
            else:
                reference = self._reference(item, _spacing(node))
            option, _, place = str(item.get("role")).partition(" ")
            if option in flags:  # "rule url.domains=*": the path stands where the star is
                before, _, after = place.partition("*")
                words += [
                    flags[option][0],
                    shlex.quote(before) * bool(before) + reference + shlex.quote(after) * bool(after),
                ]
            else:
                suffix = suffixes[len(positional)] if len(positional) < len(suffixes) else ""
                if suffix and reference == STDIN:
                    reference = STDIN_PATH  # "-:0.5" would be an option
                positional.append(reference + (shlex.quote(suffix) if suffix else ""))
        roles = {item.get("role") for item in inputs}
        for key, value in sorted(options.items()):
            if key in flags and key not in roles:
                words += _as_words(value, *flags[key])
        return upstream + " ".join(words[:2] + positional + words[2:]) + redirection

    def _reference(self, item: Record, every: int = 0) -> str:
        """How the script names an input: made by an earlier line, or an original."""
        name = Path(item["name"]).name or "input"  # a record must not lead the script outside its directories
        if not item["lineage"]:
            digest = str(item.get("digest", ""))
            if name == STDIN:
                # What came on stdin from elsewhere: the script's own stdin, and files for any more of that kind.
                name = f"stdin-{len(self._streams)}" if self._streams else ""
                self._streams.append(digest)
                if not name:
                    self.originals[_STREAM] = digest
                    return STDIN
            return f'"$IN"/{shlex.quote(self._original(name, digest))}'
        key = (name, str(item.get("digest")))
        if key not in self._made:
            self._made[key] = self.make(item["lineage"], name, every if item["lineage"].get("command") in RUNS else 0)
        return self._made[key]

    def _original(self, name: str, digest: str) -> str:
        """Where an original lies in INPUTS; another one of the same name lies in a numbered directory."""
        number, place = 1, name
        while self.originals.get(place, digest) != digest:
            number += 1
            place = f"{number}/{name}"
        self.originals[place] = digest
        return place


def _spacing(node: Record) -> int:
    """Steps between the checkpoints that a command needs of the runs it reads; 0 where their last ones do."""
    options = _options(node)
    if node.get("command") == "anneal":
        return parse_step(str(options.get("from_") or "")) or 0
    steps, last = options.get("steps"), options.get("last")
    if node.get("command") != "average" or not isinstance(steps, list) or not isinstance(last, int) or last < 1:
        return 0
    # The last checkpoint of each run may be its end, which is stored anyway.
    passed = [step for i, step in enumerate(steps) if (i + 1) % last and isinstance(step, int)]
    return math.gcd(*passed)


def _as_words(value: Any, flag: str, negative: str, default: Any) -> list[str]:
    """The words of one option; none where it has its default."""
    if value == default or (value in (None, []) and default in (None, [], ())):
        return []
    if isinstance(value, bool):
        return [flag] if value else [negative] if negative else []
    if isinstance(value, list):
        return [word for item in value for word in (flag, shlex.quote(str(item)))]
    return [flag, shlex.quote(str(value))]

"""The lineage record of an artefact: the part that every writer needs, whatever its format.

A record names the command, the options that decide the content, the version, the inputs (base name, digest, and
their own records), and the result (counts and a digest of the content). It holds no time, host, absolute path,
number of workers or output name, so equal inputs, options and seed give equal bytes.

An input that is part of a larger artefact, such as the held-out documents of a mix, one shard of a directory or a
checkpoint of a run, also names that part, and its record is that of the command that made the whole. The record of
an artefact that is itself a part (`heldout` of a mix) says so too, wherever it is moved.

A writer stores the *header* before it reads any input and the *trailer* once the content is complete. Which
format keeps them where: llmkit/lineage/formats.py. The trailer ends with a digest of the record itself, so that a
damaged one is noticed. Formats of one file add a digest of all its bytes (io/sealed_file.py).
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from llmkit import __version__
from llmkit.errors import UNREADABLE, InputWarning, UnreadableRecordError
from llmkit.io.inputs import STDIN, is_pipe, is_remote, redacted
from llmkit.io.names import escape_name, is_utf8
from llmkit.io.sealed_file import BYTES, PENDING

# Digests of one file in one place, which the records of later artefacts do not repeat.
OWN_DIGESTS = ("record", BYTES)
_SLOT = re.compile(rb'"llmkit"\s*:|^llmkit\s*=', re.MULTILINE)  # of a record, in JSON or TOML


@dataclass(slots=True)
class Input:
    """One input of a command: role, base name (`-` for a pipe), digest, and its own record.

    The role is "input", or the name of the option that named the file, or that option and its value with an
    asterisk in place of the path: "rule url.domains=*". `part` is set where the input is only a part of what the
    command in `lineage` made: name of the artefact and path inside it, "mix/heldout". `runs` are the records of the
    runs that made an index, oldest first; None where they are not known.
    """

    role: str
    name: str
    digest: str
    lineage: dict[str, Any] | None = None
    part: str = ""
    runs: list[dict[str, Any]] | None = None
    columns: Any = None  # io.parquet.Columns of a Parquet file; not recorded

    def to_dict(self) -> dict[str, Any]:
        record: dict[str, Any] = {"role": self.role, "name": self.name, "digest": self.digest}
        record |= {"part": self.part} if self.part else {}
        record |= {"runs": self.runs} if self.runs is not None else {}
        lineage = {key: value for key, value in (self.lineage or {}).items() if key not in OWN_DIGESTS}
        return record | ({"lineage": lineage} if lineage else {})


@dataclass(slots=True)
class Lineage:
    """The record of one artefact. `header` is known before the work, `trailer` after it.

    `digest` is that of the content, and `files` of whatever of the artefact it does not cover (a tokenizer beside
    shards, the configuration of a model; lineage/formats.py). `part` is the path inside what the command wrote.
    """

    command: str
    options: dict[str, Any] = field(default_factory=dict)
    inputs: list[Input] = field(default_factory=list)
    counts: dict[str, Any] = field(default_factory=dict)
    digest: str | None = None
    files: str | None = None
    part: str = ""

    def header(self) -> dict[str, Any]:
        """The fields that are known before any input is read."""
        record = {"llmkit": __version__, "command": self.command, "options": self.options}
        return record | ({"part": self.part} if self.part else {})

    def trailer(self) -> dict[str, Any]:
        """The fields that are known once the content is complete."""
        record: dict[str, Any] = {"inputs": [item.to_dict() for item in self.inputs], "counts": self.counts}
        digests = {"digest": self.digest, "files": self.files}
        record |= {name: digest for name, digest in digests.items() if digest}
        return record | {"record": record_digest(self.header() | record)}

    def to_dict(self) -> dict[str, Any]:
        return self.header() | self.trailer()

    def to_json(self) -> str:
        """The complete record of a model; equal records give equal text. The digest of its files follows with them."""
        return record_text(sealed(self.to_dict(), self.files or PENDING))


def record_text(record: dict[str, Any]) -> str:
    """A record as JSON."""
    return json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def record_digest(record: dict[str, Any]) -> str:
    """The digest of a record, without those of its own that it contains."""
    plain = json.loads(json.dumps({key: value for key, value in record.items() if key not in OWN_DIGESTS}))
    return "xxh3:" + xxhash.xxh3_128_hexdigest(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode())


def sealed(record: dict[str, Any], files: str) -> dict[str, Any]:
    """A record with this digest of its files."""
    record = record | {"files": files}
    return record | {"record": record_digest(record)}


def base_name(path: str | Path) -> str:
    """The name of an input in a record: its last path component, escaped where it is not UTF-8.

    `-` for stdin and process substitutions.
    """
    text = str(path)
    if is_pipe(text):
        return STDIN
    return escape_name(os.path.basename(redacted(text).rstrip("/") if is_remote(text) else os.path.abspath(text)))


def recorded(value: Any, marks: tuple[Any, ...]) -> Any:
    """The value of an option, with the marks of its annotation, as a record holds it; the one way into a record.

    No directory is part of it: a path becomes its last component, and so does a string that names an existing file by
    an absolute path.
    """
    from llmkit.options import Recorded

    for mark in marks:
        if isinstance(mark, Recorded):
            value = mark.convert(value)
    if isinstance(value, (list, tuple)):
        return [recorded(item, ()) for item in value]
    if isinstance(value, Path) or (isinstance(value, str) and os.path.isabs(value) and os.path.exists(value)):
        return base_name(value)
    if isinstance(value, str) and not is_utf8(value):  # a path
        return escape_name(value)
    return value


def join_notes(notes: list[tuple[str, dict[str, Any]]], name: str) -> dict[str, Any] | None:
    """The record in the notes of stream `name`; for concatenated ones, one of command `cat` whose inputs are the parts.

    Raises UnreadableRecordError as `parse_record` does, but not for one of several parts.
    """
    headers = [content for kind, content in notes if kind == "header"]
    trailers = [content for kind, content in notes if kind == "trailer"]
    records = [header | (trailers[i] if i < len(trailers) else {}) for i, header in enumerate(headers)]
    if len(records) < 2:
        return parse_record(records[0] if records else None, name)
    parts = [
        Input("input", f"part-{i}", str(record.get("digest", "")), record_or_warning(parse_record, record, name))
        for i, record in enumerate(records)
    ]
    return Lineage("cat", {}, parts).to_dict()


def parse_record(value: Any, name: str) -> dict[str, Any] | None:
    """The record from the text or table in the metadata slot of `name`; None where the slot is empty.

    Raises UnreadableRecordError for anything else than a record.
    """
    if value is None:
        return None
    try:
        content = json.loads(value) if isinstance(value, (str, bytes)) else value
    except (ValueError, RecursionError) as error:
        raise UnreadableRecordError(name, f"not JSON ({str(error).splitlines()[0]})") from None
    if problem := record_problem(content):
        raise UnreadableRecordError(name, problem)
    return dict(content)


def record_problem(record: Any) -> str:
    """What is wrong with a record, without the ones inside it; "" if nothing is."""
    if not isinstance(record, dict):
        return "not an object"
    if isinstance(record.get(UNREADABLE), str):
        return str(record[UNREADABLE])
    if not isinstance(record.get("command"), str):
        return "it names no command"
    inputs = record.get("inputs", [])
    if not isinstance(record.get("options", {}), dict) or not isinstance(inputs, list):
        return "its options or inputs are of the wrong type"
    is_named = all(isinstance(item, dict) and isinstance(item.get("name"), str) for item in inputs)
    return "" if is_named else "one of its inputs has no name"


def record_or_warning(read: Callable[..., dict[str, Any] | None], *arguments: Any) -> dict[str, Any] | None:
    """What `read` returns: the record of an input. Of one that cannot be read, a warning, and what stands for it."""
    try:
        return read(*arguments)
    except UnreadableRecordError as error:
        warnings.warn(f"{error.message}; the step that made it is unknown", InputWarning, stacklevel=1)
        return {UNREADABLE: error.reason}


def slot_of(data: bytes, load: Callable[[str], Any], name: str) -> Any:
    """What a JSON or TOML file holds as `llmkit`, or None. Raises UnreadableRecordError where `load` cannot read it."""
    try:
        content = load(data.decode())
    except (ValueError, RecursionError) as error:
        if _SLOT.search(data):
            raise UnreadableRecordError(name, str(error).splitlines()[0]) from None
        return None
    return content.get("llmkit") if isinstance(content, dict) else None

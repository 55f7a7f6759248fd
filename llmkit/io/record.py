"""The lineage record of an artefact: the part that every writer needs, whatever its format.

A record names the command, the options that decide the content, the version, the inputs (base name, digest, and
their own records), and the result (counts and a digest of the content). It holds no time, host, absolute path,
number of workers or output name, so equal inputs, options and seed give equal bytes.

A writer stores the *header* before it reads any input and the *trailer* once the content is complete. Which
format keeps them where: llmkit/lineage/formats.py.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmkit import __version__
from llmkit.io.inputs import STDIN, is_remote, redacted


@dataclass(slots=True)
class Input:
    """One input of a command: role, base name (`-` for a pipe), digest, and its own record.

    The role is "input", or the name of the option that named the file, or that option and its value with an
    asterisk in place of the path: "rule url.domains=*".
    """

    role: str
    name: str
    digest: str
    lineage: dict[str, Any] | None = None
    columns: Any = None  # io.parquet.Columns of a Parquet file; not recorded

    def to_dict(self) -> dict[str, Any]:
        record: dict[str, Any] = {"role": self.role, "name": self.name, "digest": self.digest}
        return record | ({"lineage": self.lineage} if self.lineage else {})


@dataclass(slots=True)
class Lineage:
    """The record of one artefact. `header` is known before the work, `trailer` after it."""

    command: str
    options: dict[str, Any] = field(default_factory=dict)
    inputs: list[Input] = field(default_factory=list)
    counts: dict[str, Any] = field(default_factory=dict)
    digest: str | None = None

    def header(self) -> dict[str, Any]:
        """The fields that are known before any input is read."""
        return {"llmkit": __version__, "command": self.command, "options": self.options}

    def trailer(self) -> dict[str, Any]:
        """The fields that are known once the content is complete."""
        record: dict[str, Any] = {"inputs": [item.to_dict() for item in self.inputs], "counts": self.counts}
        return record | ({"digest": self.digest} if self.digest else {})

    def to_dict(self) -> dict[str, Any]:
        return self.header() | self.trailer()

    def to_json(self) -> str:
        """The complete record; equal records give equal text."""
        return json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def base_name(path: str | Path) -> str:
    """The name of an input in a record: its last path component, `-` for stdin."""
    text = str(path)
    if text == STDIN:
        return STDIN
    return os.path.basename(redacted(text).rstrip("/") if is_remote(text) else os.path.abspath(text))


def join_notes(notes: list[tuple[str, dict[str, Any]]]) -> dict[str, Any] | None:
    """The record in a stream's notes; for concatenated streams, one of command `cat` whose inputs are the parts."""
    headers = [content for kind, content in notes if kind == "header"]
    trailers = [content for kind, content in notes if kind == "trailer"]
    records = [header | (trailers[i] if i < len(trailers) else {}) for i, header in enumerate(headers)]
    if len(records) < 2:
        return records[0] if records else None
    parts = [Input("input", f"part-{i}", str(record.get("digest", "")), record) for i, record in enumerate(records)]
    return Lineage("cat", {}, parts).to_dict()


def parse_record(value: Any) -> dict[str, Any] | None:
    """A record from the text or table in a metadata slot; None where it is anything else."""
    if isinstance(value, (str, bytes)):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    return value if isinstance(value, dict) and "command" in value else None

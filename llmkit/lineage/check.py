"""Verification of the digests in a lineage record: of the artefact itself, and of every input that is found by name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from llmkit.io.inputs import STDIN
from llmkit.io.names import unescape_name
from llmkit.io.record import base_name
from llmkit.lineage.fields import MAX_DEPTH, Record, file_name, inputs_of
from llmkit.lineage.formats import content_digest, digest_path


def check(record: Record, path: str, directories: list[str]) -> Iterator[tuple[str, str]]:
    """(name, "ok" | "DIFFERS" | "not found" | "unchecked") of the artefact and each input named in its record.

    Inputs are looked for in `directories` and in that of the artefact. A name with two digests counts as two inputs.
    """
    digest = content_digest(path) if record.get("digest") else None
    yield base_name(path), "unchecked" if digest is None else "ok" if digest == record["digest"] else "DIFFERS"
    seen: set[tuple[str, str]] = set()
    searched = [*map(Path, directories), Path(path).resolve().parent]

    def walk(node: Record, depth: int) -> Iterator[tuple[str, str]]:
        for item in inputs_of(node):
            key = (item["name"], str(item.get("digest")))
            if item["name"] != STDIN and key not in seen:
                seen.add(key)
                is_index = item.get("role") == "index"  # its digest is that of the runs before, not of the file
                yield item["name"], "unchecked" if is_index else _state(item, searched)
            if item["lineage"] and depth < MAX_DEPTH:
                yield from walk(item["lineage"], depth + 1)

    yield from walk(record, 0)


def _state(item: Record, directories: list[Path]) -> str:
    name = unescape_name(file_name(item["name"]))  # a record must not lead outside the directories
    candidates = [directory / name for directory in directories if (directory / name).exists()]
    if not candidates:
        return "not found"
    return "ok" if any(digest_path(candidate) == item.get("digest") for candidate in candidates) else "DIFFERS"

"""Digests in a lineage record against the files that are there: the artefact itself, and every input found by name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from llmkit.io.inputs import STDIN
from llmkit.io.record import base_name
from llmkit.lineage.fields import MAX_DEPTH, Record, inputs_of
from llmkit.lineage.formats import content_digest, digest_path


def check(record: Record, path: str, places: list[str]) -> Iterator[tuple[str, str]]:
    """(name, "ok" | "DIFFERS" | "not found" | "unchecked") of the artefact itself and of every named input beneath it, each once.

    Inputs are looked for in `places` and beside the artefact; one name met with two digests counts as two inputs.
    """
    own = content_digest(path) if record.get("digest") else None
    yield base_name(path), "unchecked" if own is None else "ok" if own == record["digest"] else "DIFFERS"
    seen: set[tuple[str, str]] = set()
    searched = [Path(place) for place in places] + [Path(path).resolve().parent]

    def walk(node: Record, depth: int) -> Iterator[tuple[str, str]]:
        for item in inputs_of(node):
            key = (item["name"], str(item.get("digest")))
            if item["name"] != STDIN and key not in seen:
                seen.add(key)
                grows = item.get("role") == "index"  # its digest is that of the runs before, not of the file
                yield item["name"], "unchecked" if grows else _find(item, searched)
            if item["lineage"] and depth < MAX_DEPTH:
                yield from walk(item["lineage"], depth + 1)

    yield from walk(record, 0)


def _find(item: Record, places: list[Path]) -> str:
    name = Path(item["name"]).name  # a record must not lead us outside the places
    candidates = [place / name for place in places if (place / name).exists()]
    if not candidates:
        return "not found"
    return "ok" if any(digest_path(candidate) == item.get("digest") for candidate in candidates) else "DIFFERS"

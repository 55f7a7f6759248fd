"""What all ways of deduplication share: the names of the methods, what becomes of a chunk, and the counts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import orjson

from llmkit.io.documents import BadLine
from llmkit.registry import Registry

METHODS = Registry("method")


@dataclass(slots=True)
class Decided:
    """A chunk's outcome: lines to keep, lines to reject, bad lines for the reader, number of documents read."""

    kept: bytes
    rejects: bytes
    bad: list[BadLine]
    documents: int


@dataclass
class Tally:
    """Documents decided so far; `dropped` by reason, `lacking` a field that an option names."""

    documents: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    lacking: Counter[str] = field(default_factory=Counter)

    def counts(self) -> dict[str, Any]:
        """For summary and lineage."""
        reasons = dict(sorted(self.dropped.items()))
        return {
            "documents": self.documents,
            "kept": self.kept,
            "dropped": self.documents - self.kept,
            "reasons": reasons,
        }


def verdict(reason: str, kept_id: str, similarity: float | None) -> dict[str, Any]:
    """The fields that say why a document is a duplicate: of which kept one, and how similar it is, if that was measured."""
    return {"reason": reason, "duplicate_of": kept_id, "similarity": similarity}


def with_fields(line: bytes, fields: dict[str, Any]) -> bytes:
    """A document's line with fields set."""
    return orjson.dumps(orjson.loads(line) | fields) + b"\n"

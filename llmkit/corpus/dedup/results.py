"""Results that all deduplication methods share: the outcome of a chunk, and the counts of a run."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from llmkit.io.documents import BadLine


@dataclass(slots=True)
class ChunkResult:
    """The outcome of a chunk: lines to keep, lines to reject, bad lines for the reader, number of documents read."""

    kept: bytes
    rejects: bytes
    bad: list[BadLine]
    documents: int


@dataclass
class DedupCounts:
    """Documents processed so far. `dropped` counts by reason, `lacking` by option the documents without its field."""

    documents: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    lacking: Counter[str] = field(default_factory=Counter)

    def counts(self) -> dict[str, Any]:
        """The counts as written to the summary and the lineage."""
        reasons = dict(sorted(self.dropped.items()))
        return {
            "documents": self.documents,
            "kept": self.kept,
            "dropped": self.documents - self.kept,
            "reasons": reasons,
        }


def duplicate_fields(reason: str, kept_id: str, similarity: float | None) -> dict[str, Any]:
    """The fields written on a duplicate: the reason, the id of its kept document, their similarity if measured."""
    return {"reason": reason, "duplicate_of": kept_id, "similarity": similarity}

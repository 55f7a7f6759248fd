"""Shared by the tests of deduplication: in-memory documents for a stage, and the results of stages that edit texts."""

from __future__ import annotations

from collections.abc import Iterable

import orjson

from llmkit.corpus.dedup.passages import PassageDedup
from llmkit.corpus.dedup.substring import SubstringDedup
from llmkit.io.documents import Chunk, ReadOptions


class Rows:
    """A reader of rows, or of their JSON lines, in chunks of `chunk` rows."""

    def __init__(self, rows: Iterable[dict[str, object] | bytes], chunk: int = 7) -> None:
        self.options = ReadOptions(max_line_bytes=100 << 20)
        self._lines = [row if isinstance(row, bytes) else orjson.dumps(row) + b"\n" for row in rows]
        self._chunk = chunk

    def chunks(self) -> Iterable[Chunk]:
        for start in range(0, len(self._lines), self._chunk):
            yield Chunk("rows", start + 1, b"".join(self._lines[start : start + self._chunk]))


def texts_to_rows(texts: Iterable[str]) -> list[dict[str, object]]:
    return [{"id": f"d{i}", "text": text} for i, text in enumerate(texts)]


def outcome_of(
    stage: PassageDedup | SubstringDedup, reason: str, texts: Iterable[str], chunk: int
) -> tuple[list[str], list[str]]:
    """The kept texts, and those dropped for `reason`; the counts are checked against both."""
    rows = list(texts)
    stage.rejects = True
    results = list(stage.run(Rows(texts_to_rows(rows), chunk)))  # type: ignore[arg-type]
    kept = [orjson.loads(line)["text"] for result in results for line in result.kept.splitlines()]
    rejects = [orjson.loads(line) for result in results for line in result.rejects.splitlines()]
    counts = stage.counts()
    assert sum(result.documents for result in results) == counts["documents"] == len(rows) == len(kept) + len(rejects)
    assert {row["reason"] for row in rejects} <= {reason} and counts["dropped"] == len(rejects)
    assert counts["characters"] == sum(map(len, rows))
    assert counts["characters"] - counts["characters_cut"] == sum(map(len, kept))
    return kept, [row["text"] for row in rejects]

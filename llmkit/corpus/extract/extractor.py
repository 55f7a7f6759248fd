"""Pages through an engine in guarded workers, in order, with counts of what became of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import orjson

from llmkit.corpus.extract.archives import Broken, Page
from llmkit.corpus.extract.engines import ENGINES, Skip, document_of
from llmkit.engine.guarded import Failure, guarded_map

BATCH_PAGES, BATCH_BYTES = 64, 1 << 20  # a batch ends at whichever comes first
MEMORY_A_BYTE, MEMORY_BASE = 48, 1 << 30  # a worker's memory: so much for each byte of the longest page, and this


@dataclass(slots=True)
class Extracted:
    """What became of some pages: lines to keep, lines for --rejects, and how many there were."""

    kept: bytes
    rejected: bytes
    pages: int
    broken: list[Broken] = field(default_factory=list)


@dataclass(slots=True)
class Extractor:
    """Runs an engine over pages; `seconds` bounds the time of one page, `max_bytes` its size. `counts` is complete once `run` is."""

    engine: str
    jobs: int
    seconds: float
    max_bytes: int
    counts: dict[str, Any] = field(default_factory=lambda: {"pages": 0, "documents": 0, "broken": 0, "characters": 0})
    reasons: Counter[str] = field(default_factory=Counter)

    def run(self, pages: Iterable[Page | Broken]) -> Iterator[Extracted]:
        """Documents and rejects of the pages, in their order."""
        engine = ENGINES[self.engine]

        def work(found: Page | Broken) -> dict[str, Any] | str:
            if isinstance(found, Broken):
                return found.reason
            try:
                return document_of(found, engine)
            except Skip as skip:
                return str(skip)
            except MemoryError:
                raise
            except Exception as error:  # hostile pages find the faults of parsers: one page, counted, not the whole run
                return f"engine failed ({type(error).__name__})"

        sent: list[list[Page | Broken]] = []  # batches whose results are not there yet; few, see guarded_map

        def batches() -> Iterator[list[Page | Broken]]:
            for batch in _batches(pages):
                sent.append(batch)
                yield batch

        memory = MEMORY_BASE + MEMORY_A_BYTE * self.max_bytes
        for results in guarded_map(work, batches(), jobs=self.jobs, seconds=self.seconds, memory=memory):
            yield self._outcome(sent.pop(0), results)

    def _outcome(self, batch: list[Page | Broken], results: list[dict[str, Any] | str | Failure]) -> Extracted:
        out = Extracted(b"", b"", len(batch))
        kept, rejected = [], []
        for found, result in zip(batch, results, strict=True):
            if isinstance(result, dict):
                kept.append(orjson.dumps(result))
                self.counts["documents"] += 1
                self.counts["characters"] += len(result["text"])
                continue
            reason = result.reason if isinstance(result, Failure) else result
            if isinstance(found, Broken):
                out.broken.append(found)
                self.counts["broken"] += 1
                row = {"file": found.file, "offset": found.offset, "reason": reason}
            else:
                self.reasons[reason] += 1
                row = {"id": found.id, "url": found.url, "content_type": found.content_type, "reason": reason}
            rejected.append(orjson.dumps(row))
        self.counts["pages"] += len(batch) - len(out.broken)
        out.kept = b"".join(line + b"\n" for line in kept)
        out.rejected = b"".join(line + b"\n" for line in rejected)
        return out


def _batches(pages: Iterable[Page | Broken]) -> Iterator[list[Page | Broken]]:
    batch: list[Page | Broken] = []
    size = 0
    for page in pages:
        batch.append(page)
        size += len(page.content) if isinstance(page, Page) else 0
        if len(batch) >= BATCH_PAGES or size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch

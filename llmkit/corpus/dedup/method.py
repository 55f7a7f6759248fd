"""What a method of deduplication is, and the pass over the documents that all of them share.

A method measures documents in the workers (keys, signatures) and has a memory in the main process that knows the kept documents. Documents are
decided one by one in input order: a document that matches a kept one goes, any other is kept and remembered. So the survivor of a group is
its first document, every removed document has a kept one that it matches, kept documents can be written at once, and nothing depends on
the number of workers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import orjson

from llmkit.engine.local import ordered_map
from llmkit.io.documents import BadLine, Chunk, Document, DocumentReader, ReadOptions, parse
from llmkit.registry import Registry

METHODS = Registry("method")


@dataclass(frozen=True, slots=True)
class Match:
    """A document is the same as the `kept`-th kept one (from 0), to the degree of `similarity` (None: not measured)."""

    reason: str
    kept: int
    similarity: float | None


class Memory(Protocol):
    """Kept documents as one method knows them; lives in the main process."""

    def find(self, measure: Any) -> Match | None:
        """The kept document that this one duplicates."""

    def keep(self, measure: Any, index: int) -> None:
        """Remember a document as the `index`-th kept one."""

    def close(self) -> None:
        """Let go of temporary files."""


class Method(Protocol):
    """One way to tell duplicates. Frozen and picklable; `measure` runs in workers."""

    def measure(self, documents: list[Document]) -> list[Any]: ...

    def memory(self) -> Memory: ...


@dataclass(slots=True)
class Measured:
    """A chunk in which every document is measured: its line, id, and one measure a method."""

    lines: list[bytes]
    ids: list[str]
    measures: list[list[Any]]
    bad: list[BadLine]


def measure_chunk(methods: tuple[Method, ...], options: ReadOptions, chunk: Chunk) -> Measured:
    """Worker side. Pure."""
    documents, bad = parse(chunk, options)
    return Measured(
        [document.encode() for document in documents],
        [document.id for document in documents],
        [method.measure(documents) for method in methods],
        bad,
    )


@dataclass(slots=True)
class Decided:
    """A chunk's outcome: lines to keep, lines to reject, bad lines for the reader, number of documents."""

    kept: bytes
    rejects: bytes
    bad: list[BadLine]
    documents: int


@dataclass
class Deduplicator:
    """The pass over the documents of a reader, once."""

    methods: tuple[Method, ...]
    jobs: int = 1
    remember_ids: bool = False  # for rejects: about 80 bytes more a kept document
    documents: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    def run(self, reader: DocumentReader) -> Iterator[Decided]:
        """Decide every document, a chunk at a time, in order."""
        memories = [method.memory() for method in self.methods]
        kept_ids: list[str] = []
        measure = partial(measure_chunk, self.methods, reader.options)
        try:
            for chunk in ordered_map(measure, reader.chunks(), self.jobs):
                yield self._decide(chunk, memories, kept_ids)
        finally:
            for memory in memories:
                memory.close()

    def warm_up(self) -> None:
        """Measure a text, so that kernels are compiled before workers fork."""
        options = ReadOptions()
        documents, _ = parse(Chunk("warm-up", 1, b'{"text": "enough words for a shingle of five"}'), options)
        for method in self.methods:
            method.measure(documents)

    def counts(self) -> dict[str, Any]:
        """Documents read, kept and dropped so far, the dropped by reason."""
        dropped = sum(self.dropped.values())
        return {
            "documents": self.documents,
            "kept": self.kept,
            "dropped": dropped,
            "reasons": dict(sorted(self.dropped.items())),
        }

    def _decide(self, chunk: Measured, memories: list[Memory], kept_ids: list[str]) -> Decided:
        keep: list[bytes] = []
        rejects: list[bytes] = []
        for line, name, *measures in zip(chunk.lines, chunk.ids, *chunk.measures, strict=True):
            # All methods look before any remembers: what one of them drops must not become a survivor of another.
            found = (memory.find(measure) for memory, measure in zip(memories, measures, strict=True))
            match = next(filter(None, found), None)
            if match is None:
                for memory, measure in zip(memories, measures, strict=True):
                    memory.keep(measure, self.kept)
                if self.remember_ids:
                    kept_ids.append(name)
                self.kept += 1
                keep.append(line)
            else:
                self.dropped[match.reason] += 1
                if self.remember_ids:
                    rejects.append(_reject(line, match, kept_ids[match.kept]))
        self.documents += len(chunk.lines)
        return Decided(b"".join(keep), b"".join(rejects), chunk.bad, len(chunk.lines))


def _reject(line: bytes, match: Match, kept_id: str) -> bytes:
    row = orjson.loads(line)
    row |= {"reason": match.reason, "duplicate_of": kept_id, "similarity": match.similarity}
    return orjson.dumps(row) + b"\n"

"""Deduplication in two passes: all documents are measured first, then the survivors chosen, then the documents written.

    groups = Groups(near=MinHash(), keep="longest")
    for outcome in groups.run(reader): ...            # kept and rejected lines, in input order

Knowing every document before the first is written, it can keep the longest or the best of a group rather than the first, write on a survivor for how
many documents it stands, and bound memory: measures and lines wait in unnamed temporary files, and bands are sorted one by one.

The promise: with `clusters="stars"` every removed document has a kept one that it matches, with a similarity at or over the threshold. `components`
removes what is connected by a chain of such pairs, as the field usually does; ends of a chain can be quite unlike. Equal keys are equal 64-bit
hashes here: among 10⁸ documents the chance of one false match is about 3·10⁻⁴.

Memory: some arrays of 8 bytes a document and candidate pair, and the sorting of one band in parts within `memory` bytes (figures, time too:
tests/bench/dedup_scale.md). Disk: the lines, compressed fast, 4 bytes a distinct shingle, 8 a band, 1 or 4 a hash function for an index.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llmkit.corpus.dedup.exact import Exact
from llmkit.corpus.dedup.local import REASONS, Choice, Telling, Waiting
from llmkit.corpus.dedup.measure import Measure
from llmkit.corpus.dedup.method import Decided, Tally
from llmkit.corpus.dedup.minhash import MinHash
from llmkit.corpus.dedup.ray import Scattered
from llmkit.engine.cluster import Cluster
from llmkit.engine.local import Engine, Local
from llmkit.errors import UsageError
from llmkit.io.documents import Chunk, DocumentReader, ReadOptions
from llmkit.io.record import Input

if TYPE_CHECKING:  # with it DuckDB, which a run without an index does without
    from llmkit.corpus.dedup.index import Index

BATCH = 1 << 15  # documents that go into the index at once


@dataclass
class Groups(Tally):
    """The two passes. `group` names a field whose values divide the documents, which are compared with their own kind only."""

    exact: Exact | None = None
    near: MinHash | None = None
    keep: str = "first"  # first, longest, best:FIELD (the largest number)
    clusters: str = "stars"
    group: str | None = None
    annotate: bool = False
    counts_written: bool = True
    engine: Engine = field(default_factory=Local)
    rejects: bool = False
    memory: int = 4 << 30  # bytes for the sorting of a band
    temporary: str | None = None
    index: Index | None = None
    options: dict[str, Any] = field(default_factory=dict)  # of the call: what else a run in the index is known by
    _commit: Callable[[], None] | None = None

    def __post_init__(self) -> None:
        if self.keep not in ("first", "longest") and not (self.keep.startswith("best:") and self.keep[5:]):
            raise UsageError(f"--keep {self.keep}", "one of: first, longest, best:FIELD")
        if self.clusters not in ("stars", "components"):
            raise UsageError(f"--clusters {self.clusters}", "one of: stars, components")

    def commit(self) -> None:
        """Call it once the output is durable: what was kept is then in the index."""
        if self._commit:
            self._commit()
            self._commit = None

    @property
    def measure(self) -> Measure:
        """What is asked of each document."""
        bits = self.index.settings["signature bits"] if self.index and self.near else 0
        return Measure(self.exact, self.near, self.keep, self.group, bits)

    def warm_up(self) -> None:
        """Compile before workers fork."""
        lines = b'{"text": "enough words for a shingle of five"}\n' * 2
        Measure(self.exact, self.near)(ReadOptions(), Chunk("warm-up", 1, lines))

    def run(self, reader: DocumentReader, against: DocumentReader | None = None) -> Iterator[Decided]:
        """Outcomes of chunks: while they are measured their bad lines and numbers, then the lines to keep and to reject."""
        settings = self.near, self.clusters, self.memory, self.temporary
        cluster = self.engine if isinstance(self.engine, Cluster) else None
        with closing(Scattered(cluster, *settings) if cluster else Waiting(*settings)) as waiting:
            if against is not None:
                for part in waiting.measured(self.engine, replace(self.measure, keep="first"), against, written=False):
                    yield Decided(b"", b"", part.bad, 0)
            for part in waiting.measured(self.engine, self.measure, reader):
                self.lacking += part.lacking
                yield Decided(b"", b"", part.bad, len(part.ids))
            seen, pending = self._seen(waiting, reader) if self.index else (None, None)
            choice = waiting.decided(seen)
            self._count(choice, waiting.given)
            telling = Telling(self.annotate, self.rejects, self.counts_written)
            yield from waiting.written(self.engine, telling, choice, self.index)
            if self.index and pending:
                self._add(
                    self.index, waiting, *pending, np.flatnonzero(choice.matches[waiting.given :] == -1) + waiting.given
                )

    def _count(self, choice: Choice, given: int) -> None:
        """Add a choice to the counts."""
        matches = choice.matches[given:]
        self.documents += len(matches)
        self.kept += len(matches) if self.annotate else int((matches == -1).sum())
        for number, reason in enumerate(REASONS[1:], 1):
            if gone := int(((matches != -1) & (choice.reasons[given:] == number)).sum()):
                self.dropped[reason] += gone

    def _seen(self, waiting: Waiting, reader: DocumentReader) -> tuple[Choice | None, tuple[int, str] | None]:
        """What earlier runs kept, and the run with what it is known by, where it is not in the index yet."""
        from llmkit.corpus.dedup.index import run_key

        assert self.index
        key = run_key([item.digest for item in reader.inputs], self.options)
        run, choice = self.index.run_of(key), None
        reader.inputs.append(Input("index", self.index.name, self.index.history(run)))
        if len(waiting):
            threshold = self.near.threshold if self.near else 0.0
            rows, similarities, reasons = self.index.find(run, waiting.indexed(slice(None)), threshold)
            rows[: waiting.given] = -1  # what is seen already stays as it is
            gone = rows >= 0
            choice = Choice(
                np.where(gone, -2 - rows, -1),
                np.where(gone, similarities, 0.0),
                np.where(gone, reasons, 0).astype(np.uint8),
            )
        return choice, None if self.index.has(key) else (run, key)

    def _add(self, index: Index, waiting: Waiting, run: int, key: str, kept: NDArray[np.int64]) -> None:
        """Add the documents to the index that stay; they are there once `commit` is called."""
        index.begin()
        ids = waiting.ids.read()
        for start in range(0, len(kept), BATCH):
            part = kept[start : start + BATCH]
            index.add(run, [ids[i].decode("utf-8", "replace") for i in part.tolist()], waiting.indexed(part))
        self._commit = partial(index.commit, run, key, len(waiting) - waiting.given, len(kept))

"""Deduplication in two passes: all documents are measured, then survivors chosen, then the documents written.

    dedup = TwoPassDedup(near=MinHash(), keep="longest")
    for result in dedup.run(reader): ...            # kept and rejected lines, in input order

Because all documents are known before the first is written, the longest or the best of a cluster can be kept rather
than the first, a survivor can carry the size of its cluster, and memory is bounded: columns and lines are in unnamed
temporary files, and bands are sorted one by one.

Guarantee: with `clusters="stars"` every removed document matches a kept one, with a similarity at or above the
threshold. `components` removes whatever is connected by a chain of such pairs, as is usual in the field; the ends of a
chain can be quite dissimilar. Equal keys are equal 64-bit hashes here: among 10⁸ documents the probability of one false
match is about 3·10⁻⁴.

Memory: a few arrays of 8 bytes per document and candidate pair, and the sorting of one band in parts within `memory`
bytes (figures, also of time: tests/bench/dedup_scale.md). Disk: the lines, lightly compressed, 4 bytes per distinct
shingle, 8 per band, and 1 or 4 per hash function for an index.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llmkit.corpus.added_fields import DUPLICATE
from llmkit.corpus.dedup.exact import Exact
from llmkit.corpus.dedup.local import REASONS, Decisions, LocalStore, OutputOptions
from llmkit.corpus.dedup.measure import ChunkMeasurer
from llmkit.corpus.dedup.minhash import MinHash
from llmkit.corpus.dedup.ray import RayStore
from llmkit.corpus.dedup.results import ChunkResult, DedupCounts
from llmkit.engine.cluster import Cluster
from llmkit.engine.local import Engine, Local
from llmkit.errors import UsageError
from llmkit.io.documents import Chunk, DocumentReader, ReadOptions
from llmkit.io.record import Input

if TYPE_CHECKING:  # imports DuckDB, which runs without an index do not need
    from llmkit.corpus.dedup.index import Index

INDEX_BATCH = 1 << 15  # documents added to the index at once


@dataclass
class TwoPassDedup(DedupCounts):
    """Deduplication in two passes. `group` names a field: only documents with the same value are compared.

    Raises UsageError for an unknown value of `keep` or `clusters`.
    """

    exact: Exact | None = None
    near: MinHash | None = None
    keep: str = "first"  # first, longest, best:FIELD (the largest number)
    clusters: str = "stars"
    group: str | None = None
    annotate: bool = False
    write_counts: bool = True
    engine: Engine = field(default_factory=Local)
    rejects: bool = False
    memory: int = 4 << 30  # bytes for the sorting of a band
    temporary: str | None = None
    index: Index | None = None
    options: dict[str, Any] = field(default_factory=dict)  # of the command; part of the identity of a run in the index
    record: dict[str, Any] = field(default_factory=dict)  # lineage of the command, with the inputs named by options
    notice: str = ""  # for the user, where the index knows the inputs already
    _record: dict[str, Any] = field(default_factory=dict)  # the lineage with the documents read
    _commit: Callable[[], None] | None = None

    def __post_init__(self) -> None:
        if self.keep not in ("first", "longest") and not (self.keep.startswith("best:") and self.keep[5:]):
            raise UsageError(f"--keep {self.keep}", "one of: first, longest, best:FIELD")
        if self.clusters not in ("stars", "components"):
            raise UsageError(f"--clusters {self.clusters}", "one of: stars, components")

    def commit(self) -> None:
        """Commit the kept documents to the index. Call it once the output is durable."""
        if self._commit:
            self._commit()
            self._commit = None

    @property
    def measurer(self) -> ChunkMeasurer:
        """What is computed for each document."""
        bits = self.index.settings["signature bits"] if self.index and self.near else 0
        added = ("cluster", "duplicates") * self.write_counts + DUPLICATE * (self.annotate or self.rejects)
        return ChunkMeasurer(self.exact, self.near, self.keep, self.group, bits, added + ("rule",) * self.rejects)

    def warm_up(self) -> None:
        """Compile the kernels before workers fork."""
        lines = b'{"text": "enough words for a shingle of five"}\n' * 2
        ChunkMeasurer(self.exact, self.near)(ReadOptions(), Chunk("warm-up", 1, lines))

    def run(self, reader: DocumentReader, against: DocumentReader | None = None) -> Iterator[ChunkResult]:
        """Results of chunks: bad lines and numbers during the first pass, then lines to keep and to reject.

        Documents of `against` are reference documents: their duplicates are removed, they are not written themselves.
        """
        settings = self.near, self.clusters, self.memory, self.temporary
        cluster = self.engine if isinstance(self.engine, Cluster) else None
        with closing(RayStore(cluster, *settings) if cluster else LocalStore(*settings)) as store:
            if against is not None:
                measurer = replace(self.measurer, keep="first", added=())
                for chunk in store.measure(self.engine, measurer, against, write=False):
                    yield ChunkResult(b"", b"", chunk.bad, 0)
            for chunk in store.measure(self.engine, self.measurer, reader):
                self.lacking += chunk.lacking
                yield ChunkResult(b"", b"", chunk.bad, len(chunk.ids))
            indexed, new_run = self._find_indexed(store, reader) if self.index else (None, None)
            decisions = store.choose_survivors(indexed)
            self._count(decisions, store.references)
            rules = tuple(criterion.rule if criterion else "" for criterion in (None, self.exact, self.near))
            output = OutputOptions(self.annotate, self.rejects, self.write_counts, rules)
            yield from store.render(self.engine, output, decisions, self.index)
            if self.index and new_run:
                kept = np.flatnonzero(decisions.matches[store.references :] == -1) + store.references
                self._add(self.index, store, *new_run, kept)

    def _count(self, decisions: Decisions, references: int) -> None:
        """Add decisions to the counts, except those for the first `references` documents."""
        matches = decisions.matches[references:]
        self.documents += len(matches)
        self.kept += len(matches) if self.annotate else int((matches == -1).sum())
        for number, reason in enumerate(REASONS[1:], 1):
            if removed := int(((matches != -1) & (decisions.reasons[references:] == number)).sum()):
                self.dropped[reason] += removed

    def _find_indexed(
        self, store: LocalStore, reader: DocumentReader
    ) -> tuple[Decisions | None, tuple[int, str] | None]:
        """Duplicates of documents of earlier runs; and the number and key of this run if it is not in the index yet."""
        from llmkit.corpus.dedup.index import run_key

        assert self.index
        key = self.index.key_of(reader.inputs, self.options)
        run, decisions = self.index.run_of(key), None
        self.notice = self._notice(key, run_key([item.digest for item in reader.inputs], self.options))
        history, runs = self.index.history(run), self.index.runs_before(run)
        seen = Input("index", self.index.name, history, runs=None if runs else runs)
        self._record = self.record | {
            "inputs": [*self.record.get("inputs", []), *(item.to_dict() for item in (*reader.inputs, seen))]
        }
        reader.inputs.append(replace(seen, runs=runs))
        if len(store):
            threshold = self.near.threshold if self.near else 0.0
            rows, similarities, reasons = self.index.find(run, store.index_columns(slice(None)), threshold)
            rows[: store.references] = -1  # reference documents are kept
            found = rows >= 0
            decisions = Decisions(
                np.where(found, -2 - rows, -1),
                np.where(found, similarities, 0.0),
                np.where(found, reasons, 0).astype(np.uint8),
            )
        return decisions, None if self.index.has(key) else (run, key)

    def _notice(self, key: str, content: str) -> str:
        """What the user must know where a run in the index has this key, or read the same content under other names."""
        assert self.index
        if self.index.has(key):
            run = self.index.run_of(key)
            return f"run {run} of {self.index.path} read the same input: this makes its output again, and adds nothing"
        if not (names := self.index.names_of(content)):
            return ""
        name, run = f"{names[0]}, ..." if len(names) > 1 else names[0], self.index.run_of(content)
        return f"run {run} of {self.index.path} read the same content under the name {name}: all are duplicates"

    def _add(self, index: Index, store: LocalStore, run: int, key: str, kept: NDArray[np.int64]) -> None:
        """Add the kept documents to the index; they become visible when `commit` is called."""
        index.begin()
        index.add_record(run, self._record)
        ids = store.ids.read()
        for start in range(0, len(kept), INDEX_BATCH):
            rows = kept[start : start + INDEX_BATCH]
            index.add(run, [ids[i].decode("utf-8", "replace") for i in rows.tolist()], store.index_columns(rows))
        self._commit = partial(index.commit, run, key, len(store) - store.references, len(kept))

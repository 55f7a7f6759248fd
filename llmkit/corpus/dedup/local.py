"""All measured documents of a deduplication in temporary files, and the choice of survivors among them.

    store = LocalStore(near, clusters, memory, temporary)
    for chunk in store.measure(Local(), measurer, reader): ...          # bad lines, numbers of documents
    decisions = store.choose_survivors()
    for result in store.render(Local(), OutputOptions(), decisions): ...  # the documents again, kept and rejected

Documents are numbered in input order and ranked by preference. The rank is the number unless longer or better documents
are preferred.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmkit.corpus.dedup.kernels import clusters as kernels
from llmkit.corpus.dedup.measure import ChunkMeasurer, MeasuredChunk
from llmkit.corpus.dedup.minhash import MinHash
from llmkit.corpus.dedup.results import ChunkResult, duplicate_fields
from llmkit.corpus.dedup.temp_columns import Blobs, Column, unpack
from llmkit.engine.local import Engine
from llmkit.io.documents import DocumentReader
from llmkit.io.splice import splice

if TYPE_CHECKING:
    from llmkit.corpus.dedup.index import Columns, Index

REASONS = ("", "exact", "minhash")
NEIGHBOURS = 16  # a document is compared with the first 16 documents of its band and the 16 before it
MIN_SORT_BYTES = 1 << 12  # too little memory for sorting below this
BATCH = 1 << 19  # documents or pairs whose shingles may be in memory at once
SORT_BYTES_PER_KEY = 40  # memory for a band key while it is sorted

EMPTY = np.empty(0, np.int64)
EMPTY.setflags(write=False)  # read-only as mapped files are, so that kernels are compiled for one kind of array


class Decisions(NamedTuple):
    """What becomes of each document.

    `matches`: the document that it duplicates (-1: none, it is kept; -2 - r: row r of the index). `similarities`: how
    similar they are (-1: not measured). `reasons`: index into REASONS.
    """

    matches: NDArray[np.int64]
    similarities: NDArray[np.float64]
    reasons: NDArray[np.uint8]

    def select(self, rows: Any) -> Decisions:
        """The decisions for some documents."""
        return Decisions(self.matches[rows], self.similarities[rows], self.reasons[rows])


@dataclass(frozen=True, slots=True)
class OutputOptions:
    """What is written: `rejects` are returned, or everything is kept and annotated; survivors get their `counts`.

    `rules`: the rule that each of REASONS stands for, written on rejects.
    """

    annotate: bool = False
    rejects: bool = False
    counts: bool = True
    rules: tuple[str, ...] = ("", "", "")

    @property
    def ids(self) -> bool:
        """Whether the ids of survivors are needed."""
        return self.annotate or self.rejects


class ChunkDecisions(NamedTuple):
    """The decisions for the documents of a chunk.

    `sizes`: lengths of their lines. `clusters`: names of their clusters. `counts`: documents in the cluster
    (0: the document is alone). `survivor_ids`: ids of the documents that the duplicates match, in order.
    """

    sizes: NDArray[np.int64]
    decisions: Decisions
    clusters: NDArray[np.uint64]
    counts: NDArray[np.int64]
    survivor_ids: list[str]


def render_chunk(output: OutputOptions, packed: bytes, chunk: ChunkDecisions) -> ChunkResult:
    """The lines of a chunk to keep and to reject. Pure: runs in a worker."""
    lines, end, ids = unpack(packed), 0, iter(chunk.survivor_ids)
    if (chunk.decisions.matches == -1).all() and not (output.counts and chunk.counts.any()):
        return ChunkResult(lines, b"", [], 0)
    kept: list[bytes] = []
    rejects: list[bytes] = []
    columns = (chunk.sizes, *chunk.decisions, chunk.clusters, chunk.counts)
    for size, match, similarity, reason, cluster, count in zip(*(values.tolist() for values in columns), strict=True):
        start, end = end, end + size
        line, survives = lines[start:end], match == -1
        fields: dict[str, Any] = {}
        if count and output.counts and (survives or output.annotate):
            fields = {"cluster": f"{cluster:016x}"} | ({"duplicates": count} if survives else {})
        if not survives and output.ids:
            fields |= duplicate_fields(REASONS[reason], next(ids), None if similarity < 0 else similarity)
            if not output.annotate:
                rejects.append(splice(line, fields | {"rule": output.rules[reason]}))
        if survives or output.annotate:
            kept.append(splice(line, fields) if fields else line)
    return ChunkResult(b"".join(kept), b"".join(rejects), [], 0)


class LocalStore:
    """The measured documents in temporary files. `memory`: bytes for sorting a band."""

    lazy = True  # similarities are measured where they are needed, not for all candidate pairs

    def __init__(self, near: MinHash | None, clusters: str, memory: int, temporary: str | None = None) -> None:
        self.near, self.clusters, self.memory, self.temporary = near, clusters, memory, temporary
        self.references = 0  # the first documents are for reference only: they are kept, and not written
        self.ids = Blobs(temporary)
        self.chunks: list[int] = []  # number of documents of each chunk to write
        self._order: NDArray[np.int64] | None = None  # document numbers by rank; None if they are equal
        self._packed = Blobs(temporary)
        self._columns: dict[str, Column] = {}

    def __len__(self) -> int:
        return len(self.ids)

    def close(self) -> None:
        """Delete the temporary files."""
        for blobs in (self.ids, self._packed):
            blobs.close()
        for column in self._columns.values():
            column.close()

    # The first pass.
    def measure(
        self, engine: Engine, measurer: ChunkMeasurer, reader: DocumentReader, write: bool = True
    ) -> Iterator[MeasuredChunk]:
        """Measure the documents of a reader, chunk by chunk. With write=False, for reference documents, comes first."""
        for chunk in engine.map(partial(measurer, reader.options), reader):
            self._append(chunk, write)
            if write:
                self._packed.append([chunk.lines])
            yield chunk

    def _append(self, chunk: MeasuredChunk, write: bool) -> None:
        """Store the columns and ids of a chunk."""
        bands = chunk.columns.pop("bands", None)
        band_columns = {} if bands is None else {f"band{i}": column for i, column in enumerate(bands.T)}
        for name, values in (chunk.columns | band_columns).items():
            if name not in self._columns:
                self._columns[name] = Column(values.dtype, self.temporary)
            self._columns[name].append(values)
        self.ids.append(chunk.ids)
        if write:
            self.chunks.append(len(chunk.ids))
        else:
            self.references += len(chunk.ids)

    def column(self, name: str) -> NDArray[Any]:
        """A column in input order; empty if it was not measured."""
        return self._columns[name].array() if name in self._columns else EMPTY

    def ranked_column(self, name: str) -> NDArray[Any]:
        """A column in order of rank."""
        values = self.column(name)
        return values if self._order is None or not len(values) else values[self._order]

    def index_columns(self, rows: Any) -> Columns:
        """Columns of some documents in the form that an index takes."""
        names = ("exact", "keyed", "same", "shingle_counts")
        columns = {n: self.column(n)[rows] for n in self._columns if n in names or n.startswith("band")}
        if "signature" in self._columns and self.near:
            columns["signature"] = self.column("signature").reshape(-1, self.near.bands * self.near.rows)[rows]
        return columns

    # Between the passes.
    def choose_survivors(self, indexed: Decisions | None = None) -> Decisions:
        """Decide which documents survive; `indexed`: decisions already made, for duplicates of indexed documents."""
        total = len(self)
        decisions = indexed or Decisions(np.full(total, -1, np.int64), np.zeros(total), np.zeros(total, np.uint8))
        if not total:
            return decisions
        if "preference" in self._columns:
            self._order = np.argsort(
                np.concatenate([np.full(self.references, -np.inf), -self.column("preference")]), kind="stable"
            )
        if self._order is not None:
            decisions = decisions.select(self._order)
        exact = self._first_ranks("exact")
        if len(exact):
            exact[~self.ranked_column("keyed")] = -1
        same = self._first_ranks("same")
        candidates = self._candidate_pairs(same)
        threshold, lazy = self._threshold(), self.lazy and self.clusters == "stars"
        similarities = np.empty(0) if lazy or threshold < 0 else self._similarities(candidates)
        if self.clusters == "stars":
            self._choose_stars(exact, same, candidates, similarities, lazy, decisions)
        else:
            kernels.components(self.references, exact, same, candidates, similarities, threshold, *decisions)
        if self._order is None:
            return decisions
        ranks = np.empty_like(self._order)
        ranks[self._order] = np.arange(total)
        matches = decisions.matches.copy()  # negative where there is none here, or one in the index
        here = matches >= 0
        matches[here] = self._order[matches[here]]
        return decisions._replace(matches=matches).select(ranks)

    def _first_ranks(self, name: str) -> NDArray[np.int64]:
        """By rank, the lowest rank with the same key in a column."""
        keys = self.ranked_column(name)
        result = np.empty(len(keys), np.int64)
        if len(keys):
            kernels.firsts(keys, np.argsort(keys, kind="stable"), result)
        return result

    def _representatives(self, same: NDArray[np.int64]) -> NDArray[np.int64]:
        """Ranks of the documents that are compared by their bands: the first of each set of equal words."""
        return np.flatnonzero((same == np.arange(len(same))) & (self.ranked_column("shingle_counts") > 0))

    def _candidate_pairs(self, same: NDArray[np.int64]) -> NDArray[np.uint64]:
        """Pairs of ranks that share a band."""
        pairs = np.empty(0, np.uint64)
        if not self.near:
            return pairs
        ranks = self._representatives(same)
        parts = -(-len(ranks) * SORT_BYTES_PER_KEY // max(self.memory, MIN_SORT_BYTES)) or 1
        for band in range(self.near.bands):
            keys = self.ranked_column(f"band{band}")[ranks]
            for part in range(parts):
                rows = np.flatnonzero(keys % np.uint64(parts) == part) if parts > 1 else slice(None)
                pairs = np.union1d(pairs, pairs_with_equal_keys(keys[rows], ranks[rows]))
        return pairs

    def _threshold(self) -> float:
        """The similarity threshold; -1 if candidates are not verified."""
        return self.near.threshold if self.near and self.near.verify else -1.0

    def _shingle_offsets(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Document number of each rank, and start of the shingles of each document, as the kernels take them."""
        starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.column("shingle_counts"))])
        return np.arange(len(self)) if self._order is None else self._order, starts

    def _choose_stars(
        self, exact: Any, same: Any, candidates: Any, similarities: Any, lazy: bool, decisions: Decisions
    ) -> None:
        """Choose survivors in order of rank; with `lazy`, similarities are measured where they are needed."""
        documents, starts = self._shingle_offsets()
        state: list[Any] = [np.full(len(column), -1, np.int64) for column in (exact, same, same)]
        state += [np.zeros(len(same)), np.zeros(len(same), np.bool_)]
        for first in range(0, len(self), BATCH):
            shingles = self.column("shingles" if lazy else "")  # mapped again, which releases the pages already read
            ranks = first, min(first + BATCH, len(self)), self.references
            measured = similarities, documents, shingles.view(np.uint32), starts, self._threshold()
            kernels.stars(*ranks, exact, same, candidates, *measured, *decisions, *state)

    def _similarities(self, candidates: NDArray[np.uint64]) -> NDArray[np.float64]:
        """Similarities of candidate pairs."""
        documents, starts = self._shingle_offsets()
        results = [np.empty(0)]
        for first in range(0, len(candidates), BATCH):
            pairs = split_pairs(candidates[first : first + BATCH])
            later, earlier = (documents[ranks.astype(np.int64)] for ranks in pairs)
            results.append(kernels.similarities_of(later, earlier, self.column("shingles"), starts, self._threshold()))
        return np.concatenate(results)

    # The second pass.
    def render(
        self, engine: Engine, output: OutputOptions, decisions: Decisions, index: Index | None = None
    ) -> Iterator[ChunkResult]:
        """The results of the chunks to write, in order."""
        packed = self._packed.read()
        for number, chunk in enumerate(self._chunk_decisions(output, decisions, index)):
            yield render_chunk(output, packed[number], chunk)

    def _chunk_decisions(
        self, output: OutputOptions, decisions: Decisions, index: Index | None
    ) -> Iterable[ChunkDecisions]:
        """The decisions, chunk by chunk."""
        matches = decisions.matches
        survivors = np.where(matches >= 0, matches, np.arange(len(matches)))
        counts = np.bincount(survivors, self.column("weights"), len(matches)).astype(np.int64)
        counts[np.bincount(survivors, minlength=len(matches)) < 2] = 0
        names, sizes, ids = self.column("same" if self.near else "exact"), self.column("sizes"), self.ids.read()
        indexed_ids = index.ids(-2 - matches[matches < -1]) if index and output.ids else {}
        start = self.references
        for size in self.chunks:
            rows = slice(start, start + size)
            start += size
            removed = matches[rows][matches[rows] != -1].tolist() if output.ids else []
            survivor_ids = [ids[n].decode("utf-8", "surrogatepass") if n >= 0 else indexed_ids[-2 - n] for n in removed]
            yield ChunkDecisions(
                sizes[rows], decisions.select(rows), names[survivors[rows]], counts[survivors[rows]], survivor_ids
            )


def split_pairs(pairs: NDArray[np.uint64]) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """The later and the earlier documents of packed pairs."""
    return pairs >> kernels.S32, pairs & kernels.LOW_32


def pairs_with_equal_keys(keys: NDArray[np.uint64], ranks: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Packed candidate pairs of documents that share a key; `ranks` ascending."""
    order = np.argsort(keys, kind="stable")
    pairs: NDArray[np.uint64] = kernels.pairs(keys[order], ranks[order], NEIGHBOURS)
    return pairs

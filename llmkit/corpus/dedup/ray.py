"""The document store on a Ray cluster: lines, band keys and shingles stay on the machines where they were measured.

Two shuffles bring together what has to meet:

1. Band join: every block of chunks partitions its (key, rank) pairs by band and key. One task per partition sorts it
   and returns the pairs of documents that share a key.
2. Verification: for each slice of these pairs, the blocks return the shingles of the documents in it. One task measures
   their similarity.

The driver holds the columns that decide, about 60 bytes per document including its id in temporary files, a few arrays
of 8 bytes per document, and 16 bytes per candidate pair. The results are those of `LocalStore`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llmkit.corpus.dedup.kernels import clusters as kernels
from llmkit.corpus.dedup.local import (
    MIN_SORT_BYTES,
    SORT_BYTES_PER_KEY,
    Decisions,
    LocalStore,
    OutputOptions,
    pairs_with_equal_keys,
    render_chunk,
    split_pairs,
)
from llmkit.corpus.dedup.measure import ChunkMeasurer, MeasuredChunk
from llmkit.corpus.dedup.results import ChunkResult
from llmkit.engine.cluster import Cluster, Ref
from llmkit.io.documents import Chunk, DocumentReader, ReadOptions

if TYPE_CHECKING:
    from llmkit.corpus.dedup.index import Index

BLOCK = 64  # chunks whose values are partitioned together
TASK_BYTES = 1 << 30  # most that one task sorts or compares; --memory if that is less


class RayStore(LocalStore):
    """Measured documents on the machines of `cluster`."""

    lazy = False

    def __init__(self, cluster: Cluster, *settings: Any) -> None:
        super().__init__(*settings)
        self.cluster = cluster
        self._lines: list[Ref] = []
        self._bands: list[Ref] = []
        self._shingles: list[Ref] = []
        self._counts: list[int] = []  # documents of each chunk, including reference documents

    def measure(
        self, engine: Any, measurer: ChunkMeasurer, reader: DocumentReader, write: bool = True
    ) -> Iterator[MeasuredChunk]:
        """As `LocalStore.measure`, on the cluster."""
        work = partial(_measure, measurer, reader.options)
        for chunk, (lines, bands, shingles) in self.cluster.scatter(work, reader, 4):
            self._append(chunk, write)
            self._counts.append(len(chunk.ids))
            self._bands.append(bands)
            self._shingles.append(shingles)
            if write:
                self._lines.append(lines)
            yield chunk

    def _blocks(self) -> Iterator[tuple[slice, slice]]:
        """(chunks, documents) of each block."""
        ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(self._counts)])
        for first in range(0, len(self._counts), BLOCK):
            last = min(first + BLOCK, len(self._counts))
            yield slice(first, last), slice(int(ends[first]), int(ends[last]))

    def _candidate_pairs(self, same: NDArray[np.int64]) -> NDArray[np.uint64]:
        if not self.near:
            return np.empty(0, np.uint64)
        representatives = self._representatives(same)
        ranks = np.full(len(self), -1, np.int64)  # by document number
        ranks[representatives if self._order is None else self._order[representatives]] = representatives
        room = max(min(self.memory, TASK_BYTES), MIN_SORT_BYTES)
        partitions = self.near.bands * max(1, -(-len(representatives) * SORT_BYTES_PER_KEY // room))
        partitioned = [
            _as_list(
                self.cluster.call(
                    _partition, partitions, self.near.bands, ranks[rows], *self._bands[chunks], returns=partitions
                )
            )
            for chunks, rows in self._blocks()
        ]
        self._bands = []  # releases the band keys in the cluster
        results = self.cluster.starmap(_join, (tuple(block[i] for block in partitioned) for i in range(partitions)))
        pairs = [np.empty(0, np.uint64)]
        for partition_pairs in results:
            pairs.append(partition_pairs)
            if len(pairs) > BLOCK:
                pairs = [np.unique(np.concatenate(pairs))]
        return np.unique(np.concatenate(pairs))

    def _similarities(self, candidates: NDArray[np.uint64]) -> NDArray[np.float64]:
        slices = self.cluster.starmap(_compare, self._slices(candidates, self._threshold()))
        similarities = np.concatenate([np.empty(0), *slices])
        self._shingles = []
        return similarities

    def _slices(self, candidates: NDArray[np.uint64], threshold: float) -> Iterator[tuple[Any, ...]]:
        """Arguments of `_compare` for each slice of the candidate pairs."""
        sizes, order = self.column("shingle_counts"), self._order
        room = max(min(self.memory, TASK_BYTES), MIN_SORT_BYTES)
        size = max(1, int(room / (8 * max(1.0, float(sizes.mean())))))
        size = min(size, max(1 << 12, -(-len(candidates) // self.cluster.cores)))
        for first in range(0, len(candidates), size):
            pair = np.stack(split_pairs(candidates[first : first + size])).astype(np.int64)
            pair = pair if order is None else order[pair]
            documents, positions = np.unique(pair, return_inverse=True)
            shingles = []
            for chunks, rows in self._blocks():
                block = documents[np.searchsorted(documents, rows.start) : np.searchsorted(documents, rows.stop)]
                if len(block):
                    shingles.append(
                        self.cluster.call(_gather, block - rows.start, sizes[rows], *self._shingles[chunks])
                    )
            yield positions.reshape(2, -1), sizes[documents], threshold, *shingles

    def render(
        self, engine: Any, output: OutputOptions, decisions: Decisions, index: Index | None = None
    ) -> Iterator[ChunkResult]:
        """As `LocalStore.render`, on the cluster."""
        self._lines.reverse()  # so that each ref is released as it is used
        arguments = ((self._lines.pop(), chunk) for chunk in self._chunk_decisions(output, decisions, index))
        return self.cluster.starmap(partial(render_chunk, output), arguments)


def _as_list(refs: Any) -> list[Ref]:
    return refs if isinstance(refs, list) else [refs]


# Functions that run on the workers.
def _measure(measurer: ChunkMeasurer, options: ReadOptions, chunk: Chunk) -> tuple[MeasuredChunk, bytes, Any, Any]:
    """Measure a chunk: the part for the driver, and lines, band keys and shingles, which stay on the worker."""
    measured = measurer(options, chunk)
    lines, measured.lines = measured.lines, b""
    columns = measured.columns
    bands = columns.get("bands") if measurer.bits else columns.pop("bands", None)  # an index needs them on the driver
    return measured, lines, bands, columns.pop("shingles", None)


def _partition(partitions: int, bands: int, ranks: NDArray[np.int64], *keys: NDArray[np.uint64]) -> Any:
    """The (keys, ranks) of each partition, each of one band; documents of rank -1 are left out."""
    block_keys, parts = np.concatenate(keys)[ranks >= 0], partitions // bands
    ranks = ranks[ranks >= 0]
    result = []
    for band in block_keys.T:
        part = band % np.uint64(parts)
        result += [(band[part == number], ranks[part == number]) for number in range(parts)]
    return tuple(result) if partitions > 1 else result[0]


def _join(*blocks: tuple[NDArray[np.uint64], NDArray[np.int64]]) -> NDArray[np.uint64]:
    """Pairs of documents of one partition that share a key."""
    keys, ranks = (np.concatenate(columns) for columns in zip(*blocks, strict=True))
    order = np.argsort(ranks, kind="stable")
    return np.unique(pairs_with_equal_keys(keys[order], ranks[order]))


def _gather(rows: NDArray[np.int64], sizes: NDArray[np.int64], *shingles: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """The shingles of some documents of a block, concatenated."""
    block_shingles, ends = np.concatenate(shingles), np.cumsum(sizes)
    return np.concatenate([block_shingles[ends[i] - sizes[i] : ends[i]] for i in rows])


def _compare(
    pairs: NDArray[np.int64], sizes: NDArray[np.int64], threshold: float, *shingles: NDArray[np.uint32]
) -> NDArray[np.float64]:
    """Similarity of each pair; `pairs` [2, n] are positions among the documents of `sizes` and `shingles`."""
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
    later, earlier = pairs
    similarities: NDArray[np.float64] = kernels.similarities_of(
        later, earlier, np.concatenate(shingles), starts, threshold
    )
    return similarities

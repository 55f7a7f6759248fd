"""The same on a Ray cluster: lines, band keys and shingles stay where they were measured, and two shuffles bring together what has to meet.

1. Band join: every block of chunks deals its (key, rank) pairs out by band and key; one task for each hand sorts it, and gives the pairs of documents that
   share a key.
2. Verification: for each slice of these pairs the blocks hand out the shingles of the documents in it; one task measures their similarity.

The driver keeps the columns that decide, about 60 bytes a document with its id in temporary files, some arrays of 8 bytes a document, and 16 bytes a
candidate pair. What comes out is what `Waiting` gives.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llmkit.corpus.dedup.kernels import groups as kernels
from llmkit.corpus.dedup.local import LEAST, SORTED, Choice, Telling, Waiting, halves, sharing, tell
from llmkit.corpus.dedup.measure import Measure, Part
from llmkit.corpus.dedup.method import Decided
from llmkit.engine.cluster import Cluster, Ref
from llmkit.io.documents import Chunk, DocumentReader, ReadOptions

if TYPE_CHECKING:
    from llmkit.corpus.dedup.index import Index

BLOCK = 64  # chunks whose values are dealt out together
HAND = 1 << 30  # bytes that one task sorts or compares, at most; --memory where that is less


class Scattered(Waiting):
    """Documents on the machines of `cluster`."""

    lazy = False

    def __init__(self, cluster: Cluster, *settings: Any) -> None:
        super().__init__(*settings)
        self.cluster = cluster
        self._lines: list[Ref] = []
        self._bands: list[Ref] = []
        self._shingles: list[Ref] = []
        self._counts: list[int] = []  # documents of each chunk, those that are not written included

    def measured(self, engine: Any, measure: Measure, reader: DocumentReader, written: bool = True) -> Iterator[Part]:
        """As `Waiting.measured`, on the cluster."""
        for part, (lines, bands, shingles) in self.cluster.scatter(partial(_apart, measure, reader.options), reader, 4):
            self._take(part, written)
            self._counts.append(len(part.ids))
            self._bands.append(bands)
            self._shingles.append(shingles)
            if written:
                self._lines.append(lines)
            yield part

    def _blocks(self) -> Iterator[tuple[slice, slice]]:
        """(chunks, documents) of each block."""
        ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(self._counts)])
        for first in range(0, len(self._counts), BLOCK):
            last = min(first + BLOCK, len(self._counts))
            yield slice(first, last), slice(int(ends[first]), int(ends[last]))

    def _candidates(self, same: NDArray[np.int64]) -> NDArray[np.uint64]:
        if not self.near:
            return np.empty(0, np.uint64)
        joined = self._joined(same)
        ranks = np.full(len(self), -1, np.int64)  # by number
        ranks[joined if self._order is None else self._order[joined]] = joined
        room = max(min(self.memory, HAND), LEAST)
        hands = self.near.bands * max(1, -(-len(joined) * SORTED // room))
        dealt = [
            _several(self.cluster.call(_deal, hands, self.near.bands, ranks[of], *self._bands[chunks], returns=hands))
            for chunks, of in self._blocks()
        ]
        self._bands = []  # the cluster need not hold them any longer
        pairs = self.cluster.each(_join, (tuple(block[hand] for block in dealt) for hand in range(hands)))
        found = [np.empty(0, np.uint64)]
        for mine in pairs:
            found.append(mine)
            if len(found) > BLOCK:
                found = [np.unique(np.concatenate(found))]
        return np.unique(np.concatenate(found))

    def _similarities(self, candidates: NDArray[np.uint64]) -> NDArray[np.float64]:
        measured = self.cluster.each(_compare, self._slices(candidates, self._threshold()))
        known = np.concatenate([np.empty(0), *measured])
        self._shingles = []
        return known

    def _slices(self, candidates: NDArray[np.uint64], threshold: float) -> Iterator[tuple[Any, ...]]:
        """Arguments of `_compare` for each slice of the candidates."""
        sizes, order = self.plain("shingled"), self._order
        room = max(min(self.memory, HAND), LEAST)
        size = max(1, int(room / (8 * max(1.0, float(sizes.mean())))))
        size = min(size, max(1 << 12, -(-len(candidates) // self.cluster.cores)))
        for first in range(0, len(candidates), size):
            pair = np.stack(halves(candidates[first : first + size])).astype(np.int64)
            pair = pair if order is None else order[pair]
            documents, places = np.unique(pair, return_inverse=True)
            handed = []
            for chunks, of in self._blocks():
                wanted = documents[np.searchsorted(documents, of.start) : np.searchsorted(documents, of.stop)]
                if len(wanted):
                    handed.append(self.cluster.call(_hand_out, wanted - of.start, sizes[of], *self._shingles[chunks]))
            yield places.reshape(2, -1), sizes[documents], threshold, *handed

    def written(self, engine: Any, telling: Telling, choice: Choice, index: Index | None = None) -> Iterator[Decided]:
        """As `Waiting.written`, on the cluster."""
        self._lines.reverse()  # each ref is given up with its turn
        arguments = ((self._lines.pop(), found) for found in self._verdicts(telling, choice, index))
        return self.cluster.each(partial(tell, telling), arguments)


def _several(refs: Any) -> list[Ref]:
    return refs if isinstance(refs, list) else [refs]


# What runs on the workers.
def _apart(measure: Measure, options: ReadOptions, chunk: Chunk) -> tuple[Part, bytes, Any, Any]:
    """What the driver gets of a chunk, and what stays: lines, band keys, shingles."""
    part = measure(options, chunk)
    lines, part.lines = part.lines, b""
    bands = part.columns.get("bands") if measure.bits else part.columns.pop("bands", None)  # an index takes them, too
    return part, lines, bands, part.columns.pop("shingles", None)


def _deal(hands: int, bands: int, ranks: NDArray[np.int64], *keys: NDArray[np.uint64]) -> Any:
    """The (keys, ranks) of each hand: all of one band, and of the documents that look for others."""
    mine, parts = np.concatenate(keys)[ranks >= 0], hands // bands
    ranks = ranks[ranks >= 0]
    dealt = []
    for band in mine.T:
        part = band % np.uint64(parts)
        dealt += [(band[part == number], ranks[part == number]) for number in range(parts)]
    return tuple(dealt) if hands > 1 else dealt[0]


def _join(*dealt: tuple[NDArray[np.uint64], NDArray[np.int64]]) -> NDArray[np.uint64]:
    """Pairs of documents of one hand."""
    keys, ranks = (np.concatenate(columns) for columns in zip(*dealt, strict=True))
    order = np.argsort(ranks, kind="stable")
    return np.unique(sharing(keys[order], ranks[order]))


def _hand_out(wanted: NDArray[np.int64], sizes: NDArray[np.int64], *shingles: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """The shingles of some documents of a block, one behind the other."""
    everything, ends = np.concatenate(shingles), np.cumsum(sizes)
    return np.concatenate([everything[ends[i] - sizes[i] : ends[i]] for i in wanted])


def _compare(
    pairs: NDArray[np.int64], sizes: NDArray[np.int64], threshold: float, *shingles: NDArray[np.uint32]
) -> NDArray[np.float64]:
    """Similarity of each pair of documents; `pairs` [2, n], by place among those that were handed out."""
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
    later, earlier = pairs
    found: NDArray[np.float64] = kernels.similarities_of(later, earlier, np.concatenate(shingles), starts, threshold)
    return found

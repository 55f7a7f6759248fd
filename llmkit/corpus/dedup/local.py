"""All measured documents of a deduplication, in temporary files, and the choice of survivors among them.

    waiting = Waiting(settings, temporary)
    for part in waiting.measured(Local(), measure, reader): ...   # bad lines, and numbers of documents
    for outcome in waiting.written(waiting.decided()): ...        # the documents again, kept and rejected

Documents are numbered as they come in, and ranked by preference: rank is number unless longer or better ones are preferred.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmkit.corpus.dedup.kernels import groups as kernels
from llmkit.corpus.dedup.measure import Measure, Part
from llmkit.corpus.dedup.method import Decided, verdict, with_fields
from llmkit.corpus.dedup.minhash import MinHash
from llmkit.corpus.dedup.temp_columns import Blobs, Column, unpack
from llmkit.engine.local import Engine
from llmkit.io.documents import DocumentReader

if TYPE_CHECKING:
    from llmkit.corpus.dedup.index import Columns, Index

REASONS = ("", "exact", "minhash")
CHAIN = 16  # documents of a band that each is compared with: the first ones, and as many before it
LEAST = 1 << 12  # bytes: less is no memory for a sort
STEP = 1 << 19  # documents or pairs whose shingles may be in memory at once
SORTED = 40  # bytes of memory that a band key takes while it is sorted

NOTHING = np.empty(0, np.int64)
NOTHING.setflags(write=False)  # as what a file holds, so that kernels are compiled for one kind of array


class Choice(NamedTuple):
    """For each document the one that it duplicates (-1: it stays; -2 - r: row r of the index), how similar they are (-1: not measured), and the number of the reason."""

    matches: NDArray[np.int64]
    similarities: NDArray[np.float64]
    reasons: NDArray[np.uint8]

    def of(self, chosen: Any) -> Choice:
        """The choice for some documents."""
        return Choice(self.matches[chosen], self.similarities[chosen], self.reasons[chosen])


@dataclass(frozen=True, slots=True)
class Telling:
    """What is written of a choice: whether `rejects` are wanted or everything is kept and annotated, and whether survivors get `counts`."""

    annotate: bool = False
    rejects: bool = False
    counts: bool = True

    @property
    def ids(self) -> bool:
        """Whether the ids of survivors are needed."""
        return self.annotate or self.rejects


class Verdicts(NamedTuple):
    """The choice for the documents of a chunk: `sizes` of their lines, `names` of their clusters, `numbers` of documents in them (0: it is alone), and the ids of those that they duplicate."""

    sizes: NDArray[np.int64]
    choice: Choice
    names: NDArray[np.uint64]
    numbers: NDArray[np.int64]
    ids: list[str]


def tell(telling: Telling, packed: bytes, found: Verdicts) -> Decided:
    """The lines of a chunk to keep and to reject. Pure: runs in a worker."""
    lines, end, ids = unpack(packed), 0, iter(found.ids)
    if (found.choice.matches == -1).all() and not (telling.counts and found.numbers.any()):
        return Decided(lines, b"", [], 0)
    kept: list[bytes] = []
    rejects: list[bytes] = []
    values = (found.sizes, *found.choice, found.names, found.numbers)
    for size, match, similarity, reason, name, number in zip(*(column.tolist() for column in values), strict=True):
        start, end = end, end + size
        line, stays = lines[start:end], match == -1
        fields: dict[str, Any] = {}
        if number and telling.counts and (stays or telling.annotate):
            fields = {"cluster": f"{name:016x}"} | ({"duplicates": number} if stays else {})
        if not stays and telling.ids:
            fields |= verdict(REASONS[reason], next(ids), None if similarity < 0 else similarity)
            if not telling.annotate:
                rejects.append(with_fields(line, fields))
        if stays or telling.annotate:
            kept.append(with_fields(line, fields) if fields else line)
    return Decided(b"".join(kept), b"".join(rejects), [], 0)


class Waiting:
    """The documents. `memory` is for the sorting of a band, in bytes."""

    lazy = True  # similarities are measured where they are needed, not all of them

    def __init__(self, near: MinHash | None, clusters: str, memory: int, temporary: str | None = None) -> None:
        self.near, self.clusters, self.memory, self.temporary = near, clusters, memory, temporary
        self.given = 0  # the first documents are seen elsewhere: they stay, and are not written
        self.ids = Blobs(temporary)
        self.chunks: list[int] = []  # documents of each chunk that is written
        self._order: NDArray[np.int64] | None = None  # documents by rank, where that is not their number
        self._packed = Blobs(temporary)
        self._columns: dict[str, Column] = {}

    def __len__(self) -> int:
        return len(self.ids)

    def close(self) -> None:
        """Give the temporary files back."""
        for blobs in (self.ids, self._packed):
            blobs.close()
        for column in self._columns.values():
            column.close()

    # The first pass.
    def measured(
        self, engine: Engine, measure: Measure, reader: DocumentReader, written: bool = True
    ) -> Iterator[Part]:
        """Measure the documents of a reader, chunk by chunk; those that are not to be written come first."""
        for part in engine.map(partial(measure, reader.options), reader):
            self._take(part, written)
            if written:
                self._packed.append([part.lines])
            yield part

    def _take(self, part: Part, written: bool) -> None:
        """Store what is known of the documents of a chunk."""
        bands = part.columns.pop("bands", None)
        more = {} if bands is None else {f"band{i}": column for i, column in enumerate(bands.T)}
        for name, values in (part.columns | more).items():
            if name not in self._columns:
                self._columns[name] = Column(values.dtype, self.temporary)
            self._columns[name].append(values)
        self.ids.append(part.ids)
        if written:
            self.chunks.append(len(part.ids))
        else:
            self.given += len(part.ids)

    def plain(self, name: str) -> NDArray[Any]:
        """One value a document, in input order; empty where that was not measured."""
        return self._columns[name].array() if name in self._columns else NOTHING

    def column(self, name: str) -> NDArray[Any]:
        """The same by rank."""
        values = self.plain(name)
        return values if self._order is None or not len(values) else values[self._order]

    def indexed(self, chosen: Any) -> Columns:
        """Columns as an index takes them, of some documents."""
        wanted = ("exact", "keyed", "same", "shingled")
        found = {n: self.plain(n)[chosen] for n in self._columns if n in wanted or n.startswith("band")}
        if "signature" in self._columns and self.near:
            found["signature"] = self.plain("signature").reshape(-1, self.near.bands * self.near.rows)[chosen]
        return found

    # Between the passes.
    def decided(self, seen: Choice | None = None) -> Choice:
        """The survivors; `seen` names documents that go already, and why."""
        total = len(self)
        choice = seen or Choice(np.full(total, -1, np.int64), np.zeros(total), np.zeros(total, np.uint8))
        if not total:
            return choice
        if "worth" in self._columns:
            self._order = np.argsort(
                np.concatenate([np.full(self.given, -np.inf), -self.plain("worth")]), kind="stable"
            )
        if self._order is not None:
            choice = choice.of(self._order)
        exact = self._firsts("exact")
        if len(exact):
            exact[~self.column("keyed")] = -1
        same = self._firsts("same")
        candidates = self._candidates(same)
        threshold, lazy = self._threshold(), self.lazy and self.clusters == "stars"
        known = np.empty(0) if lazy or threshold < 0 else self._similarities(candidates)
        if self.clusters == "stars":
            self._stars(exact, same, candidates, known, lazy, choice)
        else:
            kernels.components(self.given, exact, same, candidates, known, threshold, *choice)
        if self._order is None:
            return choice
        back = np.empty_like(self._order)
        back[self._order] = np.arange(total)
        matches = np.where(choice.matches >= 0, self._order[choice.matches], choice.matches)
        return choice._replace(matches=matches).of(back)

    def _firsts(self, name: str) -> NDArray[np.int64]:
        """By rank, the lowest document with the same key."""
        keys = self.column(name)
        result = np.empty(len(keys), np.int64)
        if len(keys):
            kernels.firsts(keys, np.argsort(keys, kind="stable"), result)
        return result

    def _joined(self, same: NDArray[np.int64]) -> NDArray[np.int64]:
        """Ranks of the documents that look for others like them: the first ones with their words."""
        return np.flatnonzero((same == np.arange(len(same))) & (self.column("shingled") > 0))

    def _candidates(self, same: NDArray[np.int64]) -> NDArray[np.uint64]:
        """Pairs that share a band, by rank."""
        found = np.empty(0, np.uint64)
        if not self.near:
            return found
        joined = self._joined(same)
        parts = -(-len(joined) * SORTED // max(self.memory, LEAST)) or 1
        for band in range(self.near.bands):
            keys = self.column(f"band{band}")[joined]
            for part in range(parts):
                chosen = np.flatnonzero(keys % np.uint64(parts) == part) if parts > 1 else slice(None)
                found = np.union1d(found, sharing(keys[chosen], joined[chosen]))
        return found

    def _threshold(self) -> float:
        """Of similarity; -1 where candidates are believed."""
        return self.near.threshold if self.near and self.near.verify else -1.0

    def _places(self) -> tuple[Any, ...]:
        """Where the shingles of each rank are, as kernels/groups.py takes it."""
        starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.plain("shingled"))])
        return np.arange(len(self)) if self._order is None else self._order, starts

    def _stars(self, exact: Any, same: Any, candidates: Any, known: Any, lazy: bool, choice: Choice) -> None:
        """Choose survivors; `lazy`: similarities are measured where they are needed."""
        places, starts = self._places()
        state: list[Any] = [np.full(len(column), -1, np.int64) for column in (exact, same, same)]
        state += [np.zeros(len(same)), np.zeros(len(same), np.bool_)]
        for first in range(0, len(self), STEP):
            shingles = self.plain("shingles" if lazy else "")  # mapped anew, so that what was read is let go
            ranks = first, min(first + STEP, len(self)), self.given
            measured = known, places, shingles.view(np.uint32), starts, self._threshold()
            kernels.stars(*ranks, exact, same, candidates, *measured, *choice, *state)

    def _similarities(self, candidates: NDArray[np.uint64]) -> NDArray[np.float64]:
        """How similar candidates are."""
        places, starts = self._places()
        found = [np.empty(0)]
        for first in range(0, len(candidates), STEP):
            later, earlier = (places[part.astype(np.int64)] for part in halves(candidates[first : first + STEP]))
            found.append(kernels.similarities_of(later, earlier, self.plain("shingles"), starts, self._threshold()))
        return np.concatenate(found)

    # The second pass.
    def written(
        self, engine: Engine, telling: Telling, choice: Choice, index: Index | None = None
    ) -> Iterator[Decided]:
        """The documents that are written, chunk by chunk."""
        packed = self._packed.read()
        for chunk, found in enumerate(self._verdicts(telling, choice, index)):
            yield tell(telling, packed[chunk], found)

    def _verdicts(self, telling: Telling, choice: Choice, index: Index | None) -> Iterable[Verdicts]:
        """The choice, chunk by chunk."""
        matches = choice.matches
        survivors = np.where(matches >= 0, matches, np.arange(len(matches)))
        numbers = np.bincount(survivors, self.plain("weights"), len(matches)).astype(np.int64)
        numbers[np.bincount(survivors, minlength=len(matches)) < 2] = 0
        names, sizes, ids = self.plain("same" if self.near else "exact"), self.plain("sizes"), self.ids.read()
        known = index.ids(-2 - matches[matches < -1]) if index and telling.ids else {}
        start = self.given
        for count in self.chunks:
            mine = slice(start, start + count)
            start += count
            gone = matches[mine][matches[mine] != -1].tolist() if telling.ids else []
            named = [ids[n].decode("utf-8", "surrogatepass") if n >= 0 else known[-2 - n] for n in gone]
            yield Verdicts(sizes[mine], choice.of(mine), names[survivors[mine]], numbers[survivors[mine]], named)


def halves(pairs: NDArray[np.uint64]) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """The later and the earlier documents of pairs."""
    return pairs >> kernels.S32, pairs & kernels.LOW_32


def sharing(keys: NDArray[np.uint64], documents: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Candidate pairs of documents, in order of rank, that share a key."""
    order = np.argsort(keys, kind="stable")
    found: NDArray[np.uint64] = kernels.pairs(keys[order], documents[order], CHAIN)
    return found

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

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import orjson
import xxhash
import zstandard
from numpy.typing import NDArray

from llmkit.corpus.dedup.exact import Exact
from llmkit.corpus.dedup.index import Index, run_key
from llmkit.corpus.dedup.method import Decided, Tally, verdict, with_fields
from llmkit.corpus.dedup.minhash import MinHash
from llmkit.corpus.dedup.spool import Blobs, Column
from llmkit.corpus.kernels import groups as kernels
from llmkit.corpus.lists import dotted
from llmkit.engine.local import ordered_map
from llmkit.errors import LlmkitError, UsageError
from llmkit.io.documents import BadLine, Chunk, Document, DocumentReader, ReadOptions, parse
from llmkit.io.lineage import Input

REASONS = ("", "exact", "minhash")
CHAIN = 16  # documents of a band that each is compared with: the first ones, and as many before it
LEAST = 1 << 12  # bytes: less is no memory for a sort
BATCH = 1 << 15  # documents that go into the index at once
LEVEL = -5  # of the lines that wait


@dataclass(slots=True)
class Part:
    """A measured chunk: compressed lines, and a column for each thing known of its documents."""

    lines: bytes
    ids: list[bytes]
    columns: dict[str, NDArray[Any]]
    bad: list[BadLine]


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
    jobs: int = 1
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

    def warm_up(self) -> None:
        """Compile before workers fork."""
        lines = b'{"text": "enough words for a shingle of five"}\n' * 2
        measure(dataclasses.replace(self, keep="first"), ReadOptions(), Chunk("warm-up", 1, lines))

    def run(self, reader: DocumentReader, against: DocumentReader | None = None) -> Iterator[Decided]:
        """Outcomes of chunks: while they are measured their bad lines and numbers, then the lines to keep and to reject."""
        waiting = Waiting(self)
        try:
            if against is not None:
                for part in waiting.measured(against, written=False):
                    yield Decided(b"", b"", part.bad, 0)
                waiting.given = len(waiting.ids)
            for part in waiting.measured(reader):
                yield Decided(b"", b"", part.bad, len(part.ids))
            if self.index:
                waiting.seen(self.index, reader)
            yield from waiting.written()
        finally:
            waiting.close()


def measure(groups: Groups, options: ReadOptions, chunk: Chunk) -> Part:
    """Worker side: everything that is asked of the documents of a chunk. Pure."""
    documents, bad = parse(chunk, options)
    lines = [document.encode() for document in documents]
    columns: dict[str, NDArray[Any]] = {"sizes": np.fromiter(map(len, lines), np.int64, len(lines))}
    divided = np.zeros(len(lines), np.uint64)
    if groups.group is not None:
        divided = np.fromiter((_division(document, groups.group) for document in documents), np.uint64, len(lines))
    if groups.keep != "first":
        columns["worth"] = np.fromiter((_worth(document, groups.keep) for document in documents), float, len(lines))
    if groups.exact:
        found = [groups.exact.of(document) for document in documents]
        columns["keyed"] = np.fromiter((key is not None for key in found), bool, len(found))
        columns["exact"] = np.frombuffer(b"".join(key or bytes(16) for key in found), np.uint64)[::2] ^ divided
    if groups.near:
        near = groups.near.sketches(documents)
        columns |= {"same": near.same ^ divided, "shingles": near.shingles, "shingled": near.sizes}
        columns |= {f"band{i}": column ^ divided for i, column in enumerate(near.keys.T)}
        if groups.index:
            width = np.uint8 if groups.index.settings["signature bits"] == 8 else np.uint32
            columns["signature"] = near.signatures.astype(width).ravel()
    weights = (document.fields.get("duplicates", 1) for document in documents)
    columns["weights"] = np.fromiter(
        (n if type(n) is int and 0 < n < 2**31 else 1 for n in weights), np.int64, len(lines)
    )
    packed = zstandard.ZstdCompressor(level=LEVEL).compress(b"".join(lines))
    return Part(packed, [document.id.encode("utf-8", "surrogatepass") for document in documents], columns, bad)


def _division(document: Document, path: str) -> int:
    """A number for the value of a field: documents of different ones are never duplicates."""
    value = orjson.dumps(dotted(document.fields, path), option=orjson.OPT_SORT_KEYS)
    return xxhash.xxh3_64_intdigest(value)


def _worth(document: Document, keep: str) -> float:
    """How much a document is preferred."""
    if keep == "longest":
        return len(document.text)
    value = dotted(document.fields, keep.removeprefix("best:"))
    if isinstance(value, bool) or not isinstance(value, int | float):
        said = "no such field" if value is None else f"{str(value)[:40]!r} is no number"
        raise LlmkitError(f"{document}: --keep {keep}: {said}", "every document needs a number there")
    return float(value)


class Waiting:
    """All measured documents, and what is decided of them."""

    def __init__(self, groups: Groups) -> None:
        self.groups = groups
        self.given = 0  # the first documents are seen already, and not written
        self._seen: tuple[NDArray[Any], ...] | None = None  # row of the index, similarity, reason
        self._pending: tuple[int, str] | None = None  # the run, and what it is known by
        self._order: NDArray[np.int64] | None = None  # documents by rank, where that is not the order of the input
        self.lines: list[int] = []  # documents of each chunk
        self.ids = Blobs(groups.temporary)
        self._packed = Blobs(groups.temporary)
        self._columns: dict[str, Column] = {}

    def measured(self, reader: DocumentReader, written: bool = True) -> Iterator[Part]:
        """Measure the documents of a reader, chunk by chunk."""
        groups = self.groups if written else dataclasses.replace(self.groups, keep="first")
        for part in ordered_map(partial(measure, groups, reader.options), reader.chunks(), groups.jobs):
            if groups is not self.groups and self.groups.keep != "first":
                part.columns["worth"] = np.zeros(len(part.ids))  # they stay in any case
            for name, values in part.columns.items():
                if name not in self._columns:
                    self._columns[name] = Column(values.dtype, self.groups.temporary)
                self._columns[name].append(values)
            self.ids.append(part.ids)
            if written:
                self._packed.append([part.lines])
                self.lines.append(len(part.ids))
            yield part

    def close(self) -> None:
        """Give the temporary files back."""
        self.ids.close()
        self._packed.close()
        for column in self._columns.values():
            column.close()

    def plain(self, name: str) -> NDArray[Any]:
        """One value a document, in input order; empty where that was not measured."""
        return self._columns[name].array() if name in self._columns else np.empty(0, np.int64)

    def column(self, name: str) -> NDArray[Any]:
        """The same by rank."""
        values = self.plain(name)
        return values if self._order is None or not len(values) else values[self._order]

    def _part(self, chosen: Any) -> dict[str, NDArray[Any]]:
        """Columns as the index takes them, of some documents."""
        names = [
            name for name in self._columns if name in ("exact", "keyed", "same", "shingled") or name.startswith("band")
        ]
        found = {name: self.plain(name)[chosen] for name in names}
        if "signature" in self._columns and self.groups.near:
            functions = self.groups.near.bands * self.groups.near.rows
            found["signature"] = self.plain("signature").reshape(-1, functions)[chosen]
        return found

    def seen(self, index: Index, reader: DocumentReader) -> None:
        """Ask the index for what earlier runs kept, and begin to add to it."""
        key = run_key([item.digest for item in reader.inputs], self.groups.options)
        run = index.run_of(key)
        reader.inputs.append(Input("index", index.name, index.history(run)))
        if len(self.ids):
            near = self.groups.near
            rows, similarities, reasons = index.find(run, self._part(slice(None)), near.threshold if near else 0.0)
            rows[: self.given] = -1  # what is seen already stays as it is
            self._seen = rows, similarities, reasons
        if not index.has(key):
            self._pending = (run, key)

    def decided(self) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.uint8]]:
        """For each document the one that it duplicates (-1: it stays; -2 - r: row r of the index), how similar they are (-1: not measured), and
        the number of the reason.
        """
        groups, total = self.groups, len(self.ids)
        if groups.keep != "first" and total:
            worth = -self.column("worth")
            worth[: self.given] = -np.inf
            self._order = np.argsort(worth, kind="stable")
        matches, similarities = np.full(total, -1, np.int64), np.zeros(total)
        reasons = np.zeros(total, np.uint8)
        if self._seen is not None:
            rows, alike, why = self._seen if self._order is None else (part[self._order] for part in self._seen)
            found = np.flatnonzero(rows >= 0)
            matches[found], similarities[found], reasons[found] = -2 - rows[found], alike[found], why[found]
        exact = self._firsts("exact")
        if len(exact):
            exact[~self.column("keyed")] = -1
        same = self._firsts("same")
        shingled = self._columns["shingled"].array() if groups.near else np.empty(0, np.int64)
        starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(shingled)])
        places = np.arange(total) if self._order is None else self._order
        threshold = groups.near.threshold if groups.near and groups.near.verify else -1.0
        shingles = self._columns["shingles"].array() if groups.near else np.empty(0, np.uint32)
        choose = kernels.stars if groups.clusters == "stars" else kernels.components
        choose(
            self.given,
            exact,
            same,
            self._candidates(same),
            places,
            shingles,
            starts,
            threshold,
            matches,
            similarities,
            reasons,
        )
        if self._order is None:
            return matches, similarities, reasons
        back = np.empty_like(self._order)
        back[self._order] = np.arange(total)
        matches = np.where(matches >= 0, self._order[matches], matches)
        return matches[back], similarities[back], reasons[back]

    def _firsts(self, name: str) -> NDArray[np.int64]:
        """By rank, the lowest document with the same key."""
        keys = self.column(name)
        result = np.empty(len(keys), np.int64)
        if len(keys):
            kernels.firsts(keys, np.argsort(keys, kind="stable"), result)
        return result

    def _candidates(self, same: NDArray[np.int64]) -> NDArray[np.uint64]:
        """Pairs that share a band, of the first documents with their words, by rank."""
        groups, found = self.groups, np.empty(0, np.uint64)
        if not groups.near:
            return found
        joined = np.flatnonzero((same == np.arange(len(same))) & (self.column("shingled") > 0))
        parts = -(-len(joined) * 40 // max(groups.memory, LEAST)) or 1
        for band in range(groups.near.bands):
            keys = self.column(f"band{band}")[joined]
            for part in range(parts):
                chosen = np.flatnonzero(keys % np.uint64(parts) == part) if parts > 1 else slice(None)
                mine, documents = keys[chosen], joined[chosen]
                order = np.argsort(mine, kind="stable")
                pairs = kernels.pairs(mine[order], documents[order], CHAIN)
                found = np.unique(np.concatenate([found, pairs]))
        return found

    def written(self) -> Iterator[Decided]:
        """The documents, chunk by chunk, with what becomes of them."""
        matches = np.empty(0, np.int64)
        if len(self.ids):
            matches, similarities, reasons = self.decided()
            yield from self._written(matches, similarities, reasons)
        if self.groups.index and self._pending:
            self._add(self.groups.index, *self._pending, np.flatnonzero(matches[self.given :] == -1) + self.given)

    def _add(self, index: Index, run: int, key: str, kept: NDArray[np.int64]) -> None:
        """Add the documents to the index that stay; they are there once `Groups.commit` is called."""
        index.begin()
        ids = self.ids.read()
        for start in range(0, len(kept), BATCH):
            part = kept[start : start + BATCH]
            index.add(run, [ids[i].decode("utf-8", "replace") for i in part.tolist()], self._part(part))
        self.groups._commit = partial(index.commit, run, key, len(self.ids) - self.given, len(kept))

    def _written(
        self, matches: NDArray[np.int64], similarities: NDArray[np.float64], reasons: NDArray[np.uint8]
    ) -> Iterator[Decided]:
        groups = self.groups
        survivors = np.where(matches >= 0, matches, np.arange(len(matches)))
        numbers = np.bincount(survivors, self.plain("weights"), len(matches)).astype(np.int64)
        grouped = np.bincount(survivors, minlength=len(matches)) > 1
        sizes, ids, packed = self.plain("sizes"), self.ids.read(), self._packed.read()
        names = self.plain("same" if groups.near else "exact")
        told = groups.annotate or groups.rejects
        indexed = groups.index.ids(-2 - matches[matches < -1]) if groups.index and told else {}
        first = self.given
        for chunk, count in enumerate(self.lines):
            lines = zstandard.ZstdDecompressor().decompress(packed[chunk])
            kept: list[bytes] = []
            rejects: list[bytes] = []
            end = 0
            for i in range(first, first + count):
                start, end = end, end + int(sizes[i])
                line, match = lines[start:end], int(matches[i])
                survivor = int(survivors[i])
                fields: dict[str, Any] = {}
                if grouped[survivor] and groups.counts_written and (match == -1 or groups.annotate):
                    fields = {"cluster": f"{names[survivor]:016x}"}
                    if match == -1:
                        fields["duplicates"] = int(numbers[i])
                if match != -1:
                    reason = REASONS[reasons[i]]
                    groups.dropped[reason] += 1
                    if told:
                        similarity = float(similarities[i])
                        kept_id = ids[match].decode("utf-8", "surrogatepass") if match >= 0 else indexed[-2 - match]
                        fields |= verdict(reason, kept_id, None if similarity < 0 else similarity)
                        if not groups.annotate:
                            rejects.append(with_fields(line, fields))
                if match == -1 or groups.annotate:
                    groups.kept += 1
                    kept.append(with_fields(line, fields) if fields else line)
            first += count
            groups.documents += count
            yield Decided(b"".join(kept), b"".join(rejects), [], 0)

"""Deduplication that edits texts: what stands twice is cut out, and a document goes only when nothing is left of it.

A text is a sequence of pieces (lines, paragraphs, words) with something between them. A piece that is cut goes with what follows it; where the last ones
are cut, what stood before them goes instead: cut lines leave `"\\n".join(the others)`. A document of which nothing but whitespace is left is
dropped, whole; one without a cut keeps its bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import orjson
from numpy.typing import DTypeLike, NDArray

from llmkit.corpus.dedup.method import Tally, with_fields
from llmkit.corpus.dedup.temp_columns import Blobs, Column, pack, unpack
from llmkit.engine.local import Engine, Local
from llmkit.io.documents import BadLine, Chunk, DocumentReader, ReadOptions, parse
from llmkit.kernels.utf8 import Bytes

Ends = NDArray[np.int64]
Hashes = NDArray[np.uint64]
Measure = Callable[[str], tuple[NDArray[Any], Hashes]]  # a text to a number for each of its pieces, and further hashes
Split = Callable[[Bytes], tuple[Ends, Ends]]  # UTF-8 to the first byte of each piece, and the byte behind it


class Measured(NamedTuple):
    """A measured chunk: lines, numbers of all pieces, how many of them each document has, further hashes, characters."""

    lines: list[bytes]
    pieces: NDArray[Any]
    sizes: Ends
    more: Hashes
    characters: int
    bad: list[BadLine]


def measure_chunk(measure: Measure, options: ReadOptions, chunk: Chunk) -> Measured:
    """Worker side. Pure."""
    documents, bad = parse(chunk, options)
    with np.errstate(over="ignore"):  # unsigned arithmetic that wraps, where nothing is compiled
        found = [measure(document.text) for document in documents]
        none = measure("")
    pieces, more = (np.concatenate([one[i][:0], *(one[i] for one in found)]) for i, one in ((0, none), (1, none)))
    lines, characters = [document.encode() for document in documents], sum(len(document.text) for document in documents)
    return Measured(
        lines, pieces, np.fromiter((len(one) for one, _ in found), np.int64, len(found)), more, characters, bad
    )


class Backlog:
    """Measured chunks that wait in temporary files for the second pass, without their further hashes."""

    def __init__(self, dtype: DTypeLike, directory: str | None = None) -> None:
        self.packed, self.sizes, self.pieces = Blobs(directory), Column(np.int64, directory), Column(dtype, directory)
        self._chunks: list[int] = []

    def append(self, part: Measured) -> None:
        """Add a chunk."""
        self.packed.append([pack(part.lines)])
        self.sizes.append(part.sizes)
        self.pieces.append(part.pieces)
        self._chunks.append(len(part.lines))

    def __iter__(self) -> Iterator[tuple[list[bytes], Ends, int, int]]:
        """Lines and sizes of each chunk, with the numbers of its first piece and of the one behind its last."""
        packed, sizes, document, start = self.packed.read(), self.sizes.array(), 0, 0
        for chunk, count in enumerate(self._chunks):
            data = unpack(packed[chunk])
            mine = sizes[document : document + count]
            document, stop = document + count, start + int(mine.sum())
            yield [line + b"\n" for line in data.split(b"\n")[:-1]], mine, start, stop
            start = stop

    def close(self) -> None:
        for file in (self.packed, self.sizes, self.pieces):
            file.close()


def without(data: bytes, starts: Ends, stops: Ends, cut: NDArray[np.bool_]) -> bytes:
    """A text without the pieces that are `cut`."""
    edges = np.flatnonzero(np.diff(np.concatenate([[True], cut, [True]])))
    nexts = np.append(starts[1:], len(data))
    kept = [data[starts[a] : nexts[b - 1]] for a, b in edges.reshape(-1, 2)]
    if kept and cut[-1]:
        kept[-1] = data[starts[edges[-2]] : stops[edges[-1] - 1]]
    return b"".join([data[: starts[0]], *kept])


@dataclass
class Edits(Tally):
    """Counts of documents and of characters. `rejects`: whether dropped documents are wanted; `temporary`: where documents wait."""

    edited: int = 0
    characters: int = 0
    characters_cut: int = 0
    rejects: bool = False
    engine: Engine = field(default_factory=Local)
    temporary: str | None = None

    def measured(self, reader: DocumentReader, measure: Measure) -> Iterator[Measured]:
        """The documents of a reader, chunk by chunk."""
        for part in self.engine.map(partial(measure_chunk, measure, reader.options), reader):
            self.characters += part.characters
            yield part

    def counts(self) -> dict[str, Any]:
        more = {"edited": self.edited, "characters": self.characters, "characters_cut": self.characters_cut}
        return super().counts() | more

    def edit(
        self,
        lines: Iterable[bytes],
        sizes: Ends,
        flags: NDArray[np.bool_],
        split: Split,
        key: str,
        reason: str,
        fences: int = 0,
    ) -> tuple[bytes, bytes]:
        """Lines to keep and to reject. `flags`: for each of the pieces, `sizes[i]` of document i, whether it is cut; the last `fences` are of none."""
        kept: list[bytes] = []
        rejects: list[bytes] = []
        stop = 0
        for line, size in zip(lines, sizes.tolist(), strict=True):
            start, stop = stop, stop + size
            cut = flags[start : stop - fences]
            self.documents += 1
            if not cut.any():
                kept.append(line)
                continue
            fields = orjson.loads(line)
            before, data = fields[key], fields[key].encode()
            starts, stops = split(np.frombuffer(data, np.uint8))
            if len(cut) > len(starts):  # flags of bytes, pieces that are characters: one goes if all of it is cut
                cut = np.logical_and.reduceat(cut, starts)
            text = without(data, starts, stops, cut).decode()
            if text and not text.isspace():
                self.edited += 1
                self.characters_cut += len(before) - len(text)
                fields[key] = text
                kept.append(orjson.dumps(fields) + b"\n")
            else:
                self.dropped[reason] += 1
                self.characters_cut += len(before)
                if self.rejects:
                    rejects.append(with_fields(line, {"reason": reason}))
        self.kept += len(kept)
        return b"".join(kept), b"".join(rejects)

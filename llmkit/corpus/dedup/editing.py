"""Deduplication that edits texts: repeats are cut, and a document is dropped only if nothing of it remains.

A text is a sequence of pieces (lines, paragraphs, words) with separators between them. A piece is cut together with
the separator after it; if the last pieces are cut, the separator before them is cut as well. Cutting lines therefore
leaves `"\\n".join(remaining_lines)`. A document of which only whitespace remains is dropped; one without a cut keeps
its bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from llmkit.corpus.added_fields import CUT, check_added
from llmkit.corpus.dedup.results import DedupCounts
from llmkit.corpus.dedup.temp_columns import Blobs, Column, pack, unpack
from llmkit.engine.local import Engine, Local
from llmkit.io.documents import BadLine, Chunk, DocumentReader, ReadOptions, parse
from llmkit.io.splice import parse_fields, splice
from llmkit.kernels.utf8 import Bytes

Ends = NDArray[np.int64]
Hashes = NDArray[np.uint64]
MeasureText = Callable[[str], tuple[NDArray[Any], Hashes]]  # text -> a number for each of its pieces, further hashes
Split = Callable[[Bytes], tuple[Ends, Ends]]  # UTF-8 -> start of each piece, end of each piece (exclusive)


class ChunkPieces(NamedTuple):
    """A measured chunk: lines, numbers of all pieces, pieces per document, further hashes, characters, bad lines."""

    lines: list[bytes]
    pieces: NDArray[Any]
    sizes: Ends
    more: Hashes
    characters: int
    bad: list[BadLine]


def measure_chunk(measure: MeasureText, added: tuple[str, ...], options: ReadOptions, chunk: Chunk) -> ChunkPieces:
    """Measure the documents of a chunk; LlmkitError for one with an `added` field of its own. Pure."""
    documents, bad = parse(chunk, options)
    for document in documents:
        check_added(document, added, "--rejects")
    with np.errstate(over="ignore"):  # uncompiled kernels rely on unsigned arithmetic that wraps
        measured = [measure(document.text) for document in documents]
        empty = measure("")
    pieces, more = (
        np.concatenate([values[i][:0], *(values[i] for values in measured)]) for i, values in ((0, empty), (1, empty))
    )
    lines, characters = [document.encode() for document in documents], sum(len(document.text) for document in documents)
    return ChunkPieces(
        lines,
        pieces,
        np.fromiter((len(numbers) for numbers, _ in measured), np.int64, len(measured)),
        more,
        characters,
        bad,
    )


class SpilledChunks:
    """Measured chunks in temporary files, without their further hashes, for the second pass."""

    def __init__(self, dtype: DTypeLike, directory: str | None = None) -> None:
        self.packed, self.sizes, self.pieces = Blobs(directory), Column(np.int64, directory), Column(dtype, directory)
        self._chunks: list[int] = []  # documents per chunk

    def append(self, chunk: ChunkPieces) -> None:
        """Add a chunk."""
        self.packed.append([pack(chunk.lines)])
        self.sizes.append(chunk.sizes)
        self.pieces.append(chunk.pieces)
        self._chunks.append(len(chunk.lines))

    def __iter__(self) -> Iterator[tuple[list[bytes], Ends, int, int]]:
        """For each chunk: its lines, pieces per document, and the range [start, stop) of its pieces."""
        packed, sizes, document, start = self.packed.read(), self.sizes.array(), 0, 0
        for chunk, count in enumerate(self._chunks):
            data = unpack(packed[chunk])
            chunk_sizes = sizes[document : document + count]
            document, stop = document + count, start + int(chunk_sizes.sum())
            yield [line + b"\n" for line in data.split(b"\n")[:-1]], chunk_sizes, start, stop
            start = stop

    def close(self) -> None:
        for file in (self.packed, self.sizes, self.pieces):
            file.close()


def without(data: bytes, starts: Ends, stops: Ends, cut: NDArray[np.bool_]) -> bytes:
    """A text without the pieces marked in `cut`."""
    edges = np.flatnonzero(np.diff(np.concatenate([[True], cut, [True]])))
    nexts = np.append(starts[1:], len(data))
    kept = [data[starts[a] : nexts[b - 1]] for a, b in edges.reshape(-1, 2)]
    if kept and cut[-1]:
        kept[-1] = data[starts[edges[-2]] : stops[edges[-1] - 1]]
    return b"".join([data[: starts[0]], *kept])


@dataclass
class EditingDedup(DedupCounts):
    """Base of the methods that edit texts; counts documents and characters.

    `rejects`: whether the lines of dropped documents are returned. `temporary`: directory of temporary files.
    """

    edited: int = 0
    characters: int = 0
    characters_cut: int = 0
    rejects: bool = False
    engine: Engine = field(default_factory=Local)
    temporary: str | None = None

    @property
    def rule(self) -> str:
        """The rule by which repeats are cut, as options of the command."""
        raise NotImplementedError

    def measure_chunks(self, reader: DocumentReader, measure: MeasureText) -> Iterator[ChunkPieces]:
        """Measure the documents of a reader, chunk by chunk."""
        for chunk in self.engine.map(partial(measure_chunk, measure, CUT * self.rejects, reader.options), reader):
            self.characters += chunk.characters
            yield chunk

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
        """Cut the flagged pieces out of documents. Returns the lines to keep and to reject.

        Document i has `sizes[i]` pieces, the last `fences` of which belong to no text; `flags` has one value per piece.
        """
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
            fields = parse_fields(line)
            before, data = fields[key], fields[key].encode()
            starts, stops = split(np.frombuffer(data, np.uint8))
            if len(cut) > len(starts):  # one flag per byte, pieces are characters: cut only if all its bytes are
                cut = np.logical_and.reduceat(cut, starts)
            text = without(data, starts, stops, cut).decode()
            if text and not text.isspace():
                self.edited += 1
                self.characters_cut += len(before) - len(text)
                kept.append(splice(line, {key: text}, fields))
            else:
                self.dropped[reason] += 1
                self.characters_cut += len(before)
                if self.rejects:
                    rejects.append(splice(line, {"reason": reason, "rule": self.rule}, fields))
        self.kept += len(kept)
        return b"".join(kept), b"".join(rejects)

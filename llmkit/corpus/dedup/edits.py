"""Deduplication that edits texts: what stands twice is cut out, and a document goes only when nothing is left of it.

A text is a sequence of pieces (lines, paragraphs, words) with something between them. A piece that is cut goes with what follows it; where the last ones
are cut, what stood before them goes instead: cut lines leave `"\\n".join(the others)`. A document of which nothing but whitespace is left is
dropped, whole; one without a cut keeps its bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
import zstandard
from numpy.typing import NDArray

from llmkit.corpus.dedup.method import Tally, with_fields
from llmkit.corpus.dedup.spool import Blobs, Column
from llmkit.corpus.kernels.characters import Bytes

Ends = NDArray[np.int64]
Split = Callable[[Bytes], tuple[Ends, Ends]]  # UTF-8 to the first byte of each piece, and the byte behind it
LEVEL = -5  # of the lines that wait


class Spool:
    """Chunks of documents that wait in temporary files for the second pass, and how many pieces each document has."""

    def __init__(self, directory: str | None = None) -> None:
        self._packed, self._sizes = Blobs(directory), Column(np.int64, directory)
        self._chunks: list[int] = []

    def append(self, lines: list[bytes], sizes: Ends) -> None:
        """Add a chunk."""
        self._packed.append([zstandard.ZstdCompressor(level=LEVEL).compress(b"".join(lines))])
        self._sizes.append(sizes)
        self._chunks.append(len(lines))

    def __iter__(self) -> Iterator[tuple[list[bytes], Ends, int, int]]:
        """Lines and sizes of each chunk, with the numbers of its first piece and of the one behind its last."""
        packed, sizes, document, start = self._packed.read(), self._sizes.array(), 0, 0
        for chunk, count in enumerate(self._chunks):
            data = zstandard.ZstdDecompressor().decompress(packed[chunk])
            mine = sizes[document : document + count]
            document, stop = document + count, start + int(mine.sum())
            yield [line + b"\n" for line in data.split(b"\n")[:-1]], mine, start, stop
            start = stop

    def close(self) -> None:
        self._packed.close()
        self._sizes.close()


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
    """Counts of documents and of characters. `rejects`: whether dropped documents are wanted."""

    edited: int = 0
    characters: int = 0
    characters_cut: int = 0
    rejects: bool = False

    def counts(self) -> dict[str, Any]:
        more = {"edited": self.edited, "characters": self.characters, "characters_cut": self.characters_cut}
        return super().counts() | more

    def edit(
        self, lines: Iterable[bytes], cuts: Iterable[NDArray[np.bool_]], split: Split, key: str, reason: str
    ) -> tuple[bytes, bytes]:
        """Lines to keep and to reject of documents with a flag for each of their pieces; their text is the field `key`."""
        kept: list[bytes] = []
        rejects: list[bytes] = []
        for line, cut in zip(lines, cuts, strict=True):
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

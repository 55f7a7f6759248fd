"""Exact repeats anywhere in the texts of a corpus, cut out: "Deduplicating Training Data Makes Language Models Better" (Lee et al. 2022, arXiv:2107.06499).

    for outcome in Substring(length=50).run(reader): ...     # edited documents, in input order

A window is `length` words in a row (between whitespace, whose kind is not compared), or bytes. Whatever stands in a window that stood before, in an
earlier document or further up in the same one without overlapping it, is cut; so the first occurrence in input order stays. Of a character in UTF-8 all
bytes are cut or none. Nothing else is cut, and no such repeat missed, but for chance (two of the windows with the same 64-bit hash, 10⁻¹⁰ for 10⁹
documents' worth of each); matches are compared unit by unit, so that chance never cuts (of words, 64-bit hashes are compared).

1. Each document's fingerprints (kernels/substring.py), about 1 in `length`/4 units, are spooled, and then counted in a table of one byte a slot and
   4 to 8 slots a fingerprint, up to 2: a window with a fingerprint met once has no equal. Most documents end here.
2. Windows of the rest are looked up in a table of the first window of each kind, in input order, and repeats followed to their end. If that
   table could outgrow `memory`, it is done in parts by the hash of a window.
3. The documents are written without what is marked.

Memory: half a byte a unit for fingerprints, a bit a unit for marks, at most `memory` for the table (70 bytes a distinct window of the rest), 16 bytes a unit
of the longest document. Disk: 8 bytes a word, or 1 a byte; fingerprints; the lines, compressed. Cost: linear, whatever repeats.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmkit.corpus.dedup.edits import Edits, Ends, Spool
from llmkit.corpus.dedup.method import METHODS, Decided
from llmkit.corpus.dedup.passages import Seen
from llmkit.corpus.dedup.spool import Column
from llmkit.corpus.kernels import substring as kernels
from llmkit.corpus.kernels.characters import Bytes, classes
from llmkit.engine.local import ordered_map
from llmkit.errors import UsageError
from llmkit.io.documents import BadLine, Chunk, DocumentReader, ReadOptions, parse

Units = NDArray[Any]
Hashes = NDArray[np.uint64]
DTYPES: dict[str, np.dtype[Any]] = {"words": np.dtype(np.uint64), "bytes": np.dtype(np.uint8)}
BLOCK = 1 << 16  # fingerprints, or windows, at a time
SORTED, GROWING = 40, 70  # bytes of memory that a fingerprint takes while it is counted, a window while the table grows


@dataclass(slots=True)
class _Measured:
    """A chunk's documents: lines, units with a fence behind each document, how many, fingerprints, and characters."""

    lines: list[bytes]
    units: Units
    sizes: Ends
    prints: Hashes
    characters: int
    bad: list[BadLine]


@METHODS.register("substring")
@dataclass
class Substring(Edits):
    """The stage; `memory` bounds the table of windows, in bytes; `temporary`: where documents wait."""

    length: int = 50
    unit: str = "words"
    jobs: int = 1
    memory: int = 4 << 30
    temporary: str | None = None

    def __post_init__(self) -> None:
        if self.unit not in DTYPES:
            raise UsageError(f"--unit {self.unit}", "one of: " + ", ".join(DTYPES))
        if not 2 <= self.length <= 1 << 20:
            raise UsageError(f"--length {self.length} is out of range", "give a number from 2 to 1048576")

    def split(self, data: Bytes) -> tuple[Ends, Ends]:
        """Where words or characters begin and end, in bytes."""
        if self.unit == "words":
            starts, stops, _ = kernels.words(data, classes())
            return starts, stops
        starts = np.flatnonzero(data & 0xC0 != 0x80)
        return starts, np.append(starts[1:], len(data))

    def units(self, text: str) -> Units:
        """What is compared."""
        data = np.frombuffer(text.encode(), np.uint8)
        units = data if self.unit == "bytes" else kernels.words(data, classes())[2]
        units.setflags(write=False)  # as those of the spool, so that kernels are compiled for one kind of array
        return units

    def warm_up(self) -> None:
        """Compile before workers fork."""
        part = _measured(self, ReadOptions(), Chunk("warm-up", 1, b'{"text": "%s"}\n' % (b"a " * 4 * self.length)))
        part.units.setflags(write=False)
        self._marked(part.units, part.sizes, part.prints)

    def run(self, reader: DocumentReader) -> Iterator[Decided]:
        """Outcomes of chunks: bad lines and numbers while they are measured, then the lines to keep and to reject."""
        key = reader.options.text_key or "text"
        with ExitStack() as stack:
            waiting = stack.enter_context(closing(Spool(self.temporary)))
            units, sizes, prints = (
                stack.enter_context(closing(Column(dtype, self.temporary)))
                for dtype in (DTYPES[self.unit], np.int64, np.uint64)
            )
            for part in ordered_map(partial(_measured, self, reader.options), reader.chunks(), self.jobs):
                self.characters += part.characters
                waiting.append(part.lines, part.sizes)
                units.append(part.units)
                sizes.append(part.sizes)
                prints.append(part.prints)
                yield Decided(b"", b"", part.bad, len(part.lines))
            with np.errstate(over="ignore"):  # unsigned arithmetic that wraps, where nothing is compiled
                marks = self._marked(units.array(), sizes.array(), prints.array())
            for lines, counts, start, stop in waiting:
                flags = np.unpackbits(marks[start >> 3 : (stop >> 3) + 1])[start & 7 :].view(np.bool_)
                ends = np.cumsum(counts).tolist()
                cuts = (flags[end - size : end - 1] for end, size in zip(ends, counts.tolist(), strict=True))
                yield Decided(*self.edit(lines, cuts, self.split, key, "substring"), [], 0)

    def _common(self, prints: Hashes) -> tuple[Seen, int]:
        """The fingerprints of which there are several, and how many windows they stand for at most."""
        common, windows = Seen(), 0
        parts = np.uint64(max(1, -(-len(prints) * SORTED // self.memory)))
        blocks = [prints[i : i + BLOCK] for i in range(0, len(prints), BLOCK)] or [prints]
        for part in range(int(parts)):
            values, counts = np.unique(
                np.concatenate([block[block % parts == part] for block in blocks]), return_counts=True
            )
            common.add(values[counts > 1])
            windows += int(counts[counts > 1].sum()) * (self.length - kernels.run_of(self.length) + 1)
        return common, windows

    def _marked(self, units: Units, sizes: Ends, prints: Hashes) -> Bytes:
        """A bit for each unit: whether it is to be cut."""
        marks = np.zeros((len(units) >> 3) + 1, np.uint8)
        common, windows = self._common(prints)
        stops = np.cumsum(sizes) - 1
        starts, parts = stops + 1 - sizes, max(1, -(-windows * GROWING // self.memory))
        for part in range(parts if windows else 0):
            table = Seen(np.int64)
            for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
                mine, window = units[start:stop], 0
                found, hashes = kernels.of_windows(mine, self.length), kernels.hashes_of_runs(mine, self.length)
                while window < len(hashes):
                    until = min(len(hashes), window + BLOCK)
                    table.reserve(until - window)
                    window, new = kernels.repeats(
                        *(units, start, stop, self.length, found, hashes, window, until),
                        *(common.keys, table.keys, table.values, part, parts, marks),
                    )
                    table.used += new
        return marks


def _measured(substring: Substring, options: ReadOptions, chunk: Chunk) -> _Measured:
    """Worker side. Pure."""
    documents, bad = parse(chunk, options)
    dtype = DTYPES[substring.unit]
    fence = np.array([np.iinfo(dtype).max], dtype)
    with np.errstate(over="ignore"):
        units = [substring.units(document.text) for document in documents]
        prints = [kernels.fingerprints(one, substring.length) for one in units]
    return _Measured(
        [document.encode() for document in documents],
        np.concatenate([np.empty(0, dtype), *(piece for one in units for piece in (one, fence))]),
        np.fromiter((len(one) + 1 for one in units), np.int64, len(units)),
        np.concatenate([np.empty(0, np.uint64), *prints]),
        sum(len(document.text) for document in documents),
        bad,
    )

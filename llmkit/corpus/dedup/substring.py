"""Exact repeats anywhere in the texts of a corpus, cut out: "Deduplicating Training Data Makes Language Models Better" (Lee et al. 2022, arXiv:2107.06499).

    for outcome in Substring(length=50).run(reader): ...     # edited documents, in input order

A window is `length` words in a row (between whitespace, whose kind is not compared), or bytes. Whatever stands in a window that stood before, in an
earlier document or further up in the same one without overlapping it, is cut, and nothing else; so the first occurrence in input order stays. Of a
character in UTF-8 all bytes are cut or none. Matches are compared unit by unit (words as 64-bit hashes); a repeat is missed only where its hash is
that of another window, of 10⁹ different ones with a chance of 5·10⁻¹¹.

1. Each document's fingerprints (kernels/substring.py), about 4 in `length` units, are spooled and sorted: only windows of which the fingerprint
   stands twice can be repeats.
2. Those are looked up, in input order, in a table of the first window of each kind, and repeats followed to their end. When the table has outgrown
   `memory`, half of it is put off to a further pass over the units.
3. The documents are written without what is marked.

Memory: `memory` for sorting and for the table (70 bytes a distinct window while it grows), up to 12 bytes a fingerprint that stands twice, a bit a unit
for marks, 24 bytes a unit of the longest document. Disk: 8 bytes a word, or 1 a byte; fingerprints; the lines, compressed. Cost: linear, but for
`length` comparisons for each of the repeats that could not be followed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmkit.corpus.dedup.edits import Backlog, Edits, Ends, Hashes
from llmkit.corpus.dedup.hash_set import Seen
from llmkit.corpus.dedup.kernels import substring as kernels
from llmkit.corpus.dedup.method import METHODS, Decided
from llmkit.corpus.dedup.temp_columns import Column
from llmkit.corpus.kernels.characters import classes
from llmkit.errors import UsageError
from llmkit.io.documents import DocumentReader
from llmkit.kernels.utf8 import Bytes

Units = NDArray[Any]
FENCES: dict[str, Any] = {"words": kernels.FENCE, "bytes": np.uint8(0xFF)}  # behind each document
BLOCK = 1 << 16  # fingerprints, or windows, at a time
MOST_PARTS = 1 << 20
SORTED, GROWING = 24, 70  # bytes of memory that a fingerprint takes while it is counted, a window while the table grows


@METHODS.register("substring")
@dataclass
class Substring(Edits):
    """The stage; `memory` bounds the table of windows, in bytes."""

    length: int = 50
    unit: str = "words"
    memory: int = 4 << 30

    def __post_init__(self) -> None:
        if self.unit not in FENCES:
            raise UsageError(f"--unit {self.unit}", "one of: " + ", ".join(FENCES))
        if not 2 <= self.length <= 1 << 20:
            raise UsageError(f"--length {self.length} is out of range", "give a number from 2 to 1048576")

    @np.errstate(over="ignore")  # unsigned arithmetic that wraps, where nothing is compiled
    def split(self, data: Bytes) -> tuple[Ends, Ends]:
        """Where words or characters begin and end, in bytes."""
        if self.unit == "words":
            starts, stops, _ = kernels.words(data, classes())
            return starts, stops
        starts = np.flatnonzero(data & 0xC0 != 0x80)
        return starts, np.append(starts[1:], len(data))

    def measure(self, text: str) -> tuple[Units, Hashes]:
        """What is compared, with a fence behind it, and its fingerprints."""
        data = np.frombuffer(text.encode(), np.uint8)
        units = np.append(data if self.unit == "bytes" else kernels.words(data, classes())[2], FENCES[self.unit])
        units.setflags(write=False)  # as those of the spool, so that kernels are compiled for one kind of array
        return units, kernels.fingerprints(units[:-1], self.length)

    def warm_up(self) -> None:
        """Compile before workers fork."""
        units, prints = self.measure("a " * 4 * self.length)
        self._marked(units, np.array([len(units)]), prints)

    def run(self, reader: DocumentReader) -> Iterator[Decided]:
        """Outcomes of chunks: bad lines and numbers while they are measured, then the lines to keep and to reject."""
        key, temporary = reader.options.text_key or "text", self.temporary
        dtype = FENCES[self.unit].dtype
        with closing(Backlog(dtype, temporary)) as waiting, closing(Column(np.uint64, temporary)) as prints:
            for part in self.measured(reader, self.measure):
                waiting.append(part)
                prints.append(part.more)
                yield Decided(b"", b"", part.bad, len(part.lines))
            marks = self._marked(waiting.pieces.array(), waiting.sizes.array(), prints.array())
            for lines, sizes, start, stop in waiting:
                flags = np.unpackbits(marks[start >> 3 : (stop >> 3) + 1])[start & 7 :].view(np.bool_)
                yield Decided(*self.edit(lines, sizes, flags, self.split, key, "substring", fences=1), [], 0)

    def _common(self, prints: Hashes) -> Seen:
        """The fingerprints of which there are several; sorted in parts."""
        common = Seen()
        parts = np.uint64(max(1, -(-len(prints) * SORTED // self.memory)))
        blocks = [prints[i : i + BLOCK] for i in range(0, len(prints), BLOCK)]
        for part in range(int(parts) if blocks else 0):
            mine = np.sort(np.concatenate([block[block % parts == part] for block in blocks]))
            common.add(np.unique(mine[1:][mine[1:] == mine[:-1]]))
        return common

    @np.errstate(over="ignore")
    def _marked(self, units: Units, sizes: Ends, prints: Hashes) -> Bytes:
        """A bit for each unit: whether it is to be cut."""
        marks = np.zeros((len(units) >> 3) + 1, np.uint8)
        common, stops = self._common(prints), np.cumsum(sizes) - 1
        ends = list(zip((stops + 1 - sizes).tolist(), stops.tolist(), strict=True))
        todo = [(0, 1)] if common.used else []  # (part, parts) of the hashes of windows
        while todo:
            (part, parts), table = todo.pop(), Seen(np.int64)
            for start, stop in ends:
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
                    while table.used * GROWING > self.memory and parts < MOST_PARTS:  # go on with half of them
                        todo.append((part + parts, 2 * parts))
                        parts *= 2
                        table = table.where((table.keys >> np.uint64(40)) % np.uint64(parts) == part)
        return marks

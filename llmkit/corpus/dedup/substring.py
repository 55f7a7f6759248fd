"""Exact repeats anywhere in the texts of a corpus, cut out.

After "Deduplicating Training Data Makes Language Models Better" (Lee et al. 2022, arXiv:2107.06499).

    for result in SubstringDedup(length=50).run(reader): ...     # edited documents, in input order

A window is `length` consecutive words (separated by whitespace, whose kind is not compared), or bytes. Exactly what
lies in a window that occurred before is cut: in an earlier document, or earlier in the same one without overlap. The
first occurrence in input order is therefore kept. Of a UTF-8 character, all bytes are cut or none. Matches are
compared unit by unit (words as 64-bit hashes). A repeat is missed only if its hash equals that of another window:
with 10⁹ different windows, a probability of 5·10⁻¹¹.

1. The fingerprints of each document (kernels/substring.py), about 4 per `length` units, are written to a temporary file
   and sorted: only windows whose fingerprint occurs twice can be repeats.
2. Those windows are looked up, in input order, in a table of the first window of each kind, and repeats are followed to
   their end. When the table outgrows `memory`, half of it is deferred to another pass over the units.
3. The documents are written without the marked units.

Memory: `memory` for sorting and for the table (70 bytes per distinct window while it grows), up to 12 bytes per
fingerprint that occurs twice, one bit per unit for marks, 24 bytes per unit of the longest document. Disk: 8 bytes per
word, or 1 per byte; fingerprints; the lines, compressed. Cost: linear, except for `length` comparisons for each repeat
that could not be followed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmkit.corpus.dedup.editing import EditingDedup, Ends, Hashes, SpilledChunks
from llmkit.corpus.dedup.kernels import substring as kernels
from llmkit.corpus.dedup.kernels.hash_set import HashSet
from llmkit.corpus.dedup.results import ChunkResult
from llmkit.corpus.dedup.temp_columns import Column
from llmkit.corpus.kernels.characters import classes
from llmkit.errors import UsageError
from llmkit.io.documents import DocumentReader
from llmkit.kernels.utf8 import Bytes

Units = NDArray[Any]
FENCES: dict[str, Any] = {"words": kernels.FENCE, "bytes": np.uint8(0xFF)}  # after each document
BLOCK = 1 << 16  # fingerprints or windows processed at a time
MAX_PARTS = 1 << 20
SORT_BYTES_PER_FINGERPRINT = 24
TABLE_BYTES_PER_WINDOW = 70  # while the table grows


@dataclass
class SubstringDedup(EditingDedup):
    """Cuts repeated runs of words or bytes. `memory`: bytes for sorting and for the table of windows."""

    length: int = 50
    unit: str = "words"
    memory: int = 4 << 30

    def __post_init__(self) -> None:
        if self.unit not in FENCES:
            raise UsageError(f"--unit {self.unit}", "one of: " + ", ".join(FENCES))
        if not 2 <= self.length <= 1 << 20:
            raise UsageError(f"--length {self.length} is out of range", "use a number from 2 to 1048576")

    @property
    def rule(self) -> str:
        return f"--method substring --length {self.length} --unit {self.unit}"

    @np.errstate(over="ignore")  # uncompiled kernels rely on unsigned arithmetic that wraps
    def split(self, data: Bytes) -> tuple[Ends, Ends]:
        """Start and end of each word or character, in bytes."""
        if self.unit == "words":
            starts, stops, _ = kernels.words(data, classes())
            return starts, stops
        starts = np.flatnonzero(data & 0xC0 != 0x80)
        return starts, np.append(starts[1:], len(data))

    def measure(self, text: str) -> tuple[Units, Hashes]:
        """The units of a text, followed by a fence, and their fingerprints."""
        data = np.frombuffer(text.encode(), np.uint8)
        units = np.append(data if self.unit == "bytes" else kernels.words(data, classes())[2], FENCES[self.unit])
        units.setflags(write=False)  # read-only as mapped files are, so that kernels are compiled for one kind of array
        return units, kernels.fingerprints(units[:-1], self.length)

    def warm_up(self) -> None:
        """Compile the kernels before workers fork."""
        units, fingerprints = self.measure("a " * 4 * self.length)
        self._mark_repeats(units, np.array([len(units)]), fingerprints)

    def run(self, reader: DocumentReader) -> Iterator[ChunkResult]:
        """Results of chunks: bad lines and numbers during the first pass, then the lines to keep and to reject."""
        key, temporary = reader.options.text_key or "text", self.temporary
        dtype = FENCES[self.unit].dtype
        with closing(SpilledChunks(dtype, temporary)) as spilled, closing(Column(np.uint64, temporary)) as fingerprints:
            for chunk in self.measure_chunks(reader, self.measure):
                spilled.append(chunk)
                fingerprints.append(chunk.more)
                yield ChunkResult(b"", b"", chunk.bad, len(chunk.lines))
            marks = self._mark_repeats(spilled.pieces.array(), spilled.sizes.array(), fingerprints.array())
            for lines, sizes, start, stop in spilled:
                flags = np.unpackbits(marks[start >> 3 : (stop >> 3) + 1])[start & 7 :].view(np.bool_)
                yield ChunkResult(*self.edit(lines, sizes, flags, self.split, key, "substring", fences=1), [], 0)

    def _repeated_fingerprints(self, fingerprints: Hashes) -> HashSet:
        """The fingerprints that occur more than once; sorted in parts."""
        repeated = HashSet()
        parts = np.uint64(max(1, -(-len(fingerprints) * SORT_BYTES_PER_FINGERPRINT // self.memory)))
        blocks = [fingerprints[i : i + BLOCK] for i in range(0, len(fingerprints), BLOCK)]
        for part in range(int(parts) if blocks else 0):
            hashes = np.sort(np.concatenate([block[block % parts == part] for block in blocks]))
            repeated.add(np.unique(hashes[1:][hashes[1:] == hashes[:-1]]))
        return repeated

    @np.errstate(over="ignore")
    def _mark_repeats(self, units: Units, sizes: Ends, fingerprints: Hashes) -> Bytes:
        """One bit per unit: whether it is to be cut."""
        marks = np.zeros((len(units) >> 3) + 1, np.uint8)
        repeated, stops = self._repeated_fingerprints(fingerprints), np.cumsum(sizes) - 1
        documents = list(zip((stops + 1 - sizes).tolist(), stops.tolist(), strict=True))
        todo = [(0, 1)] if repeated.used else []  # (part, parts) of the hashes of windows
        while todo:
            (part, parts), table = todo.pop(), HashSet(np.int64)
            for start, stop in documents:
                text, window = units[start:stop], 0
                window_fingerprints = kernels.of_windows(text, self.length)
                hashes = kernels.hashes_of_runs(text, self.length)
                while window < len(hashes):
                    until = min(len(hashes), window + BLOCK)
                    table.reserve(until - window)
                    window, new = kernels.repeats(
                        *(units, start, stop, self.length, window_fingerprints, hashes, window, until),
                        *(repeated.keys, table.keys, table.values, part, parts, marks),
                    )
                    table.used += new
                    # Too large: continue with half of the windows and defer the others.
                    while table.used * TABLE_BYTES_PER_WINDOW > self.memory and parts < MAX_PARTS:
                        todo.append((part + parts, 2 * parts))
                        parts *= 2
                        table = table.subset((table.keys >> np.uint64(40)) % np.uint64(parts) == part)
        return marks

"""Near duplicates: documents that share most of their word 5-grams, found by MinHash and locality-sensitive hashing, then verified.

1. A text is normalised (`normalise.loose`), and each run of 5 words becomes a shingle of 32 bits. Shorter texts have no shingles; they are
   duplicates only of texts with the very same words (in the same sense).
2. Each of 112 random hash functions is taken over the shingles, and its minimum kept: functions of 32 bits, or with `bits=61` of 61, modulo the prime
   2⁶¹-1 over wider shingles (kernels/minhash.py). Both follow the curve below (tests/bench/minhash_recall.md).
3. The minima are cut in 14 bands of 8 rows. Documents equal in a band are candidates: with Jaccard similarity s that happens with
   probability 1-(1-s⁸)¹⁴: 0.77 at 0.75, 0.92 at 0.8, 1 for equal sets.
4. A candidate is a duplicate if the true Jaccard similarity of the shingle sets reaches `threshold` (0.75, what FineWeb aims at with these bands).
   Unverified, a third of such candidates are below 0.8 and a tenth below 0.7. Set `verify=False` to trust the bands.

Memory: about 350 to 600 bytes a kept document (bands.py), whatever its length; the shingles of kept documents wait in an unnamed temporary file,
about 0.7 bytes a byte of text, none with verify=False. Cost: compiled, about 80 MB of text a second and core, half that with bits=61.
"""

from __future__ import annotations

import os
import tempfile
from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmkit.corpus.dedup.exact import text_key
from llmkit.corpus.dedup.method import METHODS, Match
from llmkit.errors import UsageError
from llmkit.io.documents import Document

if TYPE_CHECKING:
    import numpy as np

    Shingles = np.ndarray[tuple[int], np.dtype[np.uint32]]


@METHODS.register("minhash")
@dataclass(frozen=True)
class MinHash:
    """Parameters; `bands` x `rows` hash functions, drawn by `seed`. Raises UsageError where they make no sense."""

    threshold: float = 0.75
    verify: bool = True
    ngram: int = 5
    bands: int = 14
    rows: int = 8
    seed: int = 0
    temporary: str | None = None  # directory of the temporary file
    bits: int = 32  # of the hash functions: 32 or 61

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise UsageError(f"threshold {self.threshold} is not a similarity", "give a number above 0, at most 1")
        for name in ("ngram", "bands", "rows"):
            if not 1 <= getattr(self, name) <= 1024:
                raise UsageError(f"{name} {getattr(self, name)} is out of range", "give a number from 1 to 1024")
        if self.bits not in (32, 61):
            raise UsageError(f"bits {self.bits}: there are no such hash functions", "one of: 32, 61")

    def measure(self, documents: list[Document]) -> list[Any]:
        """For each document (band keys, shingles), or its exact key (bytes) where it has no shingles."""
        from llmkit.corpus.kernels.minhash import functions, sketch

        drawn = functions(self.seed, self.bands * self.rows, self.bits)
        measures: list[Any] = []
        for document in documents:
            found = sketch(document.text, self.ngram, drawn, self.bands, self.bits)
            if len(found.keys):
                measures.append((array("Q", found.keys.tobytes()), found.shingles if self.verify else None))
            else:
                measures.append(text_key(found.normalised.tobytes().decode() or document.text))
        return measures

    def memory(self) -> MinHashMemory:
        return MinHashMemory(self)


class MinHashMemory:
    """Band keys of the kept documents, and their shingles in a temporary file."""

    def __init__(self, method: MinHash) -> None:
        from llmkit.corpus.dedup.bands import BandTable
        from llmkit.corpus.kernels.minhash import jaccard

        self._jaccard = jaccard
        self._method = method
        self._table = BandTable(method.bands)
        self._short: dict[bytes, int] = {}  # documents without shingles: exact key to kept index
        self._kept = array("Q")  # kept index by number in the table
        self._spool = Spool(method.temporary) if method.verify else None

    def find(self, measure: Any) -> Match | None:
        """The first candidate that reaches the threshold, those that share more bands first; unverified, the first candidate."""
        if isinstance(measure, bytes):
            kept = self._short.get(measure)
            return None if kept is None else Match("exact", kept, 1.0)
        keys, found = measure
        candidates = self._table.candidates(keys)
        if self._spool is None:
            return Match("minhash", self._kept[candidates[0]], None) if candidates else None
        for row in candidates:
            size = self._spool.size(row)
            if min(size, len(found)) < self._method.threshold * max(size, len(found)):
                continue  # sets of such different size cannot be similar enough
            similarity = self._jaccard(found, self._spool.read(row))
            if similarity >= self._method.threshold:
                return Match("minhash", self._kept[row], similarity)
        return None

    def keep(self, measure: Any, index: int) -> None:
        if isinstance(measure, bytes):
            self._short[measure] = index
            return
        keys, found = measure
        self._table.add(keys)
        self._kept.append(index)
        if self._spool is not None:
            self._spool.append(found)

    def close(self) -> None:
        if self._spool is not None:
            self._spool.close()


class Spool:
    """Arrays of uint32 in an unnamed temporary file, by number."""

    def __init__(self, directory: str | None) -> None:
        import numpy as np

        self._file = tempfile.TemporaryFile(buffering=0, dir=directory)
        self._ends = np.zeros(1024, np.int64)  # in elements; _ends[i] is where array i starts
        self._count = 0

    def append(self, values: Shingles) -> None:
        import numpy as np

        if self._count + 1 == len(self._ends):
            self._ends = np.concatenate([self._ends, np.zeros_like(self._ends)])
        start = int(self._ends[self._count])
        data = memoryview(values.tobytes())
        written = 0
        while written < len(data):
            written += os.pwrite(self._file.fileno(), data[written:], 4 * start + written)
        self._count += 1
        self._ends[self._count] = start + len(values)

    def size(self, number: int) -> int:
        """Elements of one array."""
        return int(self._ends[number + 1] - self._ends[number])

    def read(self, number: int) -> Shingles:
        import numpy as np

        wanted, offset = 4 * self.size(number), 4 * int(self._ends[number])
        data = bytearray()
        while len(data) < wanted:
            block = os.pread(self._file.fileno(), wanted - len(data), offset + len(data))
            assert block, "the temporary file is shorter than what was written to it"
            data += block
        return np.frombuffer(data, np.uint32)

    def close(self) -> None:
        self._file.close()

"""A growing set of hashes of 64 bits, with a count of each where one is wanted.

    seen = Seen(np.uint32)
    seen.add(np.array([7, 8, 7], np.uint64))            # bool[3]: False, False, True
    seen.frequent(np.array([7, 8], np.uint64), 2)       # bool[2]: True, False

Open addressing (kernels/seen.py): an array of keys and one of values, copied into ones of twice the size when they are full. 0 is no hash: it is
passed over. Memory: 11 to 23 bytes a hash, 17 to 34 with values of 32 bits; when the table doubles, both are there for a moment. Cost: compiled, one
look-up a hash.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import DTypeLike, NDArray

from llmkit.corpus.dedup.edits import Hashes
from llmkit.corpus.dedup.kernels import hash_set as kernels


class Seen:
    """A growing set of hashes; with `values`, a number for each: of times that it was added, unless others put something else there."""

    def __init__(self, values: DTypeLike | None = None) -> None:
        self.keys = np.zeros(1 << 12, np.uint64)
        self.values = np.zeros(0 if values is None else len(self.keys), values or np.uint32)
        self.used = 0

    def reserve(self, more: int) -> None:
        """Make room for so many more."""
        size = len(self.keys)
        while self.used + more > kernels.FULL * size:
            size *= 2
        if size > len(self.keys):
            keys, values = np.zeros(size, np.uint64), np.zeros(size if len(self.values) else 0, self.values.dtype)
            kernels.move(self.keys, self.values, keys, values)
            self.keys, self.values = keys, values

    def add(self, hashes: Hashes) -> NDArray[np.bool_]:
        """Add hashes in order, 0 apart; whether each was there."""
        self.reserve(len(hashes))
        seen = np.zeros(len(hashes), np.bool_)
        self.used += kernels.add(self.keys, self.values, hashes, seen)
        return seen

    def where(self, kept: NDArray[np.bool_]) -> Seen:
        """Another set, of what is in the slots that are `kept`."""
        other = Seen(self.values.dtype if len(self.values) else None)
        used = int((kept & (self.keys != 0)).sum())
        other.reserve(used)
        other.used = used
        kernels.move(np.where(kept, self.keys, 0), self.values, other.keys, other.values)
        return other

    def frequent(self, hashes: Hashes, least: int) -> NDArray[np.bool_]:
        """Which hashes, all of them added before, were so `least` times."""
        found = np.zeros(len(hashes), np.bool_)
        kernels.frequent(self.keys, self.values, hashes, least, found)
        return found

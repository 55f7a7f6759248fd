"""A growing set of 64-bit hashes, with a value for each, such as a count, if requested.

    hashes = HashSet(np.uint32)
    hashes.add(np.array([7, 8, 7], np.uint64))            # bool[3]: False, False, True
    hashes.frequent(np.array([7, 8], np.uint64), 2)       # bool[2]: True, False

Open addressing (kernels/hash_set.py): an array of keys and one of values, copied into arrays of twice the size when
full. 0 is not a hash and is ignored. Memory: 11 to 23 bytes per hash, 17 to 34 with values of 32 bits; while the table
doubles, the old and the new one exist for a moment. Cost: compiled, one look-up per hash.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import DTypeLike, NDArray

from llmkit.corpus.dedup.editing import Hashes
from llmkit.corpus.dedup.kernels import hash_set as kernels


class HashSet:
    """A growing set of hashes. With `values` (a dtype), each hash has a value: by default the number of additions."""

    def __init__(self, values: DTypeLike | None = None) -> None:
        self.keys = np.zeros(1 << 12, np.uint64)
        self.values = np.zeros(0 if values is None else len(self.keys), values or np.uint32)
        self.used = 0

    def reserve(self, more: int) -> None:
        """Make room for `more` hashes."""
        size = len(self.keys)
        while self.used + more > kernels.FULL * size:
            size *= 2
        if size > len(self.keys):
            keys, values = np.zeros(size, np.uint64), np.zeros(size if len(self.values) else 0, self.values.dtype)
            kernels.move(self.keys, self.values, keys, values)
            self.keys, self.values = keys, values

    def add(self, hashes: Hashes) -> NDArray[np.bool_]:
        """Add hashes in order, except 0. Returns whether each was present before."""
        self.reserve(len(hashes))
        present = np.zeros(len(hashes), np.bool_)
        self.used += kernels.add(self.keys, self.values, hashes, present)
        return present

    def subset(self, slots: NDArray[np.bool_]) -> HashSet:
        """A new set with the entries of the marked slots."""
        other = HashSet(self.values.dtype if len(self.values) else None)
        used = int((slots & (self.keys != 0)).sum())
        other.reserve(used)
        other.used = used
        kernels.move(np.where(slots, self.keys, 0), self.values, other.keys, other.values)
        return other

    def frequent(self, hashes: Hashes, minimum: int) -> NDArray[np.bool_]:
        """Whether each of the hashes, all of which must be present, was added at least `minimum` times."""
        result = np.zeros(len(hashes), np.bool_)
        kernels.frequent(self.keys, self.values, hashes, minimum, result)
        return result

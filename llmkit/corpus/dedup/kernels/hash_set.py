"""A growing set of 64-bit hashes, with a value for each, such as a count, if requested; compiled.

    hashes = HashSet(np.uint32)
    hashes.add(np.array([7, 8, 7], np.uint64))            # bool[3]: False, False, True
    hashes.frequent(np.array([7, 8], np.uint64), 2)       # bool[2]: True, False

Open addressing over a power of two of slots, at most a share of `FULL` of them used: an array of keys and one of
values, copied into arrays of twice the size when full. 0 is not a hash: it is the key of a free slot, and is ignored.
Memory: 11 to 23 bytes per hash, 17 to 34 with values of 32 bits; while the table doubles, the old and the new one exist
for a moment. Cost: one look-up per hash.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import DTypeLike, NDArray

from llmkit.kernels import kernel, swar

FULL = 0.7


@kernel
def slot(keys, h):  # type: ignore[no-untyped-def]
    """The slot that holds a hash, or the free slot where it belongs."""
    last = np.uint64(len(keys) - 1)
    i = h & last
    while keys[i] != 0 and keys[i] != h:
        i = (i + swar.ONE) & last
    return i


@kernel
def add(keys, counts, hashes, present):  # type: ignore[no-untyped-def]
    """Add hashes, and set present[j] if hashes[j] was in the table before. Returns the number of new hashes.

    `counts`, unless empty, are incremented for each hash.
    """
    new = 0
    for j in range(len(hashes)):
        h = hashes[j]
        if h != 0:
            i = slot(keys, h)
            present[j] = keys[i] == h
            new += keys[i] != h
            keys[i] = h
            if len(counts):
                counts[i] += 1
    return new


@kernel
def move(keys, values, larger, larger_values):  # type: ignore[no-untyped-def]
    """Copy all entries of a table into a larger one."""
    for i in range(len(keys)):
        if keys[i] != 0:
            target = slot(larger, keys[i])
            larger[target] = keys[i]
            if len(values):
                larger_values[target] = values[i]


@kernel
def frequent(keys, counts, hashes, minimum, result):  # type: ignore[no-untyped-def]
    """Set result[j] to whether the count of hashes[j] is at least `minimum`."""
    for j in range(len(hashes)):
        if hashes[j] != 0:
            result[j] = counts[slot(keys, hashes[j])] >= minimum


class HashSet:
    """A growing set of hashes. With `values` (a dtype), each hash has a value: by default the number of additions."""

    def __init__(self, values: DTypeLike | None = None) -> None:
        self.keys = np.zeros(1 << 12, np.uint64)
        self.values = np.zeros(0 if values is None else len(self.keys), values or np.uint32)
        self.used = 0

    def reserve(self, more: int) -> None:
        """Make room for `more` hashes."""
        size = len(self.keys)
        while self.used + more > FULL * size:
            size *= 2
        if size > len(self.keys):
            keys, values = np.zeros(size, np.uint64), np.zeros(size if len(self.values) else 0, self.values.dtype)
            move(self.keys, self.values, keys, values)
            self.keys, self.values = keys, values

    def add(self, hashes: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Add hashes in order, except 0. Returns whether each was present before."""
        self.reserve(len(hashes))
        present = np.zeros(len(hashes), np.bool_)
        self.used += add(self.keys, self.values, hashes, present)
        return present

    def subset(self, slots: NDArray[np.bool_]) -> HashSet:
        """A new set with the entries of the marked slots."""
        other = HashSet(self.values.dtype if len(self.values) else None)
        used = int((slots & (self.keys != 0)).sum())
        other.reserve(used)
        other.used = used
        move(np.where(slots, self.keys, 0), self.values, other.keys, other.values)
        return other

    def frequent(self, hashes: NDArray[np.uint64], minimum: int) -> NDArray[np.bool_]:
        """Whether each of the hashes, all of which must be present, was added at least `minimum` times."""
        result = np.zeros(len(hashes), np.bool_)
        frequent(self.keys, self.values, hashes, minimum, result)
        return result

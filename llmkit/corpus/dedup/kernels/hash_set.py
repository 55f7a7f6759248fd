"""A hash table of 64-bit hashes (dedup/hash_set.py), compiled.

Open addressing over a power of two of slots, at most a share of `FULL` of them used. 0 is not a hash: it is the key
of a free slot. Cost: one look-up per hash.
"""

from __future__ import annotations

import numpy as np

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

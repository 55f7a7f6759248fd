"""A table of the hashes that were seen (dedup/seen.py), compiled: open addressing over a power of two of slots, at most `FULL` of them used.

Hashes are of 64 bits; 0 is none, and the key of a free slot. Cost: a look-up a hash.
"""

from __future__ import annotations

import numpy as np

from llmkit.kernels import kernel, swar

FULL = 0.7


@kernel
def slot(keys, h):  # type: ignore[no-untyped-def]
    """Where a hash stands in the table, or has to."""
    last = np.uint64(len(keys) - 1)
    i = h & last
    while keys[i] != 0 and keys[i] != h:
        i = (i + swar.ONE) & last
    return i


@kernel
def add(keys, counts, hashes, seen):  # type: ignore[no-untyped-def]
    """Enter hashes; `seen[j]`: hashes[j] was there before; `counts`, if there are any, go up by one. Returns how many were new."""
    new = 0
    for j in range(len(hashes)):
        h = hashes[j]
        if h != 0:
            i = slot(keys, h)
            seen[j] = keys[i] == h
            new += keys[i] != h
            keys[i] = h
            if len(counts):
                counts[i] += 1
    return new


@kernel
def move(keys, values, larger, larger_values):  # type: ignore[no-untyped-def]
    """Enter all of a table into a larger one."""
    for i in range(len(keys)):
        if keys[i] != 0:
            place = slot(larger, keys[i])
            larger[place] = keys[i]
            if len(values):
                larger_values[place] = values[i]


@kernel
def frequent(keys, counts, hashes, least, found):  # type: ignore[no-untyped-def]
    """found[j]: the count of hashes[j] is at least `least`."""
    for j in range(len(hashes)):
        if hashes[j] != 0:
            found[j] = counts[slot(keys, hashes[j])] >= least

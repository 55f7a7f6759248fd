"""Counting the words and phrases of a list in a text, both as hashes of runs of letters and digits. One pass."""

from __future__ import annotations

import numpy as np
from numba import njit

from llmkit.corpus.kernels.characters import ALNUM, COMBINING, SPACE
from llmkit.kernels import kernel
from llmkit.kernels.utf8 import HASH_PRIME, HASH_START, decode, finish

MASK = np.uint64(0xFFFF)


@njit(cache=True, nogil=True)
def letter_runs(data, table):  # type: ignore[no-untyped-def]
    """uint64 hashes of a text's runs of letters and digits, and of every other non-space character."""
    size = len(data)
    hashes = np.empty(size, np.uint64)
    n = i = 0
    while i < size:
        code, width = decode(data, i)
        kind = table[code]
        if kind & SPACE:
            i += width
            continue
        h = HASH_START
        while True:
            for k in range(i, i + width):
                h = (h ^ np.uint64(data[k])) * HASH_PRIME
            i += width
            if i >= size or not kind & (ALNUM | COMBINING):
                break
            code, width = decode(data, i)
            kind = table[code]
            if not kind & (ALNUM | COMBINING):
                break
        hashes[n] = finish(h)
        n += 1
    return hashes[:n]


@kernel
def count_phrases(words, starts, ends, flat, likely):  # type: ignore[no-untyped-def]
    """Number of positions in `words` (uint64) at which one of the phrases begins.

    Phrase i is flat[starts[i]:ends[i]]; phrases are sorted by their first word. `likely` (bool[65536]) is true
    at the low bits of every first word.
    """
    count = 0
    size = len(words)
    for position in range(size):
        first = words[position]
        if not likely[first & MASK]:
            continue
        low, high = 0, len(starts)
        while low < high:
            middle = (low + high) // 2
            if flat[starts[middle]] < first:
                low = middle + 1
            else:
                high = middle
        while low < len(starts) and flat[starts[low]] == first:
            length = ends[low] - starts[low]
            same = position + length <= size
            k = 1
            while same and k < length:
                same = words[position + k] == flat[starts[low] + k]
                k += 1
            if same:
                count += 1
                break
            low += 1
    return count

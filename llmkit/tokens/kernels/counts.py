"""How often each piece of some texts occurs, compiled: a table of distinct byte strings that grows.

A table is three arrays: `slots` uint64[2^n], open addressing, upper half of a hash and number of the word plus one; `words` int64[capacity, 3], a row a
word: where its bytes end in the pool, its count, its hash; `pool` uint8, the bytes of all words, one behind the other. Words are equal if their bytes are,
whatever their hashes. Each function takes the arrays and how many words there are and returns them, since they may have been replaced by larger ones.

Memory: the bytes of the distinct words, and for each 24 to 48 of its row and 16 to 32 of slots. Cost: one hash and mostly one comparison a piece.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from llmkit.kernels import octets
from llmkit.kernels.utf8 import hash_bytes
from llmkit.tokens.kernels.pretokenize import cut

END, COUNT, HASH = range(3)
NUMBER = np.uint64(0xFFFFFFFF)


@njit(cache=True, nogil=True)
def same(data, i, pool, k, size):  # type: ignore[no-untyped-def]
    """Whether data[i:i+size] and pool[k:k+size] are equal."""
    while size >= 8:
        if octets.load(data, i) != octets.load(pool, k):
            return False
        i, k, size = i + 8, k + 8, size - 8
    return not size or not (octets.load(data, i) ^ octets.load(pool, k)) & octets.below(size)


@njit(cache=True, nogil=True)
def find(data, start, stop, h, slots, words, pool):  # type: ignore[no-untyped-def]
    """Number of the word data[start:stop], whose hash is `h`; -1 if it is not there."""
    mask = np.uint64(len(slots) - 1)
    slot = h & mask
    while slots[slot]:
        if (slots[slot] ^ h) <= NUMBER:
            word = np.int64(slots[slot] & NUMBER) - 1
            begin = words[word - 1, END] if word else 0
            if words[word, END] - begin == stop - start and same(data, start, pool, begin, stop - start):
                return word
        slot = slot + octets.ONE & mask
    return -1


@njit(cache=True, nogil=True)
def enter(h, word, slots):  # type: ignore[no-untyped-def]
    """Put a word that is not there into the slots."""
    mask = np.uint64(len(slots) - 1)
    slot = h & mask
    while slots[slot]:
        slot = slot + octets.ONE & mask
    slots[slot] = h & ~NUMBER | np.uint64(word + 1)


@njit(cache=True, nogil=True)
def insert(data, start, stop, h, times, known, slots, words, pool):  # type: ignore[no-untyped-def]
    """Make data[start:stop] the last word. Returns the arrays, larger ones where these were full."""
    used = words[known - 1, END] if known else 0
    end = used + stop - start
    if known == len(words):
        rows = np.empty((2 * known, 3), np.int64)
        rows[:known] = words
        words = rows
    if end + 8 > len(pool):  # octets.copy writes whole eights
        larger = np.empty(max(2 * len(pool), end + 8), np.uint8)
        larger[:used] = pool[:used]
        pool = larger
    octets.copy(data, start, stop, pool, used)
    words[known, END], words[known, COUNT], words[known, HASH] = end, times, np.int64(h)
    if 2 * known < len(slots):
        enter(h, known, slots)
    else:
        slots = np.zeros(2 * len(slots), np.uint64)
        for word in range(known + 1):
            enter(np.uint64(words[word, HASH]), word, slots)
    return slots, words, pool


@njit(cache=True, nogil=True)
def count_pieces(data, stops, how, table, known, slots, words, pool):  # type: ignore[no-untyped-def]
    """Count the pieces of the texts that end at `stops` in `data`, cut as the pattern `how` does."""
    ends = np.empty(len(data), np.int64)
    begin = 0
    for stop in stops:
        n = cut(data, begin, stop, how, table, ends)
        for k in range(n):
            h = hash_bytes(data, begin, ends[k])
            word = find(data, begin, ends[k], h, slots, words, pool)
            if word >= 0:
                words[word, COUNT] += 1
            else:
                slots, words, pool = insert(data, begin, ends[k], h, 1, known, slots, words, pool)
                known += 1
            begin = ends[k]
    return known, slots, words, pool


@njit(cache=True, nogil=True)
def add_counts(others, data, known, slots, words, pool):  # type: ignore[no-untyped-def]
    """Add the words of another table: its rows and its pool."""
    begin = 0
    for k in range(len(others)):
        end, h = others[k, END], np.uint64(others[k, HASH])
        word = find(data, begin, end, h, slots, words, pool)
        if word >= 0:
            words[word, COUNT] += others[k, COUNT]
        else:
            slots, words, pool = insert(data, begin, end, h, others[k, COUNT], known, slots, words, pool)
            known += 1
        begin = end
    return known, slots, words, pool

"""Count the pieces of texts, compiled: a growing hash table of distinct byte strings.

    table, pool, word_count, used = count_texts(data, stops, how, classes, table, pool, word_count, used)

`table` int64[2^n, 4] uses open addressing and is at most half full. Its columns are the first eight bytes of a
word, its count (0: a free row), its offset in `pool` uint8, and its length. Words are compared by their bytes,
not only by their hashes; for words of up to eight bytes the row alone is enough. `word_count` words fill `used`
bytes of the pool. The arrays are returned, since they are replaced by larger ones as they fill up.

Cost: one hash and usually one cache miss per piece. Memory: 64 to 128 bytes per distinct word, plus its bytes.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from llmkit.kernels import kernel, swar
from llmkit.kernels.utf8 import finish, hash_bytes
from llmkit.tokens.kernels.pretokenize import cut

FIRST, COUNT, START, LENGTH = range(4)
SPREAD = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: spreads the lengths


@kernel
def key(data, start, size):  # type: ignore[no-untyped-def]
    """(first eight bytes, padded with zeros; hash) of a word."""
    first = swar.load(data, start)
    if size < 8:
        first &= swar.below(size)
    return np.int64(first), finish(first ^ np.uint64(size) * SPREAD) if size <= 8 else hash_bytes(
        data, start, start + size
    )


@kernel
def same(data, i, pool, k, size):  # type: ignore[no-untyped-def]
    """Whether data[i:i+size] and pool[k:k+size] are equal."""
    while size >= 8:
        if swar.load(data, i) != swar.load(pool, k):
            return False
        i, k, size = i + 8, k + 8, size - 8
    return not (swar.load(data, i) ^ swar.load(pool, k)) & swar.below(size)


@kernel
def count_known(data, begin, ends, k, n, times, table, pool):  # type: ignore[no-untyped-def]
    """Count words `k` to `n`, the first of which starts at `begin`, until one is not in the table.

    Returns that word's start, its number, and the free row for it.
    """
    mask, last = len(table) - 1, len(times) - 1
    row = np.int64(0)
    while k < n:
        size = ends[k] - begin
        first, h = key(data, begin, size)
        row = np.int64(h & np.uint64(mask))
        while table[row, COUNT] and (
            table[row, FIRST] != first
            or table[row, LENGTH] != size
            or (size > 8 and not same(data, begin, pool, table[row, START], size))
        ):
            row = row + 1 & mask
        if not table[row, COUNT]:
            break
        table[row, COUNT] += times[min(k, last)]
        begin = ends[k]
        k += 1
    return begin, k, row


@njit(cache=True, nogil=True)
def insert(data, start, size, times, row, table, pool, word_count, used):  # type: ignore[no-untyped-def]
    """Insert a new word.

    `word_count` and `used` already include it. Returns table and pool, with room for another row.
    """
    if used + 8 > len(pool):  # swar.copy writes eight bytes at a time
        larger = np.empty(2 * len(pool) + size, np.uint8)
        swar.copy(pool, 0, used - size, larger, 0)
        pool = larger
    swar.copy(data, start, start + size, pool, used - size)
    table[row, FIRST], _ = key(data, start, size)
    table[row, COUNT], table[row, START], table[row, LENGTH] = times, used - size, size
    if 2 * word_count < len(table):
        return table, pool
    larger_table = np.zeros((2 * len(table), 4), np.int64)
    mask = len(larger_table) - 1
    for k in range(len(table)):
        if table[k, COUNT]:
            _, h = key(pool, table[k, START], table[k, LENGTH])
            row = np.int64(h & np.uint64(mask))
            while larger_table[row, COUNT]:
                row = row + 1 & mask
            for column in range(4):
                larger_table[row, column] = table[k, column]
    return larger_table, pool


@njit(cache=True, nogil=True)
def count_words(data, begin, ends, n, times, table, pool, word_count, used):  # type: ignore[no-untyped-def]
    """Count `n` consecutive words from `begin`; word k occurs `times[k]` times, or `times[0]` where there is
    only one entry.
    """
    k = np.int64(0)
    while k < n:
        begin, k, row = count_known(data, begin, ends, k, n, times, table, pool)
        if k < n:
            word_count, used = word_count + 1, used + ends[k] - begin
            more = times[min(k, len(times) - 1)]
            table, pool = insert(data, begin, ends[k] - begin, more, row, table, pool, word_count, used)
            begin = ends[k]
            k += 1
    return table, pool, word_count, used


@njit(cache=True, nogil=True)
def count_texts(data, stops, how, classes, table, pool, word_count, used):  # type: ignore[no-untyped-def]
    """Count the pieces of the texts that end at `stops` in `data`, split by the pattern `how`."""
    ends, once = np.empty(len(data), np.int64), np.ones(1, np.int64)
    begin = np.int64(0)
    for stop in stops:
        n = cut(data, begin, stop, how, classes, ends)
        table, pool, word_count, used = count_words(data, begin, ends, n, once, table, pool, word_count, used)
        begin = stop
    return table, pool, word_count, used

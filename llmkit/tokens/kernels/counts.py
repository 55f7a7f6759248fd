"""How often each piece of some texts occurs, compiled: a table of distinct byte strings that grows.

    table, pool, known, used = count_texts(data, stops, how, classes, table, pool, known, used)

`table` int64[2^n, 4], open addressing, at most half full: the first eight bytes of a word, its count (0: a free row), where it starts in `pool` uint8 and
its length. Words are equal if their bytes are, whatever their hashes; for those of up to eight bytes one row says so. `known` words fill `used` bytes of
the pool. Arrays that became too small are replaced by larger ones, hence returned.

Cost: one hash and mostly one miss of the cache for a piece. Memory for each distinct word 64 to 128 bytes and its own.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from llmkit.kernels import octets
from llmkit.kernels.utf8 import finish, hash_bytes
from llmkit.tokens.kernels.pretokenize import cut

FIRST, COUNT, START, LENGTH = range(4)
SPREAD = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: lengths far apart


@njit(cache=True, nogil=True)
def key(data, start, size):  # type: ignore[no-untyped-def]
    """(first eight bytes, or all and zeros behind; hash) of a word."""
    first = octets.load(data, start)
    if size < 8:
        first &= octets.below(size)
    return np.int64(first), finish(first ^ np.uint64(size) * SPREAD) if size <= 8 else hash_bytes(data, start, start + size)


@njit(cache=True, nogil=True)
def same(data, i, pool, k, size):  # type: ignore[no-untyped-def]
    """Whether data[i:i+size] and pool[k:k+size] are equal."""
    while size >= 8:
        if octets.load(data, i) != octets.load(pool, k):
            return False
        i, k, size = i + 8, k + 8, size - 8
    return not (octets.load(data, i) ^ octets.load(pool, k)) & octets.below(size)


@njit(cache=True, nogil=True)
def count(data, start, size, times, table, pool, used):  # type: ignore[no-untyped-def]
    """Count the word data[start:start+size] so many times more; whether it is new. There has to be room for it."""
    first, h = key(data, start, size)
    mask = len(table) - 1
    row = np.int64(h & np.uint64(mask))
    while table[row, COUNT]:
        if (
            table[row, FIRST] == first
            and table[row, LENGTH] == size
            and (size <= 8 or same(data, start, pool, table[row, START], size))
        ):
            table[row, COUNT] += times
            return False
        row = row + 1 & mask
    octets.copy(data, start, start + size, pool, used)
    table[row, FIRST], table[row, COUNT], table[row, START], table[row, LENGTH] = first, times, used, size
    return True


@njit(cache=True, nogil=True)
def is_full(size, table, pool, known, used):  # type: ignore[no-untyped-def]
    """Whether there is no room for one more word of `size` bytes; octets.copy writes whole eights."""
    return 2 * known >= len(table) or used + size + 8 > len(pool)


@njit(cache=True, nogil=True)
def with_room(size, table, pool, known, used):  # type: ignore[no-untyped-def]
    """Larger arrays, where one more word of `size` bytes has no room."""
    if used + size + 8 > len(pool):
        larger = np.empty(2 * len(pool) + size, np.uint8)
        octets.copy(pool, 0, used, larger, 0)
        pool = larger
    if 2 * known >= len(table):
        old, table = table, np.zeros((2 * len(table), 4), np.int64)
        mask = len(table) - 1
        for k in range(len(old)):
            if old[k, COUNT]:
                _, h = key(pool, old[k, START], old[k, LENGTH])
                row = np.int64(h & np.uint64(mask))
                while table[row, COUNT]:
                    row = row + 1 & mask
                for column in range(4):
                    table[row, column] = old[k, column]
    return table, pool


@njit(cache=True, nogil=True)
def count_pieces(data, begin, ends, k, n, table, pool, known, used):  # type: ignore[no-untyped-def]
    """Count pieces `k` to `n` while there is room; returns (begin, k, known, used) for the rest. The arrays stay: to replace them here would cost half."""
    while k < n and not is_full(ends[k] - begin, table, pool, known, used):
        size = ends[k] - begin
        if count(data, begin, size, 1, table, pool, used):
            known, used = known + 1, used + size
        begin = ends[k]
        k += 1
    return begin, k, known, used


@njit(cache=True, nogil=True)
def count_texts(data, stops, how, classes, table, pool, known, used):  # type: ignore[no-untyped-def]
    """Count the pieces of the texts that end at `stops` in `data`, cut as the pattern `how` does."""
    ends = np.empty(len(data), np.int64)
    begin = np.int64(0)
    for stop in stops:
        n, k = cut(data, begin, stop, how, classes, ends), 0
        while k < n:
            table, pool = with_room(ends[k] - begin, table, pool, known, used)
            begin, k, known, used = count_pieces(data, begin, ends, k, n, table, pool, known, used)
    return table, pool, known, used


@njit(cache=True, nogil=True)
def count_rows(rows, data, table, pool, known, used):  # type: ignore[no-untyped-def]
    """Add the rows of another table, whose pool is `data`."""
    for k in range(len(rows)):
        size = rows[k, LENGTH]
        if is_full(size, table, pool, known, used):
            table, pool = with_room(size, table, pool, known, used)
        if count(data, rows[k, START], size, rows[k, COUNT], table, pool, used):
            known, used = known + 1, used + size
    return table, pool, known, used

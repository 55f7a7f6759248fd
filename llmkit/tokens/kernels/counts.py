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

from llmkit.kernels import kernel, swar
from llmkit.kernels.utf8 import finish, hash_bytes
from llmkit.tokens.kernels.pretokenize import cut

FIRST, COUNT, START, LENGTH = range(4)
SPREAD = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: lengths far apart


@kernel
def key(data, start, size):  # type: ignore[no-untyped-def]
    """(first eight bytes, or all and zeros behind; hash) of a word."""
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
    """Count words `k` to `n`, the first from `begin`, up to one that is new; returns (where and which that is, a row for it)."""
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
def insert(data, start, size, times, row, table, pool, known, used):  # type: ignore[no-untyped-def]
    """Enter a new word, the last of `known`, that then fill `used` bytes; returns table and pool, in which there is room for another row."""
    if used + 8 > len(pool):  # octets.copy writes whole eights
        larger = np.empty(2 * len(pool) + size, np.uint8)
        swar.copy(pool, 0, used - size, larger, 0)
        pool = larger
    swar.copy(data, start, start + size, pool, used - size)
    table[row, FIRST], _ = key(data, start, size)
    table[row, COUNT], table[row, START], table[row, LENGTH] = times, used - size, size
    if 2 * known < len(table):
        return table, pool
    twice = np.zeros((2 * len(table), 4), np.int64)
    mask = len(twice) - 1
    for k in range(len(table)):
        if table[k, COUNT]:
            _, h = key(pool, table[k, START], table[k, LENGTH])
            row = np.int64(h & np.uint64(mask))
            while twice[row, COUNT]:
                row = row + 1 & mask
            for column in range(4):
                twice[row, column] = table[k, column]
    return twice, pool


@njit(cache=True, nogil=True)
def count_words(data, begin, ends, n, times, table, pool, known, used):  # type: ignore[no-untyped-def]
    """Count `n` words, one behind the other from `begin`, each `times[0]` more, or each as `times` says."""
    k = np.int64(0)
    while k < n:
        begin, k, row = count_known(data, begin, ends, k, n, times, table, pool)
        if k < n:
            known, used = known + 1, used + ends[k] - begin
            more = times[min(k, len(times) - 1)]
            table, pool = insert(data, begin, ends[k] - begin, more, row, table, pool, known, used)
            begin = ends[k]
            k += 1
    return table, pool, known, used


@njit(cache=True, nogil=True)
def count_texts(data, stops, how, classes, table, pool, known, used):  # type: ignore[no-untyped-def]
    """Count the pieces of the texts that end at `stops` in `data`, cut as the pattern `how` does."""
    ends, once = np.empty(len(data), np.int64), np.ones(1, np.int64)
    begin = np.int64(0)
    for stop in stops:
        n = cut(data, begin, stop, how, classes, ends)
        table, pool, known, used = count_words(data, begin, ends, n, once, table, pool, known, used)
        begin = stop
    return table, pool, known, used

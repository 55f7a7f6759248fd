"""Repeats inside texts, compiled: fingerprints of a sequence of units, and which of them occurred before.

Units are words as 64-bit hashes (uint64), or bytes (uint8). All documents form one array, each followed by a unit that
occurs in no text (`FENCE`). A window is `length` consecutive units. Its fingerprint is the minimum hash among its runs
of k = `run_of(length)` units, so that equal windows have equal fingerprints, and neighbouring windows mostly the same
one: winnowing, after Schleimer, Wilkerson and Aiken (SIGMOD 2003).
"""

from __future__ import annotations

import numpy as np
from numba import njit

from llmkit.corpus.dedup.kernels.hash_set import slot
from llmkit.corpus.dedup.kernels.minhash import BASE
from llmkit.corpus.kernels.characters import SPACE
from llmkit.kernels import kernel, swar
from llmkit.kernels.utf8 import decode, finish, hash_bytes

FENCE = np.uint64(0xFFFFFFFFFFFFFFFF)


@kernel
def run_of(length):  # type: ignore[no-untyped-def]
    """Number of units of a hashed run: half a window."""
    return (length + 1) // 2


@njit(cache=True, nogil=True)
def words(data, table):  # type: ignore[no-untyped-def]
    """(start, stop, hash) of each word between whitespace, in bytes: int64 [words] twice, uint64 [words]."""
    starts = np.empty(len(data) // 2 + 1, np.int64)
    stops, hashes = np.empty_like(starts), np.empty(len(starts), np.uint64)
    n, i, size = 0, 0, len(data)
    while i < size:
        start = i
        while i < size:  # a word, possibly empty, and the character after it
            stop, byte = i, data[i]
            i += 1
            if 0x20 < byte < 0x7F:
                stop = i
                continue
            code, width = decode(data, stop)
            i = stop + width
            if table[code] & SPACE:
                break
            stop = i
        if stop > start:
            starts[n], stops[n], hashes[n] = start, stop, min(hash_bytes(data, start, stop), FENCE - swar.ONE)
            n += 1
    return starts[:n], stops[:n], hashes[:n]


@njit(cache=True, nogil=True)
def hashes_of_runs(units, length):  # type: ignore[no-untyped-def]
    """Hash of every run of `length` units, by a rolling polynomial; never 0.

    uint64 [units - length + 1]; empty if there are fewer units than `length`.
    """
    n = len(units) - length + 1
    hashes = np.empty(max(0, n), np.uint64)
    power, h = swar.ONE, np.uint64(0)
    for i in range(len(units)):
        h = h * BASE + finish(np.uint64(units[i]))
        if i < length:
            power *= BASE
        else:
            h -= power * finish(np.uint64(units[i - length]))
        if i >= length - 1:
            hashes[i - length + 1] = max(finish(h), swar.ONE)
    return hashes


@njit(cache=True, nogil=True)
def least_in_windows(hashes, width):  # type: ignore[no-untyped-def]
    """Minimum of every `width` consecutive hashes, in place.

    A window is the end of one block of `width` hashes and the beginning of the next.
    """
    count = len(hashes) - width + 1
    ends = np.empty(width, np.uint64)
    for block in range(0, count, width):
        least = FENCE
        for j in range(width - 1, -1, -1):
            ends[j] = least = min(least, hashes[block + j])
        hashes[block] = least
        least = FENCE
        for j in range(1, min(width, count - block)):
            least = min(least, hashes[block + width + j - 1])
            hashes[block + j] = min(ends[j], least)
    return hashes[: max(0, count)]


@njit(cache=True, nogil=True)
def of_windows(units, length):  # type: ignore[no-untyped-def]
    """Fingerprint of each window."""
    k = run_of(length)
    return least_in_windows(hashes_of_runs(units, k), length - k + 1)


@njit(cache=True, nogil=True)
def fingerprints(units, length):  # type: ignore[no-untyped-def]
    """The fingerprints of the windows of a document, one for each sequence of equal ones.

    A sequence of more windows than can contain the same run gives another fingerprint.
    """
    result, width = of_windows(units, length), length - run_of(length) + 1
    n = since = 0
    last = FENCE
    for i in range(len(result)):
        since += 1
        if i == 0 or result[i] != last or since > width:
            last, since = result[i], 1
            result[n] = last
            n += 1
    return result[:n].copy()


@kernel
def repeats(  # type: ignore[no-untyped-def]
    units, start, stop, length, fingerprints, hashes, i, until, repeated, keys, positions, part, parts, marks
):
    """Mark repeats in a document, units[start:stop], considering its windows from `i` to about `until`.

    A unit is marked, with one bit, if it lies in a window that occurred before. A repeat is followed unit by unit as
    far as it extends; the windows in it need not be looked up. Returns (next window to consider, new windows in the
    table).

    `fingerprints` and `hashes` are those of the windows of the document. `repeated`: table of the fingerprints that
    occur more than once. `keys`, `positions`: table of the first window of each kind, for the kinds in this `part` of
    `parts`.
    """
    new, last, is_repeated = 0, np.uint64(0), False
    while i < until:
        h = hashes[i]
        if fingerprints[i] != last:
            last = fingerprints[i]
            is_repeated = repeated[slot(repeated, last)] == last
        if not is_repeated or (parts > 1 and (h >> np.uint64(40)) % np.uint64(parts) != part):
            i += 1
            continue
        k = slot(keys, h)
        position, size = start + i, 0
        if keys[k] != h:
            keys[k], positions[k] = h, position
            new += 1
        elif positions[k] + length <= position:  # else it overlaps itself
            while position + size < stop and units[positions[k] + size] == units[position + size]:
                size += 1
        if size >= length:
            for j in range(position, position + size):
                marks[j >> 3] |= np.uint8(0x80 >> (j & 7))
            i += size - length
        i += 1
    return i, new

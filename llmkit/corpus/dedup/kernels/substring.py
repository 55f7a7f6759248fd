"""Repeats inside texts, compiled: fingerprints of a sequence of units, and what of it stood before.

Units are words as 64-bit hashes (uint64), or bytes (uint8). All documents are one array, each with a unit behind it that no text has (`fence`).
A window is `length` units in a row; its fingerprint is the least hash among the runs of k = `run_of(length)` units in it, so that equal windows have
equal fingerprints, and neighbours mostly the same one: winnowing, of Schleimer, Wilkerson and Aiken (SIGMOD 2003).
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
    """Units in a run that is hashed: half a window."""
    return (length + 1) // 2


@njit(cache=True, nogil=True)
def words(data, table):  # type: ignore[no-untyped-def]
    """(first byte, byte behind, hash) of each word between whitespace: int64 [words] twice, uint64 [words]."""
    starts = np.empty(len(data) // 2 + 1, np.int64)
    stops, hashes = np.empty_like(starts), np.empty(len(starts), np.uint64)
    n, i, size = 0, 0, len(data)
    while i < size:
        start = i
        while i < size:  # a word, maybe empty, and the character behind it
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
    """Hash of every run of so many units: uint64 [units - length + 1], empty where there are fewer; never 0. A polynomial that rolls on."""
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
    """Minimum of each `width` hashes in a row, in their place: a window is the end of one block of `width` and the beginning of the next."""
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
    """The fingerprints of a document's windows, one for neighbours that agree: but two where more agree than can hold one and the same run."""
    found, width = of_windows(units, length), length - run_of(length) + 1
    n = since = 0
    last = FENCE
    for i in range(len(found)):
        since += 1
        if i == 0 or found[i] != last or since > width:
            last, since = found[i], 1
            found[n] = last
            n += 1
    return found[:n].copy()


@kernel
def repeats(units, start, stop, length, prints, hashes, i, until, common, keys, places, part, parts, marks):  # type: ignore[no-untyped-def]
    """Mark, a bit a unit, what of units[start:stop], a document, stands in a window that stood before; of its windows from `i` to about `until`.

    `prints` and `hashes` are those of its windows, `common` a table of fingerprints of which there are several, `keys` and `places` one of the first
    window of each kind, of the kinds that are of this `part`.
    A repeat is followed as far as it goes, unit by unit; the windows in it need not be looked up. Returns (next window to do, new ones in the table).
    """
    new, last, several = 0, np.uint64(0), False
    while i < until:
        h = hashes[i]
        if prints[i] != last:
            last = prints[i]
            several = common[slot(common, last)] == last
        if not several or (parts > 1 and (h >> np.uint64(40)) % np.uint64(parts) != part):
            i += 1
            continue
        k = slot(keys, h)
        place, size = start + i, 0
        if keys[k] != h:
            keys[k], places[k] = h, place
            new += 1
        elif places[k] + length <= place:  # else it overlaps itself
            while place + size < stop and units[places[k] + size] == units[place + size]:
                size += 1
        if size >= length:
            for j in range(place, place + size):
                marks[j >> 3] |= np.uint8(0x80 >> (j & 7))
            i += size - length
        i += 1
    return i, new

"""Lines and paragraphs for deduplication: where they stand, and a hash of each, compiled.

Hashes are of 64 bits; 0 is that of a passage which is never cut. Cost: linear.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from llmkit.corpus.dedup.kernels.normalise import loose
from llmkit.corpus.kernels.characters import SPACE
from llmkit.kernels import kernel, swar
from llmkit.kernels.utf8 import decode, hash_bytes

NONE, WHITESPACE, LOOSE = 0, 1, 2  # normalisations


@njit(cache=True, nogil=True)
def spans(data, paragraphs):  # type: ignore[no-untyped-def]
    """(first byte, byte behind) of each line, or of each of the `paragraphs` between runs of two and more newlines: int64 [passages] twice."""
    room = 1
    for byte in data:
        room += byte == 0x0A
    starts, stops = np.zeros(room, np.int64), np.empty(room, np.int64)
    n = i = 0
    while True:
        stop = swar.find(data, i, len(data), swar.NEWLINES)
        i = stop + 1
        while paragraphs and i < len(data) and data[i] == 0x0A:
            i += 1
        if paragraphs and i == stop + 1 and stop < len(data):
            continue
        stops[n] = stop
        n += 1
        if stop == len(data):
            return starts[:n], stops[:n]
        starts[n] = i


@kernel
def collapse(data, start, stop, table, out):  # type: ignore[no-untyped-def]
    """`" ".join(text.split())` of data[start:stop] into `out`, which has room for one byte more; its length in bytes."""
    n, last, i = 0, np.uint8(0x20), start
    while i < stop:
        byte = data[i]
        if 0x20 <= byte < 0x80:
            out[n] = byte
            n += (byte != 0x20) | (last != 0x20)  # no branch: it could not be predicted
            last = byte
            i += 1
            continue
        code, width = decode(data, i)
        if table[code] & SPACE:
            out[n] = 0x20
            n += last != 0x20
            last = np.uint8(0x20)
        else:
            for k in range(i, i + width):
                out[n] = last = data[k]
                n += 1
        i += width
    return n - (n > 0 and last == 0x20)


@njit(cache=True, nogil=True)
def hashes_of(data, paragraphs, how, shortest, table, becomes, pool):  # type: ignore[no-untyped-def]
    """(hash of each passage, True), or False where the Python normalisation has to do the text. `shortest`: characters, whitespace collapsed."""
    starts, stops = spans(data, paragraphs)
    hashes, out = np.zeros(len(starts), np.uint64), np.empty(len(data) + 1, np.uint8)
    for i in range(len(starts)):
        n = collapse(data, starts[i], stops[i], table, out)
        if n == 0 or (n < 4 * shortest and swar.length(out, 0, n) < shortest):
            continue
        if how == NONE:
            h = hash_bytes(data, starts[i], stops[i])
        else:
            h = hash_bytes(out, 0, n)
            if how == LOOSE:
                text, done = loose(out[:n], becomes, pool)
                if not done:
                    return hashes, False
                if len(text):
                    h = hash_bytes(text, 0, len(text))
        hashes[i] = max(h, swar.ONE)
    return hashes, True

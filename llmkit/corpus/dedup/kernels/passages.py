"""Lines and paragraphs for deduplication, compiled: their positions, and a hash of each.

Hashes have 64 bits; 0 marks a passage that is never cut. Cost: linear.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from llmkit.corpus.dedup.kernels.normalise import normalised
from llmkit.corpus.kernels.characters import SPACE
from llmkit.kernels import kernel, swar
from llmkit.kernels.utf8 import decode, hash_bytes

NONE, WHITESPACE, MORE = 0, 1, 2  # normalisations


@njit(cache=True, nogil=True)
def spans(data, paragraphs):  # type: ignore[no-untyped-def]
    """(start, stop) of each line in bytes: int64 [passages] each.

    With `paragraphs`, of each paragraph: these are separated by runs of two or more newlines.
    """
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
def collapse(data, start, stop, classes, out):  # type: ignore[no-untyped-def]
    """Write `" ".join(text.split())` of data[start:stop] to `out`, which has room for one byte more.

    Returns its length in bytes.
    """
    n, last, i = 0, np.uint8(0x20), start
    while i < stop:
        byte = data[i]
        if 0x20 <= byte < 0x80:
            out[n] = byte
            n += (byte != 0x20) | (last != 0x20)  # branchless: a branch would be mispredicted
            last = byte
            i += 1
            continue
        code, width = decode(data, i)
        if classes[code] & SPACE:
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
def hashes_of(data, paragraphs, mode, min_characters, classes, fast, table, pool):  # type: ignore[no-untyped-def]
    """(hash of each passage, True), or False as the second value if the Python normalisation must process the text.

    `min_characters` counts characters after whitespace is collapsed. `classes` are character classes; `fast`, `table`
    and `pool` are the tables of a normalisation, used in `mode` MORE.
    """
    starts, stops = spans(data, paragraphs)
    hashes, out = np.zeros(len(starts), np.uint64), np.empty(len(data) + 1, np.uint8)
    for i in range(len(starts)):
        n = collapse(data, starts[i], stops[i], classes, out)
        if n == 0 or (n < 4 * min_characters and swar.length(out, 0, n) < min_characters):
            continue
        if mode == NONE:
            h = hash_bytes(data, starts[i], stops[i])
        else:
            h = hash_bytes(out, 0, n)
            if mode == MORE:
                text, done = normalised(out[:n], fast, table, pool)
                if not done:
                    return hashes, False
                if len(text):
                    h = hash_bytes(text, 0, len(text))
        hashes[i] = max(h, swar.ONE)
    return hashes, True

"""Classes of characters as one table, and how kernels step through UTF-8.

`classes()` is `uint8[0x110000]`: bits by code point, read from Python's own Unicode tables, so that kernels decide as `str` methods and `re` do.
"""

from __future__ import annotations

import string
import unicodedata
from functools import cache

import numpy as np
from numba import njit
from numpy.typing import NDArray

from llmkit.corpus.kernels import octets
from llmkit.corpus.words import MARKS, TERMINALS

ALNUM = 1  # str.isalnum
ALPHA = 2  # str.isalpha
SPACE = 4  # str.isspace
COMBINING = 8  # accents and vowel signs, which belong to the letter before
MARK = 16  # punctuation or sentence end: a word of these alone is a symbol
TERMINAL = 32  # ends a sentence
RUN = 64  # marks of which a run is one word
UPPER = 128  # str.isupper

RUN_MARKS = string.punctuation + "–—…•·"

Bytes = NDArray[np.uint8]


@cache
def classes() -> Bytes:
    """The table; built once a process, in some 50 ms."""
    table = np.zeros(0x110000, np.uint8)
    for start, stop in ((0, 0xD800), (0xE000, 0x34000), (0xE0000, 0xE0200)):  # every plane with assigned characters
        text = "".join(map(chr, range(start, stop)))
        for bit, test in ((ALNUM, str.isalnum), (ALPHA, str.isalpha), (SPACE, str.isspace), (UPPER, str.isupper)):
            table[start:stop] |= np.fromiter(map(test, text), np.bool_, stop - start).astype(np.uint8) * np.uint8(bit)
    for code in range(0x300, 0xFE30):
        if unicodedata.category(chr(code))[0] == "M":
            table[code] |= COMBINING
    for bit, characters in ((MARK, MARKS), (TERMINAL, TERMINALS), (RUN, RUN_MARKS)):
        table[[ord(character) for character in characters]] |= bit
    table.setflags(write=False)
    return table


@njit(cache=True, nogil=True)
def decode(data, i):  # type: ignore[no-untyped-def]
    """(code point, bytes it takes) at byte `i` of valid UTF-8."""
    first = np.int64(data[i])
    if first < 0x80:
        return first, 1
    if first < 0xE0:
        return (first & 0x1F) << 6 | np.int64(data[i + 1]) & 0x3F, 2
    middle = np.int64(data[i + 1]) & 0x3F
    if first < 0xF0:
        return (first & 0x0F) << 12 | middle << 6 | np.int64(data[i + 2]) & 0x3F, 3
    return (first & 0x07) << 18 | middle << 12 | (np.int64(data[i + 2]) & 0x3F) << 6 | np.int64(data[i + 3]) & 0x3F, 4


@njit(cache=True, nogil=True)
def start_of(data, i):  # type: ignore[no-untyped-def]
    """First byte of the character that holds byte `i`."""
    while data[i] & 0xC0 == 0x80:
        i -= 1
    return i


@njit(cache=True, nogil=True)
def stripped(data, first, last, table):  # type: ignore[no-untyped-def]
    """Where data[first:last] begins and ends without the white space around it, as str.strip takes it away."""
    while first < last:
        code, width = decode(data, first)
        if not table[code] & SPACE:
            break
        first += width
    while first < last:
        before = start_of(data, last - 1)
        code, _ = decode(data, before)
        if not table[code] & SPACE:
            break
        last = before
    return first, last


HASH_START = np.uint64(0xCBF29CE484222325)  # FNV-1a, 64 bits, with a finish that spreads it over all bits
HASH_PRIME = np.uint64(0x100000001B3)
MIX_A = np.uint64(0xFF51AFD7ED558CCD)  # the finish of MurmurHash3
MIX_B = np.uint64(0xC4CEB9FE1A85EC53)


@njit(cache=True, nogil=True)
def finish(h):  # type: ignore[no-untyped-def]
    """Spread a hash over all its bits."""
    h ^= h >> np.uint64(33)
    h *= MIX_A
    h ^= h >> np.uint64(33)
    h *= MIX_B
    return h ^ h >> np.uint64(33)


@njit(cache=True, nogil=True)
def extend(h, other):  # type: ignore[no-untyped-def]
    """Hash of a sequence from that of its beginning and of its next item, both spread over all bits."""
    return h * MIX_A + other


@njit(cache=True, nogil=True)
def hash_eight(h, word):  # type: ignore[no-untyped-def]
    """A hash of bytes, eight bytes further."""
    h = (h ^ word) * MIX_A
    return h ^ h >> np.uint64(32)


@njit(cache=True, nogil=True)
def hash_rest(h, word):  # type: ignore[no-untyped-def]
    """A hash of bytes, one to seven bytes further, the last ones."""
    return (h ^ word) * MIX_A


@njit(cache=True, nogil=True)
def hash_bytes(data, start, stop):  # type: ignore[no-untyped-def]
    """64-bit hash of data[start:stop]."""
    h = HASH_START
    i = start
    while i + 8 <= stop:
        h = hash_eight(h, octets.load(data, i))
        i += 8
    if i < stop:
        h = hash_rest(h, octets.load(data, i) & octets.below(stop - i))
    return finish(h + np.uint64(stop - start))


@njit(cache=True, nogil=True)
def line_at(data, start):  # type: ignore[no-untyped-def]
    """(end at the next newline or that of the text, characters, `hash_bytes`) of the line that begins at byte `start`."""
    i, size, inner, h = start, len(data), 0, HASH_START
    while i < size:
        word = octets.load(data, i)
        found = octets.equal(word, octets.NEWLINES)
        step = min(octets.first(found), size - i)
        if step < 8:
            word &= octets.below(step)
        inner += octets.count(octets.continuations(word))
        if step < 8:
            if step > 0:
                h = hash_rest(h, word)
            i += step
            break
        h = hash_eight(h, word)
        i += 8
    return i, i - start - inner, finish(h + np.uint64(i - start))

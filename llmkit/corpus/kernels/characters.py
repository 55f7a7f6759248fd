"""Character classes as one table, and kernels that strip whitespace and find lines.

`classes()` is `uint8[0x110000]`: class bits by code point, taken from Python's own Unicode tables, so that
kernels agree with `str` methods and `re`.
"""

from __future__ import annotations

import string
import unicodedata
from functools import cache

import numpy as np

from llmkit.corpus.words import MARKS, TERMINALS
from llmkit.kernels import kernel, swar
from llmkit.kernels.utf8 import HASH_START, Bytes, decode, finish, hash_eight, hash_rest, start_of

ALNUM = 1  # str.isalnum
ALPHA = 2  # str.isalpha
SPACE = 4  # str.isspace
COMBINING = 8  # accents and vowel signs, which belong to the preceding letter
MARK = 16  # punctuation or sentence end: a word that consists of these is a symbol
TERMINAL = 32  # ends a sentence
RUN = 64  # marks whose runs form one word
UPPER = 128  # str.isupper

RUN_MARKS = string.punctuation + "–—…•·"


@cache
def classes() -> Bytes:
    """The table; built once per process."""
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


@kernel
def stripped(data, first, last, table):  # type: ignore[no-untyped-def]
    """The bounds of data[first:last] without the whitespace around it, as removed by str.strip."""
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


@kernel
def line_at(data, start):  # type: ignore[no-untyped-def]
    """(end, characters, `hash_bytes`) of the line from byte `start` to the next newline or the end of the text."""
    i, size, continuation_bytes, h = start, len(data), 0, HASH_START
    while i < size:
        word = swar.load(data, i)
        newlines = swar.equal(word, swar.NEWLINES)
        step = min(swar.first(newlines), size - i)
        if step < 8:
            word &= swar.below(step)
        continuation_bytes += swar.count(swar.continuations(word))
        if step < 8:
            if step > 0:
                h = hash_rest(h, word)
            i += step
            break
        h = hash_eight(h, word)
        i += 8
    return i, i - start - continuation_bytes, finish(h + np.uint64(i - start))

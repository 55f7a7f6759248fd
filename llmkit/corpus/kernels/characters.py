"""Classes of characters as one table, and what lies between spaces and newlines.

`classes()` is `uint8[0x110000]`: bits by code point, read from Python's own Unicode tables, so that kernels decide as `str` methods and `re` do.
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
COMBINING = 8  # accents and vowel signs, which belong to the letter before
MARK = 16  # punctuation or sentence end: a word of these alone is a symbol
TERMINAL = 32  # ends a sentence
RUN = 64  # marks of which a run is one word
UPPER = 128  # str.isupper

RUN_MARKS = string.punctuation + "–—…•·"


@cache
def classes() -> Bytes:
    """The table; built once a process."""
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


@kernel
def line_at(data, start):  # type: ignore[no-untyped-def]
    """(end at the next newline or that of the text, characters, `hash_bytes`) of the line that begins at byte `start`."""
    i, size, inner, h = start, len(data), 0, HASH_START
    while i < size:
        word = swar.load(data, i)
        found = swar.equal(word, swar.NEWLINES)
        step = min(swar.first(found), size - i)
        if step < 8:
            word &= swar.below(step)
        inner += swar.count(swar.continuations(word))
        if step < 8:
            if step > 0:
                h = hash_rest(h, word)
            i += step
            break
        h = hash_eight(h, word)
        i += 8
    return i, i - start - inner, finish(h + np.uint64(i - start))

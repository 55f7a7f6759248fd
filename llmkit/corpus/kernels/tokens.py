"""Words of a text as arrays: a hash, a length and flags for each. Cost: one pass, about 4 ns a byte."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from llmkit.corpus.kernels.characters import (
    ALNUM,
    ALPHA,
    COMBINING,
    HASH_PRIME,
    HASH_START,
    MARK,
    RUN,
    SPACE,
    classes,
    decode,
    finish,
    start_of,
)


class Tokens(NamedTuple):
    """Words in order: 64-bit hash, length in characters, and ALPHA (has a letter) and MARK (made of marks alone) as flags."""

    hashes: NDArray[np.uint64]
    lengths: NDArray[np.int32]
    flags: NDArray[np.uint8]


@njit(cache=True, nogil=True)
def joins(data, i, table):  # type: ignore[no-untyped-def]
    """Whether the ASCII mark at byte `i`, behind a letter or digit, stands inside a word."""
    mark, before = data[i], data[i - 1]
    if mark >= 0x80 or i + 1 >= len(data):
        return False
    after, _ = decode(data, i + 1)
    if not table[after] & ALNUM:
        return False
    digit = 0x30 <= after <= 0x39
    if mark == 0x2E:  # .
        return not (0x61 <= before <= 0x7A and 0x41 <= after <= 0x5A)
    if mark == 0x2C or mark == 0x3A or mark == 0x2F:  # , : /
        return digit
    if mark == 0x2D:  # -
        return digit != (0x30 <= before <= 0x39)
    return mark == 0x5F or mark == 0x40 or mark == 0x26  # _ @ &


@njit(cache=True, nogil=True)
def initial(data, dot, table):  # type: ignore[no-untyped-def]
    """Whether a single ASCII letter stands before the full stop at byte `dot`, and no other full stop behind it."""
    if not 0x41 <= data[dot - 1] & 0xDF <= 0x5A or (dot + 1 < len(data) and data[dot + 1] == 0x2E):
        return False
    if dot == 1:
        return True
    before, _ = decode(data, start_of(data, dot - 2))
    return table[before] & ALNUM == 0


@njit(cache=True, nogil=True)
def end_of_url(data, i, table):  # type: ignore[no-untyped-def]
    """Where the URL ends whose :// is at byte `i`: at the next space, marks that close a sentence or a bracket left out; 0 if there is none."""
    if i + 3 >= len(data) or data[i + 1] != 0x2F or data[i + 2] != 0x2F:
        return 0
    start = end = i + 3
    while end < len(data):
        code, width = decode(data, end)
        if table[code] & SPACE:
            break
        end += width
    while end > start and data[end - 1] in (0x2E, 0x2C, 0x3B, 0x3A, 0x21, 0x3F, 0x29, 0x22, 0x27, 0x5D, 0x3E, 0x7D):
        end -= 1
    return end if end > start else 0


@njit(cache=True, nogil=True)
def scan(data, table, whitespace):  # type: ignore[no-untyped-def]
    """Words as llmkit.corpus.words defines them: `whitespace` or else `unicode`."""
    size = len(data)
    hashes, lengths, flags = np.empty(size, np.uint64), np.empty(size, np.int32), np.empty(size, np.uint8)
    n = i = 0
    while i < size:
        code, width = decode(data, i)
        kind = table[code]
        if kind & SPACE:
            i += width
            continue
        h, characters, alpha, marks, first = HASH_START, 0, 0, MARK, code
        run = same = False
        if not whitespace:
            run = kind & ALNUM != 0
            if not run:
                same = kind & RUN != 0
                if (code == 0x27 or code == 0x2019) and 0 < i < size - width:  # perhaps an ending such as 's
                    before, _ = decode(data, start_of(data, i - 1))
                    after, _ = decode(data, i + width)
                    run = table[before] & table[after] & ALNUM != 0
        whole = 0  # a URL goes on to here
        while True:
            if run and code < 0x80 and kind & ALNUM:  # fast over ASCII letters and digits
                start = i
                byte = data[i]
                while True:
                    alpha |= table[byte] & ALPHA
                    h = (h ^ np.uint64(byte)) * HASH_PRIME
                    i += 1
                    if i >= size:
                        break
                    byte = data[i]
                    if byte >= 0x80 or not table[byte] & ALNUM:
                        break
                characters += i - start
                marks = 0
            else:
                for k in range(i, i + width):
                    h = (h ^ np.uint64(data[k])) * HASH_PRIME
                characters += 1
                alpha |= kind & ALPHA
                marks &= kind
                i += width
            if i >= size:
                break
            code, width = decode(data, i)
            kind = table[code]
            if whitespace:
                if kind & SPACE:
                    break
            elif run:
                if not kind & (ALNUM | COMBINING) and i >= whole and not joins(data, i, table):
                    if whole > 0:
                        break
                    if code == 0x3A:
                        whole = end_of_url(data, i, table)
                        if whole == 0:
                            break
                    elif code == 0x2E and initial(data, i, table):
                        run = False  # the full stop is the last
                    else:
                        break
            elif not (same and code == first):
                break
        hashes[n], lengths[n], flags[n] = finish(h), characters, alpha | marks
        n += 1
    return hashes[:n], lengths[:n], flags[:n]


@njit(cache=True, nogil=True)
def fewest_words(data):  # type: ignore[no-untyped-def]
    """A number of words that the text has at least, for either kind of words: parts between ASCII spaces, and what may be a wider one."""
    count = 0
    space = True
    for byte in data:
        was = space
        space = 0x09 <= byte <= 0x0D or 0x1C <= byte <= 0x20 or byte == 0xC2 or 0xE1 <= byte <= 0xE3
        count += was and not space and byte < 0x80
    return count


@njit(cache=True, nogil=True)
def summary(hashes, lengths, flags, wanted):  # type: ignore[no-untyped-def]
    """(words that are no symbols, characters in them, words with a letter, how many of the `wanted` hashes occur)."""
    proper = characters = lettered = found = 0
    missing = wanted.copy()
    for i in range(len(hashes)):
        if not flags[i] & MARK:
            proper += 1
            characters += lengths[i]
        lettered += flags[i] & ALPHA != 0
        for k in range(len(missing) - found):
            if missing[k] == hashes[i]:
                found += 1
                missing[k] = missing[len(missing) - found]
                break
    return proper, characters, lettered, found


@njit(cache=True, nogil=True)
def measure(data, ends, table):  # type: ignore[no-untyped-def]
    """Words that lie end to end in `data`, word i ending before byte `ends[i]`."""
    n = len(ends)
    hashes, lengths, flags = np.empty(n, np.uint64), np.empty(n, np.int32), np.empty(n, np.uint8)
    i = 0
    for word in range(n):
        h, characters, alpha, marks = HASH_START, 0, 0, MARK
        while i < ends[word]:
            code, width = decode(data, i)
            for k in range(i, i + width):
                h = (h ^ np.uint64(data[k])) * HASH_PRIME
            characters += 1
            alpha |= table[code] & ALPHA
            marks &= table[code]
            i += width
        hashes[word], lengths[word], flags[word] = finish(h), characters, alpha | marks
    return hashes, lengths, flags


def tokens_of(words: list[str]) -> Tokens:
    """Tokens of given words."""
    encoded = [word.encode() for word in words]
    data = np.frombuffer(b"".join(encoded), np.uint8)
    return Tokens(*measure(data, np.cumsum([len(word) for word in encoded], dtype=np.int64), classes()))

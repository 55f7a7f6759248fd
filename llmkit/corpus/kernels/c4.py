"""The C4 rules for lines, compiled: which lines of a text stay, and how many sentences they hold. Cost: one pass, about 3 ns a byte."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numba import njit

from llmkit.corpus.kernels.characters import ALNUM, SPACE, TERMINAL, Bytes, decode, start_of
from llmkit.corpus.kernels.lines import breaks
from llmkit.corpus.words import ABBREVIATIONS

LOREM, JAVASCRIPT, POLICY = 1, 2, 4  # what a pattern means
CURLY = 8


def packed(patterns: Mapping[str, int]) -> Bytes:
    """ASCII strings and what each means, as kernels look for them: meaning, length, bytes, one behind the other."""
    return np.frombuffer(b"".join(bytes([meaning, len(s)]) + s.encode() for s, meaning in patterns.items()), np.uint8)


# What cannot be there without its sign, and a letter of that sign by which it is looked for: no letter twice.
SIGNS = {"lorem ipsum": "m", "javascript": "j", "terms of use": "f", "privacy policy": "v", "cookie": "k"}


def anchors() -> tuple[Bytes, Bytes, Bytes]:
    """Tables for `count_signs`: sign + 1 by byte, place of the letter in the sign, the signs packed one by one."""
    by_byte, places = (
        np.zeros(256, np.uint8),
        np.array([sign.index(letter) for sign, letter in SIGNS.items()], np.uint8),
    )
    for number, letter in enumerate(SIGNS.values(), 1):
        by_byte[ord(letter)] = by_byte[ord(letter.upper())] = number
    return by_byte, places, packed({sign: number for number, sign in enumerate(SIGNS, 1)})


CITATIONS = packed({"[edit]": 1, "[citation needed]": 1})
SHORT_FORMS = packed(dict.fromkeys(ABBREVIATIONS, 1))


@njit(cache=True, nogil=True)
def match(data, start, stop, patterns, fold):  # type: ignore[no-untyped-def]
    """(meaning, bytes it takes) of the first of `patterns` at data[start:stop]; with `fold`, as if that were lower-cased. (0, 0): none."""
    p = 0
    while p < len(patterns):
        length = int(patterns[p + 1])
        i, k = start, 0
        while k < length and i < stop:
            byte = data[i]
            if fold and 0x41 <= byte <= 0x5A:
                byte += 0x20
            elif fold and byte == 0xE2 and i + 2 < stop and data[i + 1] == 0x84 and data[i + 2] == 0xAA:
                byte = 0x6B  # the Kelvin sign is a k for str.lower
                i += 2
            if byte != patterns[p + 2 + k]:
                break
            i += 1
            k += 1
        if k == length:
            return int(patterns[p]), i - start
        p += length + 2
    return 0, 0


@njit(cache=True, nogil=True)
def count_signs(data, by_byte, places, signs):  # type: ignore[no-untyped-def]
    """int64[5]: how often each of SIGNS occurs, in any case; where a Kelvin sign (another k) is about, a cookie is assumed."""
    counts = np.zeros(len(places), np.int64)
    size = len(data)
    for i in range(size):
        number = by_byte[data[i]]
        if number:
            start = i - places[number - 1]
            if start >= 0 and match(data, start, size, signs, True)[0] == number:
                counts[number - 1] += 1
        elif data[i] == 0xE2 and i + 2 < size and data[i + 1] == 0x84 and data[i + 2] == 0xAA:
            counts[len(places) - 1] += 1
    return counts


@njit(cache=True, nogil=True)
def abbreviated(data, dot, table, short_forms):  # type: ignore[no-untyped-def]
    """Whether an initial or an abbreviation ends before `dot`."""
    first = dot
    while first > 0 and dot - first < 5 and 0x41 <= data[first - 1] & 0xDF <= 0x5A:
        first -= 1
    if first == dot or dot - first == 5:
        return False
    if first > 0:  # a digit, underscore or other letter before makes it part of a word
        code, _ = decode(data, start_of(data, first - 1))
        if code == 0x5F or table[code] & ALNUM:
            return False
    if dot - first == 1:
        return data[first] <= 0x5A
    _, length = match(data, first, dot, short_forms, False)
    return length == dot - first


@njit(cache=True, nogil=True)
def sentences(data, table, short_forms):  # type: ignore[no-untyped-def]
    """Sentences of lines, each ended by a newline, as llmkit.corpus.words.count_sentences counts them."""
    count = i = 0
    size = len(data)
    while i < size:
        if 0x3F < data[i] < 0x80:  # no mark
            i += 1
            continue
        code, width = decode(data, i)
        if not table[code] & TERMINAL:
            count += code == 0x0A
            i += width
            continue
        spaced = code < 0x80  # . ! ?
        if spaced:
            dotted = i > 0 and data[i - 1] == 0x2E
            dotted |= i >= 3 and data[i - 3] == 0xE2 and data[i - 2] == 0x80 and data[i - 1] == 0xA6
            if dotted or (code == 0x2E and (data[i + 1] == 0x2E or abbreviated(data, i, table, short_forms))):
                i += 1
                continue
        i += width
        closing, j, marks = False, i, i
        while True:  # up to the newline at the latest
            after, step = decode(data, j)
            if closing or not table[after] & TERMINAL or (after < 0x80) != spaced:
                closing = True
                if not (after in (0x29, 0x5D, 0x22, 0x27) or after == 0x201D or after == 0x2019 or after == 0xBB):
                    break
            else:
                marks = j + step
            j += step
        i = marks  # a mark further on in the same run comes to the same end
        if spaced and not table[after] & SPACE:
            continue
        k = j
        while table[after] & SPACE and after != 0x0A:
            k += step
            after, step = decode(data, k)
        if after != 0x0A:  # something follows
            count += 1
            i = j
    return count


@njit(cache=True, nogil=True)
def edit(data, table, longest, citations, end_mark, fewest, curly, patterns, citation_marks):  # type: ignore[no-untyped-def]
    """(text of the kept lines, each stripped and ended by a newline, how many lines, why the document goes, at which line).

    `longest` word and `fewest` words a line (-1: any); `citations`, `end_mark`, `curly`: whether that rule is on; `patterns`: those of the
    notices whose rule is on and that the text may hold.
    """
    size = len(data)
    out = np.empty(size + 1, np.uint8)
    o = kept = number = i = 0
    while i < size:
        number += 1
        first, width = i, 1
        bracket = brace = False
        while i < size and data[i] != 0x0A:
            byte = data[i]
            bracket |= byte == 0x5B
            brace |= byte == 0x7B
            if byte < 0x20 or byte == 0xC2 or byte == 0xE2:
                code, width = decode(data, i)
                if breaks(code):
                    break
                width = 1
            i += 1
        last = i
        if i + 1 < size and data[i] == 0x0D and data[i + 1] == 0x0A:
            width = 2
        i += width
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
        # Words, as many as have to be counted.
        words = length = most = 0
        enough = fewest if longest < 0 or last - first <= longest else last - first
        j = first
        while j < last and words <= enough:
            code, width = decode(data, j)
            j += width
            if table[code] & SPACE:
                length = 0
                continue
            words += length == 0
            length += 1
            most = max(most, length)
        if longest >= 0 and most > longest:
            continue
        start = stop = o  # written behind what is kept; kept itself if `o` moves on
        if not (bracket and citations):
            for j in range(first, last):
                out[stop + j - first] = data[j]
            stop += last - first
            first = last
        j = first
        while j < last:
            if data[j] == 0x5B:
                after = j + 1
                while after < last and 0x30 <= data[after] <= 0x39:
                    after += 1
                if after < last and data[after] == 0x5D:
                    j = after + 1
                    continue
                _, skip = match(data, j, last, citation_marks, False)
                if skip:
                    j += skip
                    continue
            out[stop] = data[j]
            stop += 1
            j += 1
        if end_mark:
            mark = out[stop - 1] if stop > start else 0
            ellipsis = stop - start >= 3 and mark == 0x2E and out[stop - 2] == 0x2E and out[stop - 3] == 0x2E
            if ellipsis or mark not in (0x2E, 0x3F, 0x21, 0x22, 0x27):
                continue
        if words < fewest:
            continue
        found = 0
        if len(patterns):
            for j in range(start, stop):
                found |= match(out, j, stop, patterns, True)[0]
        if found & LOREM:
            return out[:0], kept, LOREM, number
        if found & JAVASCRIPT:
            continue
        if brace and curly:
            return out[:0], kept, CURLY, number
        if found & POLICY:
            continue
        kept += 1
        out[stop] = 0x0A
        o = stop + 1
    return out[:o], kept, 0, 0

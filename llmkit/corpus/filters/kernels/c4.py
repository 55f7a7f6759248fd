"""Compiled C4 rules for lines: which lines of a text are kept, and how many sentences they contain. A few passes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numba import njit

from llmkit.corpus.kernels.characters import ALNUM, SPACE, TERMINAL, stripped
from llmkit.corpus.kernels.lines import end_of_line, rare_breaks
from llmkit.corpus.words import ABBREVIATIONS
from llmkit.kernels import kernel, swar
from llmkit.kernels.utf8 import Bytes, decode, start_of

LOREM, JAVASCRIPT, POLICY = 1, 2, 4  # the rule that a pattern belongs to
CURLY = 8
STOPS, EXCLAMATIONS, QUESTIONS, BRACKETS, BRACES = (np.uint64(byte * 0x0101010101010101) for byte in b".!?[{")


def packed(patterns: Mapping[str, int]) -> Bytes:
    """ASCII strings and their meanings in the format of the kernels: meaning, length, bytes, one after another."""
    return np.frombuffer(b"".join(bytes([meaning, len(s)]) + s.encode() for s, meaning in patterns.items()), np.uint8)


# Signs without which a notice cannot occur, each with the position of the pair of letters (one of PAIRS, in
# lower case) by which it is searched for. The last pair begins the Kelvin sign, which str.lower turns into k
# (its byte 84 becomes A4 in the "lower case" of the search).
SIGNS = {"lorem ipsum": 6, "javascript": 0, "terms of use": 8, "privacy policy": 3, "cookie": 3}
SIGN_PATTERNS = packed({sign: number for number, sign in enumerate(SIGNS, 1)})
SIGN_PLACES = np.array(list(SIGNS.values()))
PAIRS = (b"ip", b"ja", b" u", b"va", b"ki", b"\xe2\xa4")
FIRSTS, SECONDS = (tuple(np.uint64(pair[k] * 0x0101010101010101) for pair in PAIRS) for k in (0, 1))
SPACES = np.uint64(0x20 * 0x0101010101010101)

CITATIONS = packed({"[edit]": 1, "[citation needed]": 1})
SHORT_FORMS = packed(dict.fromkeys(ABBREVIATIONS, 1))


@kernel
def match(data, start, stop, patterns, fold):  # type: ignore[no-untyped-def]
    """(meaning, length in bytes) of the first of `patterns` that matches at data[start:stop]; (0, 0) for no match.

    With `fold`, the data are compared as if they were lower-cased.
    """
    p = 0
    while p < len(patterns):
        length = int(patterns[p + 1])
        i, k = start, 0
        while k < length and i < stop:
            byte = data[i]
            if fold and 0x41 <= byte <= 0x5A:
                byte += 0x20
            elif fold and byte == 0xE2 and i + 2 < stop and data[i + 1] == 0x84 and data[i + 2] == 0xAA:
                byte = 0x6B  # str.lower turns the Kelvin sign into k
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
def count_signs(data, signs, offsets):  # type: ignore[no-untyped-def]
    """int64[5]: number of occurrences of each of SIGNS, ignoring case."""
    counts = np.zeros(len(offsets), np.int64)
    size = len(data)
    for i in range(0, size, 8):
        a, b = swar.load(data, i) | SPACES, swar.load(data, i + 1) | SPACES
        candidates = np.uint64(0)
        for k in range(6):
            differences = a ^ FIRSTS[k] | b ^ SECONDS[k]
            candidates |= differences - swar.ONES & ~differences  # a zero byte, or possibly the byte after one
        candidates &= swar.HIGH
        while candidates:
            position = i + swar.first(candidates)
            candidates &= candidates - swar.ONE
            for k in range(len(offsets)):
                if position >= offsets[k] and match(data, position - offsets[k], size, signs, True)[0] == k + 1:
                    counts[k] += 1
    return counts


@kernel
def abbreviated(data, dot, table, short_forms):  # type: ignore[no-untyped-def]
    """Whether an initial or an abbreviation ends directly before `dot`."""
    first = dot
    while first > 0 and dot - first < 5 and 0x41 <= data[first - 1] & 0xDF <= 0x5A:
        first -= 1
    if first == dot or dot - first == 5:
        return False
    if first > 0:  # a preceding digit, underscore or other letter makes it part of a word
        code, _ = decode(data, start_of(data, first - 1))
        if code == 0x5F or table[code] & ALNUM:
            return False
    if dot - first == 1:
        return data[first] <= 0x5A
    _, length = match(data, first, dot, short_forms, False)
    return length == dot - first


@kernel
def sentences(data, table, short_forms):  # type: ignore[no-untyped-def]
    """Number of sentences in newline-terminated lines, counted as by llmkit.corpus.words.count_sentences."""
    count = i = 0
    size = len(data)
    while True:
        word = swar.load(data, i)
        candidates = word & swar.HIGH | swar.equal(word, swar.NEWLINES) | swar.equal(word, STOPS)
        candidates |= swar.equal(word, EXCLAMATIONS) | swar.equal(word, QUESTIONS)
        if not candidates:
            i += 8
        else:
            i += swar.first(candidates)
        if i >= size:
            return count
        if not candidates:
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
        i = marks  # later marks of the same run have the same end
        if spaced and not table[after] & SPACE:
            continue
        k = j
        while table[after] & SPACE and after != 0x0A:
            k += step
            after, step = decode(data, k)
        if after != 0x0A:  # something follows
            count += 1
            i = j


@njit(cache=True, nogil=True)
def edit(  # type: ignore[no-untyped-def]
    data, table, longest, citations, end_mark, fewest, curly, patterns, citation_marks
):
    """(text of the kept lines, each stripped and newline-terminated; why the document is dropped, 0 if not; at
    which line).

    `longest`: characters of the longest word that passes, `fewest`: words of the shortest line that passes (-1:
    any); `citations`, `end_mark`, `curly`: whether that rule is on; `patterns`: the notices whose rule is on
    and that may occur.
    """
    size = len(data)
    out = np.empty(size + 9, np.uint8)  # one byte for a final newline, eight that `copy` may overwrite
    o = number = i = 0
    rare = rare_breaks(data)
    brackets = False
    for byte in data:
        brackets |= byte == 0x5B
    brackets &= citations
    while i < size:
        number += 1
        first = i
        last, width = end_of_line(data, first, size, rare)
        i = last + width
        first, last = stripped(data, first, last, table)
        # Count words, but only as many as the rules need.
        words = length = longest_seen = 0
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
            longest_seen = max(longest_seen, length)
        if longest >= 0 and longest_seen > longest:
            continue
        begin, start, stop = first, o, o  # the line is written after the kept lines, and kept by advancing `o`
        if not brackets or swar.find(data, first, last, BRACKETS) == last:
            swar.copy(data, first, last, out, o)
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
        matched = 0
        if len(patterns):
            for j in range(start, stop):
                matched |= match(out, j, stop, patterns, True)[0]
        if matched & LOREM:
            return out[:0], LOREM, number
        if matched & JAVASCRIPT:
            continue
        if curly and swar.find(data, begin, last, BRACES) < last:
            return out[:0], CURLY, number
        if matched & POLICY:
            continue
        out[stop] = 0x0A
        o = stop + 1
    return out[:o], 0, 0

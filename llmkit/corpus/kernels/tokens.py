"""Words of a text as arrays: a hash, a length and flags for each word. One pass."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from llmkit.corpus.kernels.characters import ALNUM, ALPHA, COMBINING, MARK, RUN, SPACE, classes
from llmkit.kernels import kernel, swar
from llmkit.kernels.utf8 import HASH_START, decode, finish, hash_bytes, hash_eight, hash_rest, start_of

JOINERS = np.uint64(sum(1 << ord(mark) for mark in ".,:/-&"))  # the marks below 0x40 that `joins` handles


class Tokens(NamedTuple):
    """Words in order: 64-bit hash, length in characters, and the flags ALPHA (has a letter) and MARK (only marks)."""

    hashes: NDArray[np.uint64]
    lengths: NDArray[np.int32]
    flags: NDArray[np.uint8]


@kernel
def joins(data, i, table):  # type: ignore[no-untyped-def]
    """Whether the ASCII mark at byte `i`, which follows a letter or digit, is inside a word."""
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


@kernel
def initial(data, dot, table):  # type: ignore[no-untyped-def]
    """Whether the full stop at byte `dot` follows a single ASCII letter and precedes no other full stop."""
    if not 0x41 <= data[dot - 1] & 0xDF <= 0x5A or (dot + 1 < len(data) and data[dot + 1] == 0x2E):
        return False
    if dot == 1:
        return True
    before, _ = decode(data, start_of(data, dot - 2))
    return table[before] & ALNUM == 0


@kernel
def end_of_url(data, i, table):  # type: ignore[no-untyped-def]
    """End of the URL whose :// is at byte `i`: before the next space, without closing marks and brackets; 0 if none."""
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


@njit(cache=True, nogil=True, inline="always")
def word_at(data, start, table, whitespace):  # type: ignore[no-untyped-def]
    """(end, characters, flags) of the word that begins at byte `start`; for whitespace, (its end, 0, 0)."""
    size = len(data)
    i = start
    code, width = decode(data, i)
    kind = table[code]
    if kind & SPACE:
        return i + width, 0, 0
    first, characters, alpha, marks = code, 0, 0, MARK
    run = same = False
    if not whitespace:
        run = kind & ALNUM != 0
        if not run:
            same = kind & RUN != 0
            if (code == 0x27 or code == 0x2019) and 0 < i < size - width:  # possibly an ending such as 's
                before, _ = decode(data, start_of(data, i - 1))
                after, _ = decode(data, i + width)
                run = table[before] & table[after] & ALNUM != 0
    url_end = 0  # end of a URL that the word contains
    while True:
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
            if not kind & (ALNUM | COMBINING) and i >= url_end and not joins(data, i, table):
                if url_end > 0:
                    break
                if code == 0x3A:
                    url_end = end_of_url(data, i, table)
                    if url_end == 0:
                        break
                elif code == 0x2E and initial(data, i, table):
                    run = False  # the full stop is the last character
                else:
                    break
        elif not (same and code == first):
            break
    return i, characters, alpha | marks


@njit(cache=True, nogil=True)
def scan(data, table, whitespace):  # type: ignore[no-untyped-def]
    """Words as llmkit.corpus.words defines them: `whitespace` or else `unicode`."""
    size = len(data)
    hashes, lengths, flags = np.empty(size, np.uint64), np.empty(size, np.int32), np.empty(size, np.uint8)
    n = i = 0
    while i < size:
        byte = data[i]
        if byte < 0x80 and table[byte] & SPACE:
            i += 1
            continue
        # Fast path for most words: ASCII characters up to one that certainly ends the word, eight at a time.
        h, letters, digits, stop = HASH_START, np.uint64(0), np.uint64(0), i
        while True:
            word = swar.load(data, stop)
            some_letters, some_digits = swar.letters_and_digits(word)
            inside = swar.visible(word) if whitespace else some_letters | some_digits
            step = swar.first(~inside & swar.HIGH)
            if step < 8:
                break
            letters |= some_letters
            digits |= some_digits
            h = hash_eight(h, word)
            stop += 8
        if stop + step + 1 < size:
            if step > 0:
                letters |= some_letters & swar.below(step)
                digits |= some_digits & swar.below(step)
                h = hash_rest(h, word & swar.below(step))
            stop += step
            mark, after = data[stop], data[stop + 1]
            if stop == i:  # a single mark
                ends = 0x20 < byte < 0x7F and byte != 0x27 and after != byte
                closed = True
            elif whitespace:
                ends = mark < 0x80 and table[mark] & SPACE != 0
                closed = False
            else:
                joined = mark >= 0x40 or JOINERS >> np.uint64(mark) & swar.ONE != 0
                closed = mark > 0x20 and after <= 0x20
                ends = mark < 0x80 and (not joined or (closed and (stop - i > 1 or mark != 0x2E)))
            if ends:
                if stop > i:
                    flag = ALPHA if letters else 0 if digits else MARK
                    hashes[n], lengths[n], flags[n] = finish(h + np.uint64(stop - i)), stop - i, flag
                    n += 1
                i = stop
                if closed:
                    h = hash_rest(HASH_START, np.uint64(mark))
                    hashes[n], lengths[n], flags[n] = finish(h + swar.ONE), 1, MARK
                    n += 1
                    i += 1
                continue
        start = i
        i, characters, flag = word_at(data, start, table, whitespace)
        if characters:
            hashes[n], lengths[n], flags[n] = hash_bytes(data, start, i), characters, flag
            n += 1
    return hashes[:n], lengths[:n], flags[:n]


@kernel
def has_words(data, minimum):  # type: ignore[no-untyped-def]
    """Whether the text certainly has at least `minimum` words of either kind.

    Counts visible ASCII characters that follow a space or newline, each of which begins a word.
    """
    count, start = 0, 1
    while start < len(data) and count < minimum:
        stop = min(start + 512, len(data))
        for i in range(start, stop):  # without branches, so that it vectorises
            a, b = data[i - 1], data[i]
            count += ((a == 0x20) | (a == 0x0A)) & (b > 0x20) & (b < 0x7F)
        start = stop
    return count >= minimum


@kernel
def symbols(data):  # type: ignore[no-untyped-def]
    """(number signs, ellipses), as counted by str.count for "#" and for "..." and "…"."""
    any_symbol = False
    for i in range(1, len(data)):  # without branches, so that it vectorises
        a, b = data[i - 1], data[i]
        any_symbol |= (a == 0x23) | ((a == 0x2E) & (b == 0x2E)) | ((a == 0x80) & (b == 0xA6))
    number_signs = ellipses = run = 0
    for i in range(len(data) if any_symbol else 0):
        byte = data[i]
        number_signs += byte == 0x23
        ellipses += byte == 0xA6 and i >= 2 and data[i - 1] == 0x80 and data[i - 2] == 0xE2
        run = run + 1 if byte == 0x2E else 0
        if run == 3:
            ellipses, run = ellipses + 1, 0
    return number_signs + (not any_symbol and len(data) > 0 and data[-1] == 0x23), ellipses


@njit(cache=True, nogil=True)
def summary(hashes, lengths, flags, targets):  # type: ignore[no-untyped-def]
    """(words that are not symbols, characters in them, words with a letter, number of `targets` that occur)."""
    proper = characters = words_with_letter = matches = 0
    for i in range(len(flags)):
        marks = int(flags[i] & MARK != 0)
        proper += 1 - marks
        characters += lengths[i] * (1 - marks)
        words_with_letter += flags[i] & ALPHA != 0
    missing, possible = targets.copy(), np.uint64(0)
    for h in targets:
        possible |= swar.ONE << (h & np.uint64(63))
    for i in range(len(hashes)):
        if not possible >> (hashes[i] & np.uint64(63)) & swar.ONE:
            continue
        if matches == len(missing):
            break
        for k in range(len(missing) - matches):
            if missing[k] == hashes[i]:
                matches += 1
                missing[k] = missing[len(missing) - matches]
                break
    return proper, characters, words_with_letter, matches


@njit(cache=True, nogil=True)
def measure(data, ends, table):  # type: ignore[no-untyped-def]
    """(hashes, lengths, flags) of words stored end to end in `data`, word i ending before byte `ends[i]`."""
    n = len(ends)
    hashes, lengths, flags = np.empty(n, np.uint64), np.empty(n, np.int32), np.empty(n, np.uint8)
    i = 0
    for word in range(n):
        start, characters, alpha, marks = i, 0, 0, MARK
        while i < ends[word]:
            code, width = decode(data, i)
            characters += 1
            alpha |= table[code] & ALPHA
            marks &= table[code]
            i += width
        hashes[word], lengths[word], flags[word] = hash_bytes(data, start, i), characters, alpha | marks
    return hashes, lengths, flags


def tokens_of(words: list[str]) -> Tokens:
    """`Tokens` of a list of words."""
    encoded = [word.encode() for word in words]
    data = np.frombuffer(b"".join(encoded), np.uint8)
    return Tokens(*measure(data, np.cumsum([len(word) for word in encoded], dtype=np.int64), classes()))

"""Normalisation before texts are compared (dedup/normalise.py) over UTF-8, compiled: the same bytes for every text.

`normalised(data, *tables(how, marks_first))` returns the normalised text and whether it is complete; for normalisations
in which whitespace does not count. The result for a single character is taken from the Python function, so that the
definition stays there. What depends on more than one character is done here, except where noted:

- numbers: a run of digits of any script with at most one decimal part becomes one `0`, or is copied with its
  separator; where punctuation does not count, the marks that are part of a number are told by their neighbours;
- marks that count, which precede the next word without spaces (`normalise.comparable`);
- combining marks: dropped after a letter that has accents, else copied. Where canonical decomposition would reorder
  them, the kernel stops, and the Python function has to normalise the text; so it does at 45 rare characters (among
  them signs of Javanese and Balinese, and of musical notation);
- the capital sigma, whose lower case differs at the end of a word: `utf8` lower-cases a text that contains one
  in Python, which is correct because lower-casing twice changes nothing.

Cost: linear (tests/bench/minhash_recall.md). Tables: 4.4 MB at most for each normalisation in use.
"""

from __future__ import annotations

import unicodedata
from functools import cache, partial
from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from llmkit.corpus.dedup import normalise
from llmkit.corpus.words import ACCENTED, MAX_LEADING, PUNCTUATION
from llmkit.kernels import kernel
from llmkit.kernels.utf8 import Bytes, decode, start_of

# What a character becomes; values above 0 refer to bytes in a pool.
SAME, DROPPED, BLANK, ZERO, NUMBER, NEEDS_REORDERING, MARK = 0, -1, -2, -3, -4, -5, -6  # ZERO, NUMBER: digits
DIGIT = -7  # in a number that keeps its marks
PART = -8  # minus some of the following: a mark that may be part of a number
LEADING, TRAILING, SPACED = 1, 2, 4  # SPACED: after a space
COMBINING = -16  # minus the canonical combining class: a nonspacing mark
GROWTH = 3  # maximum bytes written per byte read, for Hangul syllables
# All other characters stay unchanged: ideographs, private use, unassigned.
RANGES = ((0, 0x3400), (0xA000, 0xD800), (0xF900, 0x17000), (0x1B000, 0x20000), (0x2F800, 0x2FA20), (0xE0000, 0xE0200))
BETWEEN = "\ue000"  # a separator that normalisation leaves unchanged


class Tables(NamedTuple):
    """A normalisation for the kernel.

    `fast`: uint8[256], the byte that each byte becomes regardless of its neighbours, 0 if that is not known from it.
    `table`: int32[0x110000], what each character becomes; a value above 0 is 16 · offset + length of the replacement in
    `pool`, uint8[...], which is followed by the combining class of its last character, and by 1 if it begins with a
    nonspacing mark.
    """

    fast: Bytes
    table: NDArray[np.int32]
    pool: Bytes


UNUSED = Tables(np.frombuffer(b"", np.uint8), np.frombuffer(b"", np.int32), np.frombuffer(b"", np.uint8))


@cache
def tables(how: str, marks_first: bool) -> Tables:
    """The tables of a normalisation in which whitespace does not count; `marks_first`: of its comparable form."""
    parts, apply = normalise.parts_of(how), normalise.normaliser(how)
    assert "whitespace" in parts
    digits = ZERO if "numbers" in parts else DIGIT if normalise.keeps_numbers(parts) else NUMBER
    table = np.zeros(0x110000, np.int32)
    entry_of = {"": DROPPED, " ": BLANK}
    pool = bytearray(1)
    characters, special, marks = _characters()
    replacements = apply(f"{BETWEEN}{BETWEEN.join(characters)}{BETWEEN}").split(BETWEEN)[1:-1]
    for old, new in zip(characters, replacements, strict=True):
        if old == new and old not in special:
            continue
        is_plain = marks.isdisjoint(new)  # most are: looking at each of their characters takes longer than all else
        if old.isdecimal():
            table[ord(old)] = digits
        elif "accents" in parts and old == new and unicodedata.category(old) == "Mn":
            table[ord(old)] = COMBINING - unicodedata.combining(old)
        elif "accents" in parts and not is_plain and _is_reordered(old, new):
            table[ord(old)] = NEEDS_REORDERING
        elif old != new:
            if new not in entry_of:
                entry_of[new] = 16 * len(pool) + len(new.encode())
                pool += new.encode()
                pool += bytes(2 if is_plain else [unicodedata.combining(new[-1]), unicodedata.category(new[0]) == "Mn"])
            table[ord(old)] = entry_of[new]
    if normalise.keeps_numbers(parts):
        for mark in normalise.WITHIN:
            roles = LEADING * (mark in normalise.LEADING) + TRAILING * (mark in normalise.TRAILING)
            table[ord(mark)] = PART - roles - SPACED * marks_first
    if marks_first:
        table[[ord(mark) for mark in normalise.counted_marks(parts)]] = MARK
    fast = [0 if table[ord(c)] < BLANK else ord(apply(f"a{c}b")[1]) for c in map(chr, range(128))]
    for array in (table, fast_bytes := np.array(fast + [0] * 128, np.uint8)):
        array.setflags(write=False)
    return Tables(fast_bytes, table, np.frombuffer(bytes(pool), np.uint8))


@cache
def _characters() -> tuple[str, frozenset[str], frozenset[str]]:
    """The characters that a normalisation may change, those of them that are digits or marks, and the marks.

    Of 80,000 characters, 60,000 are none of these. With arrays this takes 15 ms, character by character 60.
    """
    codes = np.concatenate([np.arange(*bounds, dtype="<u4") for bounds in RANGES])
    text, separated = _text(codes), np.full(2 * len(codes), ord(BETWEEN), "<u4")
    separated[::2] = codes
    categories = list(map(unicodedata.category, text))
    marks, others = (
        np.fromiter(map(kinds.__contains__, categories), np.bool_, len(codes))
        for kinds in ({"Mc", "Me", "Mn"}, {"Cc", "Nd", "Zl", "Zp", "Zs"})
    )
    changed = marks | others | np.isin(codes, [ord(mark) for mark in PUNCTUATION])
    for function in (str.lower, partial(unicodedata.normalize, "NFD")):
        replaced = np.frombuffer(function(_text(separated)).encode("utf-32-le"), "<u4")
        stops = np.flatnonzero(replaced == ord(BETWEEN))
        changed |= (np.diff(stops, prepend=-1) != 2) | (replaced[stops - 1] != codes)
    characters, signs = _text(codes[changed]), frozenset(_text(codes[marks]))
    return characters, signs.union(filter(str.isdecimal, characters)), signs


def _text(codes: NDArray[np.uint32]) -> str:
    return codes.tobytes().decode("utf-32-le")


def _is_reordered(old: str, new: str) -> bool:
    """Whether a character, or what it becomes, could be reordered in a way that the kernel does not follow."""
    signs = [c for c in new if unicodedata.combining(c)]
    return any(unicodedata.category(c) != "Mn" for c in signs) or (old != new and new[:1] in signs)


def utf8(text: str, how: str) -> Bytes:
    """The bytes of a text for the kernel, lower-cased if it contains a capital sigma and case does not count."""
    return np.frombuffer(
        (text.lower() if "Σ" in text and "case" in normalise.parts_of(how) else text).encode(), np.uint8
    )


@kernel
def after_digits(data, i, table):  # type: ignore[no-untyped-def]
    """End of the run of digits that starts at byte `i`; `i` if there is none."""
    while i < len(data):
        code, width = decode(data, i)
        if table[code] != ZERO and table[code] != NUMBER:
            break
        i += width
    return i


@kernel
def after_number(data, i, table):  # type: ignore[no-untyped-def]
    """End of the number whose first digit is at byte `i`."""
    end = after_digits(data, i, table)
    if end < len(data):
        code, width = decode(data, end)
        if code in (0x2C, 0x2E, 0x060C, 0x066B, 0x2396, 0x2397, 0x2398):  # decimal separators
            decimals = after_digits(data, end + width, table)
            if decimals > end + width:
                return decimals
    return end


@kernel
def is_digit(data, i, table):  # type: ignore[no-untyped-def]
    """Whether a digit of a number that keeps its marks is at byte `i`."""
    return i < len(data) and table[decode(data, i)[0]] == DIGIT


@kernel
def is_leading(data, i, width, table):  # type: ignore[no-untyped-def]
    """Whether the mark at byte `i`, which may precede a number, does so, alone or with one or two more such marks."""
    for _ in range(MAX_LEADING):
        i += width
        if i >= len(data):
            return False
        code, width = decode(data, i)
        action = int(table[code])
        if action == DIGIT:
            return True
        if not COMBINING < action <= PART or not (PART - action) & LEADING:
            return False
    return False


@kernel
def has_accents(out, n):  # type: ignore[no-untyped-def]
    """Whether the last of `n` bytes belongs to a letter of the kind that has accents."""
    code, _ = decode(out, start_of(out, n - 1))
    for start, stop in ACCENTED:
        if code < stop:
            return code >= start
    return False


@njit(cache=True, nogil=True)
def normalised(data, fast, table, pool):  # type: ignore[no-untyped-def]
    """(normalised bytes, True), or (the bytes so far, False) at a character that needs the Python function."""
    size = len(data)
    capacity = size + 2
    for byte in data:
        capacity += (GROWTH - 1) * (byte >= 0x80) + (fast[byte] == 0)
    out = np.empty(capacity, np.uint8)
    out[0] = previous = np.uint8(0x20)  # so that leading spaces follow a space and are dropped
    n, i = 1, 0
    number_end = marks_end = -1  # bytes after the last digit and after the last combining mark that was copied
    order = 0  # combining class of that mark
    while i < size:
        new = fast[data[i]]
        if new:
            out[n] = new
            n += (new != 0x20) | (previous != 0x20)  # without a branch, which could not be predicted
            previous = new
            i += 1
            continue
        code, width = decode(data, i)
        action = int(table[code])
        if COMBINING < action <= PART:
            roles = PART - action
            if i == number_end and (roles & TRAILING or is_digit(data, i + width, table)):
                action = SAME
            elif roles & LEADING and is_leading(data, i, width, table):
                action = MARK if roles & SPACED else SAME
            else:
                action = BLANK
        elif action <= COMBINING:
            if has_accents(out, n):
                action = DROPPED
            else:
                if COMBINING - action < order and action != COMBINING and i == marks_end:
                    return out[1:n], False
                order, marks_end = COMBINING - action, i + width
                action = SAME
        if action > 0:
            end = (action >> 4) + (action & 15)
            if pool[end + 1] and has_accents(out, n):
                return out[1:n], False
            for k in range(action >> 4, end):
                out[n] = pool[k]
                n += 1
            order, marks_end = int(pool[end]), i + width
        elif action == ZERO:
            out[n] = 0x30
            n += 1
            width = after_number(data, i, table) - i
        elif action == NUMBER:
            width = after_number(data, i, table) - i
            for k in range(i, i + width):
                out[n] = data[k]
                n += 1
        elif action in (SAME, MARK, DIGIT):
            if action == DIGIT:
                number_end = i + width
            elif action == MARK and previous != 0x20:
                out[n] = 0x20
                n += 1
            out[n] = data[i]
            if width > 1:
                out[n + 1] = data[i + 1]
            if width > 2:
                out[n + 2] = data[i + 2]
            if width > 3:
                out[n + 3] = data[i + 3]
            n += width
        elif action == BLANK:
            out[n] = 0x20
            n += previous != 0x20
        elif action == NEEDS_REORDERING:
            return out[1:n], False
        i += width
        previous = np.uint8(0x20) if action in (MARK, BLANK) else out[n - 1]  # spaces after a mark are dropped
    if n > 1 and out[n - 1] == 0x20:
        n -= 1
    return out[1:n], True

"""The `loose` normalisation (dedup/normalise.py) over UTF-8, compiled: the same bytes for every text.

`loose(data, *tables())` returns the normalised text and whether it is complete. The result for a single
character is taken from the Python function, so that the definition stays there. Three things depend on more
than one character:

- numbers: a run of digits of any script with at most one decimal part becomes one `0`, which is done here;
- the capital sigma, whose lower case differs at the end of a word: `utf8` lower-cases a text that contains one
  in Python, which is correct because lower-casing twice changes nothing;
- characters other than marks that canonical decomposition reorders (38, among them signs of Javanese and
  Balinese, of musical notation, and of old Korean): the kernel stops, and the Python function has to normalise
  the text.

Cost: linear (tests/bench/minhash_recall.md). Tables: 4.4 MB at most.
"""

from __future__ import annotations

import unicodedata
from functools import cache

import numpy as np
from numba import njit
from numpy.typing import NDArray

from llmkit.corpus.dedup import normalise
from llmkit.kernels import kernel
from llmkit.kernels.utf8 import Bytes, decode

# What a character becomes; values above 0 refer to bytes in a pool.
SAME, DROPPED, BLANK, DIGIT, POINT, NEEDS_REORDERING = 0, -1, -2, -3, -4, -5
GROWTH = 3  # maximum bytes written per byte read, for Hangul syllables
POINTS = ".,\u060c\u066b\u2396\u2397\u2398"  # decimal separators
# All other characters stay unchanged: ideographs, private use, unassigned.
RANGES = ((0, 0x3400), (0xA000, 0xD800), (0xF900, 0x17000), (0x1B000, 0x20000), (0x2F800, 0x2FA20), (0xE0000, 0xE0200))
BETWEEN = "\ue000"  # a separator that normalisation leaves unchanged


@cache
def tables() -> tuple[NDArray[np.int32], Bytes]:
    """(table, pool): int32[0x110000], what each character becomes, and uint8[...], the bytes of replacements.

    A value above 0 is 16 · offset + length of the replacement in the pool.
    """
    table = np.zeros(0x110000, np.int32)
    entry_of = {"": DROPPED, " ": BLANK}
    pool = bytearray(1)
    for start, stop in RANGES:
        characters = list(map(chr, range(start, stop)))
        replacements = normalise.loose(BETWEEN.join(["", *characters, ""])).split(BETWEEN)[1:-1]
        for code, (old, new) in enumerate(zip(characters, replacements, strict=True), start):
            if old == new != "0" and not unicodedata.combining(old):
                continue  # most characters
            if any(map(unicodedata.combining, new)):
                table[code] = NEEDS_REORDERING
            elif new == "0":
                table[code] = DIGIT
            else:
                if new not in entry_of:
                    entry_of[new] = 16 * len(pool) + len(new.encode())
                    pool += new.encode()
                table[code] = entry_of[new]
    table[[ord(point) for point in POINTS]] = POINT
    table.setflags(write=False)
    return table, np.frombuffer(bytes(pool), np.uint8)


def _fast() -> Bytes:
    """The byte that each byte becomes regardless of its neighbours; 0 for digits and non-ASCII bytes."""
    return np.array(
        [0 if chr(code).isdecimal() else ord(normalise.loose(f"a{chr(code)}b")[1]) for code in range(128)] + [0] * 128,
        np.uint8,
    )


FAST = _fast()


def utf8(text: str) -> Bytes:
    """The bytes of a text for the kernel, lower-cased if it contains a capital sigma."""
    return np.frombuffer((text.lower() if "Σ" in text else text).encode(), np.uint8)


@kernel
def after_digits(data, i, table):  # type: ignore[no-untyped-def]
    """End of the run of digits that starts at byte `i`; `i` if there is none."""
    while i < len(data):
        code, width = decode(data, i)
        if table[code] != DIGIT:
            break
        i += width
    return i


@kernel
def after_number(data, i, table):  # type: ignore[no-untyped-def]
    """End of the number whose first digit is at byte `i`."""
    end = after_digits(data, i, table)
    if end < len(data):
        code, width = decode(data, end)
        if table[code] == POINT:
            decimals = after_digits(data, end + width, table)
            if decimals > end + width:
                return decimals
    return end


@njit(cache=True, nogil=True)
def loose(data, table, pool):  # type: ignore[no-untyped-def]
    """(normalised bytes, True), or (the bytes so far, False) at a character that needs the Python function."""
    size = len(data)
    capacity = size + 2
    for byte in data:
        capacity += (GROWTH - 1) * (byte >= 0x80)
    out = np.empty(capacity, np.uint8)
    out[0] = previous = np.uint8(0x20)  # so that leading spaces follow a space and are dropped
    n, i = 1, 0
    while i < size:
        new = FAST[data[i]]
        if new:
            out[n] = new
            n += (new != 0x20) | (previous != 0x20)  # without a branch, which could not be predicted
            previous = new
            i += 1
            continue
        code, width = decode(data, i)
        action = np.int64(table[code])
        if action > 0:
            for k in range(action >> 4, (action >> 4) + (action & 15)):
                out[n] = pool[k]
                n += 1
        elif action == DIGIT:
            out[n] = 0x30
            n += 1
            width = after_number(data, i, table) - i
        elif action in (SAME, POINT):
            out[n] = data[i]
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
        previous = out[n - 1]
    if n > 1 and out[n - 1] == 0x20:
        n -= 1
    return out[1:n], True

"""The `loose` normalisation (dedup/normalise.py) over UTF-8, compiled: the same bytes for every text.

`loose(data, *tables())` is the normalised text and whether that is all of it. What a character becomes is read off the Python function, one
character at a time, so that the definition stays there. Three things depend on more than one character:
- numbers: a run of digits of any script with at most one decimal part is one `0`; done here.
- the capital sigma, whose lower case is another at the end of a word: `utf8` gives a text that has one in Python's lower case, which is right,
  since lower case changes nothing when taken twice.
- characters other than marks that canonical decomposition puts in order (38, signs of Javanese and Balinese, of musical notation, of old Korean
  among them): the kernel stops, and the Python function has to do the text.

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

# What becomes of a character; above 0: bytes elsewhere.
SAME, DROPPED, BLANK, DIGIT, POINT, REORDERED = 0, -1, -2, -3, -4, -5
GROWTH = 3  # most bytes out for one in: Hangul syllables
POINTS = ".,\u060c\u066b\u2396\u2397\u2398"  # decimal separators
# Every other character stays what it is: ideographs, private use, unassigned.
RANGES = ((0, 0x3400), (0xA000, 0xD800), (0xF900, 0x17000), (0x1B000, 0x20000), (0x2F800, 0x2FA20), (0xE0000, 0xE0200))
BETWEEN = "\ue000"  # stays what it is, and keeps characters apart


@cache
def tables() -> tuple[NDArray[np.int32], Bytes]:
    """(int32[0x110000]: what becomes of each character, or 16 · offset + length of its bytes in the other; uint8: those bytes)."""
    table = np.zeros(0x110000, np.int32)
    made = {"": DROPPED, " ": BLANK}
    pool = bytearray(1)
    for start, stop in RANGES:
        characters = list(map(chr, range(start, stop)))
        becomes = normalise.loose(BETWEEN.join(["", *characters, ""])).split(BETWEEN)[1:-1]
        for code, (old, new) in enumerate(zip(characters, becomes, strict=True), start):
            if old == new != "0" and not unicodedata.combining(old):
                continue  # most of them
            if any(map(unicodedata.combining, new)):
                table[code] = REORDERED
            elif new == "0":
                table[code] = DIGIT
            else:
                if new not in made:
                    made[new] = 16 * len(pool) + len(new.encode())
                    pool += new.encode()
                table[code] = made[new]
    table[[ord(point) for point in POINTS]] = POINT
    table.setflags(write=False)
    return table, np.frombuffer(bytes(pool), np.uint8)


def _fast() -> Bytes:
    """What a byte becomes that is one whatever is beside it; 0 for digits and what is not ASCII."""
    return np.array(
        [0 if chr(code).isdecimal() else ord(normalise.loose(f"a{chr(code)}b")[1]) for code in range(128)] + [0] * 128,
        np.uint8,
    )


FAST = _fast()


def utf8(text: str) -> Bytes:
    """The bytes of a text for the kernel."""
    return np.frombuffer((text.lower() if "Σ" in text else text).encode(), np.uint8)


@kernel
def after_digits(data, i, table):  # type: ignore[no-untyped-def]
    """Where the run of digits that starts at byte `i` ends: `i` if there is none."""
    while i < len(data):
        code, width = decode(data, i)
        if table[code] != DIGIT:
            break
        i += width
    return i


@kernel
def after_number(data, i, table):  # type: ignore[no-untyped-def]
    """Where the number ends whose first digit is at byte `i`."""
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
    """(normalised bytes, True), or (what was done so far, False) at a character that the Python function has to do."""
    size = len(data)
    room = size + 2
    for byte in data:
        room += (GROWTH - 1) * (byte >= 0x80)
    out = np.empty(room, np.uint8)
    out[0] = last = np.uint8(0x20)  # so that spaces at the start are spaces behind one
    n, i = 1, 0
    while i < size:
        new = FAST[data[i]]
        if new:
            out[n] = new
            n += (new != 0x20) | (last != 0x20)  # no branch: it could not be predicted
            last = new
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
            n += last != 0x20
        elif action == REORDERED:
            return out[1:n], False
        i += width
        last = out[n - 1]
    if n > 1 and out[n - 1] == 0x20:
        n -= 1
    return out[1:n], True

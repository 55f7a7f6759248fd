"""Lines of a text as arrays: a hash, a length and flags for each line. One pass."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from llmkit.corpus.kernels.characters import SPACE, TERMINAL, line_at
from llmkit.corpus.kernels.repetition import EMPTY, line_repeats
from llmkit.kernels import kernel, swar
from llmkit.kernels.utf8 import decode, hash_bytes, start_of

BLANK = 2  # nothing but whitespace
BULLET = 4  # starts with • or -, possibly after whitespace
ELLIPSIS = 8  # ends with … or ... before whitespace
TERMINATED = 16  # its last character ends a sentence


class Lines(NamedTuple):
    """Lines in order: 64-bit hash, length in characters and flags, and the number of lines with BULLET and with
    ELLIPSIS.

    `rare_breaks`: whether text.splitlines() and text.split("\\n") could differ by more than a final empty line
    and carriage returns at the ends of lines.
    """

    hashes: NDArray[np.uint64]
    characters: NDArray[np.int64]
    flags: NDArray[np.uint8]
    bullets: int
    ellipses: int
    rare_breaks: bool


@kernel
def breaks(code):  # type: ignore[no-untyped-def]
    """Whether str.splitlines ends a line at this character."""
    return 0x0A <= code <= 0x0D or 0x1C <= code <= 0x1E or code == 0x85 or code == 0x2028 or code == 0x2029


@kernel
def rare_breaks(data):  # type: ignore[no-untyped-def]
    """Whether there may be line breaks other than newlines and carriage returns before a newline."""
    result = len(data) > 0 and 0x0B <= data[-1] < 0x20
    for i in range(1, len(data)):  # without branches, so that it vectorises
        a, b = data[i - 1], data[i]
        result |= (a < 0x20) & (a != 0x09) & (a != 0x0A) & ((a != 0x0D) | (b != 0x0A))
        result |= ((a == 0xC2) & (b == 0x85)) | ((a == 0x80) & ((b | 1) == 0xA9))
    return result


@kernel
def end_of_line(data, start, stop, rare):  # type: ignore[no-untyped-def]
    """(end of the line that begins at `start`, bytes of its line break).

    A line ends at the next newline or, if there may be `rare` line breaks, at any break that str.splitlines recognises.
    """
    if not rare:
        return swar.find(data, start, stop, swar.NEWLINES), 1
    i = start
    while i < stop and data[i] != 0x0A:
        if data[i] < 0x20 or data[i] == 0xC2 or data[i] == 0xE2:
            code, width = decode(data, i)
            if breaks(code):
                return i, 2 if code == 0x0D and i + 1 < stop and data[i + 1] == 0x0A else width
        i += 1
    return i, 1


@njit(cache=True, nogil=True)
def lines(data, table, universal):  # type: ignore[no-untyped-def]
    """The fields of `Lines` for the lines of text.splitlines() (`universal`) or text.split("\\n")."""
    size = len(data)
    capacity, rare = 1, rare_breaks(data)
    for byte in data:
        capacity += byte == 0x0A
    if universal:
        for byte in data:
            capacity += (byte < 0x20) | (byte == 0x85) | (byte == 0xA8) | (byte == 0xA9)
    hashes, characters, flags = (
        np.empty(capacity, np.uint64),
        np.empty(capacity, np.int64),
        np.empty(capacity, np.uint8),
    )
    n = i = bullets = ellipses = 0
    while i < size or (not universal and i == size):
        start = i
        if universal and rare:
            i, width = end_of_line(data, start, size, rare)
            hashes[n], characters[n] = hash_bytes(data, start, i), swar.length(data, start, i)
        else:
            i, characters[n], hashes[n] = line_at(data, start)
            width = 1
        flag = EMPTY | BLANK if start == i else 0
        if start < i:
            last = start_of(data, i - 1)
            code, _ = decode(data, last)
            if table[code] & TERMINAL:
                flag |= TERMINATED
            while table[code] & SPACE and last > start:
                last = start_of(data, last - 1)
                code, _ = decode(data, last)
            dots = last - start >= 2 and data[last] == 0x2E and data[last - 1] == 0x2E and data[last - 2] == 0x2E
            if dots or code == 0x2026:
                flag |= ELLIPSIS
                ellipses += 1
            if table[code] & SPACE:
                flag |= BLANK
            first = start
            code, step = decode(data, first)
            while table[code] & SPACE and first < last:
                first += step
                code, step = decode(data, first)
            if code == 0x2022 or code == 0x2D:
                flag |= BULLET
                bullets += 1
        flags[n] = flag
        n += 1
        i += width
    return hashes[:n], characters[:n], flags[:n], bullets, ellipses, rare


@njit(cache=True, nogil=True)
def fineweb(hashes, characters, flags, short):  # type: ignore[no-untyped-def]
    """Over the non-blank lines: (lines, those that end in a terminal mark, those of at most `short` characters,
    characters in repeats of earlier lines)."""
    terminated = short_lines = 0
    for i in range(len(flags)):
        if not flags[i] & BLANK:
            terminated += flags[i] & TERMINATED != 0
            short_lines += characters[i] <= short
    line_count, _, repeated = line_repeats(hashes, characters, flags, BLANK)
    return line_count, terminated, short_lines, repeated

"""The shapes of lines: length, number of words, share of capitals. One pass."""

from __future__ import annotations

import numpy as np
from numba import njit

from llmkit.corpus.kernels.characters import ALNUM, ALPHA, SPACE, UPPER
from llmkit.kernels import kernel
from llmkit.kernels.utf8 import decode

BLANK, REMOVED, DIGITS, SHORT = 1, 2, 4, 8


@njit(cache=True, nogil=True)
def line_shapes(data, table, max_uppercase, max_single, short):  # type: ignore[no-untyped-def]
    """(bits per line, whitespace-separated words per line, the union of all bits, the total of words) of
    text.split("\\n").

    REMOVED: the share of capitals in the line's non-space characters exceeds `max_uppercase`, or the line has
    at most `max_single` words. DIGITS: it has a digit, and no letter or at most three words. SHORT: it has at
    most `short` words. Negative limits are off.
    """
    lines = 1
    for byte in data:
        lines += byte == 0x0A
    bits, counts = np.zeros(lines, np.uint8), np.zeros(lines, np.int32)
    union = all_words = line = i = 0
    characters = capitals = alpha = words = digits = 0
    in_word = False
    while i <= len(data):
        code, width = decode(data, i) if i < len(data) else (np.int64(0x0A), 1)
        i += width
        kind = table[code]
        if not kind & SPACE:
            characters += 1
            capitals += kind & UPPER != 0
            alpha += kind & ALPHA != 0
            digits += kind & (ALNUM | ALPHA) == ALNUM
            words += not in_word
            in_word = True
            continue
        in_word = False
        if code == 0x0A:
            bit = BLANK
            if words:
                bit = DIGITS * (digits > 0 and (alpha == 0 or words <= 3)) | SHORT * (words <= short)
                if (max_uppercase >= 0 and capitals > max_uppercase * characters) or words <= max_single:
                    bit = REMOVED
            bits[line], counts[line] = bit, words
            union |= bit
            all_words += words
            line += 1
            characters = capitals = alpha = words = digits = 0
    return bits, counts, union, all_words


@kernel
def letters(data, table):  # type: ignore[no-untyped-def]
    """Number of (characters, letters, letters and digits) in a text."""
    characters = alpha = alnum = i = 0
    while i < len(data):
        code, width = decode(data, i)
        i += width
        characters += 1
        alpha += table[code] & ALPHA != 0
        alnum += table[code] & ALNUM != 0
    return characters, alpha, alnum

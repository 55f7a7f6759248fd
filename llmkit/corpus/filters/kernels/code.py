"""Data written into source code as text: base64, hexadecimal bytes, \\u escapes. One pass."""

from __future__ import annotations

import numpy as np

from llmkit.kernels import kernel
from llmkit.kernels.utf8 import Bytes

SHORTEST_BASE64 = 64  # characters
SHORTEST_PAIRS = 8  # hexadecimal bytes, or \u escapes

HEX, BASE64 = 1, 2
KINDS = np.zeros(256, np.uint8)  # of bytes
for _byte in b"0123456789abcdefABCDEF":
    KINDS[_byte] |= HEX
for _byte in b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ+/=\n":
    KINDS[_byte] |= BASE64
_WORD = np.zeros(256, np.bool_)
for _byte in b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_":
    _WORD[_byte] = True


@kernel
def base64_end(data, i, kinds):  # type: ignore[no-untyped-def]
    """Where the run of base64 characters at `i` ends."""
    while i < len(data) and kinds[data[i]] & BASE64:
        i += 1
    return i


@kernel
def pairs_end(data, i, kinds, word):  # type: ignore[no-untyped-def]
    """Where `SHORTEST_PAIRS` or more hexadecimal bytes at `i` end, each `4f`, `0x4f` or `\\x4f`, between them a comma, whitespace, a backslash; else `i`."""
    size = len(data)
    pairs, at, end = 0, i, i
    while at + 1 < size:
        if data[at + 1] == 0x78 and (data[at] == 0x5C or data[at] == 0x30):
            at += 2
        if at + 1 >= size or not (kinds[data[at]] & HEX and kinds[data[at + 1]] & HEX):
            break
        if at + 2 < size and word[data[at + 2]]:
            break
        pairs, at = pairs + 1, at + 2
        end = at
        if at < size and data[at] == 0x2C:
            at += 1
        while at < size and (data[at] == 0x20 or 0x09 <= data[at] <= 0x0D):
            at += 1
    return end if pairs >= SHORTEST_PAIRS else i


@kernel
def escapes_end(data, i, kinds):  # type: ignore[no-untyped-def]
    """Where `SHORTEST_PAIRS` or more escapes `\\u4f4f` at `i` end; else `i`."""
    at = i
    while at + 5 < len(data) and data[at] == 0x5C and data[at + 1] == 0x75:
        digits = 0
        for k in range(at + 2, at + 6):
            digits += kinds[data[k]] & HEX
        if digits < 4:
            break
        at += 6
    return at if at - i >= 6 * SHORTEST_PAIRS else i


@kernel
def encoded(data, kinds, word):  # type: ignore[no-untyped-def]
    """(bytes in the longest run of encoded data, bytes in all runs)."""
    longest = total = i = 0
    seen = 0  # up to where runs of base64 are known
    while i < len(data):
        kind = kinds[data[i]]
        end = i
        if kind & BASE64 and i >= seen:
            seen = base64_end(data, i, kinds)
            if seen - i >= SHORTEST_BASE64:
                end = seen
        after = data[i + 1] if i + 1 < len(data) else np.uint8(0)
        likely = kind & kinds[after] & HEX or after == 0x78 or after == 0x75  # 4f, 0x or \\x, \\u
        if end == i and likely and (kind & HEX or data[i] == 0x5C) and not (i > 0 and word[data[i - 1]]):
            end = max(pairs_end(data, i, kinds, word), escapes_end(data, i, kinds))
        longest = max(longest, end - i)
        total += end - i
        i = max(end, i + 1)
    return longest, total


def encoded_runs(data: Bytes) -> tuple[int, int]:
    """`encoded` with its tables."""
    longest, total = encoded(data, KINDS, _WORD)
    return int(longest), int(total)

"""Data embedded in source code as text: base64, hexadecimal bytes, \\u escapes. One pass."""

from __future__ import annotations

import numpy as np

from llmkit.kernels import kernel
from llmkit.kernels.utf8 import Bytes

SHORTEST_BASE64 = 64  # characters
SHORTEST_PAIRS = 8  # hexadecimal bytes, or \u escapes

HEX, BASE64 = 1, 2
KINDS = np.zeros(256, np.uint8)  # byte -> HEX and BASE64 bits
for _byte in b"0123456789abcdefABCDEF":
    KINDS[_byte] |= HEX
for _byte in b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ+/=\n":
    KINDS[_byte] |= BASE64
_WORD = np.zeros(256, np.bool_)
for _byte in b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_":
    _WORD[_byte] = True


@kernel
def base64_end(data, i, kinds):  # type: ignore[no-untyped-def]
    """End of the run of base64 characters at `i`."""
    while i < len(data) and kinds[data[i]] & BASE64:
        i += 1
    return i


@kernel
def pairs_end(data, i, kinds, word):  # type: ignore[no-untyped-def]
    """End of a run of at least `SHORTEST_PAIRS` hexadecimal bytes at `i`; `i` if there is none.

    A byte is written `4f`, `0x4f` or `\\x4f`; between bytes there may be a comma, whitespace or a backslash.
    """
    size = len(data)
    pairs, position, end = 0, i, i
    while position + 1 < size:
        if data[position + 1] == 0x78 and (data[position] == 0x5C or data[position] == 0x30):
            position += 2
        if position + 1 >= size or not (kinds[data[position]] & HEX and kinds[data[position + 1]] & HEX):
            break
        if position + 2 < size and word[data[position + 2]]:
            break
        pairs, position = pairs + 1, position + 2
        end = position
        if position < size and data[position] == 0x2C:
            position += 1
        while position < size and (data[position] == 0x20 or 0x09 <= data[position] <= 0x0D):
            position += 1
    return end if pairs >= SHORTEST_PAIRS else i


@kernel
def escapes_end(data, i, kinds):  # type: ignore[no-untyped-def]
    """End of a run of at least `SHORTEST_PAIRS` escapes `\\u4f4f` at `i`; `i` if there is none."""
    position = i
    while position + 5 < len(data) and data[position] == 0x5C and data[position + 1] == 0x75:
        digits = 0
        for k in range(position + 2, position + 6):
            digits += kinds[data[k]] & HEX
        if digits < 4:
            break
        position += 6
    return position if position - i >= 6 * SHORTEST_PAIRS else i


@kernel
def encoded(data, kinds, word):  # type: ignore[no-untyped-def]
    """(bytes in the longest run of encoded data, bytes in all runs)."""
    longest = total = i = 0
    scanned = 0  # runs of base64 are known up to this byte
    while i < len(data):
        kind = kinds[data[i]]
        end = i
        if kind & BASE64 and i >= scanned:
            scanned = base64_end(data, i, kinds)
            if scanned - i >= SHORTEST_BASE64:
                end = scanned
        after = data[i + 1] if i + 1 < len(data) else np.uint8(0)
        plausible = kind & kinds[after] & HEX or after == 0x78 or after == 0x75  # 4f, 0x or \\x, \\u
        if end == i and plausible and (kind & HEX or data[i] == 0x5C) and not (i > 0 and word[data[i - 1]]):
            end = max(pairs_end(data, i, kinds, word), escapes_end(data, i, kinds))
        longest = max(longest, end - i)
        total += end - i
        i = max(end, i + 1)
    return longest, total


def encoded_runs(data: Bytes) -> tuple[int, int]:
    """(bytes in the longest run of encoded data, bytes in all runs) of a text; `encoded` with its tables."""
    longest, total = encoded(data, KINDS, _WORD)
    return int(longest), int(total)

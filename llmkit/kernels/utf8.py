"""UTF-8 decoding for kernels, and 64-bit hashes of bytes.

Texts are `uint8[bytes]` of valid UTF-8. No function reads outside the character or the range that it is called for.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llmkit.kernels import inner, kernel, swar

Bytes = NDArray[np.uint8]


@inner
def decode(data, i):  # type: ignore[no-untyped-def]
    """(code point, length in bytes) of the character at byte `i`."""
    first = np.int64(data[i])
    if first < 0x80:
        return first, 1
    if first < 0xE0:
        return (first & 0x1F) << 6 | np.int64(data[i + 1]) & 0x3F, 2
    middle = np.int64(data[i + 1]) & 0x3F
    if first < 0xF0:
        return (first & 0x0F) << 12 | middle << 6 | np.int64(data[i + 2]) & 0x3F, 3
    return (first & 0x07) << 18 | middle << 12 | (np.int64(data[i + 2]) & 0x3F) << 6 | np.int64(data[i + 3]) & 0x3F, 4


@kernel
def start_of(data, i):  # type: ignore[no-untyped-def]
    """Index of the first byte of the character that byte `i` belongs to."""
    while data[i] & 0xC0 == 0x80:
        i -= 1
    return i


HASH_START = np.uint64(0xCBF29CE484222325)  # 64-bit FNV-1a, with a finaliser that mixes all bits
HASH_PRIME = np.uint64(0x100000001B3)
MIX_A = np.uint64(0xFF51AFD7ED558CCD)  # finaliser of MurmurHash3
MIX_B = np.uint64(0xC4CEB9FE1A85EC53)


@kernel
def finish(h):  # type: ignore[no-untyped-def]
    """Finalise a hash: mix all its bits."""
    h ^= h >> np.uint64(33)
    h *= MIX_A
    h ^= h >> np.uint64(33)
    h *= MIX_B
    return h ^ h >> np.uint64(33)


@kernel
def extend(h, other):  # type: ignore[no-untyped-def]
    """Hash of a sequence, from the hash of its beginning and that of its next item, both finalised."""
    return h * MIX_A + other


@kernel
def hash_eight(h, word):  # type: ignore[no-untyped-def]
    """Update a hash of bytes with the next eight bytes."""
    h = (h ^ word) * MIX_A
    return h ^ h >> np.uint64(32)


@kernel
def hash_rest(h, word):  # type: ignore[no-untyped-def]
    """Update a hash of bytes with the last one to seven bytes."""
    return (h ^ word) * MIX_A


@kernel
def hash_bytes(data, start, stop):  # type: ignore[no-untyped-def]
    """64-bit hash of data[start:stop]."""
    h = HASH_START
    i = start
    while i + 8 <= stop:
        h = hash_eight(h, swar.load(data, i))
        i += 8
    if i < stop:
        h = hash_rest(h, swar.load(data, i) & swar.below(stop - i))
    return finish(h + np.uint64(stop - start))

"""MinHash, compiled: from a text to its shingles, its signature, and one key per band.

    result = sketch(text, 5, functions(seed, 112, 32), 14, 32)

A shingle is a run of `ngram` words, or characters, of the normalised text (`normalise.comparable`). Its 64-bit hash is
a polynomial in those of its words, rolled from one run to the next (all arithmetic modulo 2⁶⁴), so the cost does not
depend on `ngram`. There are two widths of hash functions, each with its own minima:

- 32 bits: x -> a·x + b mod 2³², a odd, over the upper half of that hash. Each function is a permutation, so no two
  shingles tie; as x is already random, each shingle of a set is the minimum with the same probability.
- 61 bits: x -> (a·x + b) mod p, p = 2⁶¹ - 1, over the upper 61 bits (Carter and Wegman 1979); exact, by a product of
  128 bits in halves.

The sets compared in verification are the upper 32 bits for either width: two texts of 1,000 shingles have 0.0002 of
them in common by chance.

Shapes: shingles uint32 [distinct], ascending; signature uint64 [bands · rows]; keys uint64 [bands]. Cost: linear; about
11 ns per byte of English text for 112 functions of 32 bits, 24 for 61 bits (tests/bench/minhash_recall.md). Memory: two
to three times the text, with shingles of characters ten times.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache, partial
from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from llmkit.corpus.dedup import normalise
from llmkit.corpus.dedup.kernels.normalise import UNUSED, normalised, tables, utf8
from llmkit.kernels import kernel
from llmkit.kernels.utf8 import HASH_PRIME, HASH_START, Bytes, extend, finish
from llmkit.seeds import derive

Hashes = NDArray[np.uint64]
Shingles = NDArray[np.uint32]

BASE = np.uint64(0x9E3779B97F4A7C15)  # of the polynomial; 5 modulo 8, so that its powers differ in their lower bits
PRIME = np.uint64((1 << 61) - 1)
LOW_32 = np.uint64(0xFFFFFFFF)
S3, S29, S32, S61 = np.uint64(3), np.uint64(29), np.uint64(32), np.uint64(61)  # numba shifts unsigned by unsigned only
BLOCK = 4096  # shingles per block, to which all functions are applied while it is in the CPU cache


class Sketch(NamedTuple):
    """The sketch of a text. The last three are empty if it has fewer words than a shingle."""

    normalised: Bytes
    shingles: Shingles
    signature: Hashes
    keys: Hashes


@cache
def functions(seed: int, count: int, bits: int) -> Hashes:
    """Multipliers and offsets of `count` hash functions, uint64 [2, count]; a pure function of the seed."""
    a, b = ([derive(seed, "minhash", bits, name, i) for i in range(count)] for name in "ab")
    if bits == 32:
        return np.array([[value >> 32 | 1 for value in a], [value >> 32 for value in b]], np.uint64)
    prime = int(PRIME)
    return np.array([[1 + value % (prime - 1) for value in a], [value % prime for value in b]], np.uint64)


@njit(cache=True, nogil=True)
def shingle_hashes(data, ngram, characters):  # type: ignore[no-untyped-def]
    """Hash of every run of `ngram` words, or `characters`, of a normalised text, in order.

    uint64 [units - ngram + 1]; empty if there are fewer words or characters than `ngram`.
    """
    units = 1 if len(data) and not characters else 0
    for byte in data:
        units += (byte & 0xC0 != 0x80) if characters else byte == 0x20
    if units < ngram:
        return np.empty(0, np.uint64)
    hashes = np.empty(units, np.uint64)
    h, n = HASH_START, 0
    if characters:
        for i in range(len(data)):
            h = (h ^ np.uint64(data[i])) * HASH_PRIME
            if i + 1 == len(data) or data[i + 1] & 0xC0 != 0x80:
                hashes[n] = h
                h = HASH_START
                n += 1
    else:
        for byte in data:
            hashes[n] = h
            h = (h ^ np.uint64(byte)) * HASH_PRIME
            if byte == 0x20:
                h = HASH_START
                n += 1
        hashes[n] = h
    for i in range(units):
        hashes[i] = finish(hashes[i])
    power, h = np.uint64(1), np.uint64(0)
    for i in range(ngram):
        h = h * BASE + hashes[i]
        power *= BASE
    for i in range(units - ngram):
        first = hashes[i]
        hashes[i] = finish(h)
        h = h * BASE + hashes[i + ngram] - first * power
    hashes[units - ngram] = finish(h)
    return hashes[: units - ngram + 1]


@njit(cache=True, nogil=True)
def distinct(values):  # type: ignore[no-untyped-def]
    """The distinct values of a uint32 array, ascending; `values` is overwritten. Radix sort by bytes: always linear."""
    n = len(values)
    places = np.zeros((4, 256), np.int64)
    for value in values:
        places[0, value & 0xFF] += 1
        places[1, value >> 8 & 0xFF] += 1
        places[2, value >> 16 & 0xFF] += 1
        places[3, value >> 24] += 1
    other = np.empty(n, np.uint32)
    for digit in range(4):
        start = 0
        for k in range(256):
            count = places[digit, k]
            places[digit, k] = start
            start += count
        for value in values:
            k = value >> 8 * digit & 0xFF
            other[places[digit, k]] = value
            places[digit, k] += 1
        values, other = other, values
    kept, last = min(n, 1), values[0] if n else np.uint32(0)
    for i in range(1, n):
        value = values[i]
        values[kept] = value
        kept += value != last  # branchless: a branch would be mispredicted
        last = value
    return values[:kept]


@njit(cache=True, nogil=True)
def least_32(values, ab):  # type: ignore[no-untyped-def]
    """Minimum of each 32-bit function over uint32 `values`: uint64 [functions]. Vectorised, eight values at a time."""
    a, b = ab[0].astype(np.uint32), ab[1].astype(np.uint32)
    least = np.full(len(a), 0xFFFFFFFF, np.uint32)
    for start in range(0, len(values), BLOCK):
        block = values[start : start + BLOCK]
        for j in range(len(a)):
            multiplier, offset, low = a[j], b[j], least[j]
            for i in range(len(block)):  # `for x in block` would not be vectorised
                low = min(low, np.uint32(multiplier * block[i] + offset))
            least[j] = low
    return least.astype(np.uint64)


@njit(cache=True, nogil=True)
def least_61(values, ab):  # type: ignore[no-untyped-def]
    """Minimum of each 61-bit function over uint64 `values` below 2⁶¹: uint64 [functions]. Vectorised, four at a time.

    a·x = a1·x1 · 2⁶⁴ + middle · 2³² + lower, and as 2⁶¹ is 1 modulo p, 2⁶⁴ is 8. The halves are uint32, so that the
    compiler recognises products of 32 by 32 bits.
    """
    a0s, a1s, a8s = ab[0].astype(np.uint32), (ab[0] >> S32).astype(np.uint32), (ab[0] >> S32 << S3).astype(np.uint32)
    least = np.full(ab.shape[1], PRIME, np.uint64)
    for start in range(0, len(values), BLOCK):
        block = values[start : start + BLOCK]
        for j in range(len(least)):
            a0, a1, a8, offset, low = np.uint64(a0s[j]), np.uint64(a1s[j]), np.uint64(a8s[j]), ab[1, j], least[j]
            for i in range(len(block)):  # `for x in block` would not be vectorised
                x0, x1 = block[i] & LOW_32, block[i] >> S32
                lower = a0 * x0
                middle = a0 * x1 + a1 * x0 + (lower >> S32)
                y = a8 * x1 + (middle >> S29) + (((middle << S32) | (lower & LOW_32)) & PRIME) + offset
                y = (y & PRIME) + (y >> S61)
                low = min(low, min(y, y - PRIME))  # if y < p, y - p wraps and is the larger
            least[j] = low
    return least


@njit(cache=True, nogil=True)
def band_keys(signature, bands):  # type: ignore[no-untyped-def]
    """Hash of the rows of each band together with its number: uint64 [bands]."""
    rows = len(signature) // bands
    keys = np.empty(bands, np.uint64)
    for band in range(bands):
        h = finish(np.uint64(band))
        for j in range(band * rows, band * rows + rows):
            h = extend(h, signature[j])
        keys[band] = finish(h)
    return keys


@njit(cache=True, nogil=True)
def sketch_of(data, finished, fast, table, pool, ngram, characters, ab, bands, bits):  # type: ignore[no-untyped-def]
    """The fields of `Sketch` for UTF-8 `data`, normalised already if `finished`, and whether the kernel can do it."""
    done = True
    if finished:
        text = data.copy()
    else:
        text, done = normalised(data, fast, table, pool)
    hashes = shingle_hashes(text, ngram, characters)
    n = len(hashes)
    shingles = np.empty(n, np.uint32)
    if n == 0:
        return text, shingles, hashes, hashes, done
    for i in range(n):
        shingles[i] = hashes[i] >> S32
    shingles = distinct(shingles)
    if bits == 32:
        signature = least_32(shingles, ab)
    else:
        for i in range(n):
            hashes[i] >>= S3
        signature = least_61(hashes, ab)
    return text, shingles, signature, band_keys(signature, bands), done


@kernel
def jaccard(a, b):  # type: ignore[no-untyped-def]
    """Similarity of two ascending sets: size of the intersection over size of the union. 0 for two empty ones."""
    i = j = shared = 0
    while i < len(a) and j < len(b):
        x, y = a[i], b[j]
        shared += x == y
        i += x <= y
        j += y <= x
    return shared / max(1, len(a) + len(b) - shared)


# Unsigned arithmetic is meant to wrap; without compilation, NumPy would warn about it.
_ignore_overflow = partial(np.errstate, over="ignore") if not hasattr(sketch_of, "py_func") else nullcontext


def sketch(
    text: str, ngram: int, ab: Hashes, bands: int, bits: int, how: str = normalise.DEFAULT, characters: bool = False
) -> Sketch:
    """Normalise and sketch a text.

    `ab`: coefficients of hash functions of `bits` bits, as `functions` returns them. `how`: the normalisation; without
    `characters`, whitespace must not count.
    """
    compiled = "whitespace" in normalise.parts_of(how)
    character_tables = tables(how, True) if compiled else UNUSED
    shape = ngram, characters, ab, bands, bits
    with _ignore_overflow():
        done = False
        if compiled:
            *result, done = sketch_of(utf8(text, how), False, *character_tables, *shape)
        if not done:
            data = np.frombuffer(normalise.comparable(how)(text).encode(), np.uint8)
            *result, _ = sketch_of(data, True, *character_tables, *shape)
    return Sketch(*result)

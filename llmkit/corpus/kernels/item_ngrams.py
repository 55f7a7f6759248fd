"""Words of a text and look-ups of their n-grams: the compiled part of decontamination (corpus/decontaminate.py).

A word is a run of letters and digits, lower-cased and without diacritics; everything else separates words.
Texts are UTF-8 as uint8[bytes], words and n-grams are uint64 hashes. Cost: one pass over the bytes and one
look-up per word.
"""

from __future__ import annotations

import unicodedata
from contextlib import nullcontext
from functools import cache, partial
from itertools import chain

import numpy as np
from numba import njit
from numpy.typing import NDArray

from llmkit.kernels import kernel
from llmkit.kernels.utf8 import Bytes, decode

Hashes = NDArray[np.uint64]
Positions = NDArray[np.int32]


SEPARATOR, MARK, OWN_WORD = np.uint32(0), np.uint32(1), np.uint32(1 << 31)
UNSPACED = (
    *((0xE00, 0xF00), (0x1000, 0x10A0), (0x1780, 0x1800), (0x3040, 0x3100)),
    *((0x3400, 0x4DC0), (0x4E00, 0xA000), (0xF900, 0xFB00), (0x20000, 0x33480)),
)
START = np.uint64(0xCBF29CE484222325)
STEP = np.uint64(0x9E3779B97F4A7C15)
MIX = np.uint64(0xD6E8FEB86659FD93)
HALF = np.uint64(32)


@cache
def folding() -> NDArray[np.uint32]:
    """uint32 [0x110000]: the letter or digit that each character counts as.

    SEPARATOR separates words, MARK is skipped, and values from OWN_WORD on are words by themselves.
    """
    table = np.zeros(0x110000, np.uint32)
    table[0xAC00:0xD7A4] = np.arange(0xAC00, 0xD7A4)  # Hangul syllables are not decomposed
    for code in chain(range(0x3400), range(0xA000, 0xAC00), range(0xD7A4, 0xD800), range(0xF900, 0x20000)):
        character = chr(code)
        category = unicodedata.category(character)
        if category == "Mn":
            table[code] = MARK
        elif category == "Nd":
            table[code] = ord("0") + unicodedata.decimal(character)
        elif character.isalnum() or category == "Mc":
            plain = unicodedata.normalize("NFD", character.lower())
            bare = [letter for letter in plain if unicodedata.category(letter) != "Mn"]
            table[code] = ord(bare[0]) if len(bare) == 1 else code
    for start, stop in UNSPACED:
        codes = np.arange(start, stop, dtype=np.uint32)
        block = table[start:stop]
        letters = (block > MARK) | np.fromiter(map(str.isalnum, map(chr, range(start, stop))), np.bool_, stop - start)
        letters &= (block < ord("0")) | (block > ord("9"))
        block[letters] = codes[letters] | OWN_WORD
    return table


@kernel
def split(data, fold, hashes, starts, ends):  # type: ignore[no-untyped-def]
    """Write the hashes of a text's words and the bytes at which they start and end; the text is valid UTF-8.

    Returns the number of words, which is at most half the number of bytes plus 1.
    """
    count = i = 0
    while i < len(data):
        begin, after, h = i, i, START
        code = SEPARATOR
        while i < len(data):
            character, width = decode(data, i)
            code, after = fold[character], i + width
            if code == SEPARATOR or code >= OWN_WORD:
                break
            i = after
            if code != MARK:
                h = (h ^ np.uint64(code)) * STEP
        if h != START:
            hashes[count] = (h ^ h >> HALF) * MIX
            starts[count] = begin
            ends[count] = i
            count += 1
        if i < len(data) and code >= OWN_WORD:
            h = (START ^ np.uint64(code)) * STEP
            hashes[count] = (h ^ h >> HALF) * MIX
            starts[count] = i
            ends[count] = after
            count += 1
        i = after
    return count


@njit(cache=True, nogil=True)
def ngrams(hashes, n):  # type: ignore[no-untyped-def]
    """Keys of the n-grams of `n` words, uint64 [words - n + 1], never 0: a rolling polynomial of the words' hashes."""
    keys = np.empty(max(0, len(hashes) - n + 1), np.uint64)
    power = np.uint64(1)
    for _ in range(n):
        power *= STEP
    key = np.uint64(0)
    for i in range(len(hashes)):
        key = key * STEP + hashes[i]
        if i >= n:
            key -= hashes[i - n] * power
        if i >= n - 1:
            keys[i - n + 1] = max(key, np.uint64(1))
    return keys


@kernel
def insert(keys, slots, numbers):  # type: ignore[no-untyped-def]
    """Fill an open-addressing table whose size is a power of two: slot -> key (0: free) and number of the key."""
    mask = np.uint64(len(slots) - 1)
    for number in range(len(keys)):
        slot = (keys[number] ^ keys[number] >> HALF) & mask
        while slots[slot] != 0:
            slot = (slot + np.uint64(1)) & mask
        slots[slot] = keys[number]
        numbers[slot] = number


@kernel
def look_up(keys, slots, numbers, hits, positions):  # type: ignore[no-untyped-def]
    """Write the numbers of the keys that are in the table to `hits`, and their positions in `keys` to `positions`.

    Returns the number of hits.
    """
    mask = np.uint64(len(slots) - 1)
    count = 0
    for i in range(len(keys)):
        slot = (keys[i] ^ keys[i] >> HALF) & mask
        while slots[slot] != 0:
            if slots[slot] == keys[i]:
                hits[count] = numbers[slot]
                positions[count] = i
                count += 1
                break
            slot = (slot + np.uint64(1)) & mask
    return count


@njit(cache=True, nogil=True)
def has_enough_hits(data, fold, n, slots, numbers, floor, reach):  # type: ignore[no-untyped-def]
    """Whether `floor` n-grams of the table occur within `reach` words: the only test needed for most documents."""
    max_words = len(data) // 2 + 1
    hashes, starts, ends = np.empty(max_words, np.uint64), np.empty(max_words, np.int32), np.empty(max_words, np.int32)
    words = split(data, fold, hashes, starts, ends)
    hits = look_up(ngrams(hashes[:words], n), slots, numbers, starts, ends)
    for i in range(floor - 1, hits):  # noqa: SIM110 - numba compiles no any()
        if ends[i] - ends[i - floor + 1] <= reach:
            return True
    return False


@njit(cache=True, nogil=True)
def windows(  # type: ignore[no-untyped-def]
    parts, words, offsets, weights, totals, lengths, floor, min_share, first, last, share
):
    """Slide a window of twice a part's length over its hits, and sum the weights of the distinct n-grams in it.

    Hits are sorted by part, then word; an n-gram is identified by its offset in the part (`offsets`). Each run of
    windows that reach `min_share` gives one row: first and last hit, and highest share. Returns the number of rows,
    and the highest share of all windows.
    """
    rows = 0
    highest = 0.0
    seen = np.zeros(lengths.max() + 1, np.int32)
    hits = len(parts)
    left = 0
    while left < hits:
        part = parts[left]
        stop = left
        while stop < hits and parts[stop] == part:
            stop += 1
        distinct, weight, width, open_row = 0, 0.0, 2 * lengths[part], -1
        for right in range(left, stop):
            while words[right] - words[left] > width:
                seen[offsets[left]] -= 1
                if seen[offsets[left]] == 0:
                    distinct -= 1
                    weight -= weights[left]
                left += 1
            seen[offsets[right]] += 1
            if seen[offsets[right]] == 1:
                distinct += 1
                weight += weights[right]
            if distinct < floor:
                continue
            current_share = min(1.0, weight / totals[part])
            highest = max(highest, current_share)
            if current_share + 1e-9 >= min_share:
                if open_row < 0 or left > last[open_row]:
                    open_row = rows
                    first[rows] = left
                    share[rows] = current_share
                    rows += 1
                last[open_row] = right
                share[open_row] = max(share[open_row], current_share)
        while left < stop:
            seen[offsets[left]] = 0
            left += 1
    return rows, highest


# Unsigned arithmetic wraps around on purpose; kernels that are not compiled would warn about it.
wrapping_arithmetic = partial(np.errstate, over="ignore") if not hasattr(split, "py_func") else nullcontext


def as_bytes(text: str) -> Bytes:
    """A text in UTF-8, uint8 [bytes]."""
    return np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8)


def words_of(data: Bytes) -> tuple[Hashes, Positions, Positions]:
    """Words of a text in UTF-8: their hashes, and the bytes at which they start and end, each [words]. Linear time."""
    max_words = len(data) // 2 + 1
    hashes, starts, ends = np.empty(max_words, np.uint64), np.empty(max_words, np.int32), np.empty(max_words, np.int32)
    with wrapping_arithmetic():
        count = split(data, folding(), hashes, starts, ends)
    return hashes[:count], starts[:count], ends[:count]

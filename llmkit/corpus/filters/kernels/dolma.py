"""How much of a text repeats as dolma's taggers measure it: all copies count, the first one too, and n-grams overlap.

An n-gram can repeat only where the (n-1)-grams at its place and the next do, as in kernels/repetition.py.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from llmkit.corpus.kernels.characters import ALPHA
from llmkit.corpus.kernels.repetition import EMPTY, group, pairs
from llmkit.kernels.utf8 import extend


@njit(cache=True, nogil=True)
def all_copies(hashes, lengths):  # type: ignore[no-untyped-def]
    """int64[2, 9] for n = 2 to 10, in characters of words without spaces.

    Row 0: for n to 4 all copies of the most common n-gram (of equally common ones the first), then all copies of those that come more than once.
    Row 1: what that is a share of, the whole text for n to 4, then all n-grams; 0 where there are too few words for one.
    """
    result = np.zeros((2, 9), np.int64)
    words = len(hashes)
    upto, places, keys = pairs(hashes, lengths)
    left = len(keys)
    for n in range(2, 11):
        if words < n:
            break
        numbers, counts, _, _ = group(keys, left)
        if n <= 4:
            result[1, n - 2] = upto[words]
            most, result[0, n - 2] = 1, upto[n]
            seen = 0  # numbers grow in order of first occurrence
            for j in range(left):
                if numbers[j] == seen:
                    seen += 1
                    if counts[numbers[j]] > most:
                        most = counts[numbers[j]]
                        result[0, n - 2] = (upto[places[j] + n] - upto[places[j]]) * most
        else:
            for i in range(words - n + 1):
                result[1, n - 2] += upto[i + n] - upto[i]
            for j in range(left):
                if counts[numbers[j]] > 1:
                    result[0, n - 2] += upto[places[j] + n] - upto[places[j]]
        kept = 0
        for j in range(left - 1):  # the last one has no neighbour
            place = places[j]
            if (
                counts[numbers[j]] > 1
                and places[j + 1] == place + 1
                and counts[numbers[j + 1]] > 1
                and place + n < words
            ):
                places[kept] = place
                keys[kept] = extend(keys[j], hashes[place + n])
                kept += 1
        left = kept
    return result


@njit(cache=True, nogil=True)
def line_copies(hashes, characters, flags, empty):  # type: ignore[no-untyped-def]
    """Of the lines (with `empty`: of all, else of those with a character): (how many, how many have an equal, characters in those)."""
    n = 0
    keys, sizes = np.empty_like(hashes), np.empty_like(characters)
    for i in range(len(hashes)):
        if empty or not flags[i] & EMPTY:
            keys[n], sizes[n] = hashes[i], characters[i]
            n += 1
    numbers, counts, _, _ = group(keys, n)
    copies = size = 0
    for i in range(n):
        if counts[numbers[i]] > 1:
            copies += 1
            size += sizes[i]
    return n, copies, size


@njit(cache=True, nogil=True)
def summary(hashes, lengths, flags, wanted):  # type: ignore[no-untyped-def]
    """(characters in words, twice their median length or -1 if that is 255 or more, words with a letter, words among the `wanted`, each time counted)."""
    characters = lettered = found = 0
    of_length = np.zeros(256, np.int64)  # the last: all longer ones
    for i in range(len(hashes)):
        characters += lengths[i]
        of_length[min(lengths[i], 255)] += 1
        lettered += flags[i] & ALPHA != 0
        for other in wanted:
            if hashes[i] == other:
                found += 1
                break
    twice = 0
    if len(hashes):
        for rank in ((len(hashes) - 1) // 2, len(hashes) // 2):
            length = below = 0
            while length < 255 and below + of_length[length] <= rank:
                below += of_length[length]
                length += 1
            if length == 255:
                return characters, -1, lettered, found
            twice += length
    return characters, twice, lettered, found

"""Repetition in a text as measured by dolma's taggers: all copies count, including the first, and n-grams overlap.

An n-gram can repeat only where the (n-1)-grams at its position and at the next do, as in corpus/kernels/repetition.py.
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

    Row 0: for n up to 4 all copies of the most common n-gram (of equally common ones the first); for larger n
    all copies of the n-grams that occur more than once. Row 1: the denominator, which is the whole text for n
    up to 4 and all n-grams for larger n; 0 where the text has fewer than n words.
    """
    result = np.zeros((2, 9), np.int64)
    words = len(hashes)
    offsets, positions, keys = pairs(hashes, lengths)
    remaining = len(keys)
    for n in range(2, 11):
        if words < n:
            break
        numbers, counts, _, _ = group(keys, remaining)
        if n <= 4:
            result[1, n - 2] = offsets[words]
            highest_count, result[0, n - 2] = 1, offsets[n]
            next_number = 0  # numbers are assigned in order of first occurrence
            for j in range(remaining):
                if numbers[j] == next_number:
                    next_number += 1
                    if counts[numbers[j]] > highest_count:
                        highest_count = counts[numbers[j]]
                        result[0, n - 2] = (offsets[positions[j] + n] - offsets[positions[j]]) * highest_count
        else:
            for i in range(words - n + 1):
                result[1, n - 2] += offsets[i + n] - offsets[i]
            for j in range(remaining):
                if counts[numbers[j]] > 1:
                    result[0, n - 2] += offsets[positions[j] + n] - offsets[positions[j]]
        survivors = 0
        for j in range(remaining - 1):  # the last one has no neighbour
            position = positions[j]
            if (
                counts[numbers[j]] > 1
                and positions[j + 1] == position + 1
                and counts[numbers[j + 1]] > 1
                and position + n < words
            ):
                positions[survivors] = position
                keys[survivors] = extend(keys[j], hashes[position + n])
                survivors += 1
        remaining = survivors
    return result


@njit(cache=True, nogil=True)
def line_copies(hashes, characters, flags, empty):  # type: ignore[no-untyped-def]
    """(lines, lines that occur more than once, characters in those), over non-empty lines or, with `empty`, all."""
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
def summary(hashes, lengths, flags, targets):  # type: ignore[no-untyped-def]
    """(characters in words, twice the median word length, words with a letter, occurrences of the words `targets`).

    Twice the median is -1 where the median is 255 or more.
    """
    characters = words_with_letter = matches = 0
    length_counts = np.zeros(256, np.int64)  # the last entry counts all longer words, too
    for i in range(len(hashes)):
        characters += lengths[i]
        length_counts[min(lengths[i], 255)] += 1
        words_with_letter += flags[i] & ALPHA != 0
        for other in targets:
            if hashes[i] == other:
                matches += 1
                break
    doubled_median = 0
    if len(hashes):
        for rank in ((len(hashes) - 1) // 2, len(hashes) // 2):
            length = below = 0
            while length < 255 and below + length_counts[length] <= rank:
                below += length_counts[length]
                length += 1
            if length == 255:
                return characters, -1, words_with_letter, matches
            doubled_median += length
    return characters, doubled_median, words_with_letter, matches

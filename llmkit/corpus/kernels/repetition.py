"""Repetition in a text: n-grams of words, lines, paragraphs.

Items are equal if their 64-bit hashes are. An n-gram can repeat only where the (n-1)-grams at its position and
at the next do, so that after the 2-grams few positions are left to examine: exact, without a pass over all
words for each n.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from llmkit.corpus.kernels.characters import line_at, stripped
from llmkit.kernels.utf8 import HASH_START, extend

EMPTY = 1  # a line without any character (kernels/lines.py)


@njit(cache=True, nogil=True)
def group(keys, n):  # type: ignore[no-untyped-def]
    """Number the groups of equal keys among the first `n`, in order of first occurrence.

    Returns (group number of each key, size of each group, position of its first key, number of groups).
    """
    size = 4
    while size < 2 * n:
        size *= 2
    mask = np.uint64(size - 1)
    table = np.zeros(size, np.int32)  # number + 1
    group_keys = np.empty(n, np.uint64)
    numbers = np.empty(n, np.int32)
    counts = np.empty(n, np.int32)
    first_positions = np.empty(n, np.int32)
    groups = 0
    for i in range(n):
        slot = keys[i] & mask
        while True:
            match = table[slot] - 1
            if match < 0:
                table[slot] = groups + 1
                group_keys[groups] = keys[i]
                counts[groups] = 1
                first_positions[groups] = i
                numbers[i] = groups
                groups += 1
                break
            if group_keys[match] == keys[i]:
                counts[match] += 1
                numbers[i] = match
                break
            slot = (slot + np.uint64(1)) & mask
    return numbers, counts, first_positions, groups


@njit(cache=True, nogil=True)
def pairs(hashes, lengths):  # type: ignore[no-untyped-def]
    """(characters before each word, with the total as last entry; first word of each 2-gram; hash of each 2-gram)."""
    words = len(hashes)
    offsets = np.zeros(words + 1, np.int64)
    for i in range(words):
        offsets[i + 1] = offsets[i] + lengths[i]
    keys = np.empty(max(0, words - 1), np.uint64)
    for i in range(len(keys)):
        keys[i] = extend(hashes[i], hashes[i + 1])
    return offsets, np.arange(len(keys)), keys


@njit(cache=True, nogil=True)
def ngram_repeats(hashes, lengths):  # type: ignore[no-untyped-def]
    """int64[9] for n = 2 to 10, in characters.

    For n up to 4: all copies of the most common n-gram, its words joined by a space; of equally common ones the
    first. For larger n: n-grams that occurred before, without spaces, scanned from left to right and continuing
    after each repeat.
    """
    result = np.zeros(9, np.int64)
    words = len(hashes)
    offsets, positions, keys = pairs(hashes, lengths)
    remaining = len(keys)
    for n in range(2, 11):
        if words < n:
            break
        numbers, counts, first_positions, groups = group(keys, remaining)
        if n <= 4:
            highest_count, characters = 1, offsets[n] + n - 1
            for number in range(groups):
                if counts[number] > highest_count:
                    highest_count = counts[number]
                    position = positions[first_positions[number]]
                    characters = (offsets[position + n] - offsets[position] + n - 1) * highest_count
            result[n - 2] = characters
        else:
            seen = np.zeros(groups, np.bool_)
            next_free = 0
            for j in range(remaining):
                position = positions[j]
                if position < next_free:
                    continue
                if seen[numbers[j]]:
                    result[n - 2] += offsets[position + n] - offsets[position]
                    next_free = position + n
                else:
                    seen[numbers[j]] = True
        # Keep the positions at which the n-gram and that at the next position both repeat. Each entry is always
        # written and `survivors` advanced conditionally, since a branch here could not be predicted.
        survivors = 0
        for j in range(remaining - 1):  # the last one has no neighbour
            position = positions[j]
            keys[survivors] = extend(keys[j], hashes[min(position + n, words - 1)])
            positions[survivors] = position
            survivors += (
                (counts[numbers[j]] > 1)
                & (counts[numbers[j + 1]] > 1)
                & (positions[j + 1] == position + 1)
                & (position + n < words)
            )
        remaining = survivors
        if remaining == 0 and n >= 4:
            break
    return result


@njit(cache=True, nogil=True)
def repeats(hashes, sizes, n):  # type: ignore[no-untyped-def]
    """Over the first `n` items: (repeats of earlier items, their total size)."""
    _, _, first_positions, groups = group(hashes, n)
    size = sizes[:n].sum()
    for number in range(groups):
        size -= sizes[first_positions[number]]
    copies = n - groups
    return copies, size


@njit(cache=True, nogil=True)
def line_repeats(hashes, characters, flags, without):  # type: ignore[no-untyped-def]
    """Over the lines that have none of the flags `without`: (lines, repeats of earlier lines, characters in those)."""
    n = 0
    keys, sizes = np.empty_like(hashes), np.empty_like(characters)
    for i in range(len(hashes)):
        if not flags[i] & without:
            keys[n], sizes[n] = hashes[i], characters[i]
            n += 1
    copies, size = repeats(keys, sizes, n)
    return n, copies, size


@njit(cache=True, nogil=True)
def paragraph_repeats(data, table):  # type: ignore[no-untyped-def]
    """(paragraphs, repeats of earlier paragraphs, characters in those) of the stripped text.

    Paragraphs are separated by two or more newlines.
    """
    i, stop = stripped(data, 0, len(data), table)
    capacity = 1
    for k in range(i, stop):
        capacity += data[k] == 0x0A
    keys, sizes = np.empty(capacity, np.uint64), np.empty(capacity, np.int64)
    n, text = 0, data[:stop]
    while i < stop:
        key, size, more = HASH_START, -1, True
        while more:
            i, characters, line = line_at(text, i)
            key, size = extend(key, line), size + characters + 1
            i += 1
            more = i < stop and data[i] != 0x0A
        keys[n], sizes[n] = key, size
        n += 1
        while i < stop and data[i] == 0x0A:
            i += 1
    copies, size = repeats(keys, sizes, n)
    return n, copies, size


@njit(cache=True, nogil=True)
def repetition(  # type: ignore[no-untyped-def]
    data, table, line_hashes, characters, flags, ends, hashes, lengths, size
):
    """float64[13]: share of repeated paragraphs and of characters in them; the same for lines (parts between
    runs of newlines, plus `ends` empty ones at the ends of the text); then the counts of `ngram_repeats`.
    Characters are counted as shares of the text's `size`."""
    result = np.empty(13, np.float64)
    n, copies, repeated = paragraph_repeats(data, table)
    result[0], result[1] = copies / max(1, n), repeated / size
    n, copies, repeated = line_repeats(line_hashes, characters, flags, EMPTY)
    result[2], result[3] = (copies + (ends == 2)) / max(1, n + ends), repeated / size
    counts = ngram_repeats(hashes, lengths)
    for i in range(9):
        result[4 + i] = counts[i] / size
    return result

"""How much of a text repeats: n-grams of words, lines, paragraphs.

Equality is that of 64-bit hashes. An n-gram can repeat only where the (n-1)-grams at its place and the next do, so that after the 2-grams only
few places are left to look at: exact, without a pass over all words for each n.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from llmkit.corpus.kernels.characters import line_at, stripped
from llmkit.kernels.utf8 import HASH_START, extend

EMPTY = 1  # a line without any character (kernels/lines.py)


@njit(cache=True, nogil=True)
def group(keys, n):  # type: ignore[no-untyped-def]
    """Equal keys get one number, in order of first occurrence: (number of each key, count and first place of each number, how many numbers)."""
    size = 4
    while size < 2 * n:
        size *= 2
    mask = np.uint64(size - 1)
    table = np.zeros(size, np.int32)  # number + 1
    firsts = np.empty(n, np.uint64)
    numbers = np.empty(n, np.int32)
    counts = np.empty(n, np.int32)
    places = np.empty(n, np.int32)
    groups = 0
    for i in range(n):
        slot = keys[i] & mask
        while True:
            found = table[slot] - 1
            if found < 0:
                table[slot] = groups + 1
                firsts[groups] = keys[i]
                counts[groups] = 1
                places[groups] = i
                numbers[i] = groups
                groups += 1
                break
            if firsts[found] == keys[i]:
                counts[found] += 1
                numbers[i] = found
                break
            slot = (slot + np.uint64(1)) & mask
    return numbers, counts, places, groups


@njit(cache=True, nogil=True)
def pairs(hashes, lengths):  # type: ignore[no-untyped-def]
    """(characters before each word, and of all of them last; first word of each 2-gram; hash of each 2-gram)."""
    words = len(hashes)
    upto = np.zeros(words + 1, np.int64)
    for i in range(words):
        upto[i + 1] = upto[i] + lengths[i]
    keys = np.empty(max(0, words - 1), np.uint64)
    for i in range(len(keys)):
        keys[i] = extend(hashes[i], hashes[i + 1])
    return upto, np.arange(len(keys)), keys


@njit(cache=True, nogil=True)
def ngram_repeats(hashes, lengths):  # type: ignore[no-untyped-def]
    """int64[9]: characters (words joined by a space) of all copies of the most common 2-, 3-, 4-gram; of equally common ones the first. Then
    characters (without spaces) of 5- to 10-grams that occurred before, left to right, going on behind each one found."""
    result = np.zeros(9, np.int64)
    words = len(hashes)
    upto, places, keys = pairs(hashes, lengths)
    left = len(keys)
    for n in range(2, 11):
        if words < n:
            break
        numbers, counts, firsts, groups = group(keys, left)
        if n <= 4:
            most, characters = 1, upto[n] + n - 1
            for number in range(groups):
                if counts[number] > most:
                    most = counts[number]
                    place = places[firsts[number]]
                    characters = (upto[place + n] - upto[place] + n - 1) * most
            result[n - 2] = characters
        else:
            met = np.zeros(groups, np.bool_)
            free = 0
            for j in range(left):
                place = places[j]
                if place < free:
                    continue
                if met[numbers[j]]:
                    result[n - 2] += upto[place + n] - upto[place]
                    free = place + n
                else:
                    met[numbers[j]] = True
        # Places whose n-gram and whose neighbour's repeat; written always and kept or not, since such a branch cannot be predicted.
        kept = 0
        for j in range(left - 1):  # the last one has no neighbour
            place = places[j]
            keys[kept] = extend(keys[j], hashes[min(place + n, words - 1)])
            places[kept] = place
            kept += (
                (counts[numbers[j]] > 1)
                & (counts[numbers[j + 1]] > 1)
                & (places[j + 1] == place + 1)
                & (place + n < words)
            )
        left = kept
        if left == 0 and n >= 4:
            break
    return result


@njit(cache=True, nogil=True)
def repeats(hashes, sizes, n):  # type: ignore[no-untyped-def]
    """Of the first `n` items: (how many occurred before, their sizes together)."""
    _, _, places, groups = group(hashes, n)
    size = sizes[:n].sum()
    for number in range(groups):
        size -= sizes[places[number]]
    copies = n - groups
    return copies, size


@njit(cache=True, nogil=True)
def line_repeats(hashes, characters, flags, without):  # type: ignore[no-untyped-def]
    """Of the lines that have none of the flags `without`: (how many, how many occurred before, characters in those)."""
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
    """Of the parts of the stripped text between runs of two or more newlines: (how many, how many occurred before, characters in those)."""
    i, stop = stripped(data, 0, len(data), table)
    room = 1
    for k in range(i, stop):
        room += data[k] == 0x0A
    keys, sizes = np.empty(room, np.uint64), np.empty(room, np.int64)
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
def repetition(data, table, line_hashes, characters, flags, ends, hashes, lengths, size):  # type: ignore[no-untyped-def]
    """float64[13]: shares of repeated paragraphs and of characters in them, the same of lines (parts between runs of newlines, of which `ends`
    are empty), then the counts of `ngram_repeats`, all of characters as shares of the text's `size`."""
    result = np.empty(13, np.float64)
    n, copies, repeated = paragraph_repeats(data, table)
    result[0], result[1] = copies / max(1, n), repeated / size
    n, copies, repeated = line_repeats(line_hashes, characters, flags, EMPTY)
    result[2], result[3] = (copies + (ends == 2)) / max(1, n + ends), repeated / size
    counts = ngram_repeats(hashes, lengths)
    for i in range(9):
        result[4 + i] = counts[i] / size
    return result

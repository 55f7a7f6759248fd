"""Kernels of fastText's inference: a dictionary's entries and tables, a text's features, means of rows, the Huffman tree.

Data are UTF-8 bytes; tables are open addressing over powers of two, -1 where free. Hashes are FNV-1a of 32 bits over sign-extended bytes.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from llmkit.kernels import kernel

LABEL = "__label__"
END = "</s>"

FNV_START, FNV_PRIME, LOW = 2166136261, 16777619, 0xFFFFFFFF
WORD_PRIME = np.uint64(116049371)


def _fnv(data: bytes) -> int:
    h = FNV_START
    for byte in data:
        h = (h ^ byte) * FNV_PRIME & LOW
    return h


END_HASH = _fnv(END.encode())
PREFIX, END_BYTES = np.frombuffer(LABEL.encode(), np.uint8), np.frombuffer(END.encode(), np.uint8)


@kernel
def step(h, byte):  # type: ignore[no-untyped-def]
    """FNV-1a of 32 bits with the byte sign-extended, as the library has it; int64 in and out."""
    byte = np.int64(byte)
    return (h ^ (byte + (byte >> 7) * 0xFFFFFF00)) * FNV_PRIME & LOW


@njit(cache=True, nogil=True)
def entries(data, at, size):  # type: ignore[no-untyped-def]
    """The dictionary's entries from byte `at`: where each begins and ends, its count, its kind; and where they stop (-1: not within the data)."""
    starts, ends, counts = np.empty(size, np.int64), np.empty(size, np.int64), np.empty(size, np.int64)
    kinds = np.empty(size, np.uint8)
    for i in range(size):
        starts[i] = at
        while at < len(data) and data[at] != 0:
            at += 1
        ends[i] = at
        if at + 10 > len(data):
            return starts, ends, counts, kinds, -1
        count = np.int64(np.int8(data[at + 8]))
        for k in range(7, 0, -1):
            count = count << 8 | np.int64(data[at + k])
        counts[i] = count
        kinds[i] = data[at + 9]
        at += 10
    return starts, ends, counts, kinds, at


@kernel
def find(data, h, blob, starts, ends, hashes, table):  # type: ignore[no-untyped-def]
    """Entry whose bytes are `data`, of hash `h`; -1 where there is none."""
    mask = len(table) - 1
    slot = h & mask
    while table[slot] >= 0:
        entry = table[slot]
        if hashes[entry] == h and ends[entry] - starts[entry] == len(data):
            same = True
            for k in range(len(data)):
                if blob[starts[entry] + k] != data[k]:
                    same = False
                    break
            if same:
                return entry
        slot = (slot + 1) & mask
    return -1


@njit(cache=True, nogil=True)
def index(blob, starts, ends, room):  # type: ignore[no-untyped-def]
    """(hashes, table) of entries; of two equal ones the last counts."""
    hashes, table = np.empty(len(starts), np.uint32), np.full(room, -1, np.int32)
    for i in range(len(starts)):
        h = FNV_START
        for k in range(starts[i], ends[i]):
            h = step(h, blob[k])
        hashes[i] = h
        same = find(blob[starts[i] : ends[i]], h, blob, starts, ends, hashes, table)
        slot = h & (room - 1)
        while table[slot] >= 0 and table[slot] != same:
            slot = (slot + 1) & (room - 1)
        table[slot] = i
    return hashes, table


@njit(cache=True, nogil=True)
def index_pairs(pairs, room):  # type: ignore[no-untyped-def]
    """(keys, values) tables of (n-gram, row) pairs."""
    keys, values = np.full(room, -1, np.int32), np.full(room, -1, np.int32)
    for i in range(len(pairs)):
        slot = pairs[i, 0] & (room - 1)
        while keys[slot] >= 0 and keys[slot] != pairs[i, 0]:
            slot = (slot + 1) & (room - 1)
        keys[slot], values[slot] = pairs[i]
    return keys, values


@kernel
def row_of(place, words, left, keys, values):  # type: ignore[no-untyped-def]
    """Row of an n-gram by its place in the buckets, -1 where pruning removed it."""
    if not len(keys):
        return words + place
    if not left[place >> 3] >> (place & 7) & 1:
        return -1
    mask = len(keys) - 1
    slot = place & mask
    while keys[slot] != place:
        slot = (slot + 1) & mask
    return words + values[slot]


@kernel
def is_space(byte):  # type: ignore[no-untyped-def]
    return byte == 0x20 or 0x09 <= byte <= 0x0D or byte == 0


@kernel
def starts_with(word, prefix):  # type: ignore[no-untyped-def]
    if len(word) < len(prefix):
        return False
    for k in range(len(prefix)):  # noqa: SIM110 (no generators in a kernel)
        if word[k] != prefix[k]:
            return False
    return True


@njit(cache=True, nogil=True)
def features(  # type: ignore[no-untyped-def]
    data, blob, starts, ends, hashes, table, left, keys, values, words, end, min_n, max_n, word_ngrams, bucket
):
    """Rows for a text in UTF-8: for each word its own and those of its character n-grams; then n-grams of words, by where they start."""
    size = len(data)
    most = size // 2 + 2  # words, and the end
    grams = max(0, max_n - max(min_n, 1) + 1) if bucket else 0
    rows = np.empty(most * (1 + max(0, word_ngrams)) + grams * (size + 2 * most), np.int32)
    seen = np.empty(most, np.int64)  # hashes of the words, as int32
    bracketed = np.empty(size + 2, np.uint8)
    bracketed[0] = 0x3C  # <
    share = 1 / max(1, bucket)
    n = count = i = 0
    while True:
        while i < size and is_space(data[i]):
            i += 1
        first, h = i, FNV_START
        while i < size and not is_space(data[i]):
            h = step(h, data[i])
            i += 1
        word = data[first:i]
        if not len(word) or (len(word) == len(END_BYTES) and starts_with(word, END_BYTES)):
            break
        entry = find(word, h, blob, starts, ends, hashes, table)
        if entry >= words:
            continue
        if entry >= 0:
            rows[n] = entry
            n += 1
        elif starts_with(word, PREFIX):
            continue
        seen[count] = h - (h >> 31 << 32)
        count += 1
        if grams:
            last = len(word) + 2
            for k in range(len(word)):
                bracketed[k + 1] = word[k]
            bracketed[last - 1] = 0x3E  # >
            for a in range(last):
                if bracketed[a] & 0xC0 == 0x80:
                    continue
                b, h = a, FNV_START
                for length in range(1, max_n + 1):
                    if b == last:
                        break
                    h = step(h, bracketed[b])
                    b += 1
                    while b < last and bracketed[b] & 0xC0 == 0x80:
                        h = step(h, bracketed[b])
                        b += 1
                    if length >= min_n and not (length == 1 and (a == 0 or b == last)):
                        place = (
                            h - np.int64(h * share) * bucket
                        )  # h % bucket without the division, which takes longer than all else
                        place += bucket if place < 0 else -bucket if place >= bucket else 0
                        row = row_of(place, words, left, keys, values)
                        if row >= 0:
                            rows[n] = row
                            n += 1
    if end >= 0:
        rows[n] = end
        n += 1
    seen[count] = END_HASH - (END_HASH >> 31 << 32)
    if bucket:
        for a in range(count + 1):
            mixed = np.uint64(seen[a])
            for b in range(a + 1, min(count + 1, a + word_ngrams)):
                mixed = mixed * WORD_PRIME + np.uint64(seen[b])
                row = row_of(np.int64(mixed % np.uint64(bucket)), words, left, keys, values)
                if row >= 0:
                    rows[n] = row
                    n += 1
    return rows[:n]


@njit(cache=True, nogil=True)
def average_rows(rows, values):  # type: ignore[no-untyped-def]
    """Mean of values[rows], float32 [dim]."""
    total = np.zeros(values.shape[1], np.float32)
    for row in rows:
        added = values[row]  # hoisted, the inner loop becomes vector instructions
        for k in range(len(total)):
            total[k] += added[k]
    return total * np.float32(1 / len(rows))


@njit(cache=True, nogil=True)
def average_codes(rows, codes, centroids, norms, dim):  # type: ignore[no-untyped-def]
    """Mean of the rows that product-quantised codes stand for, float32 [dim]."""
    parts, _, part = centroids.shape
    total = np.zeros((parts, part), np.float32)
    for row in rows:
        norm = norms[row] if len(norms) else np.float32(1)
        for m in range(parts):
            code = codes[row, m]
            for k in range(part):
                total[m, k] += norm * centroids[m, code, k]
    return total.reshape(-1)[:dim] * np.float32(1 / len(rows))


@njit(cache=True, nogil=True)
def products(hidden, output, scale):  # type: ignore[no-untyped-def]
    """(output @ hidden) * scale in float32, summed in order: the library's sigmoid has steps, so the last bit may count."""
    found = np.zeros(len(output), np.float32)
    for row in range(len(output)):
        for k in range(len(hidden)):
            found[row] += output[row, k] * hidden[k]
    return found * scale


@njit(cache=True, nogil=True)
def tree_scores(hidden, output, scale, left, right):  # type: ignore[no-untyped-def]
    """Logarithm of each label's probability: the sum over the decisions on its way from the root."""
    size = len(left) + 1
    scores = np.zeros(2 * size - 1, np.float32)
    for node in range(2 * size - 2, size - 1, -1):
        inner = node - size
        dot, weights = np.float32(0), output[inner]
        for k in range(len(hidden)):
            dot += weights[k] * hidden[k]
        right_one = np.float32(1 / (1 + np.exp(-dot * scale[inner])))
        scores[left[inner]] = scores[node] + np.float32(np.log(np.float32(1 - right_one) + 1e-5))
        scores[right[inner]] = scores[node] + np.float32(np.log(right_one + 1e-5))
    return scores[:size]

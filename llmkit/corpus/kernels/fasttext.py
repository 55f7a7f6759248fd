"""Kernels for fastText inference: dictionary entries and tables, features of a text, means of rows, the Huffman tree.

Data are UTF-8 bytes. Tables use open addressing, with sizes that are powers of two and -1 in free slots. Hashes
are 32-bit FNV-1a over sign-extended bytes.
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
    """One step of 32-bit FNV-1a with the byte sign-extended, as in the library; int64 in and out."""
    byte = np.int64(byte)
    return (h ^ (byte + (byte >> 7) * 0xFFFFFF00)) * FNV_PRIME & LOW


@njit(cache=True, nogil=True)
def entries(data, position, size):  # type: ignore[no-untyped-def]
    """The dictionary's `size` entries from byte `position`: (starts, ends, counts, kinds, end of the last entry).

    The last value is -1 if the entries do not fit in the data.
    """
    starts, ends, counts = np.empty(size, np.int64), np.empty(size, np.int64), np.empty(size, np.int64)
    kinds = np.empty(size, np.uint8)
    for i in range(size):
        starts[i] = position
        while position < len(data) and data[position] != 0:
            position += 1
        ends[i] = position
        if position + 10 > len(data):
            return starts, ends, counts, kinds, -1
        count = np.int64(np.int8(data[position + 8]))
        for k in range(7, 0, -1):
            count = count << 8 | np.int64(data[position + k])
        counts[i] = count
        kinds[i] = data[position + 9]
        position += 10
    return starts, ends, counts, kinds, position


@kernel
def find(data, h, blob, starts, ends, hashes, table):  # type: ignore[no-untyped-def]
    """The entry with the bytes `data`, whose hash is `h`; -1 if there is none."""
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
def index(blob, starts, ends, slots):  # type: ignore[no-untyped-def]
    """(hashes, table) of the entries; of equal entries the last one counts."""
    hashes, table = np.empty(len(starts), np.uint32), np.full(slots, -1, np.int32)
    for i in range(len(starts)):
        h = FNV_START
        for k in range(starts[i], ends[i]):
            h = step(h, blob[k])
        hashes[i] = h
        same = find(blob[starts[i] : ends[i]], h, blob, starts, ends, hashes, table)
        slot = h & (slots - 1)
        while table[slot] >= 0 and table[slot] != same:
            slot = (slot + 1) & (slots - 1)
        table[slot] = i
    return hashes, table


@njit(cache=True, nogil=True)
def index_pairs(pairs, slots):  # type: ignore[no-untyped-def]
    """(keys, values) tables of (n-gram, row) pairs."""
    keys, values = np.full(slots, -1, np.int32), np.full(slots, -1, np.int32)
    for i in range(len(pairs)):
        slot = pairs[i, 0] & (slots - 1)
        while keys[slot] >= 0 and keys[slot] != pairs[i, 0]:
            slot = (slot + 1) & (slots - 1)
        keys[slot], values[slot] = pairs[i]
    return keys, values


@kernel
def row_of(bucket_index, words, kept_bits, keys, values):  # type: ignore[no-untyped-def]
    """Row of the n-gram with hash bucket `bucket_index`; -1 if pruning removed it."""
    if not len(keys):
        return words + bucket_index
    if not kept_bits[bucket_index >> 3] >> (bucket_index & 7) & 1:
        return -1
    mask = len(keys) - 1
    slot = bucket_index & mask
    while keys[slot] != bucket_index:
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
    data, blob, starts, ends, hashes, table, kept_bits, keys, values, words, end, min_n, max_n, word_ngrams, bucket
):
    """Rows for a text in UTF-8: for each word its own row and its character n-grams, then word n-grams by position."""
    size = len(data)
    max_words = size // 2 + 2  # words, and the end-of-text entry
    grams = max(0, max_n - max(min_n, 1) + 1) if bucket else 0
    rows = np.empty(max_words * (1 + max(0, word_ngrams)) + grams * (size + 2 * max_words), np.int32)
    seen = np.empty(max_words, np.int64)  # hashes of the words, as int32
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
                        # h % bucket without the division, which would take longer than everything else
                        bucket_index = h - np.int64(h * share) * bucket
                        bucket_index += bucket if bucket_index < 0 else -bucket if bucket_index >= bucket else 0
                        row = row_of(bucket_index, words, kept_bits, keys, values)
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
                row = row_of(np.int64(mixed % np.uint64(bucket)), words, kept_bits, keys, values)
                if row >= 0:
                    rows[n] = row
                    n += 1
    return rows[:n]


@njit(cache=True, nogil=True)
def average_rows(rows, values):  # type: ignore[no-untyped-def]
    """Mean of values[rows], float32 [dim]."""
    total = np.zeros(values.shape[1], np.float32)
    for row in rows:
        added = values[row]  # hoisted so that the inner loop compiles to vector instructions
        for k in range(len(total)):
            total[k] += added[k]
    return total * np.float32(1 / len(rows))


@njit(cache=True, nogil=True)
def average_codes(rows, codes, centroids, norms, dim):  # type: ignore[no-untyped-def]
    """Mean of product-quantised rows, float32 [dim]."""
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
    """(output @ hidden) * scale in float32, summed in order: the last bit can matter in the library's sigmoid table."""
    result = np.zeros(len(output), np.float32)
    for row in range(len(output)):
        for k in range(len(hidden)):
            result[row] += output[row, k] * hidden[k]
    return result * scale


@njit(cache=True, nogil=True)
def tree_scores(hidden, output, scale, left, right):  # type: ignore[no-untyped-def]
    """Log probability of each label: the sum over the decisions on the path from the root."""
    size = len(left) + 1
    scores = np.zeros(2 * size - 1, np.float32)
    for node in range(2 * size - 2, size - 1, -1):
        inner = node - size
        dot, weights = np.float32(0), output[inner]
        for k in range(len(hidden)):
            dot += weights[k] * hidden[k]
        p_right = np.float32(1 / (1 + np.exp(-dot * scale[inner])))
        scores[left[inner]] = scores[node] + np.float32(np.log(np.float32(1 - p_right) + 1e-5))
        scores[right[inner]] = scores[node] + np.float32(np.log(p_right + 1e-5))
    return scores[:size]

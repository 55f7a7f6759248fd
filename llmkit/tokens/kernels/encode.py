"""Byte-level BPE, compiled: pieces of text to ids, through a cache of the pieces seen so far.

A slot of the table is four 64-bit words, half a cache line. The first two are the key. A piece of up to 15
bytes is its own key, with its length in the highest byte, so that two different pieces never have the same key;
a longer piece is found by its hash and compared with the bytes in `texts`. The other two words are its ids, 28
bits each, with their number in the highest byte; a piece of more than four ids has them in `ids`. A piece that
is not in the table is merged as BPE defines it: the pair of the lowest rank first, among equals the leftmost
(Sennrich et al., 2016, arXiv:1508.07909, over bytes). A heap of pairs makes that O(n log n) for n bytes.

The table uses open addressing over a power of two of slots, at most half of them in use. `encode` stops and
returns FULL when the limit is reached.
"""

from __future__ import annotations

import numpy as np

from llmkit.kernels import inner, kernel, swar
from llmkit.kernels.utf8 import MIX_A, MIX_B, hash_bytes
from llmkit.tokens.kernels.pretokenize import cut

SHORT = 15  # longest piece that is its own key, in bytes
RANK_BITS = 20
MAX_IDS = 1 << RANK_BITS  # limit on ids and merges, so that a pair and its rank fit in 63 bits
NONE = 1 << RANK_BITS  # instead of a rank: the pair is not merged
FEW = 24  # longest piece that is merged without a heap, in bytes
LONGEST = 128  # longest piece that is cached, in bytes
BLOCK = 32  # pieces whose slots are prefetched together
INLINE = 4  # ids that fit in a slot
ID_BITS = 28
TOP = np.uint64(56)  # shift of the highest byte
LONG = np.uint64(255 << 56)  # instead of a length: the other 56 bits are the offset in `texts`
ID = np.uint64((1 << ID_BITS) - 1)
OFFSET = np.uint64((1 << 56) - 1)
HALF = np.uint64(32)
TWO, THREE, FOUR = (np.uint64(n) for n in (2, 3, 4))  # unsigned: numba then generates no code for negative indices
SECOND = np.uint64(ID_BITS)
# Masks for the bytes of a piece in the first and second eight bytes, by its size.
FIRST_PART = np.array([(1 << 8 * min(size, 8)) - 1 for size in range(SHORT + 1)], np.uint64)
SECOND_PART = np.array([(1 << 8 * max(size - 8, 0)) - 1 for size in range(SHORT + 1)], np.uint64)
USED, BYTES, IDS = range(3)  # counters of a table: slots, bytes and ids in use
DONE, FULL = -1, -2  # return values of `encode`


@kernel
def cut_all(data, bounds, how, table, ends, pieces):  # type: ignore[no-untyped-def]
    """Apply `cut` to every text data[bounds[t]:bounds[t + 1]]. All ends go to `ends`, those of text t before
    pieces[t + 1].
    """
    n = 0
    for t in range(len(bounds) - 1):
        n += cut(data, bounds[t], bounds[t + 1], how, table, ends[n:])
        pieces[t + 1] = n


@inner
def first_slot(key, second, table):  # type: ignore[no-untyped-def]
    """Index of the first slot to probe for a key."""
    h = (key ^ second * MIX_B) * MIX_A
    return (h ^ h >> HALF) << TWO & np.uint64(len(table) - 1)


@inner
def key_of(data, start, stop):  # type: ignore[no-untyped-def]
    """The two words of a piece's key; for a long piece without its offset."""
    size = stop - start
    if size > SHORT:
        return hash_bytes(data, start, stop), LONG
    # Masks instead of branches, which the processor could not predict.
    second = swar.load(data, start + 8) & SECOND_PART[size] | np.uint64(size) << TOP
    return swar.load(data, start) & FIRST_PART[size], second


@inner
def find(data, start, stop, key, second, i, table, texts):  # type: ignore[no-untyped-def]
    """The slot from `i` on that holds the piece data[start:stop] with this key, or the free slot where it belongs."""
    last = np.uint64(len(table) - 1)
    if second != LONG:
        while table[i + swar.ONE] != 0 and (table[i] != key or table[i + swar.ONE] != second):
            i = i + FOUR & last
        return i
    size = stop - start
    while table[i + swar.ONE] != 0:
        if table[i] == key and table[i + swar.ONE] >= LONG:
            offset = np.int64(table[i + swar.ONE] & OFFSET)
            if np.int64(swar.load(texts, offset)) == size:
                k = 0
                while k < size and texts[offset + 8 + k] == data[start + k]:
                    k += 1
                if k == size:
                    break
        i = i + FOUR & last
    return i


@kernel
def insert(data, start, stop, i, key, second, piece_ids, n, table, texts, ids, counts):  # type: ignore[no-untyped-def]
    """Insert the piece data[start:stop], with the ids piece_ids[:n], at slot `i`, as returned by `find`."""
    if second == LONG:
        offset = counts[BYTES]
        swar.store(texts, offset, np.uint64(stop - start))
        swar.copy(data, start, stop, texts, offset + 8)
        counts[BYTES] = offset + 8 + stop - start
        second |= np.uint64(offset)
    value, more = np.uint64(n) << TOP, np.uint64(0)
    if n > INLINE:
        value |= np.uint64(counts[IDS])
        for k in range(n):
            ids[counts[IDS] + k] = piece_ids[k]
        counts[IDS] += n
    else:
        value |= np.uint64(piece_ids[0])
        if n > 1:
            value |= np.uint64(piece_ids[1]) << SECOND
        if n > 2:
            more = np.uint64(piece_ids[2])
        if n > 3:
            more |= np.uint64(piece_ids[3]) << SECOND
    table[i], table[i + swar.ONE], table[i + TWO], table[i + THREE] = key, second, value, more
    counts[USED] += 1


@inner
def pair_slot(pairs, pair):  # type: ignore[no-untyped-def]
    """Index of a pair in the merge table, or of the free entry where it belongs."""
    last = len(pairs) - 1
    i = np.int64(np.uint64(pair) * MIX_A >> HALF) & last
    while pairs[i] >= 0 and pairs[i] >> RANK_BITS != pair:
        i = (i + 1) & last
    return i


@kernel
def enter_merges(lefts, rights, pairs, byte_of, byte_ranks):  # type: ignore[no-untyped-def]
    """Enter all merges, by rank, into `pairs` (int64, -1: free) as left · 2^40 + right · 2^20 + rank. The last
    of equal pairs wins.

    Ranks of pairs of bytes, the most frequent lookups, also go to byte_ranks[first, second], which is NONE
    elsewhere. `byte_of` maps an id to its byte, or to -1.
    """
    for rank in range(len(lefts)):
        left, right = lefts[rank], rights[rank]
        pair = left << RANK_BITS | right
        pairs[pair_slot(pairs, pair)] = pair << RANK_BITS | rank
        if byte_of[left] >= 0 and byte_of[right] >= 0:
            byte_ranks[byte_of[left], byte_of[right]] = rank


@inner
def rank_of(left, right, pairs):  # type: ignore[no-untyped-def]
    """Rank of a pair of ids; NONE where it is not merged."""
    entry = pairs[pair_slot(pairs, left << RANK_BITS | right)]
    return entry & (MAX_IDS - 1) if entry >= 0 else np.int64(NONE)


@kernel
def push(heap, size, item):  # type: ignore[no-untyped-def]
    """Add an item to a min-heap of `size` items. Returns the new size."""
    i = size
    while i > 0:
        parent = (i - 1) >> 1
        if heap[parent] <= item:
            break
        heap[i] = heap[parent]
        i = parent
    heap[i] = item
    return size + 1


@kernel
def pop(heap, size):  # type: ignore[no-untyped-def]
    """Remove heap[0]. Returns the new size."""
    size -= 1
    item = heap[size]
    i = 0
    while 2 * i + 1 < size:
        child = 2 * i + 1
        if child + 1 < size and heap[child + 1] < heap[child]:
            child += 1
        if heap[child] >= item:
            break
        heap[i] = heap[child]
        i = child
    heap[i] = item
    return size


@kernel
def merge_few(n, results, pairs, out, ranks):  # type: ignore[no-untyped-def]
    """`merge` for a short piece: a linear search for the best pair lowest each step."""
    while n > 1:
        lowest = 0
        for k in range(1, n - 1):
            if ranks[k] < ranks[lowest]:
                lowest = k
        if ranks[lowest] == NONE:
            break
        out[lowest] = results[ranks[lowest]]
        n -= 1
        for k in range(lowest + 1, n):
            out[k] = out[k + 1]
            ranks[k - 1] = ranks[k]
        if lowest + 1 < n:
            ranks[lowest] = rank_of(out[lowest], out[lowest + 1], pairs)
        if lowest > 0:
            ranks[lowest - 1] = rank_of(out[lowest - 1], out[lowest], pairs)
    return n


@kernel
def merge_many(n, results, pairs, out, ranks, following, before, heap):  # type: ignore[no-untyped-def]
    """`merge` for a long piece: a heap of pairs, as rank · 2^32 + position."""
    size = np.int64(0)
    for k in range(n):
        following[k], before[k] = k + 1, k - 1
        if k < n - 1 and ranks[k] != NONE:
            size = push(heap, size, ranks[k] << 32 | k)
    while size:
        top = heap[0]
        size = pop(heap, size)
        k = top & 0xFFFFFFFF
        if ranks[k] != top >> 32:
            continue  # one of the two has been merged with another since
        merged = following[k]
        following[k] = following[merged]
        out[k], ranks[k], ranks[merged] = results[ranks[k]], NONE, NONE
        if following[k] < n:
            before[following[k]] = k
            ranks[k] = rank_of(out[k], out[following[k]], pairs)
            if ranks[k] != NONE:
                size = push(heap, size, ranks[k] << 32 | k)
        left = before[k]
        if left >= 0:
            ranks[left] = rank_of(out[left], out[k], pairs)
            if ranks[left] != NONE:
                size = push(heap, size, ranks[left] << 32 | left)
    count, position = 0, np.int64(0)
    while position < n:
        out[count] = out[position]
        count += 1
        position = following[position]
    return count


@kernel
def merge(  # type: ignore[no-untyped-def]
    data, start, stop, byte_ids, byte_ranks, results, pairs, out, ranks, following, before, heap
):
    """Merge the piece data[start:stop] and write its ids to `out`. Returns their number.

    `out`, `ranks`, `following` and `before` are int64, as long as the piece; `heap` is twice as long.
    """
    n = stop - start
    for k in range(n):
        out[k] = byte_ids[data[start + k]]
        ranks[k] = byte_ranks[data[start + k], data[start + k + 1]] if k < n - 1 else NONE
    if n <= FEW:
        return merge_few(n, results, pairs, out, ranks)
    return merge_many(n, results, pairs, out, ranks, following, before, heap)


@kernel
def encode(  # type: ignore[no-untyped-def]
    data, bounds, ends, pieces, byte_ids, byte_ranks, results, pairs, table, texts, ids, counts, work, near, slots,
    begins, out, end, state
):  # fmt: skip
    """Write the ids of all texts to `out`, each text followed by the id `end` (-1: none); those of text t are
    before begins[t + 1].

    `out` must have room for four ids more than the texts can have. `state` int64[3] is where to resume: text,
    piece, tokens written. `work` int64[5, 2 n] serves pieces of up to n bytes, `near` and `slots` a BLOCK of
    pieces. Returns DONE, FULL where the table has no room, or the size of a piece that is too long for `work`.
    """
    longest = work.shape[1] >> 1
    piece_ids, ranks, following, before, heap = work[0], work[1], work[2], work[3], work[4]
    t, p, written = state[0], state[1], np.uint64(state[2])
    while t < len(bounds) - 1:
        start = bounds[t] if p == pieces[t] else ends[p - 1]
        prefetched = p
        while p < pieces[t + 1]:
            if p == prefetched:  # prefetch the slots of the next pieces together, well before they are read
                prefetched = min(p + BLOCK, pieces[t + 1])
                begin = start
                for q in range(p, prefetched):
                    k = q & (BLOCK - 1)
                    key, second = key_of(data, begin, ends[q])
                    i = first_slot(key, second, table)
                    swar.prefetch(table, i)
                    near[0, k], near[1, k], slots[k] = key, second, i
                    begin = ends[q]
            stop = ends[p]
            k = p & (BLOCK - 1)
            key, second = near[0, k], near[1, k]
            i = find(data, start, stop, key, second, slots[k], table, texts)
            if table[i + swar.ONE] != 0:
                value = table[i + TWO]
                n = np.int64(value >> TOP)
                if n <= INLINE:  # write all four, count the actual number: no branches
                    more = table[i + THREE]
                    out[written] = value & ID
                    out[written + swar.ONE] = value >> SECOND & ID
                    out[written + TWO] = more & ID
                    out[written + THREE] = more >> SECOND
                else:
                    offset = np.int64(value & OFFSET)
                    for k in range(n):
                        out[written + np.uint64(k)] = ids[offset + k]
            else:
                size = stop - start
                status = size if size > longest else 0
                if (
                    8 * counts[USED] >= len(table)
                    or counts[BYTES] + LONGEST + 16 > len(texts)
                    or counts[IDS] + LONGEST > len(ids)
                ):
                    status = FULL
                if status != 0:
                    state[0], state[1], state[2] = t, p, np.int64(written)
                    return status
                n = merge(
                    data, start, stop, byte_ids, byte_ranks, results, pairs, piece_ids, ranks, following, before, heap
                )
                for k in range(n):
                    out[written + np.uint64(k)] = piece_ids[k]
                if size <= LONGEST:
                    insert(data, start, stop, i, key, second, piece_ids, n, table, texts, ids, counts)
            written += np.uint64(n)
            p += 1
            start = stop
        if end >= 0:
            out[written] = end
            written += swar.ONE
        t += 1
        begins[t] = np.int64(written)
    return DONE


@kernel
def enter_words(data, ends, word_ids, table, texts, ids, counts):  # type: ignore[no-untyped-def]
    """Insert words that have an id of their own, whatever the merges would give. The table must have room for them."""
    start = np.int64(0)  # with a literal, numba would compile the callee once more
    for w in range(len(ends)):
        key, second = key_of(data, start, ends[w])
        i = find(data, start, ends[w], key, second, first_slot(key, second, table), table, texts)
        insert(data, start, ends[w], i, key, second, word_ids[w : w + 1], np.int64(1), table, texts, ids, counts)
        start = ends[w]


@kernel
def move(table, larger):  # type: ignore[no-untyped-def]
    """Rehash a table into a larger one."""
    for j in range(0, len(table), 4):
        second = table[j + 1]
        if second != 0:
            i = first_slot(table[j], min(second, LONG), larger)
            while larger[i + swar.ONE] != 0:
                i = i + FOUR & np.uint64(len(larger) - 1)
            for k in range(4):
                larger[i + np.uint64(k)] = table[j + k]

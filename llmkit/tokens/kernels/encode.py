"""Byte-level BPE, compiled: the pieces of texts to ids, through a table of the pieces met so far.

A slot of the table is four words of 64 bits, half a cache line. The first two are the key: a piece of up to 15 bytes is its own, its length in the highest byte,
so that no two pieces can be taken for each other; a longer one is found by a hash and compared with the bytes kept elsewhere. The other two are its ids,
28 bits each, with their number in the highest byte; those of a piece of more than four stand elsewhere. A piece that is not there is merged as BPE has it: the pair of lowest rank first, of equal ones the leftmost (Sennrich et
al., 2016, arXiv 1508.07909, over bytes), with a heap of pairs: O(n log n) for a piece of n bytes.

The table is open addressing over a power of two of slots, half of them used at most; `encode` stops where it is full and says so.
"""

from __future__ import annotations

import numpy as np

from llmkit.kernels import inner, kernel, swar
from llmkit.kernels.utf8 import MIX_A, MIX_B, hash_bytes
from llmkit.tokens.kernels.pretokenize import cut

SHORT = 15  # bytes of a piece that is its own key
RANK_BITS = 20
MOST = 1 << RANK_BITS  # ids and merges that a pair and its rank have room for in 63 bits
NONE = 1 << RANK_BITS  # instead of a rank: not merged
FEW = 24  # bytes of a piece that needs no heap to be merged
LONGEST = 128  # bytes of a piece that is kept
BLOCK = 32  # pieces whose slots are asked for together
INLINE = 4  # ids that have room in a slot
ID_BITS = 28
TOP = np.uint64(56)  # where the highest byte begins
LONG = np.uint64(255 << 56)  # in place of a length: the other 56 bits say where the piece stands
ID = np.uint64((1 << ID_BITS) - 1)
PLACE = np.uint64((1 << 56) - 1)
HALF = np.uint64(32)
TWO, THREE, FOUR = (np.uint64(n) for n in (2, 3, 4))  # unsigned: numba takes no care of negative places then
SECOND = np.uint64(ID_BITS)
# Which bits of sixteen bytes belong to a piece of so many.
FIRST_PART = np.array([(1 << 8 * min(size, 8)) - 1 for size in range(SHORT + 1)], np.uint64)
SECOND_PART = np.array([(1 << 8 * max(size - 8, 0)) - 1 for size in range(SHORT + 1)], np.uint64)
USED, BYTES, IDS = range(3)  # what is counted of a table: slots, bytes and ids in use
DONE, FULL = -1, -2  # what `encode` answers


@kernel
def cut_all(data, bounds, how, table, ends, pieces):  # type: ignore[no-untyped-def]
    """`cut` for every text data[bounds[t]:bounds[t + 1]]: all ends in `ends`; those of text t lie before pieces[t + 1]."""
    n = 0
    for t in range(len(bounds) - 1):
        n += cut(data, bounds[t], bounds[t + 1], how, table, ends[n:])
        pieces[t + 1] = n


@inner
def first_slot(key, second, table):  # type: ignore[no-untyped-def]
    """Where in the table looking for a key begins."""
    h = (key ^ second * MIX_B) * MIX_A
    return (h ^ h >> HALF) << TWO & np.uint64(len(table) - 1)


@inner
def key_of(data, start, stop):  # type: ignore[no-untyped-def]
    """The two words of the key of a piece; of a long one without its place."""
    size = stop - start
    if size > SHORT:
        return hash_bytes(data, start, stop), LONG
    # Masks instead of branches, which the processor cannot foresee.
    second = swar.load(data, start + 8) & SECOND_PART[size] | np.uint64(size) << TOP
    return swar.load(data, start) & FIRST_PART[size], second


@inner
def find(data, start, stop, key, second, i, table, texts):  # type: ignore[no-untyped-def]
    """The slot at or behind `i` that holds the piece data[start:stop] of that key, or the free one where it has to go."""
    last = np.uint64(len(table) - 1)
    if second != LONG:
        while table[i + swar.ONE] != 0 and (table[i] != key or table[i + swar.ONE] != second):
            i = i + FOUR & last
        return i
    size = stop - start
    while table[i + swar.ONE] != 0:
        if table[i] == key and table[i + swar.ONE] >= LONG:
            place = np.int64(table[i + swar.ONE] & PLACE)
            if np.int64(swar.load(texts, place)) == size:
                k = 0
                while k < size and texts[place + 8 + k] == data[start + k]:
                    k += 1
                if k == size:
                    break
        i = i + FOUR & last
    return i


@kernel
def keep(data, start, stop, i, key, second, found, n, table, texts, ids, counts):  # type: ignore[no-untyped-def]
    """Enter the piece data[start:stop], of the ids found[:n], at slot `i`, where `find` says that it goes."""
    if second == LONG:
        place = counts[BYTES]
        swar.store(texts, place, np.uint64(stop - start))
        swar.copy(data, start, stop, texts, place + 8)
        counts[BYTES] = place + 8 + stop - start
        second |= np.uint64(place)
    value, more = np.uint64(n) << TOP, np.uint64(0)
    if n > INLINE:
        value |= np.uint64(counts[IDS])
        for k in range(n):
            ids[counts[IDS] + k] = found[k]
        counts[IDS] += n
    else:
        value |= np.uint64(found[0])
        if n > 1:
            value |= np.uint64(found[1]) << SECOND
        if n > 2:
            more = np.uint64(found[2])
        if n > 3:
            more |= np.uint64(found[3]) << SECOND
    table[i], table[i + swar.ONE], table[i + TWO], table[i + THREE] = key, second, value, more
    counts[USED] += 1


@inner
def pair_slot(pairs, pair):  # type: ignore[no-untyped-def]
    """Where a pair stands among the merges, or would."""
    last = len(pairs) - 1
    i = np.int64(np.uint64(pair) * MIX_A >> HALF) & last
    while pairs[i] >= 0 and pairs[i] >> RANK_BITS != pair:
        i = (i + 1) & last
    return i


@kernel
def enter_merges(lefts, rights, pairs, byte_of, byte_ranks):  # type: ignore[no-untyped-def]
    """All merges, in order of rank, into `pairs` (int64, -1: free): left · 2^40 + right · 2^20 + rank. Of equal pairs the last counts.

    Those of two bytes stand in byte_ranks[first, second] too, NONE elsewhere: they are looked for most. `byte_of`: the byte that an id stands for, or -1.
    """
    for rank in range(len(lefts)):
        left, right = lefts[rank], rights[rank]
        pair = left << RANK_BITS | right
        pairs[pair_slot(pairs, pair)] = pair << RANK_BITS | rank
        if byte_of[left] >= 0 and byte_of[right] >= 0:
            byte_ranks[byte_of[left], byte_of[right]] = rank


@inner
def rank_of(left, right, pairs):  # type: ignore[no-untyped-def]
    """The rank of a pair of ids; NONE: it is not merged."""
    found = pairs[pair_slot(pairs, left << RANK_BITS | right)]
    return found & (MOST - 1) if found >= 0 else np.int64(NONE)


@kernel
def push(heap, size, item):  # type: ignore[no-untyped-def]
    """An item into a heap of `size`, the smallest first; returns its new size."""
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
    """Take heap[0] away; returns the heap's new size."""
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
def merge_few(n, results, pairs, found, best):  # type: ignore[no-untyped-def]
    """`merge` for a short piece: the best pair is looked for among all of them each time."""
    while n > 1:
        at = 0
        for k in range(1, n - 1):
            if best[k] < best[at]:
                at = k
        if best[at] == NONE:
            break
        found[at] = results[best[at]]
        n -= 1
        for k in range(at + 1, n):
            found[k] = found[k + 1]
            best[k - 1] = best[k]
        if at + 1 < n:
            best[at] = rank_of(found[at], found[at + 1], pairs)
        if at > 0:
            best[at - 1] = rank_of(found[at - 1], found[at], pairs)
    return n


@kernel
def merge_many(n, results, pairs, found, best, following, before, heap):  # type: ignore[no-untyped-def]
    """`merge` for a long piece: a heap of pairs, rank · 2^32 + place."""
    size = np.int64(0)
    for k in range(n):
        following[k], before[k] = k + 1, k - 1
        if k < n - 1 and best[k] != NONE:
            size = push(heap, size, best[k] << 32 | k)
    while size:
        top = heap[0]
        size = pop(heap, size)
        k = top & 0xFFFFFFFF
        if best[k] != top >> 32:
            continue  # one of the two went into another merge meanwhile
        gone = following[k]
        following[k] = following[gone]
        found[k], best[k], best[gone] = results[best[k]], NONE, NONE
        if following[k] < n:
            before[following[k]] = k
            best[k] = rank_of(found[k], found[following[k]], pairs)
            if best[k] != NONE:
                size = push(heap, size, best[k] << 32 | k)
        left = before[k]
        if left >= 0:
            best[left] = rank_of(found[left], found[k], pairs)
            if best[left] != NONE:
                size = push(heap, size, best[left] << 32 | left)
    count, place = 0, np.int64(0)
    while place < n:
        found[count] = found[place]
        count += 1
        place = following[place]
    return count


@kernel
def merge(data, start, stop, byte_ids, byte_ranks, results, pairs, found, best, following, before, heap):  # type: ignore[no-untyped-def]
    """Ids of the piece data[start:stop] into `found`; returns how many. Arrays from there on int64, as long as the piece, `heap` twice as long."""
    n = stop - start
    for k in range(n):
        found[k] = byte_ids[data[start + k]]
        best[k] = byte_ranks[data[start + k], data[start + k + 1]] if k < n - 1 else NONE
    if n <= FEW:
        return merge_few(n, results, pairs, found, best)
    return merge_many(n, results, pairs, found, best, following, before, heap)


@kernel
def encode(data, bounds, ends, pieces, byte_ids, byte_ranks, results, pairs, table, texts, ids, counts, work, near, slots, begins, out, end, state):  # type: ignore[no-untyped-def] # fmt: skip
    """Ids of all texts into `out`, four longer than they can be, `end` behind each (-1: nothing); those of text t lie before begins[t + 1].

    `state` int64[3] says where to go on: text, piece, tokens written. `work` int64[5, 2 n] is for
    pieces of up to n bytes, `near` and `slots` for a BLOCK of pieces. Returns DONE, FULL where the table has no room, or the size of a piece that `work` is too short for.
    """
    most = work.shape[1] >> 1
    found, best, following, previous, heap = work[0], work[1], work[2], work[3], work[4]
    t, p, at = state[0], state[1], np.uint64(state[2])
    while t < len(bounds) - 1:
        start = bounds[t] if p == pieces[t] else ends[p - 1]
        known = p
        while p < pieces[t + 1]:
            if p == known:  # ask for the slots of the next pieces together, long before they are looked at
                known = min(p + BLOCK, pieces[t + 1])
                begin = start
                for q in range(p, known):
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
                if n <= INLINE:  # written all, counted as many as there are: no branches
                    more = table[i + THREE]
                    out[at] = value & ID
                    out[at + swar.ONE] = value >> SECOND & ID
                    out[at + TWO] = more & ID
                    out[at + THREE] = more >> SECOND
                else:
                    place = np.int64(value & PLACE)
                    for k in range(n):
                        out[at + np.uint64(k)] = ids[place + k]
            else:
                size = stop - start
                trouble = size if size > most else 0
                if (
                    8 * counts[USED] >= len(table)
                    or counts[BYTES] + LONGEST + 16 > len(texts)
                    or counts[IDS] + LONGEST > len(ids)
                ):
                    trouble = FULL
                if trouble != 0:
                    state[0], state[1], state[2] = t, p, np.int64(at)
                    return trouble
                n = merge(
                    data, start, stop, byte_ids, byte_ranks, results, pairs, found, best, following, previous, heap
                )
                for k in range(n):
                    out[at + np.uint64(k)] = found[k]
                if size <= LONGEST:
                    keep(data, start, stop, i, key, second, found, n, table, texts, ids, counts)
            at += np.uint64(n)
            p += 1
            start = stop
        if end >= 0:
            out[at] = end
            at += swar.ONE
        t += 1
        begins[t] = np.int64(at)
    return DONE


@kernel
def enter_words(data, ends, word_ids, table, texts, ids, counts):  # type: ignore[no-untyped-def]
    """Words that are their own id, whatever the merges make of them, into the table, which has to have room for them."""
    start = np.int64(0)  # a literal, and numba would compile what it is given to once more
    for w in range(len(ends)):
        key, second = key_of(data, start, ends[w])
        i = find(data, start, ends[w], key, second, first_slot(key, second, table), table, texts)
        keep(data, start, ends[w], i, key, second, word_ids[w : w + 1], np.int64(1), table, texts, ids, counts)
        start = ends[w]


@kernel
def move(table, larger):  # type: ignore[no-untyped-def]
    """Enter all of a table into a larger one."""
    for j in range(0, len(table), 4):
        second = table[j + 1]
        if second != 0:
            i = first_slot(table[j], min(second, LONG), larger)
            while larger[i + swar.ONE] != 0:
                i = i + FOUR & np.uint64(len(larger) - 1)
            for k in range(4):
                larger[i + np.uint64(k)] = table[j + k]

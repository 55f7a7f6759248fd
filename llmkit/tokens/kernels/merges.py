"""Byte-pair merges from counted words, compiled: the most frequent pair of neighbours becomes a token, again and again.

    merges, counts, made = learn(pool, ends, times, rank, wanted, least)

In: words one behind the other in `pool` uint8[bytes], their `ends` int64[words] and how often each stands in the text, `times` int64[words]; `rank`
int64[256] of each byte, by which ties are broken. Out: the ids of both parts of each merge, int64[wanted, 2], in order, and how often the pair
occurred, int64[wanted]; the first `made` hold. Ids are ranks for bytes and 256 + i for merge i. Merging ends with pairs of fewer than `least`.

Every byte has a cell, its token's id below how often its word occurs; a token stands in its first and its last cell, so that neighbours are found from
its length alone. A pair has its count, kept up by every merge, and the list of the places where it began when it arose, which is read once, when the pair
is merged, and then checked. A pair whose count has fallen since it went into the heap goes back there when it comes to the top. Pairs too rare for now
wait outside of the heap, those of fewer than `least` are never kept.

Cost: time about linear in the distinct words; memory for each byte of them 8 of cells and up to 12 of places, for each pair 64 to 96. A pair is chosen as
Sennrich, Haddow and Birch (2016) do, and of equally frequent ones that of the lower ids, as the `tokenizers` library does.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from llmkit.kernels import kernel
from llmkit.kernels.utf8 import finish

ID_BITS = 24
ID = (1 << ID_BITS) - 1
NONE = ID  # the id of a cell between words, or where no token begins any more
# Columns of a pair; KEY is both ids, COUNTED the merge after which COUNT held.
KEY, COUNT, START, SIZE, COUNTED = range(5)


@kernel
def better(heap, i, j, pairs):  # type: ignore[no-untyped-def]
    """Whether entry `i` of the heap comes before `j`: more frequent, or as frequent with lower ids."""
    if heap[i, 0] != heap[j, 0]:
        return heap[i, 0] > heap[j, 0]
    return pairs[heap[i, 1], KEY] < pairs[heap[j, 1], KEY]


@kernel
def swap(heap, i, j):  # type: ignore[no-untyped-def]
    heap[i, 0], heap[j, 0] = heap[j, 0], heap[i, 0]
    heap[i, 1], heap[j, 1] = heap[j, 1], heap[i, 1]


@kernel
def push(heap, size, pair, pairs):  # type: ignore[no-untyped-def]
    """Add a pair to a heap of `size` entries (count, pair) with room for it."""
    i = size
    heap[i, 0], heap[i, 1] = pairs[pair, COUNT], pair
    while i and better(heap, i, (i - 1) // 2, pairs):
        swap(heap, i, (i - 1) // 2)
        i = (i - 1) // 2


@kernel
def pop(heap, size, pairs):  # type: ignore[no-untyped-def]
    """Take the first of `size` entries out; returns its pair."""
    pair = heap[0, 1]
    last = size - 1
    heap[0, 0], heap[0, 1] = heap[last, 0], heap[last, 1]
    i = 0
    while True:
        child = 2 * i + 1
        if child >= last:
            return pair
        if child + 1 < last and better(heap, child + 1, child, pairs):
            child += 1
        if not better(heap, child, i, pairs):
            return pair
        swap(heap, i, child)
        i = child


@njit(cache=True, nogil=True)
def larger_table(table, rows):  # type: ignore[no-untyped-def]
    """The same table with room for so many rows, and twice what it had."""
    if rows <= len(table):
        return table
    larger = np.empty((max(rows, 2 * len(table)), table.shape[1]), np.int64)
    for i in range(len(table)):  # a slice would take a second to compile
        for k in range(table.shape[1]):
            larger[i, k] = table[i, k]
    return larger


@njit(cache=True, nogil=True)
def lay_out(pool, ends, times, rank):  # type: ignore[no-untyped-def]
    """A cell for each byte, and one before, between and behind the words."""
    cells = np.empty(len(pool) + len(ends) + 1, np.int64)
    cells[0] = NONE
    at, start = 1, 0
    for word in range(len(ends)):
        for i in range(start, ends[word]):
            cells[at] = times[word] << ID_BITS | rank[pool[i]]
            at += 1
        cells[at] = NONE
        at += 1
        start = ends[word]
    return cells


@njit(cache=True, nogil=True)
def pairs_of_bytes(cells, least, places):  # type: ignore[no-untyped-def]
    """The pairs at the start; where they stand is written into `places`. Returns them, how many, and how many places were filled."""
    counts, sizes, starts = np.zeros(1 << 16, np.int64), np.zeros(1 << 16, np.int64), np.empty(1 << 16, np.int64)
    for i in range(len(cells) - 1):
        a, b = cells[i] & ID, cells[i + 1] & ID
        if a != NONE and b != NONE:
            counts[a << 8 | b] += cells[i] >> ID_BITS
            sizes[a << 8 | b] += 1
    pairs = np.empty((1 << 16, 4), np.int64)
    n = filled = 0
    for key in range(1 << 16):
        starts[key] = -1
        if counts[key] >= least:
            starts[key] = filled
            pairs[n, KEY], pairs[n, COUNT] = key >> 8 << ID_BITS | key & 255, counts[key]
            pairs[n, START], pairs[n, SIZE] = filled, sizes[key]
            filled += sizes[key]
            n += 1
    for i in range(len(cells) - 1):
        a, b = cells[i] & ID, cells[i + 1] & ID
        if a != NONE and b != NONE and starts[a << 8 | b] >= 0:
            places[starts[a << 8 | b]] = i
            starts[a << 8 | b] += 1
    return pairs, n, filled


@kernel
def slot_of(key, slots):  # type: ignore[no-untyped-def]
    """Where a pair stands in slots int64[2^n, 2], open addressing: KEY + 1 and its number; or the free one (0) where it belongs."""
    mask = len(slots) - 1
    slot = np.int64(finish(np.uint64(key)) & np.uint64(mask))
    while slots[slot, 0] and slots[slot, 0] != key + 1:
        slot = slot + 1 & mask
    return slot


@njit(cache=True, nogil=True)
def with_slots(slots, pairs, known, more):  # type: ignore[no-untyped-def]
    """Slots of the pairs, at most half full when `more` come."""
    if 2 * (known + more) <= len(slots):
        return slots
    size = 2 * len(slots)
    while size < 2 * (known + more):
        size *= 2
    slots = np.zeros((size, 2), np.int64)
    for pair in range(known):
        slot = slot_of(pairs[pair, KEY], slots)
        slots[slot, 0], slots[slot, 1] = pairs[pair, KEY] + 1, pair
    return slots


@kernel
def join(cells, pair, new, length, places):  # type: ignore[no-untyped-def]
    """Make `new` of a pair wherever it occurs, from left to right, and cut its list to those places."""
    a, b = pair[KEY] >> ID_BITS, pair[KEY] & ID
    start, step = pair[START], length[a]
    n = 0
    for k in range(start, start + pair[SIZE]):
        i = np.int64(places[k])
        if cells[i] & ID == a and cells[i + step] & ID == b:
            cells[i] += new - a
            cells[i + step] = NONE
            cells[i + length[new] - 1] = new
            places[start + n] = i
            n += 1
    pair[SIZE], pair[COUNT] = n, 0


@njit(cache=True, nogil=True)
def learn(pool, ends, times, rank, wanted, least):  # type: ignore[no-untyped-def]
    """Merges of the words of `pool`, see above: (merges, counts, made)."""
    cells = lay_out(pool, ends, times, rank)
    # Each merged place takes one token away and gives two places. What is never filled takes no memory.
    places = np.empty(3 * len(pool) + 1, np.uint32)
    pairs, known, filled = pairs_of_bytes(cells, least, places)
    slots = with_slots(np.zeros((1, 2), np.int64), pairs, known, 1)
    heap, size = np.empty((known + 1, 2), np.int64), 0
    floor = np.int64(1) << 62  # all pairs of at least so many are in the heap
    merges, counts = np.empty((wanted, 2), np.int64), np.empty(wanted, np.int64)
    length = np.ones(256 + wanted, np.int64)
    # Of each token before (0) or behind (1) the new one: how often, at how many places, and where the next place is put.
    beside, sums = np.zeros((2, 256 + wanted, 2), np.int64), np.zeros((2, 256 + wanted), np.int64)
    # Those tokens, once each and at each place.
    seen, near = np.empty((2, 256 + wanted), np.int64), np.empty((len(cells), 2), np.uint32)
    made = 0
    while made < wanted:
        if not size:
            if floor <= least:
                break
            above, floor = floor, max(floor // 4, least)
            for pair in range(known):
                if floor <= pairs[pair, COUNT] < above:
                    heap = larger_table(heap, size + 1)
                    push(heap, size, pair, pairs)
                    size += 1
            continue
        count = heap[0, 0]
        best = pop(heap, size, pairs)
        size -= 1
        if pairs[best, COUNT] < count:
            if pairs[best, COUNT] >= floor:
                push(heap, size, best, pairs)
                size += 1
            continue
        a, b = pairs[best, KEY] >> ID_BITS, pairs[best, KEY] & ID
        new = 256 + made
        merges[made, 0], merges[made, 1], counts[made] = a, b, count
        length[new] = length[a] + length[b]
        made += 1
        join(cells, pairs[best], new, length, places)
        start, stop = pairs[best, START], pairs[best, START] + pairs[best, SIZE]
        met = np.zeros(2, np.int64)
        for k in range(start, stop):
            i = np.int64(places[k])
            for side in range(2):
                other = cells[i + length[new] if side else i - 1] & ID
                if not side and other == new:
                    other = np.int64(NONE)  # two new ones: once, from the first
                near[k - start, side] = other
                if other != NONE:
                    if not beside[side, other, 0]:
                        seen[side, met[side]] = other
                        met[side] += 1
                    beside[side, other, 0] += 1
                    sums[side, other] += cells[i] >> ID_BITS
        pairs = larger_table(pairs, known + met[0] + met[1])
        heap = larger_table(heap, size + met[0] + met[1])
        slots = with_slots(slots, pairs, known, met[0] + met[1])
        for side in range(2):
            for k in range(met[side]):
                other = seen[side, k]
                # What the new pair has the old one lost: b before a where the next one is new too.
                before = a if other == new else other
                slot = slot_of(b << ID_BITS | before if side else other << ID_BITS | a, slots)
                if slots[slot, 0]:
                    pairs[slots[slot, 1], COUNT] -= sums[side, other]
                beside[side, other, 1] = -1
                if sums[side, other] >= least:
                    beside[side, other, 1] = filled
                    pairs[known, KEY] = new << ID_BITS | other if side else other << ID_BITS | new
                    pairs[known, COUNT] = sums[side, other]
                    pairs[known, START], pairs[known, SIZE] = filled, beside[side, other, 0]
                    filled += beside[side, other, 0]
                    slot = slot_of(pairs[known, KEY], slots)
                    slots[slot, 0], slots[slot, 1] = pairs[known, KEY] + 1, known
                    if pairs[known, COUNT] >= floor:
                        push(heap, size, known, pairs)
                        size += 1
                    known += 1
                beside[side, other, 0] = sums[side, other] = 0
        for k in range(start, stop):
            i = np.int64(places[k])
            for side in range(2):
                other = np.int64(near[k - start, side])
                if other != NONE and beside[side, other, 1] >= 0:
                    places[beside[side, other, 1]] = i if side else i - length[other]
                    beside[side, other, 1] += 1
    return merges, counts, made

"""Learn byte-pair merges from counted words, compiled: the most frequent pair of neighbours becomes a token,
repeatedly.

    merges, counts, made = learn(pool, ends, times, rank, wanted, least)

Input: concatenated words in `pool` uint8[bytes], their `ends` int64[words], and how often each occurs in the
text, `times` int64[words]; `rank` int64[256] of each byte, which breaks ties. Output: the ids of both parts of
each merge, int64[wanted, 2], in order, and the frequency of the pair, int64[wanted]; the first `made` rows are
valid. The id of a byte is its rank, that of merge i is 256 + i. Merging stops at pairs that occur fewer than
`least` times.

Every byte has a cell with its token's id in the low bits and the frequency of its word above them. A
token is stored in its first and last cell, so its neighbours are found from its length alone. A pair has a
count, which every merge updates, and the list of positions at which it began when it arose; the list is read
once, when the pair is merged, and each position is checked then. A pair whose count has fallen since it entered
the heap is pushed again when it reaches the top. Pairs too rare for the current threshold wait outside the
heap, and those that occur fewer than `least` times are not stored.

Cost: time is about linear in the distinct words. Memory: for each of their bytes 8 bytes of cells and up to 12
of positions, and 64 to 96 per pair. The choice of pairs follows Sennrich, Haddow and Birch (2016); among
equally frequent pairs the lower ids win, as in the `tokenizers` library.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from llmkit.kernels import kernel
from llmkit.kernels.utf8 import finish

ID_BITS = 24
ID = (1 << ID_BITS) - 1
NONE = ID  # id of a cell between words, or inside a token
# Columns of a pair. KEY is both ids, START and SIZE its list of positions.
KEY, COUNT, START, SIZE = range(4)


@kernel
def better(heap, i, j, pairs):  # type: ignore[no-untyped-def]
    """Whether heap entry `i` comes before `j`: more frequent, or equally frequent with lower ids."""
    if heap[i, 0] != heap[j, 0]:
        return heap[i, 0] > heap[j, 0]
    return pairs[heap[i, 1], KEY] < pairs[heap[j, 1], KEY]


@kernel
def swap(heap, i, j):  # type: ignore[no-untyped-def]
    heap[i, 0], heap[j, 0] = heap[j, 0], heap[i, 0]
    heap[i, 1], heap[j, 1] = heap[j, 1], heap[i, 1]


@kernel
def push(heap, size, pair, pairs):  # type: ignore[no-untyped-def]
    """Add a pair to a heap of `size` entries (count, pair), which must have room for it."""
    i = size
    heap[i, 0], heap[i, 1] = pairs[pair, COUNT], pair
    while i and better(heap, i, (i - 1) // 2, pairs):
        swap(heap, i, (i - 1) // 2)
        i = (i - 1) // 2


@kernel
def pop(heap, size, pairs):  # type: ignore[no-untyped-def]
    """Remove the first of `size` entries. Returns its pair."""
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
    """The table, reallocated to at least twice its size where it has no room for `rows`."""
    if rows <= len(table):
        return table
    larger = np.empty((max(rows, 2 * len(table)), table.shape[1]), np.int64)
    for i in range(len(table)):  # assigning a slice would take a second to compile
        for k in range(table.shape[1]):
            larger[i, k] = table[i, k]
    return larger


@njit(cache=True, nogil=True)
def lay_out(pool, ends, times, rank):  # type: ignore[no-untyped-def]
    """A cell for each byte, and a separator before, between and after the words."""
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
def pairs_of_bytes(cells, least, positions):  # type: ignore[no-untyped-def]
    """The initial pairs. Writes their positions to `positions`. Returns the pairs, their number, and the number
    of positions.
    """
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
            positions[starts[a << 8 | b]] = i
            starts[a << 8 | b] += 1
    return pairs, n, filled


@kernel
def slot_of(key, slots):  # type: ignore[no-untyped-def]
    """The slot of a pair, or the free one (0) where it belongs, in `slots` int64[2^n, 2] of (KEY + 1, pair number)."""
    mask = len(slots) - 1
    slot = np.int64(finish(np.uint64(key)) & np.uint64(mask))
    while slots[slot, 0] and slots[slot, 0] != key + 1:
        slot = slot + 1 & mask
    return slot


@njit(cache=True, nogil=True)
def with_slots(slots, pairs, pair_count, more):  # type: ignore[no-untyped-def]
    """The slots, enlarged where `more` pairs would fill more than half of them."""
    if 2 * (pair_count + more) <= len(slots):
        return slots
    size = 2 * len(slots)
    while size < 2 * (pair_count + more):
        size *= 2
    slots = np.zeros((size, 2), np.int64)
    for pair in range(pair_count):
        slot = slot_of(pairs[pair, KEY], slots)
        slots[slot, 0], slots[slot, 1] = pairs[pair, KEY] + 1, pair
    return slots


@kernel
def join(cells, pair, new, length, positions):  # type: ignore[no-untyped-def]
    """Replace a pair by the token `new` wherever it occurs, left to right, and trim its list to those positions."""
    a, b = pair[KEY] >> ID_BITS, pair[KEY] & ID
    start, step = pair[START], length[a]
    n = 0
    for k in range(start, start + pair[SIZE]):
        i = np.int64(positions[k])
        if cells[i] & ID == a and cells[i + step] & ID == b:
            cells[i] += new - a
            cells[i + step] = NONE
            cells[i + length[new] - 1] = new
            positions[start + n] = i
            n += 1
    pair[SIZE], pair[COUNT] = n, 0


@njit(cache=True, nogil=True)
def learn(pool, ends, times, rank, wanted, least):  # type: ignore[no-untyped-def]
    """Learn the merges of the words in `pool`. Returns (merges, counts, made); see the module docstring."""
    cells = lay_out(pool, ends, times, rank)
    # Each merged position removes one token and adds two positions. Pages that are never written take no memory.
    positions = np.empty(3 * len(pool) + 1, np.uint32)
    pairs, pair_count, filled = pairs_of_bytes(cells, least, positions)
    slots = with_slots(np.zeros((1, 2), np.int64), pairs, pair_count, 1)
    heap, size = np.empty((pair_count + 1, 2), np.int64), 0
    floor = np.int64(1) << 62  # all pairs with at least this count are in the heap
    merges, counts = np.empty((wanted, 2), np.int64), np.empty(wanted, np.int64)
    length = np.ones(256 + wanted, np.int64)
    # For each token before (0) or after (1) the new one: its number of positions and the index of the next, and
    # its frequency.
    beside, sums = np.zeros((2, 256 + wanted, 2), np.int64), np.zeros((2, 256 + wanted), np.int64)
    # The same tokens: each once, and by position.
    seen, near = np.empty((2, 256 + wanted), np.int64), np.empty((len(cells), 2), np.uint32)
    made = 0
    while made < wanted:
        if not size:
            if floor <= least:
                break
            previous_floor, floor = floor, max(floor // 4, least)
            for pair in range(pair_count):
                if floor <= pairs[pair, COUNT] < previous_floor:
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
        join(cells, pairs[best], new, length, positions)
        start, stop = pairs[best, START], pairs[best, START] + pairs[best, SIZE]
        neighbours = np.zeros(2, np.int64)
        for k in range(start, stop):
            i = np.int64(positions[k])
            for side in range(2):
                other = cells[i + length[new] if side else i - 1] & ID
                if not side and other == new:
                    other = np.int64(NONE)  # two new tokens in a row: counted once, from the first
                near[k - start, side] = other
                if other != NONE:
                    if not beside[side, other, 0]:
                        seen[side, neighbours[side]] = other
                        neighbours[side] += 1
                    beside[side, other, 0] += 1
                    sums[side, other] += cells[i] >> ID_BITS
        pairs = larger_table(pairs, pair_count + neighbours[0] + neighbours[1])
        heap = larger_table(heap, size + neighbours[0] + neighbours[1])
        slots = with_slots(slots, pairs, pair_count, neighbours[0] + neighbours[1])
        for side in range(2):
            for k in range(neighbours[side]):
                other = seen[side, k]
                # The old pair loses the count of the new one: (b, a) where the next token is new too.
                before = a if other == new else other
                slot = slot_of(b << ID_BITS | before if side else other << ID_BITS | a, slots)
                if slots[slot, 0]:
                    pairs[slots[slot, 1], COUNT] -= sums[side, other]
                beside[side, other, 1] = -1
                if sums[side, other] >= least:
                    beside[side, other, 1] = filled
                    pairs[pair_count, KEY] = new << ID_BITS | other if side else other << ID_BITS | new
                    pairs[pair_count, COUNT] = sums[side, other]
                    pairs[pair_count, START], pairs[pair_count, SIZE] = filled, beside[side, other, 0]
                    filled += beside[side, other, 0]
                    slot = slot_of(pairs[pair_count, KEY], slots)
                    slots[slot, 0], slots[slot, 1] = pairs[pair_count, KEY] + 1, pair_count
                    if pairs[pair_count, COUNT] >= floor:
                        push(heap, size, pair_count, pairs)
                        size += 1
                    pair_count += 1
                beside[side, other, 0] = sums[side, other] = 0
        for k in range(start, stop):
            i = np.int64(positions[k])
            for side in range(2):
                other = np.int64(near[k - start, side])
                if other != NONE and beside[side, other, 1] >= 0:
                    positions[beside[side, other, 1]] = i if side else i - length[other]
                    beside[side, other, 1] += 1
    return merges, counts, made

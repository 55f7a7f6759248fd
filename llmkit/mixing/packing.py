"""Pack documents into sequences of `length` positions and cut only those that are too long: best-fit packing
(Ding et al. 2024, "Fewer Truncations Improve Language Modeling").

A document longer than a sequence is cut into pieces of `length` tokens and a remainder. Pieces go into
sequences largest first, each into the fullest sequence with room. Equal sizes are placed together, so a window
costs a few numpy calls per distinct size rather than per document. Packing works on windows of WINDOW sequences
in the order of the mix, which bounds memory and keeps shares local. Sequences follow one another in the order
of their largest piece, pieces within one in the order of the documents.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

WINDOW = 1 << 16  # sequences packed together

Numbers = NDArray[np.int64]


def best_fit(sizes: Numbers, capacity: int) -> tuple[Numbers, Numbers]:
    """Best-fit decreasing: the indices of `sizes` in placement order (largest first, ties by index), and the
    bin of each size.

    Both are int64 [n]. Each size goes into the fullest bin with room, among equals the last used. Bins are
    numbered as they are opened.

    Free spaces are the bits of one integer, so that finding the smallest that fits is a shift and a mask. A bin
    that takes one piece of a size takes as many of that size as fit, which gives the same result as placing
    them one at a time.
    """
    assert sizes.max(initial=0) <= capacity, "a piece is longer than a sequence"
    narrow = np.uint16 if capacity < 1 << 16 else np.int64  # numpy radix-sorts 16-bit integers
    order = np.argsort((capacity - sizes).astype(narrow), kind="stable")
    descending = sizes[order]
    cuts = np.flatnonzero(np.diff(descending)) + 1
    bins = np.empty(len(sizes), np.int64)
    free: dict[int, list[int]] = {}  # bins by free space, the last used at the end
    spaces = opened = 0
    for begin, end in zip([0, *cuts.tolist()], [*cuts.tolist(), len(sizes)], strict=True):
        size = int(descending[begin]) if len(sizes) else 0
        while begin < end:
            fitting = spaces >> size
            space = size + (fitting & -fitting).bit_length() - 1 if fitting else capacity
            per_bin = space // size if size else end - begin
            wanted = -(-(end - begin) // per_bin)
            if fitting:
                taken = free[space][: -wanted - 1 : -1]
                del free[space][-len(taken) :]
                if not free[space]:
                    spaces &= ~(1 << space)
            else:
                taken = list(range(opened, opened + wanted))
                opened += wanted
            placed = min(end - begin, per_bin * len(taken))
            bins[order[begin : begin + placed]] = np.array(taken).repeat(per_bin)[:placed]
            begin += placed
            last = space - (placed - per_bin * (len(taken) - 1)) * size
            for remaining, used in ((space - per_bin * size, taken[:-1]), (last, taken[-1:])):
                if used:
                    free.setdefault(remaining, []).extend(used)
                    spaces |= 1 << remaining
    return order, bins


def pack_sequences(sizes: Numbers, ends: Numbers, length: int) -> tuple[Numbers, Numbers, Numbers, Numbers]:
    """Rows of an order that fills sequences of `length` positions, given the `sizes` of the documents in tokens.

    `ends` are the documents before which each stage ends. Returns for each row its document (index into
    `sizes`, -1 for padding), the token of the document at which it starts, and its size in tokens; and the rows
    before which each stage ends. No row crosses a multiple of `length`, and each stage ends on one. Empty
    documents have no row.
    """
    windows, stages = [], []
    for begin, end in zip(np.concatenate(([0], ends[:-1])).tolist(), ends.tolist(), strict=True):
        offsets = np.cumsum(sizes[begin:end])
        total = int(offsets[-1]) if len(offsets) else 0
        cuts = begin + np.searchsorted(offsets, np.arange(WINDOW * length, total, WINDOW * length))
        for first, stop in zip([begin, *cuts.tolist()], [*cuts.tolist(), end], strict=True):
            row, start, size = _pack_window(sizes[first:stop], length)
            windows.append((np.where(row < 0, -1, row + first), start, size))
        stages.append(sum(len(window[0]) for window in windows))
    rows, starts, counts = map(np.concatenate, zip(*windows, strict=True))
    return rows, starts, counts, np.array(stages, np.int64)


def _pack_window(sizes: Numbers, length: int) -> tuple[Numbers, Numbers, Numbers]:
    pieces = -(-sizes // length)
    row = np.repeat(np.arange(len(sizes)), pieces)
    start = (np.arange(len(row)) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * length
    size = np.minimum(sizes[row] - start, length)
    descending, bins = best_fit(size, length)
    gap = length - np.bincount(bins, size).astype(np.int64)
    largest, position = np.empty(len(gap), np.int64), np.empty(len(gap), np.int64)
    largest[bins[descending[::-1]]] = descending[::-1]  # the last write wins: the piece that opened the bin
    position[np.argsort(largest)] = np.arange(len(gap))  # no two are equal, so that any sort gives this order
    short = np.flatnonzero(gap)
    order = np.argsort(np.concatenate((position[bins], position[short])), kind="stable")
    padding = np.full(len(short), -1)
    return (
        np.concatenate((row, padding))[order],
        np.concatenate((start, np.zeros(len(short), np.int64)))[order],
        np.concatenate((size, gap[short]))[order],
    )


def cut_share(sizes: Numbers, length: int) -> float:
    """Share of documents that are split where their concatenation is cut every `length` tokens."""
    sizes = sizes[sizes > 0]
    ends = np.cumsum(sizes)
    return float(np.mean((ends - sizes) // length != (ends - 1) // length)) if len(sizes) else 0.0

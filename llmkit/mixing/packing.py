"""Documents into sequences of `length` positions so that none is cut that need not be: best-fit packing (Ding et al. 2024, "Fewer Truncations
Improve Language Modeling").

A document longer than a sequence is cut into pieces of `length` tokens and a rest; pieces go into sequences largest first, each into the fullest
that has room. Equal sizes are placed together, so a window costs a few numpy calls for each size there is, not for each document. Packing works on windows of WINDOW sequences in the order of the mix, so memory is bounded and shares stay local; sequences follow
one another in the order of their largest piece, what lies in one in the order of the documents.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

WINDOW = 1 << 16  # sequences packed together

Numbers = NDArray[np.int64]


def best_fit(sizes: Numbers, capacity: int) -> tuple[Numbers, Numbers]:
    """Indices of `sizes` in the order in which they are placed (largest first, ties by index), and the bin of each size, both int64 [n].

    Each goes into the fullest bin that has room, the last used of those. Bins are numbered as they are opened.

    Free spaces are the bits of one integer, so finding the smallest that fits is a shift and a mask. A bin that takes one piece of a size takes
    as many of that size as it has room for, which is what one at a time comes to.
    """
    assert sizes.max(initial=0) <= capacity, "a piece is longer than a sequence"
    narrow = np.uint16 if capacity < 1 << 16 else np.int64  # which numpy sorts digit by digit
    order = np.argsort((capacity - sizes).astype(narrow), kind="stable")
    falling = sizes[order]
    cuts = np.flatnonzero(np.diff(falling)) + 1
    bins = np.empty(len(sizes), np.int64)
    free: dict[int, list[int]] = {}  # bins by their space, the last used at the end
    spaces = opened = 0
    for begin, end in zip([0, *cuts.tolist()], [*cuts.tolist(), len(sizes)], strict=True):
        size = int(falling[begin]) if len(sizes) else 0
        while begin < end:
            fitting = spaces >> size
            space = size + (fitting & -fitting).bit_length() - 1 if fitting else capacity
            each = space // size if size else end - begin
            wanted = -(-(end - begin) // each)
            if fitting:
                taken = free[space][: -wanted - 1 : -1]
                del free[space][-len(taken) :]
                if not free[space]:
                    spaces &= ~(1 << space)
            else:
                taken = list(range(opened, opened + wanted))
                opened += wanted
            number = min(end - begin, each * len(taken))
            bins[order[begin : begin + number]] = np.array(taken).repeat(each)[:number]
            begin += number
            last = space - (number - each * (len(taken) - 1)) * size
            for left, used in ((space - each * size, taken[:-1]), (last, taken[-1:])):
                if used:
                    free.setdefault(left, []).extend(used)
                    spaces |= 1 << left
    return order, bins


def packed(sizes: Numbers, ends: Numbers, length: int) -> tuple[Numbers, Numbers, Numbers, Numbers]:
    """Rows of an order that fills sequences of `length` positions, from the documents' `sizes` in tokens, stages ending before `ends`.

    Returns for each row the document (its place in `sizes`, -1 for padding), where in it the row starts, and the row's tokens; and before which
    row each stage ends. No row crosses a multiple of `length`, each stage ends on one; documents without tokens have no row.
    """
    parts, stages = [], []
    for begin, end in zip(np.concatenate(([0], ends[:-1])).tolist(), ends.tolist(), strict=True):
        reached = np.cumsum(sizes[begin:end])
        total = int(reached[-1]) if len(reached) else 0
        cuts = begin + np.searchsorted(reached, np.arange(WINDOW * length, total, WINDOW * length))
        for first, behind in zip([begin, *cuts.tolist()], [*cuts.tolist(), end], strict=True):
            row, start, size = _window(sizes[first:behind], length)
            parts.append((np.where(row < 0, -1, row + first), start, size))
        stages.append(sum(len(part[0]) for part in parts))
    rows, starts, counts = map(np.concatenate, zip(*parts, strict=True))
    return rows, starts, counts, np.array(stages, np.int64)


def _window(sizes: Numbers, length: int) -> tuple[Numbers, Numbers, Numbers]:
    pieces = -(-sizes // length)
    row = np.repeat(np.arange(len(sizes)), pieces)
    start = (np.arange(len(row)) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * length
    size = np.minimum(sizes[row] - start, length)
    falling, bins = best_fit(size, length)
    gap = length - np.bincount(bins, size).astype(np.int64)
    largest, place = np.empty(len(gap), np.int64), np.empty(len(gap), np.int64)
    largest[bins[falling[::-1]]] = falling[::-1]  # what is written last stays: the piece that opened the bin
    place[np.argsort(largest)] = np.arange(len(gap))
    short = np.flatnonzero(gap)
    order = np.argsort(np.concatenate((place[bins], place[short])), kind="stable")
    padding = np.full(len(short), -1)
    return (
        np.concatenate((row, padding))[order],
        np.concatenate((start, np.zeros(len(short), np.int64)))[order],
        np.concatenate((size, gap[short]))[order],
    )


def cut_share(sizes: Numbers, length: int) -> float:
    """Share of documents that a stream of them, cut every `length` tokens, does not leave whole."""
    sizes = sizes[sizes > 0]
    ends = np.cumsum(sizes)
    return float(np.mean((ends - sizes) // length != (ends - 1) // length)) if len(sizes) else 0.0

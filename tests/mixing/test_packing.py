"""Best-fit packing: nothing is lost or cut without need, and the bins are those of the textbook algorithm."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.mixing import packing
from llmkit.mixing.packing import best_fit, cut_share, pack_sequences


def one_at_a_time(sizes: list[int], capacity: int) -> list[int]:
    """Best-fit decreasing as defined: each size into the fullest bin with room, among equals the last used."""
    bins, spaces, used = [0] * len(sizes), [], []
    for turn, i in enumerate(sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))):
        fitting = [(space, -used[b], b) for b, space in enumerate(spaces) if space >= sizes[i]]
        if not fitting:
            spaces.append(capacity)
            used.append(0)
        b = min(fitting)[2] if fitting else len(spaces) - 1
        bins[i], spaces[b], used[b] = b, spaces[b] - sizes[i], turn
    return bins


@given(st.lists(st.integers(0, 50), max_size=60))
@settings(deadline=None)
def test_best_fit_is_that_of_one_at_a_time(sizes: list[int]) -> None:
    """Parity with the naive algorithm, zero sizes included; no two bins could be merged."""
    order, bins = best_fit(np.array(sizes, dtype=np.int64), 50)
    assert bins.tolist() == one_at_a_time(sizes, 50)
    assert [sizes[i] for i in order] == sorted(sizes, reverse=True)
    fill = sorted(np.bincount(bins, sizes).tolist())
    assert len(fill) < 2 or (fill[-1] <= 50 < fill[0] + fill[1])


@pytest.mark.parametrize("window", [3, 1 << 16])
@given(st.lists(st.lists(st.integers(0, 70), max_size=40), min_size=1, max_size=3).filter(lambda x: any(map(any, x))))
@settings(deadline=None, max_examples=60)
def test_packed_rows(window: int, stages: list[list[int]]) -> None:
    """Property: each token occurs once; no row crosses the end of a sequence; stages end on one; padding is last."""
    sizes, ends = np.array([size for stage in stages for size in stage], np.int64), np.cumsum(list(map(len, stages)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "WINDOW", window)
        row, start, size, row_ends = pack_sequences(sizes, ends, 16)
    reached = np.cumsum(size)
    assert (size > 0).all() and ((reached - size) // 16 == (reached - 1) // 16).all() and reached[-1] % 16 == 0
    assert all(end == 0 or reached[end - 1] % 16 == 0 for end in row_ends)
    assert all(reached[i] % 16 == 0 for i in np.flatnonzero(row < 0))
    for document, length in enumerate(sizes.tolist()):
        mine = np.flatnonzero(row == document)
        assert dict(zip(start[mine].tolist(), size[mine].tolist(), strict=True)) == {
            at: min(16, length - at) for at in range(0, length, 16)
        }
        stage = np.searchsorted(ends, document, side="right")
        assert (np.searchsorted(row_ends, mine, side="right") == stage).all()


def test_windows_keep_neighbours_together() -> None:
    """Property: a document moves by at most a window's tokens; sequences are in the order of their largest pieces."""
    sizes = np.random.default_rng(0).integers(1, 60, 5_000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "WINDOW", 20)
        row, _, size, _ = pack_sequences(sizes, np.array([5_000]), 64)
    stood, given = (np.cumsum(sizes) - sizes)[row[row >= 0]], size[row >= 0]
    assert np.abs(stood - (np.cumsum(given) - given)).max() <= 64 * 20 + 60
    assert size[row < 0].sum() / size.sum() < 0.1
    sequence = (np.cumsum(size) - size) // 64
    largest = [row[sequence == s][np.argmax(size[sequence == s] * (row[sequence == s] >= 0))] for s in range(15)]
    assert largest == sorted(largest)


def test_share_of_documents_cut() -> None:
    """Behaviour: a document counts as cut where a sequence ends inside it, not at its boundary."""
    assert cut_share(np.array([4, 4, 8, 0, 9, 7]), 8) == 1 / 5
    assert cut_share(np.array([0]), 8) == 0.0

"""One row per sequence, and rows of similar length in the same step."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import CONFIG

from llmkit.mixing.length_groups import GROUP_BATCHES, length_grouped
from llmkit.model.decoder import Decoder
from llmkit.training.data import PADDING_ID, PackedSource
from llmkit.training.objectives import next_token


def rows_of(lengths: list[int]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Rows with their number as the first token."""
    draw = np.random.default_rng(0)
    return [
        (np.array([i, *draw.integers(0, 64, n - 1)], np.int32), draw.integers(0, 2, n).astype(np.float32))
        for i, n in enumerate(lengths)
    ]


def lengths_of_chats(count: int) -> list[int]:
    return np.clip(np.random.default_rng(1).lognormal(4, 0.8, count), 5, 1000).astype(int).tolist()


@given(st.lists(st.integers(1, 99), max_size=700), st.integers(1, 6), st.integers(0, 5), st.integers(0, 9))
def test_batches_are_of_similar_length(sizes: list[int], batch_size: int, filled: int, seed: int) -> None:
    """Property: every row once; behind the rows that complete a batch, the batches of each group of 50 are a sorted group cut
    into pieces; the same for equal seeds."""
    lengths, filled = np.array(sizes, np.int64), filled % batch_size
    order = length_grouped(lengths, batch_size, np.random.default_rng(seed), filled)
    assert sorted(order.tolist()) == list(range(len(sizes)))
    again = length_grouped(lengths, batch_size, np.random.default_rng(seed), filled)
    assert order.tolist() == again.tolist()
    rest = lengths[order][-filled % batch_size :]
    batches = [rest[i : i + batch_size] for i in range(0, len(rest), batch_size)]
    assert all((np.diff(batch) <= 0).all() for batch in batches)
    if len(batches) <= GROUP_BATCHES:  # one group: no batch lies inside another
        ordered = sorted(batches, key=lambda batch: (batch[0], batch[-1]))
        assert all(low[0] <= high[-1] for low, high in zip(ordered, ordered[1:], strict=False))


def test_padding_is_that_of_transformers() -> None:
    """Parity: the padding is that of transformers' groups (megabatches of 50) within a tenth, and a fifth of that in random
    order; the batches are in random order, so that length does not drift within an epoch."""
    from transformers.trainer_pt_utils import get_length_grouped_indices

    lengths, batch_size = np.array(lengths_of_chats(4000)), 8

    def padding(order: np.ndarray) -> float:
        batches = lengths[order].reshape(-1, batch_size)
        return float(1 - batches.sum() / (batches.max(axis=1) * batch_size).sum())

    ours = length_grouped(lengths, batch_size, np.random.default_rng(0))
    theirs = get_length_grouped_indices(lengths.tolist(), batch_size, generator=torch.Generator().manual_seed(0))
    random = np.random.default_rng(0).permutation(len(lengths))
    assert padding(ours) == pytest.approx(padding(np.array(theirs)), rel=0.1)
    assert padding(ours) < padding(random) / 5
    means = lengths[ours].reshape(-1, batch_size).mean(axis=1)
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.2


@pytest.mark.parametrize("group_by_length", [False, True])
def test_one_row_per_sequence(group_by_length: bool) -> None:
    """Property: every step has as many rows as the batch, but the last; every epoch has every row once; a batch is as long as
    its longest row; tokens and weights add up, and the reported padding is that of the batches."""
    lengths = lengths_of_chats(83)
    rows = rows_of(lengths)
    source = PackedSource(rows, 1000, 4, epochs=3, seed=3, pack=False, group_by_length=group_by_length)
    assert [source.rows(step) for step in range(source.steps)] == [4] * 62 + [1]
    seen: list[int] = []
    padded = positions = 0
    for step in range(source.steps):
        at_once = 2 * source.length_ratio(step)
        numbers: list[int] = []
        for start in range(0, source.rows(step), at_once):
            batch = source.batch(step, start, min(start + at_once, source.rows(step)))
            own = [int(ids[0]) for ids in batch.input_ids]
            assert batch.input_ids.shape[1] == max(lengths[i] - 1 for i in own)
            assert batch.input_ids.numel() <= 2 * 1000
            padded += int((batch.document_ids == PADDING_ID).sum())
            positions += batch.input_ids.numel()
            numbers += own
        assert source.weight(step) == sum(float(rows[i][1][1:].sum()) for i in numbers)
        assert source.tokens(step + 1) - source.tokens(step) == sum(lengths[i] - 1 for i in numbers)
        seen += numbers
    assert source.padding(2) == pytest.approx(padded / positions)
    assert sorted(seen[:80]) != sorted(seen[83:163])
    for epoch in range(3):  # a step may belong to two epochs
        assert len(set(seen[83 * epoch + 4 : 83 * epoch + 79])) == 75
    assert np.bincount(seen).tolist() == [3] * 83


def test_loss_of_a_step_is_that_of_its_rows() -> None:
    """Property: grouped or not, in forward passes of any size, the loss of a step is the weighted mean over its rows, each run
    alone, within 1e-5."""
    model = Decoder(CONFIG)
    model.initialize(0)
    rows = rows_of([int(n) for n in np.random.default_rng(2).integers(3, 33, 24)])
    for group_by_length in (False, True):
        source = PackedSource(rows, 32, 6, seed=1, pack=False, group_by_length=group_by_length)
        with torch.no_grad():
            for step in range(source.steps):
                scale, total = 1 / source.weight(step), 0.0
                losses = [
                    sum(float(next_token(model, source.batch(step, i, i + n), scale).loss) for i in range(0, 6, n))
                    for n in (1, 2, 6)
                ]
                numbers = [int(ids[0]) for ids in source.batch(step, 0, 6).input_ids]
                for tokens, weights in (rows[i] for i in numbers):
                    ids = torch.from_numpy(tokens.astype(np.int64))
                    log_p = torch.log_softmax(model(ids[None, :-1])[0], dim=-1)[torch.arange(len(ids) - 1), ids[1:]]
                    total -= float((log_p * torch.from_numpy(weights[1:])).sum()) * scale
                assert losses == pytest.approx([total] * 3, abs=1e-5)

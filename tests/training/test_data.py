"""Batches as a pure function of the step: stream order, document mask, packing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CONFIG, ListStream

from llmkit.errors import LlmkitError, UsageError
from llmkit.model.decoder import Decoder
from llmkit.training.batch_schedule import BatchSchedule, size_changes
from llmkit.training.data import PADDING_ID, HeldOutSource, PackedSource, StreamSource, collate
from llmkit.training.source_groups import document_groups


class Numbered:
    """A stream whose token at position p is p; `padding` lists the documents that are padding."""

    def __init__(self, lengths: list[int], padding: list[int] | None = None) -> None:
        self.padding = None if padding is None else np.isin(np.arange(len(lengths)), padding)
        self.offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        self.tokens = int(self.offsets[-1])

    def span(self, start: int, stop: int) -> np.ndarray:
        assert 0 <= start <= stop <= self.tokens
        return np.arange(start, stop, dtype=np.uint32)


lengths = st.lists(st.integers(0, 40), min_size=1, max_size=20).filter(lambda x: sum(x) > 1)


@settings(deadline=None)
@given(lengths, st.integers(1, 16), st.integers(1, 5), st.integers(1, 300))
def test_stream_order_and_weights(sizes: list[int], length: int, batch: int, total: int) -> None:
    """Property: inputs are the stream from its start, repeated.

    A position counts if its target belongs to the same document.
    """
    stream = Numbered(sizes)
    source = StreamSource(stream, length, batch, total)
    owner = np.repeat(np.arange(len(sizes)), sizes)
    position = 0
    for step in range(source.steps):
        assert source.tokens(step) == position
        rows = source.batch(step, 0, source.rows(step))
        inputs, targets, weights = rows.input_ids.numpy(), rows.targets.numpy(), rows.weights.numpy()
        for r in range(len(inputs)):
            here = np.arange(position, position + length + 1)
            assert (inputs[r] == here[:-1] % stream.tokens).all()
            assert (targets[r] == here[1:] % stream.tokens).all()
            document = owner[here % stream.tokens] + len(sizes) * (here // stream.tokens)
            assert (weights[r] == (document[1:] == document[:-1])).all()
            if rows.document_ids is not None:
                ids = rows.document_ids.numpy()[r]
                assert ((ids[1:] == ids[:-1]) == (document[1:-1] == document[:-2])).all()
            position += length
        assert source.weight(step) == weights.sum()
    assert source.tokens(source.steps) == position
    assert total <= position < total + length


sizes_of = st.lists(st.tuples(st.integers(0, 400), st.integers(1, 9), st.integers(1, 50)), max_size=5)


@given(sizes_of, st.integers(1, 9), st.integers(1, 50), st.integers(1, 1000))
def test_steps_partition_the_tokens(later: list[tuple[int, int, int]], rows: int, length: int, total: int) -> None:
    """Property: for any sizes, steps follow each other without gaps.

    A phase begins at the first step at or after its token; step_at inverts `tokens`.
    """
    changes = [(0, rows, length), *sorted(later)]
    steps = BatchSchedule(changes, total)
    at = 0
    for step in range(steps.steps):
        assert steps.tokens(step) == at
        due = [change for change in changes if change[0] <= at][-1]
        assert steps.length(step) == due[2]
        assert steps.rows(step) == due[1] or (step == steps.steps - 1 and 0 < steps.rows(step) < due[1])
        at += steps.rows(step) * steps.length(step)
        assert steps.step_at(steps.tokens(step)) == steps.step_at(at - 1) == step
    assert steps.tokens(steps.steps) == steps.total == at and steps.step_at(at) == steps.steps
    assert total <= at < total + max(50, length)


def test_warm_ups_of_batch_and_length() -> None:
    """Behaviour: smaller batches first.

    Shorter sequences first with as many tokens per step; the stream stays in order; micro-batches keep their
    tokens.
    """
    sizes = size_changes(8, 16, 2000, batches=[(2, 64), (4, 200)], lengths=[(4, 100), (8, 300)])
    assert sizes == [(0, 8, 4), (64, 16, 4), (100, 8, 8), (200, 16, 8), (300, 8, 16)]
    stream = Numbered([3000])
    source = StreamSource(stream, 16, 8, 2000, changes=sizes)
    seen = [source.batch(s, 0, source.rows(s)).input_ids.flatten() for s in range(source.steps)]
    assert torch.equal(torch.cat(seen), torch.arange(2000))
    assert [source.length(s) for s in range(6)] == [4, 4, 4, 8, 8, 8] and source.length_ratio(0) == 4
    assert [len(tokens) for tokens in seen[:7]] == [32, 32, 64, 64, 64, 128, 128]
    assert all(source.weight(s) == len(tokens) for s, tokens in enumerate(seen))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"batches": [(8, 10)]}, "--batch-warmup: 8 is not below 8"),
        ({"batches": [(2, 20), (4, 10)]}, "--batch-warmup: 20 tokens is not before 10"),
        ({"batches": [(2, 100)]}, "--batch-warmup: 100 tokens is not before 100"),
        ({"lengths": [(32, 10)]}, "--length-warmup: 32 is not below 16"),
        ({"lengths": [(4, 10), (4, 20)]}, "--length-warmup: 4 is not below 4"),
    ],
)
def test_warm_ups_that_do_not_rise_are_refused(more: dict[str, list[tuple[int, int]]], message: str) -> None:
    """Behaviour: refused are sizes above the final one, decreasing sizes, and warm-ups as long as the run."""
    with pytest.raises(UsageError, match=message):
        size_changes(8, 16, 100, **more)


def test_rows_do_not_depend_on_the_cut() -> None:
    """Property: the rows of a step are the same when read in parts."""
    source = StreamSource(Numbered([10, 3, 30, 7]), 8, 6, 1000)
    whole = source.batch(2, 0, 6)
    parts = [source.batch(2, a, b) for a, b in ((0, 1), (1, 4), (4, 6))]
    assert torch.equal(whole.input_ids, torch.cat([part.input_ids for part in parts]))
    assert torch.equal(whole.weights, torch.cat([part.weights for part in parts]))


def test_without_document_mask_everything_counts() -> None:
    """Behaviour: --no-document-mask."""
    source = StreamSource(Numbered([4, 4, 4]), 5, 2, 10, document_mask=False)
    batch = source.batch(0, 0, 2)
    assert batch.document_ids is None
    assert batch.weights.sum() == source.weight(0) == 10


@given(lengths, st.integers(1, 16))
@settings(deadline=None)
def test_held_out_counts_every_token_once(sizes: list[int], length: int) -> None:
    """Property: each predictable position counts once; positions beyond the end do not count."""
    stream = Numbered(sizes)
    source = HeldOutSource(stream, length)
    batch = source.batch(0, 0, source.rows(0))
    counted = batch.targets[batch.weights > 0].tolist()
    starts = {int(start) for start in stream.offsets[:-1]}
    assert counted == [p for p in range(1, stream.tokens) if p not in starts]
    assert source.weight(0) == len(counted)


def test_token_over_the_vocabulary_is_refused() -> None:
    """Behaviour: ids beyond the model's vocabulary stop the run with a clear message."""
    source = StreamSource(Numbered([30]), 8, 1, 30, vocabulary=10)
    with pytest.raises(LlmkitError, match="exceeds the model's vocabulary"):
        source.batch(1, 0, 1)


def test_padding_counts_for_nothing() -> None:
    """Property: padding tokens are neither predicted nor predict, none attends to another, and the weight of
    the step is that of its rows."""
    source = StreamSource(Numbered([5, 3, 6, 2, 1, 1], [1, 3, 5]), 9, 2, 36)
    for step in range(source.steps):
        rows = source.batch(step, 0, 2)
        inputs, targets, weights = rows.input_ids.numpy(), rows.targets.numpy(), rows.weights.numpy()
        padding = np.isin(np.arange(19), [5, 6, 7, 14, 15, 17])
        assert not weights[padding[inputs] | padding[targets]].any() and source.weight(step) == weights.sum()
        assert rows.document_ids is not None
        for row, ids in zip(inputs, rows.document_ids.numpy(), strict=True):
            of_padding = ids[padding[row]]
            assert len(set(of_padding)) == len(of_padding) and not set(of_padding) & set(ids[~padding[row]])


def rows_of(counts: list[int]) -> list[tuple[np.ndarray, np.ndarray]]:
    draw = np.random.default_rng(0)
    return [(draw.integers(0, 64, n).astype(np.int32), draw.integers(0, 2, n).astype(np.float32)) for n in counts]


def test_packed_source_sees_every_row_once_an_epoch() -> None:
    """Property: tokens, weights and rows add up; epochs differ in order; equal seeds give equal batches."""
    rows = rows_of([5, 9, 17, 3, 8, 12, 2, 16])
    source = PackedSource(rows, 16, 2, epochs=2, seed=3)
    assert source.tokens(source.steps) == 2 * sum(len(tokens) - 1 for tokens, _ in rows)
    total = sum(source.batch(s, 0, source.rows(s)).weights.sum().item() for s in range(source.steps))
    assert total == sum(map(source.weight, range(source.steps))) == 2 * sum(w[1:].sum() for _, w in rows)
    again = PackedSource(rows, 16, 2, epochs=2, seed=3)
    other = PackedSource(rows, 16, 2, epochs=2, seed=4)
    first = [s.batch(0, 0, 2).input_ids for s in (source, again, other)]
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first[0], first[2])


def test_packed_rows_do_not_see_each_other() -> None:
    """Property: hidden states of rows packed into one sequence equal those of each row alone, within 1e-5."""
    model = Decoder(CONFIG)
    model.initialize(0)
    rows = rows_of([7, 12, 9])
    batch = collate([rows], 32)
    assert (batch.document_ids == PADDING_ID).sum() == 32 - (6 + 11 + 8)
    with torch.no_grad():
        together = model(batch.input_ids, document_ids=batch.document_ids)[0]
        at = 0
        for tokens, _ in rows:
            alone = model(torch.from_numpy(tokens[:-1].astype(np.int64))[None])[0]
            assert torch.allclose(together[at : at + len(alone)], alone, atol=1e-5)
            at += len(alone)
        leaking = model(batch.input_ids)[0]
    assert not torch.allclose(leaking[6:17], together[6:17], atol=1e-3)  # without the mask they differ


def test_groups_are_those_of_the_documents() -> None:
    """Property: the code of every position is that of its document.

    In a second epoch all documents were seen before; padding has its own code.
    """
    draw = np.random.default_rng(3)
    stream = ListStream(draw.integers(0, 9, 60).tolist())
    sizes, sources = np.diff(stream.offsets), draw.integers(0, 4, 60).astype(np.int32)
    stream.padding = sources == 3  # type: ignore[assignment]
    epochs = draw.integers(0, 2, 60).astype(np.int32)
    groups = document_groups(sizes, sources, ["a", "b", "c", "<padding>"], epochs)
    assert groups.names == ("a", "b", "c")
    source = StreamSource(stream, 16, 3, int(stream.tokens * 2.5), groups=groups)
    for step in range(source.steps):
        batch = source.batch(step, 0, source.rows(step))
        for row, codes in enumerate(batch.extra["groups"].tolist()):
            for at, code in enumerate(codes, source.tokens(step) + row * 16):
                number = int(np.searchsorted(stream.offsets, at % stream.tokens, side="right")) - 1
                seen = bool(epochs[number]) or at >= stream.tokens
                assert code == (-1 if sources[number] == 3 else 2 * sources[number] + seen)

"""The batch of step s as a pure function of the data and s, so that resuming costs nothing and works for any
number of processes.

Pre-training reads the flat stream of tokens: sequence i is tokens [i·L, i·L + L + 1), of which the first L
are inputs and the last L targets, and step s takes the sequences [s·B, (s+1)·B). Where B and L change with
the tokens seen (batch_schedule.py), sequences still follow each other. At its end the stream starts over.
Fine-tuning packs rows into sequences of L positions (best fit, so that there is little padding), or has one row
in each, in a new random order for each epoch.

Every batch has loss weights, and `weight(step)` is their sum over the whole step, known before any forward
pass: losses are divided by it, which makes the result independent of micro-batches and processes. With a
document mask, the position from the last token of a document to the first of the next one has weight 0: the
next document is chosen by the mix, not by the text, so there is nothing to learn from it.

Cost: linear in tokens; memory is that of the batch, the tokens stay memory-mapped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from llmkit.errors import LlmkitError
from llmkit.mixing.length_groups import length_grouped
from llmkit.mixing.packing import best_fit
from llmkit.seeds import derive
from llmkit.training.batch_schedule import BatchSchedule, SizeChange
from llmkit.training.source_groups import PADDING_CODE, SourceGroups

PADDING_ID = -1  # document id of padding


@dataclass(slots=True)
class Batch:
    """Rows of one step.

    `input_ids`, `targets` int64 [R, L]; `weights` float32 [R, L]; `document_ids` int32 [R, L] or None; `extra`
    tensors depend on the objective.
    """

    input_ids: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    document_ids: torch.Tensor | None
    extra: dict[str, torch.Tensor] = field(default_factory=dict)

    def to(self, device: torch.device) -> Batch:
        """The batch on `device`."""
        if device.type == "cpu":
            return self
        return Batch(
            self.input_ids.to(device, non_blocking=True),
            self.targets.to(device, non_blocking=True),
            self.weights.to(device, non_blocking=True),
            None if self.document_ids is None else self.document_ids.to(device, non_blocking=True),
            {name: tensor.to(device, non_blocking=True) for name, tensor in self.extra.items()},
        )


class Source(Protocol):
    """Batches by step. All methods are pure; `tokens` and `weight` are cheap."""

    steps: int

    def rows(self, step: int) -> int:
        """Rows in the whole step, over all processes."""

    def tokens(self, step: int) -> int:
        """Tokens before `step`; `tokens(steps)` is the total."""

    def length_ratio(self, step: int) -> int:
        """Length of the longest rows of the run over that of the step's rows; 1 if they may be as long."""

    def weight(self, step: int) -> float:
        """Sum of the loss weights of the whole step."""

    def batch(self, step: int, start: int, stop: int) -> Batch:
        """Rows [start, stop) of the step."""

    def document(self, step: int, row: int, position: int) -> tuple[str, np.ndarray]:
        """Name and tokens [n] of the document that contains the token at `position` of a row of the step."""


class TokenStream(Protocol):
    """The data of pre-training: mixing.order.OrderedTokens, or shards.reader.TokenStore."""

    @property
    def tokens(self) -> int:
        """Length of the stream."""

    @property
    def offsets(self) -> np.ndarray:
        """Start of each document, and the end of the last: int64 [documents + 1]."""

    @property
    def padding(self) -> np.ndarray | None:
        """Which documents are padding, bool [documents]: their tokens are neither attended to nor predicted.

        None: no padding.
        """

    def span(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of the flat stream."""

    def id(self, i: int) -> str:
        """Id of document `i`."""

    def document(self, i: int) -> np.ndarray:
        """Tokens of document `i`."""


class StreamSource:
    """Sequences of `length` tokens in stream order, `batch_size` per step, until `total` tokens are seen.

    `changes` gives other sizes by token.
    """

    def __init__(
        self,
        stream: TokenStream,
        length: int,
        batch_size: int,
        total: int,
        *,
        changes: Sequence[SizeChange] = (),
        document_mask: bool = True,
        vocabulary: int = 1 << 32,
        groups: SourceGroups | None = None,
    ) -> None:
        if stream.tokens < 2:
            raise LlmkitError("no tokens to train on", "check the tokenized data")
        self._vocabulary = vocabulary
        self._stream, self._mask = stream, document_mask
        self._steps = BatchSchedule(changes or [(0, batch_size, length)], total)
        self.steps = self._steps.steps
        self.rows, self.tokens, self.length = self._steps.rows, self._steps.tokens, self._steps.length
        self.step_at = self._steps.step_at
        self.phases = self._steps.phases
        self._longest = max(phase.length for phase in self.phases)
        sizes = np.diff(stream.offsets)
        nonempty = sizes > 0
        self._numbers = None if nonempty.all() else np.flatnonzero(nonempty)
        self._starts = np.asarray(stream.offsets)[:-1][nonempty]
        self._padding = np.zeros(len(sizes), np.bool_)[nonempty] if stream.padding is None else stream.padding[nonempty]
        # Each token of padding counts as a document of its own, so that it has weight 0 and nothing attends to it.
        counts = np.where(self._padding, sizes[nonempty], 1)
        self._documents_before = np.concatenate(([0], np.cumsum(counts)))
        self.data_tokens, self.group_names = stream.tokens, groups.names if groups else ("",)
        codes = np.zeros(len(sizes), np.int16) if groups is None else groups.codes
        self._codes = np.where(self._padding, PADDING_CODE, codes[nonempty]).astype(np.int16)

    def length_ratio(self, step: int) -> int:
        return self._longest // self.length(step)

    def weight(self, step: int) -> float:
        rows, length = self.rows(step), self.length(step)
        if not self._mask:
            return float(rows * length)
        first = np.arange(rows, dtype=np.int64) * length + self.tokens(step)
        boundaries = self._document_numbers(first + length) - self._document_numbers(first)
        return float(rows * length - boundaries.sum())

    def batch(self, step: int, start: int, stop: int) -> Batch:
        length = self.length(step)
        first = self.tokens(step) + np.arange(start, stop, dtype=np.int64) * length
        tokens = np.stack([self._read(int(position), length + 1) for position in first])
        if tokens.max(initial=0) >= self._vocabulary:
            raise LlmkitError(
                f"token id {tokens.max()} at step {step + 1} exceeds the model's vocabulary of {self._vocabulary}",
                "the shards are damaged, or made with another tokenizer than the model's",
            )
        groups = np.stack([self._group_codes(int(position), length) for position in first])
        ones = np.ones((len(first), length), dtype=np.float32)
        if not self._mask:
            return _batch(tokens, ones, None, groups)
        documents = self._document_numbers(first[:, None] + np.arange(length + 1))
        if (documents[:, 0] == documents[:, -1]).all():  # no boundary inside: plain causal attention is faster
            return _batch(tokens, ones, None, groups)
        weights = (documents[:, 1:] == documents[:, :-1]).astype(np.float32)
        return _batch(tokens, weights, documents[:, :-1] - documents[:, :1], groups)

    def document(self, step: int, row: int, position: int) -> tuple[str, np.ndarray]:
        offset = (self.tokens(step) + row * self.length(step) + position) % self._stream.tokens
        number = int(np.searchsorted(self._starts, offset, side="right") - 1)
        number = number if self._numbers is None else int(self._numbers[number])
        return self._stream.id(number), self._stream.document(number)

    def _read(self, start: int, remaining: int) -> np.ndarray:
        """`remaining` tokens from position `start` of the endless stream."""
        spans = []
        while remaining:
            start %= self._stream.tokens
            span = self._stream.span(start, min(start + remaining, self._stream.tokens))
            spans.append(np.asarray(span).astype(np.int64))
            start, remaining = start + len(span), remaining - len(span)
        return spans[0] if len(spans) == 1 else np.concatenate(spans)

    def _group_codes(self, start: int, length: int) -> np.ndarray:
        """Codes (source_groups.py) of `length` positions from `start` on.

        From the second epoch on, every document was seen before.
        """
        spans, remaining = [], length
        while remaining:
            epoch, start = divmod(start, self._stream.tokens)
            stop = min(start + remaining, self._stream.tokens)
            first = int(np.searchsorted(self._starts, start, side="right")) - 1
            last = int(np.searchsorted(self._starts, stop, side="left"))
            cuts = np.concatenate(([start], self._starts[first + 1 : last], [stop]))
            codes = self._codes[first:last]
            spans.append(np.repeat(np.where(codes < 0, codes, codes | (epoch > 0)), np.diff(cuts)))
            remaining -= stop - start
            start = epoch * self._stream.tokens + stop
        return np.concatenate(spans)

    def _document_numbers(self, positions: np.ndarray) -> np.ndarray:
        """Number of the document at each position of the endless stream."""
        epochs, offsets = np.divmod(positions, self._stream.tokens)
        row = np.searchsorted(self._starts, offsets, side="right") - 1
        within_padding = np.where(self._padding[row], offsets - self._starts[row], 0)
        return epochs * self._documents_before[-1] + self._documents_before[row] + within_padding


class HeldOutSource:
    """Every token of a stream once, as one step: for a held-out loss that is the exact mean over tokens."""

    steps = 1

    def __init__(
        self,
        stream: TokenStream,
        length: int,
        *,
        document_mask: bool = True,
        vocabulary: int = 1 << 32,
        groups: SourceGroups | None = None,
    ) -> None:
        sequences = max(1, -(-(stream.tokens - 1) // length))
        self._inner = StreamSource(
            stream,
            length,
            sequences,
            sequences * length,
            document_mask=document_mask,
            vocabulary=vocabulary,
            groups=groups,
        )
        self.group_names = self._inner.group_names
        # Positions beyond the end of the stream, which would be read from its start, do not count.
        self._excess = sequences * length - (stream.tokens - 1)
        self._weight = self._inner.weight(0) - float(self._last_weights()[-1, ::-1][: self._excess].sum())

    def rows(self, step: int) -> int:
        return self._inner.rows(0)

    def tokens(self, step: int) -> int:
        return self._inner.tokens(step) - (self._excess if step else 0)

    def length_ratio(self, step: int) -> int:
        return 1

    def weight(self, step: int) -> float:
        return self._weight

    def batch(self, step: int, start: int, stop: int) -> Batch:
        batch = self._inner.batch(0, start, stop)
        if stop == self.rows(0) and self._excess:
            batch.weights[-1, -self._excess :] = 0.0
        return batch

    def document(self, step: int, row: int, position: int) -> tuple[str, np.ndarray]:
        return self._inner.document(0, row, position)

    def _last_weights(self) -> np.ndarray:
        rows = self._inner.rows(0)
        return self._inner.batch(0, rows - 1, rows).weights.numpy()


class PackedSource:
    """Rows of (tokens int32 [n], weights float32 [n]) packed into sequences of `length` positions, for `epochs`
    epochs, each of all rows or of those in `taken`, with repeats. The batches' extra["rows"] int64 [rows, 4] has the
    sequence of each, its first position, the one after its last, and its number in the run.

    A row of n tokens takes n - 1 positions, since its last token is only a target; no row may be longer than
    `length` + 1. With `shuffle=False` the rows are ordered by length and all form one step, for a held-out
    loss. With `pack=False` each row is a sequence of its own; those of a step are sorted by length, and with
    `group_by_length` similar to begin with.
    """

    def __init__(
        self,
        rows: Sequence[tuple[np.ndarray, np.ndarray]],
        length: int,
        batch_size: int,
        *,
        epochs: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        taken: Sequence[np.ndarray] | None = None,
        pack: bool = True,
        group_by_length: bool = False,
    ) -> None:
        self._rows, self._length = rows, length
        sizes = np.array([len(tokens) - 1 for tokens, _ in rows], dtype=np.int64)
        weights = np.array([float(w[1:].sum()) for _, w in rows])
        self._bins: list[list[int]] = []
        for epoch in range(epochs):
            generator = np.random.default_rng(derive(seed, "pack", epoch))
            order = np.arange(len(rows)) if taken is None else taken[epoch]
            if group_by_length:
                order = order[length_grouped(sizes[order], batch_size, generator, len(self._bins) % batch_size)]
            elif shuffle:
                order = order[generator.permutation(len(order))]
            if not pack:
                self._bins += [[i] for i in order.tolist()]
                continue
            packed, bin_numbers = best_fit(sizes[order], length)
            packed = packed[np.argsort(bin_numbers[packed], kind="stable")]
            ends = np.flatnonzero(np.diff(bin_numbers[packed])) + 1
            bins: list[list[int]] = (
                [order[members].tolist() for members in np.split(packed, ends)] if len(order) else []
            )
            self._bins += [bins[i] for i in generator.permutation(len(bins))] if shuffle else bins
        self._batch_size = batch_size if shuffle else max(1, len(self._bins))
        self.steps = -(-len(self._bins) // self._batch_size)
        cuts = [min(i * self._batch_size, len(self._bins)) for i in range(self.steps + 1)]
        self._first = np.concatenate([[0], np.cumsum([len(members) for members in self._bins])])  # row of each bin
        if not pack:  # so that the rows of a forward pass are of similar length
            for start, stop in zip(cuts, cuts[1:], strict=False):
                self._bins[start:stop] = sorted(self._bins[start:stop], key=lambda bin: sizes[bin[0]])
        self._sizes = np.array([sizes[b].sum() for b in self._bins], np.int64)  # positions of each sequence
        self._longest = [length if pack else int(self._sizes[cut - 1]) for cut in cuts[1:]]  # of each step
        counts = np.concatenate([[0], np.cumsum(self._sizes)])
        totals = np.concatenate([[0.0], np.cumsum([weights[b].sum() for b in self._bins])])
        self._tokens = [int(counts[cut]) for cut in cuts]
        self.data_tokens = int(counts[-1]) // epochs
        self._weights = [float(totals[b] - totals[a]) for a, b in zip(cuts, cuts[1:], strict=False)]

    def padding(self, micro_batch: int) -> float:
        """Share of the positions that are padding, with forward passes of `micro_batch` sequences of `length`."""
        return padding_share(self, self._sizes, micro_batch)

    def rows(self, step: int) -> int:
        return min(self._batch_size, len(self._bins) - step * self._batch_size)

    def tokens(self, step: int) -> int:
        return self._tokens[step]

    def length_ratio(self, step: int) -> int:
        return max(1, self._length // max(1, self._longest[step]))

    def weight(self, step: int) -> float:
        return self._weights[step]

    def batch(self, step: int, start: int, stop: int) -> Batch:
        first = step * self._batch_size
        sequences = [[self._rows[i] for i in bin] for bin in self._bins[first + start : first + stop]]
        ends = [np.cumsum([len(tokens) - 1 for tokens, _ in rows]) for rows in sequences]
        # Only as long as the longest sequence: a model may have a context of millions, which a few short rows
        # do not need.
        batch = collate(sequences, int(max(stops[-1] for stops in ends)))
        batch.extra["rows"] = torch.tensor(
            [
                (sequence, stop - len(rows[i][0]) + 1, stop, self._first[first + start + sequence] + i)
                for sequence, (rows, stops) in enumerate(zip(sequences, ends, strict=True))
                for i, stop in enumerate(stops)
            ]
        )
        return batch

    def document(self, step: int, row: int, position: int) -> tuple[str, np.ndarray]:
        members = self._bins[step * self._batch_size + row]
        ends = np.cumsum([len(self._rows[i][0]) - 1 for i in members])
        number = members[min(int(np.searchsorted(ends, position, side="right")), len(members) - 1)]
        return f"row {number + 1}", self._rows[number][0]


def padding_share(source: Source, sizes: np.ndarray, micro_batch: int) -> float:
    """Share of the positions that are padding where each forward pass is as long as the longest of its sequences, whose
    `sizes` are int64 [sequences] or [sequences, 2] in the order of the steps.
    """
    first, positions = 0, 0
    for step in range(source.steps):
        rows, at_once = source.rows(step), micro_batch * source.length_ratio(step)
        for start in range(0, rows, at_once):
            part = sizes[first + start : first + min(start + at_once, rows)]
            positions += part.size * int(part.max())
        first += rows
    return 1 - float(sizes.sum()) / max(1, positions)


def collate(sequences: Sequence[Sequence[tuple[np.ndarray, np.ndarray]]], length: int) -> Batch:
    """One batch row for each list of rows, which are concatenated with document ids 0, 1, ...

    The rest is padding (document -1, weight 0).
    """
    shape = (len(sequences), length)
    inputs, targets = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    weights, documents = np.zeros(shape, dtype=np.float32), np.full(shape, PADDING_ID, dtype=np.int64)
    for r, rows in enumerate(sequences):
        start = 0
        for number, (tokens, row_weights) in enumerate(rows):
            span = slice(start, start + len(tokens) - 1)
            inputs[r, span], targets[r, span] = tokens[:-1], tokens[1:]
            weights[r, span], documents[r, span] = row_weights[1:], number
            start = span.stop
    return Batch(
        torch.from_numpy(inputs),
        torch.from_numpy(targets),
        torch.from_numpy(weights),
        torch.from_numpy(documents.astype(np.int32)),
    )


def _batch(tokens: np.ndarray, weights: np.ndarray, documents: np.ndarray | None, groups: np.ndarray) -> Batch:
    return Batch(
        torch.from_numpy(np.ascontiguousarray(tokens[:, :-1])),
        torch.from_numpy(np.ascontiguousarray(tokens[:, 1:])),
        torch.from_numpy(weights),
        None if documents is None else torch.from_numpy(documents.astype(np.int32)),
        {"groups": torch.from_numpy(groups.astype(np.int32))},
    )

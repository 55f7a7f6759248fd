"""What step s trains on: a pure function of the data and s, so that resuming costs nothing and holds for any number of processes.

Pre-training reads the flat stream of tokens: sequence i is tokens [i·L, i·L + L + 1), of which the first L are inputs and the last L targets, and
step s takes the sequences [s·B, (s+1)·B); where B and L change with the tokens seen (steps.py), sequences still follow each other. The stream starts
again where it ends. Fine-tuning packs rows into sequences of L positions (best fit, so that little is padding) in an order drawn anew for each epoch.

Every batch carries loss weights, and `weight(step)` is their sum over the whole step, known before any forward pass: losses are divided by
it, which makes the result independent of micro-batches and processes. With a document mask the step from the last token of a document to
the first of the next one has weight 0: the next document is chosen by the mix, not by the text, so there is nothing in it to learn.

Cost: linear in tokens; memory is that of the batch, the tokens stay memory-mapped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from llmkit.errors import LlmkitError
from llmkit.mixing.packing import best_fit
from llmkit.seeds import derive
from llmkit.training.batch_schedule import BatchSchedule, Change
from llmkit.training.source_groups import NOTHING, SourceGroups

PADDING = -1  # document id of positions that hold nothing


@dataclass(slots=True)
class Batch:
    """Rows of one step: `input_ids`, `targets` int64 [R, L]; `weights` float32 [R, L]; `document_ids` int32 [R, L] or None; `extra` by objective."""

    input_ids: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    document_ids: torch.Tensor | None
    extra: dict[str, torch.Tensor] = field(default_factory=dict)

    def to(self, device: torch.device) -> Batch:
        """The same on `device`."""
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
    """Batches by step. All methods are pure; `tokens` and `weight` cost next to nothing."""

    steps: int

    def rows(self, step: int) -> int:
        """Rows in the whole step, over all processes."""

    def tokens(self, step: int) -> int:
        """Tokens before `step`; `tokens(steps)` is the total."""

    def shortened(self, step: int) -> int:
        """How many rows of the step are as long as one of the longest of the run; 1 where all may be as long."""

    def weight(self, step: int) -> float:
        """Sum of the loss weights of the whole step."""

    def batch(self, step: int, start: int, stop: int) -> Batch:
        """Rows [start, stop) of the step."""

    def document(self, step: int, row: int, position: int) -> tuple[str, np.ndarray]:
        """Name and tokens [n] of the document that the token at `position` of a row of the step is of."""


class TokenStream(Protocol):
    """What pre-training reads: io.order.OrderedTokens, or io.shards.TokenStore."""

    @property
    def tokens(self) -> int:
        """Length of the stream."""

    @property
    def offsets(self) -> np.ndarray:
        """Where each document starts, and the end of the last: int64 [documents + 1]."""

    @property
    def padding(self) -> np.ndarray | None:
        """Which documents only fill up a sequence, bool [documents]: their tokens are neither read nor predicted. None: none."""

    def span(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of the flat stream."""

    def id(self, i: int) -> str:
        """Id of document `i`."""

    def document(self, i: int) -> np.ndarray:
        """Its tokens."""


class StreamSource:
    """Sequences of `length` tokens in stream order, `batch_size` a step, until `total` tokens are seen; other sizes where `changes` says so."""

    def __init__(
        self,
        stream: TokenStream,
        length: int,
        batch_size: int,
        total: int,
        *,
        changes: Sequence[Change] = (),
        document_mask: bool = True,
        vocabulary: int = 1 << 32,
        groups: SourceGroups | None = None,
    ) -> None:
        if stream.tokens < 2:
            raise LlmkitError("no tokens to train on", "check what was tokenized")
        self._vocabulary = vocabulary
        self._stream, self._mask = stream, document_mask
        self._steps = BatchSchedule(changes or [(0, batch_size, length)], total)
        self.steps = self._steps.steps
        self.rows, self.tokens, self.length = self._steps.rows, self._steps.tokens, self._steps.length
        self.step_at = self._steps.step_at
        self.phases = self._steps.phases
        self._longest = max(phase.length for phase in self.phases)
        sizes = np.diff(stream.offsets)
        filled = sizes > 0  # documents without tokens start nothing
        self._rows = None if filled.all() else np.flatnonzero(filled)
        self._starts = np.asarray(stream.offsets)[:-1][filled]
        self._padding = np.zeros(len(sizes), np.bool_)[filled] if stream.padding is None else stream.padding[filled]
        # Each token of padding counts as a document of its own: so it has weight 0, and nothing attends to it.
        counts = np.where(self._padding, sizes[filled], 1)
        self._before = np.concatenate(([0], np.cumsum(counts)))
        self.data_tokens, self.group_names = stream.tokens, groups.names if groups else ("",)
        codes = np.zeros(len(sizes), np.int16) if groups is None else groups.codes
        self._codes = np.where(self._padding, NOTHING, codes[filled]).astype(np.int16)

    def shortened(self, step: int) -> int:
        return self._longest // self.length(step)

    def weight(self, step: int) -> float:
        rows, length = self.rows(step), self.length(step)
        if not self._mask:
            return float(rows * length)
        first = np.arange(rows, dtype=np.int64) * length + self.tokens(step)
        borders = self._documents(first + length) - self._documents(first)
        return float(rows * length - borders.sum())

    def batch(self, step: int, start: int, stop: int) -> Batch:
        length = self.length(step)
        first = self.tokens(step) + np.arange(start, stop, dtype=np.int64) * length
        tokens = np.stack([self._read(int(position), length + 1) for position in first])
        if tokens.max(initial=0) >= self._vocabulary:
            raise LlmkitError(
                f"token id {tokens.max()} at step {step + 1} is over the model's vocabulary of {self._vocabulary}",
                "the shards are damaged, or not of this model's tokenizer",
            )
        groups = np.stack([self._groups(int(position), length) for position in first])
        ones = np.ones((len(first), length), dtype=np.float32)
        if not self._mask:
            return _batch(tokens, ones, None, groups)
        documents = self._documents(first[:, None] + np.arange(length + 1))
        if (documents[:, 0] == documents[:, -1]).all():  # no border inside: plain causal attention is faster
            return _batch(tokens, ones, None, groups)
        weights = (documents[:, 1:] == documents[:, :-1]).astype(np.float32)
        return _batch(tokens, weights, documents[:, :-1] - documents[:, :1], groups)

    def document(self, step: int, row: int, position: int) -> tuple[str, np.ndarray]:
        inside = (self.tokens(step) + row * self.length(step) + position) % self._stream.tokens
        number = int(np.searchsorted(self._starts, inside, side="right") - 1)
        number = number if self._rows is None else int(self._rows[number])
        return self._stream.id(number), self._stream.document(number)

    def _read(self, start: int, missing: int) -> np.ndarray:
        """`missing` tokens from position `start` of the endless stream."""
        pieces = []
        while missing:
            start %= self._stream.tokens
            piece = self._stream.span(start, min(start + missing, self._stream.tokens))
            pieces.append(np.asarray(piece).astype(np.int64))
            start, missing = start + len(piece), missing - len(piece)
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def _groups(self, start: int, length: int) -> np.ndarray:
        """Code (groups.py) of `length` positions from `start` on; in a second round through the stream all were seen before."""
        pieces, missing = [], length
        while missing:
            rounds, start = divmod(start, self._stream.tokens)
            stop = min(start + missing, self._stream.tokens)
            first = int(np.searchsorted(self._starts, start, side="right")) - 1
            behind = int(np.searchsorted(self._starts, stop, side="left"))
            cuts = np.concatenate(([start], self._starts[first + 1 : behind], [stop]))
            codes = self._codes[first:behind]
            pieces.append(np.repeat(np.where(codes < 0, codes, codes | (rounds > 0)), np.diff(cuts)))
            missing -= stop - start
            start = rounds * self._stream.tokens + stop
        return np.concatenate(pieces)

    def _documents(self, positions: np.ndarray) -> np.ndarray:
        """Number of the document that each position of the endless stream is of."""
        rounds, inside = np.divmod(positions, self._stream.tokens)
        row = np.searchsorted(self._starts, inside, side="right") - 1
        within = np.where(self._padding[row], inside - self._starts[row], 0)
        return rounds * self._before[-1] + self._before[row] + within


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
        # What lies beyond the end of the stream would be read from its start: positions that do not count.
        self._beyond = sequences * length - (stream.tokens - 1)
        self._weight = self._inner.weight(0) - float(self._last_weights()[-1, ::-1][: self._beyond].sum())

    def rows(self, step: int) -> int:
        return self._inner.rows(0)

    def tokens(self, step: int) -> int:
        return self._inner.tokens(step) - (self._beyond if step else 0)

    def shortened(self, step: int) -> int:
        return 1

    def weight(self, step: int) -> float:
        return self._weight

    def batch(self, step: int, start: int, stop: int) -> Batch:
        batch = self._inner.batch(0, start, stop)
        if stop == self.rows(0) and self._beyond:
            batch.weights[-1, -self._beyond :] = 0.0
        return batch

    def document(self, step: int, row: int, position: int) -> tuple[str, np.ndarray]:
        return self._inner.document(0, row, position)

    def _last_weights(self) -> np.ndarray:
        rows = self._inner.rows(0)
        return self._inner.batch(0, rows - 1, rows).weights.numpy()


class PackedSource:
    """Rows of (tokens int32 [n], weights float32 [n]) packed into sequences of `length` positions, for `epochs` rounds.

    A row of n tokens takes n - 1 positions, since its last token is only a target; none may be longer than `length` + 1. With `shuffle=False`
    the rows keep their order of length and all go into one step, for a held-out loss.
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
    ) -> None:
        self._rows = rows
        sizes = np.array([len(tokens) - 1 for tokens, _ in rows], dtype=np.int64)
        weights = np.array([float(w[1:].sum()) for _, w in rows])
        self._bins: list[list[int]] = []
        for epoch in range(epochs):
            draw = np.random.default_rng(derive(seed, "pack", epoch))
            order = draw.permutation(len(rows)) if shuffle else np.arange(len(rows))
            placed, bins_of = best_fit(sizes[order], length)
            placed = placed[np.argsort(bins_of[placed], kind="stable")]
            ends = np.flatnonzero(np.diff(bins_of[placed])) + 1
            bins: list[list[int]] = [order[piece].tolist() for piece in np.split(placed, ends)] if len(rows) else []
            self._bins += [bins[i] for i in draw.permutation(len(bins))] if shuffle else bins
        self._batch_size = batch_size if shuffle else max(1, len(self._bins))
        self.steps = -(-len(self._bins) // self._batch_size)
        cuts = [min(i * self._batch_size, len(self._bins)) for i in range(self.steps + 1)]
        counts = np.concatenate([[0], np.cumsum([sizes[b].sum() for b in self._bins])])
        totals = np.concatenate([[0.0], np.cumsum([weights[b].sum() for b in self._bins])])
        self._tokens = [int(counts[cut]) for cut in cuts]
        self.data_tokens = int(sizes.sum())
        self._weights = [float(totals[b] - totals[a]) for a, b in zip(cuts, cuts[1:], strict=False)]
        self.padding = 1 - counts[-1] / max(1, len(self._bins) * length)

    def rows(self, step: int) -> int:
        return min(self._batch_size, len(self._bins) - step * self._batch_size)

    def tokens(self, step: int) -> int:
        return self._tokens[step]

    def shortened(self, step: int) -> int:
        return 1

    def weight(self, step: int) -> float:
        return self._weights[step]

    def batch(self, step: int, start: int, stop: int) -> Batch:
        first = step * self._batch_size
        sequences = [[self._rows[i] for i in bin] for bin in self._bins[first + start : first + stop]]
        # As long as the longest of them: a model may claim a context of millions, and a few short rows need none of it.
        return pack(sequences, max(sum(len(tokens) - 1 for tokens, _ in rows) for rows in sequences))

    def document(self, step: int, row: int, position: int) -> tuple[str, np.ndarray]:
        chosen = self._bins[step * self._batch_size + row]
        ends = np.cumsum([len(self._rows[i][0]) - 1 for i in chosen])
        number = chosen[min(int(np.searchsorted(ends, position, side="right")), len(chosen) - 1)]
        return f"row {number + 1}", self._rows[number][0]


def pack(sequences: Sequence[Sequence[tuple[np.ndarray, np.ndarray]]], length: int) -> Batch:
    """One batch row for each list of rows, laid end to end with document ids 0, 1, ...; the rest is padding (document -1, weight 0)."""
    shape = (len(sequences), length)
    inputs, targets = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    weights, documents = np.zeros(shape, dtype=np.float32), np.full(shape, PADDING, dtype=np.int64)
    for r, rows in enumerate(sequences):
        at = 0
        for number, (tokens, row_weights) in enumerate(rows):
            here = slice(at, at + len(tokens) - 1)
            inputs[r, here], targets[r, here] = tokens[:-1], tokens[1:]
            weights[r, here], documents[r, here] = row_weights[1:], number
            at = here.stop
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

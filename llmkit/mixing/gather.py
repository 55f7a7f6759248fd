"""Documents of mapped token shards in any order, in bulk: what `mix` writes.

A global shuffle reads every document from another place, so that memory has to be waited for. Positions are computed by numpy for a batch at once,
tokens and ids copied by one `bytes.join` over views of the mapped files. (numpy's `take` goes token by token and needs an index of each; Arrow's
joins all files first; what a numba loop saves is about what it takes to load.) Cost: tests/bench/mix_speed.md. Memory: one batch of tokens (see shards.py), and 20 bytes for each document of the sources.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from llmkit.mixing.order import OrderedTokens
from llmkit.shards.arrow import SourceCodes, Tokens, as_numpy, string_array, string_data
from llmkit.shards.reader import TokenStore
from llmkit.shards.shard import PADDING_SOURCE
from llmkit.shards.writer import BATCH_DOCUMENTS, ShardWriter

if TYPE_CHECKING:
    import pyarrow as pa

Numbers = NDArray[np.int64]


class Gatherer:
    """Copies documents of several stores of one tokenizer, which are counted through: those of the second follow those of the first.

    The number behind the last of them stands for `padding`.
    """

    def __init__(self, stores: Sequence[TokenStore], padding: Tokens) -> None:
        names: dict[str, int] = {}
        codes, epochs, rows, starts, id_starts = [], [], [], [], []
        self._tokens: list[memoryview] = []  # of each batch, as bytes
        self._ids: list[memoryview] = []
        for store in stores:
            table = [names.setdefault(name, len(names)) for name in store.sources]
            codes.append(np.array(table, np.int32)[store.codes])
            at = 0
            for tokens, ids, epoch in store.batches():
                offsets = store.offsets[at : at + len(ids) + 1]
                starts.append((offsets - offsets[0]) * tokens.itemsize)
                id_offsets, content = string_data(ids)
                id_starts.append(id_offsets)
                self._tokens.append(tokens.view(np.uint8).data)
                self._ids.append(content.data)
                epochs.append(np.zeros(len(ids), np.int32) if epoch is None else as_numpy(epoch))
                rows.append(len(ids))
                at += len(ids)
        codes.append(np.array([names.setdefault(PADDING_SOURCE, len(names))], np.int32))
        starts.append(np.array([0, padding.nbytes]))
        id_starts.append(np.zeros(2, np.int32))
        epochs.append(np.zeros(1, np.int32))
        self._tokens.append(padding.view(np.uint8).data)
        self._ids.append(memoryview(b""))
        self._dtype = stores[0].dtype
        self._names = list(names)
        self._firsts = np.cumsum([0, *rows])  # document with which each batch begins
        self._codes, self._epochs, self._starts, self._id_starts = map(
            np.concatenate, (codes, epochs, starts, id_starts)
        )

    def __call__(
        self, documents: Numbers, start: Numbers | int, size: Numbers
    ) -> tuple[Tokens, pa.StringArray, SourceCodes, NDArray[np.int32]]:
        """Of `documents` [n]: `size` [n] token ids of each from its token `start` on, flat; ids; sources; how often each was seen before [n]."""
        batch = np.searchsorted(self._firsts, documents, side="right") - 1
        place = documents + batch  # each batch has one start more than documents: where its last one ends
        width = self._dtype.itemsize
        tokens = _joined(self._tokens, batch, self._starts[place] + start * width, size * width)
        begin = self._id_starts[place]
        lengths = self._id_starts[place + 1] - begin
        ids = string_array(lengths, _joined(self._ids, batch, begin, lengths))
        sources = self._codes[documents], self._names
        return np.frombuffer(tokens, self._dtype), ids, sources, self._epochs[documents]


def _joined(content: list[memoryview], batch: Numbers, begin: Numbers, size: Numbers) -> bytes:
    spans = zip(batch.tolist(), begin.tolist(), (begin + size).tolist(), strict=True)
    return b"".join([content[i][a:b] for i, a, b in spans])


def write_ordered(ordered: OrderedTokens, writer: ShardWriter, progress: Callable[[int], object]) -> None:
    """Write the documents of `ordered` in its order, a batch of the writer at a time; `progress` is told how many each time."""
    gather = Gatherer(ordered.stores, np.full(ordered.sequence_length or 0, ordered.tokenizer.eos_id, ordered.dtype))
    # The source of padding is -1, and so its document the one behind the last.
    bases = np.cumsum([0, *(store.documents for store in ordered.stores)])
    order, offsets, first = ordered.order, ordered.offsets, 0
    while first < ordered.documents:
        full = int(np.searchsorted(offsets, offsets[first] + writer.batch_room))
        behind = min(max(full, first + 1), first + BATCH_DOCUMENTS, ordered.documents)
        rows = slice(first, behind)
        sizes = np.diff(offsets[first : behind + 1])
        documents = bases[order.source[rows]] + order.document[rows]
        start = 0 if order.start is None else order.start[rows]
        tokens, ids, sources, epochs = gather(documents, start, sizes)
        writer.extend(tokens, sizes, ids, sources, epochs + order.epoch[rows])
        progress(behind - first)
        first = behind

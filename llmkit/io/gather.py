"""Documents of mapped token shards in any order, in bulk: what `mix` writes.

A global shuffle reads each document from another place, so most of its cost is waiting for memory; what Python adds is about 2 µs a document.
Everything else is done for a batch at once: positions by numpy, tokens and ids copied by one `bytes.join` over views of the mapped files. (Not
by numpy's or Arrow's `take`: they go token by token, or join all files first. A compiled loop is no faster before 400 MB, which numba's import
takes.) Memory: one batch of tokens (shards.py), and 20 bytes for each document of the sources.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from llmkit.io.order import OrderedTokens
from llmkit.io.shard_part import Tokens, numbers
from llmkit.io.shards import BATCH_DOCUMENTS, ShardWriter
from llmkit.io.store import TokenStore


class Gatherer:
    """Copies documents of several stores, which are of one tokenizer. They are counted through: those of the second follow those of the first."""

    def __init__(self, stores: Sequence[TokenStore]) -> None:
        names: dict[str, int] = {}
        first, starts, id_starts, epochs, codes = 0, [], [], [], []
        self._tokens: list[memoryview] = []  # of each batch
        self._ids: list[memoryview] = []
        firsts = []
        for store in stores:
            table = [names.setdefault(name, len(names)) for name in store.sources]
            codes.append(np.array(table, np.int32)[store.codes])
            at = 0
            for values, ids, epoch in store.batches():
                rows = len(ids)
                firsts.append(first + at)
                starts.append((store.offsets[at : at + rows + 1] - store.offsets[at]) * values.itemsize)
                _, ends, text = ids.buffers()
                id_starts.append(
                    np.frombuffer(ends, np.int32, rows + 1, ids.offset * 4) if rows else np.zeros(1, np.int32)
                )
                epochs.append(np.zeros(rows, np.int32) if epoch is None else numbers(epoch))
                self._tokens.append(memoryview(values.view(np.uint8)))
                self._ids.append(memoryview(text or b""))
                at += rows
            first += at
        self.dtype = stores[0].dtype
        self._names = list(names)
        self._codes = np.concatenate(codes)
        self._firsts = np.array(firsts)
        self._starts, self._id_starts, self._epochs = map(np.concatenate, (starts, id_starts, epochs))

    def __call__(self, documents: NDArray[np.int64]) -> tuple[Tokens, list[memoryview], list[str], NDArray[np.int32]]:
        """Of `documents` [n]: token ids, flat; ids in UTF-8, views; sources; how often each was seen before [n]."""
        batch = np.searchsorted(self._firsts, documents, side="right") - 1
        place = documents + batch  # each batch has one more start than it has documents
        ranges = [starts[place + i].tolist() for starts in (self._starts, self._id_starts) for i in (0, 1)]
        which, names = batch.tolist(), self._names
        tokens = [self._tokens[b][i:j] for b, i, j in zip(which, *ranges[:2], strict=True)]
        ids = [self._ids[b][i:j] for b, i, j in zip(which, *ranges[2:], strict=True)]
        sources = [names[code] for code in self._codes[documents].tolist()]
        return np.frombuffer(b"".join(tokens), self.dtype), ids, sources, self._epochs[documents]


def write_ordered(ordered: OrderedTokens, writer: ShardWriter, progress: Callable[[int], object]) -> None:
    """Write the documents of `ordered` in its order, a batch of the writer at a time; `progress` is told how many each time."""
    gather = Gatherer(ordered.stores)
    bases = np.cumsum([0, *(store.documents for store in ordered.stores)])
    order, offsets, first = ordered.order, ordered.offsets, 0
    while first < ordered.documents:
        full = int(np.searchsorted(offsets, offsets[first] + writer.room))
        behind = min(max(full, first + 1), first + BATCH_DOCUMENTS, ordered.documents)
        rows = slice(first, behind)
        tokens, ids, sources, epochs = gather(bases[order.source[rows]] + order.document[rows])
        lengths = np.diff(offsets[first : behind + 1])
        writer.extend(tokens, lengths, ids, sources, epochs + order.epoch[rows])
        progress(behind - first)
        first = behind

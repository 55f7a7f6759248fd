"""Write the documents of memory-mapped token shards in any order, in bulk.

A global shuffle reads every document from another place, so the cost is waiting for memory. numpy computes the
positions of a whole batch at once; one `bytes.join` over views of the mapped files copies the tokens, another
the ids. The alternatives are slower: numpy's `take` copies token by token and needs an index for each, Arrow's
joins concatenate all files first, and what a numba loop saves is about what it takes to load. Cost:
tests/bench/mix_speed.md. Memory: one batch of tokens (shards/writer.py), and 20 bytes for each document of the
sources.
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


class DocumentGatherer:
    """Copies documents of several stores with the same tokenizer.

    Documents are numbered through all stores: those of the second follow those of the first. The number after
    the last document stands for `padding`.
    """

    def __init__(self, stores: Sequence[TokenStore], padding: Tokens) -> None:
        names: dict[str, int] = {}
        codes, epochs, rows, starts, id_starts = [], [], [], [], []
        marks = [store.json_marks for store in stores]
        json_marks = [np.zeros(s.documents, np.uint8) if m is None else m for s, m in zip(stores, marks, strict=True)]
        json_marks.append(np.zeros(1, np.uint8))
        self._json_marks = np.concatenate(json_marks) if any(m is not None for m in marks) else None
        self._tokens: list[memoryview] = []  # of each batch, as bytes
        self._ids: list[memoryview] = []
        for store in stores:
            table = [names.setdefault(name, len(names)) for name in store.sources]
            codes.append(np.array(table, np.int32)[store.codes])
            first = 0
            for tokens, ids, epoch in store.batches():
                offsets = store.offsets[first : first + len(ids) + 1]
                starts.append((offsets - offsets[0]) * tokens.itemsize)
                id_offsets, content = string_data(ids)
                id_starts.append(id_offsets)
                self._tokens.append(tokens.view(np.uint8).data)
                self._ids.append(content.data)
                epochs.append(np.zeros(len(ids), np.int32) if epoch is None else as_numpy(epoch))
                rows.append(len(ids))
                first += len(ids)
        codes.append(np.array([names.setdefault(PADDING_SOURCE, len(names))], np.int32))
        starts.append(np.array([0, padding.nbytes]))
        id_starts.append(np.zeros(2, np.int32))
        epochs.append(np.zeros(1, np.int32))
        self._tokens.append(padding.view(np.uint8).data)
        self._ids.append(memoryview(b""))
        self._dtype = stores[0].dtype
        self._names = list(names)
        self._firsts = np.cumsum([0, *rows])  # first document of each batch
        self._codes, self._epochs, self._starts, self._id_starts = map(
            np.concatenate, (codes, epochs, starts, id_starts)
        )

    def __call__(
        self, documents: Numbers, start: Numbers | int, size: Numbers
    ) -> tuple[Tokens, pa.StringArray, SourceCodes, NDArray[np.int32], NDArray[np.uint8] | None]:
        """Gather `documents` [n]: `size` [n] tokens of each, from its token `start` on.

        Returns the token ids, flat; the document ids; the sources; the epoch of each document [n]; and which ids
        and sources are not text [n] (None: all are).
        """
        batch = np.searchsorted(self._firsts, documents, side="right") - 1
        index = documents + batch  # a batch has one offset more than documents: the end of its last one
        width = self._dtype.itemsize
        tokens = _join_spans(self._tokens, batch, self._starts[index] + start * width, size * width)
        id_start = self._id_starts[index]
        lengths = self._id_starts[index + 1] - id_start
        ids = string_array(lengths, _join_spans(self._ids, batch, id_start, lengths))
        sources = self._codes[documents], self._names
        json_marks = None if self._json_marks is None else self._json_marks[documents]
        return np.frombuffer(tokens, self._dtype), ids, sources, self._epochs[documents], json_marks


def _join_spans(content: list[memoryview], batch: Numbers, start: Numbers, size: Numbers) -> bytes:
    spans = zip(batch.tolist(), start.tolist(), (start + size).tolist(), strict=True)
    return b"".join([content[i][a:b] for i, a, b in spans])


def write_ordered(ordered: OrderedTokens, writer: ShardWriter, progress: Callable[[int], object]) -> None:
    """Write the documents of `ordered` in its order, one writer batch at a time.

    `progress` is called with the number of documents in each batch.
    """
    gather = DocumentGatherer(
        ordered.stores, np.full(ordered.sequence_length or 0, ordered.tokenizer.eos_id, ordered.dtype)
    )
    # Padding has source -1, which here reads the last base: the number after the last document.
    bases = np.cumsum([0, *(store.documents for store in ordered.stores)])
    order, offsets, first = ordered.order, ordered.offsets, 0
    while first < ordered.documents:
        full = int(np.searchsorted(offsets, offsets[first] + writer.batch_room))
        stop = min(max(full, first + 1), first + BATCH_DOCUMENTS, ordered.documents)
        rows = slice(first, stop)
        sizes = np.diff(offsets[first : stop + 1])
        documents = bases[order.source[rows]] + order.document[rows]
        start = 0 if order.start is None else order.start[rows]
        tokens, ids, sources, epochs, json_marks = gather(documents, start, sizes)
        writer.extend(tokens, sizes, ids, sources, epochs + order.epoch[rows], json_marks=json_marks)
        progress(stop - first)
        first = stop

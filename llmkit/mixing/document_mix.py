"""Mix documents (JSON lines, Parquet): read the sources of a `MixRequest` into a pool, resolve the order, write
the lines.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from llmkit.engine.local import Local
from llmkit.io.documents import DocumentReader
from llmkit.io.inputs import STDIN
from llmkit.io.record import Input
from llmkit.lineage.formats import describe_input
from llmkit.mixing.document_pool import CountTokens, DocumentPool, MeasuredChunk, measure_chunk
from llmkit.mixing.order import Order, copies_by_count, resolve_order
from llmkit.mixing.plan import Plan, PlannedSource
from llmkit.mixing.request import MixRequest, Warn, refuse_duplicate_sources, token_budgets
from llmkit.mixing.statistics import mix_counts, tokens_per_pass


class DocumentMix:
    """A mix of documents: call `read` for each source in turn, then `resolve`, then `write`.

    `count` gives the tokens of texts; `field` names the field with the count that `weight_map` refers to. After
    `resolve`, `order` is the training order and `counts` its statistics (mixing/statistics.py).
    """

    order: Order
    counts: dict[str, Any]

    def __init__(self, request: MixRequest, count: CountTokens, field: str | None) -> None:
        self.request, self._count, self._field = request, count, field
        self.inputs: list[Input] = []
        self._pool = DocumentPool()
        self._lengths: list[Any] = []
        self._bad = Counter[str]()

    def read(self, path: str, reader: DocumentReader, jobs: int, advance: Callable[[int], object]) -> None:
        """Read a source into the pool; `advance` is called with the number of documents in each chunk."""

        def measured() -> Iterator[MeasuredChunk]:
            work = partial(measure_chunk, options=reader.options, count=self._count, field=self._field)
            for chunk in Local(jobs).map(work, reader):
                reader.accept(chunk.bad)
                advance(len(chunk.sizes))
                yield chunk

        self._lengths.append(self._pool.add(measured()))
        self._bad.update(reader.counts())
        if path != STDIN and os.path.isdir(path):
            self.inputs.append(describe_input(path))
        else:
            self.inputs += reader.inputs

    def resolve(self, warn: Warn) -> None:
        """Resolve the order. `warn` is called with each warning. Raises UsageError where the request cannot be met."""
        request, lengths = self.request, self._lengths
        digests = [item.digest for item in self.inputs]
        refuse_duplicate_sources(request.paths, digests)
        copies = [copies_by_count(request.weight_map, counts) if self._field else None for counts in self._pool.counts]
        budgets = token_budgets(request, tokens_per_pass(lengths, copies), warn)
        sources = tuple(PlannedSource(*fields) for fields in zip(request.paths, digests, budgets, strict=True))
        self.order = resolve_order(Plan(sources, request.seed, shuffle=request.shuffle), lengths, copies)
        self.counts = mix_counts(request, self.order, lengths, copies, warn)
        self.counts |= self._bad

    def write(self, writer: Any, advance: Callable[[int], object]) -> None:
        """Write the lines in order to a document writer; `advance` is called with the number of lines in each block."""
        for block, lines in self._pool.blocks(self.order):
            writer.write(block)
            advance(lines)

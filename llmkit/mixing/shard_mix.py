"""Mix token shards: resolve the order of a `MixRequest`, then write it as shards or as a plan."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmkit.errors import LlmkitError
from llmkit.io.atomic import atomic_file
from llmkit.io.record import Lineage
from llmkit.io.sealed_file import BYTES, PENDING, filled
from llmkit.lineage.outputs import artefact_directory
from llmkit.mixing.gather import write_ordered
from llmkit.mixing.holdout import held_out_documents
from llmkit.mixing.order import OrderedTokens, copies_per_pass
from llmkit.mixing.plan import PLAN_NAME, Plan, PlannedSource, digest_plan, format_plan
from llmkit.mixing.request import MixRequest, Warn, refuse_duplicate_sources, token_budgets
from llmkit.mixing.statistics import lineage_counts, mix_counts, tokens_per_pass
from llmkit.shards.reader import TokenStore
from llmkit.shards.writer import ShardWriter

HELD_OUT = "heldout"  # directory of the held-out documents, inside the output

Progress = Callable[[int, str], AbstractContextManager[Any]]  # (total, unit) to a progress bar


class ShardMix:
    """A resolved mix of token shards.

    `ordered` is the mix in training order, `plan` what determines it, `counts` its statistics (mixing/statistics.py).
    """

    def __init__(self, request: MixRequest, warn: Warn) -> None:
        """Open the sources and resolve their order. `warn` is called with each warning.

        Raises UsageError or LlmkitError where the request cannot be met.
        """
        paths, ranges = request.paths, request.weight_map
        self.stores = [TokenStore.open(path) for path in paths]
        digests = [store.inputs[0].digest for store in self.stores]
        refuse_duplicate_sources(paths, digests)
        if ranges and all(store.duplicates is None for store in self.stores):
            raise LlmkitError(f"{paths[0]}: its shards hold no duplicate counts", "tokenize with --keep-duplicates")
        held_out = self._held_out(request.holdout, warn)
        copies = [
            copies_per_pass(store, documents, ranges) for store, documents in zip(self.stores, held_out, strict=True)
        ]
        lengths = [np.diff(store.offsets) for store in self.stores]
        budgets = token_budgets(request, tokens_per_pass(lengths, copies), warn)
        self.plan = Plan(
            tuple(PlannedSource(*fields) for fields in zip(paths, digests, budgets, held_out, strict=True)),
            request.seed,
            self.stores[0].tokenizer.digest,
            request.shuffle,
            request.sequence_length if request.packing == "best-fit" else None,
            ranges,
            request.cut_last,
        )
        self.inputs = [item for store in self.stores for item in store.inputs]
        self.ordered = OrderedTokens(self.plan, self.stores, self.inputs)
        packed = self.ordered.order if self.plan.sequence_length else None
        self.counts = mix_counts(request, self.ordered.unpacked, lengths, copies, warn, packed)
        if self.ordered.padding is not None:
            self.counts["padding"] = self.ordered.tokens - self.counts["tokens"]
        if request.cut_last:
            self.counts["cut"] = self._cut_documents(lengths)
        if request.holdout:
            self.counts["held_out"] = sum(map(len, held_out))

    def _cut_documents(self, lengths: Sequence[NDArray[np.int64]]) -> list[str]:
        """The pieces that --cut-last left, each as "ID: tokens 0 to 17 of 50"."""
        order, pieces = self.ordered.unpacked, []
        assert order.start is not None
        for i, store in enumerate(self.stores):
            rows = np.flatnonzero(order.source == i)
            for row in rows[order.size[rows] < lengths[i][order.document[rows]]].tolist():
                document, start = int(order.document[row]), int(order.start[row])
                span = f"tokens {start:,} to {start + int(order.size[row]):,} of {int(lengths[i][document]):,}"
                pieces.append(f"{store.id(document)}: {span}")
        return pieces

    def _held_out(self, fraction: float, warn: Warn) -> Sequence[tuple[int, ...]]:
        """Held-out documents of each source."""
        if not fraction:
            return [()] * len(self.stores)
        held_out = held_out_documents(self.stores, fraction)
        if not any(held_out):
            documents = sum(store.documents for store in self.stores)
            warn(f"nothing is held out: none of {documents:,} documents falls into the fraction {fraction:.3g}")
        return held_out

    def write_shards(
        self, output: str | None, new_lineage: Callable[[], Lineage], progress: Progress, *, force: bool
    ) -> None:
        """Write the tokens in training order: a directory, a .arrow file, or stdout (None).

        LlmkitError where a source is damaged; a plan leaves that check to the run that follows it.
        """
        self.ordered.verify()
        with ShardWriter(
            output,
            self.ordered.tokenizer,
            new_lineage(),
            force=force,
            epochs=True,
            sequence_length=self.plan.sequence_length,
            stages=self.ordered.stages,
        ) as writer:
            with progress(self.ordered.documents, "documents") as bar:
                write_ordered(self.ordered, writer, bar.advance)
            writer.finish(lineage_counts(self.counts), self.inputs)
            self._write_held_out(writer.directory, new_lineage)

    def write_plan(self, output: str | None, new_lineage: Callable[[], Lineage], *, force: bool) -> None:
        """Write the plan: a .toml file, a directory that holds plan.toml, or stdout (None)."""
        lineage = new_lineage()
        lineage.inputs += self.inputs
        lineage.counts, lineage.digest = lineage_counts(self.counts), digest_plan(self.plan)

        def text(directory: str) -> bytes:
            base = os.path.realpath(directory)
            sources = [replace(s, path=os.path.relpath(os.path.realpath(s.path), base)) for s in self.plan.sources]
            record = lineage.to_dict() | {BYTES: PENDING}
            return filled(format_plan(replace(self.plan, sources=tuple(sources)), record).encode())

        if output is None:
            sys.stdout.buffer.write(text("."))
            sys.stdout.buffer.flush()
        elif output.endswith(".toml"):
            with atomic_file(output, force) as sink:
                sink.write(text(os.path.dirname(output) or "."))
        else:
            with artefact_directory(output, force) as directory:
                (directory / PLAN_NAME).write_bytes(text(output))
                self._write_held_out(directory, new_lineage)

    def _write_held_out(self, directory: Path | None, new_lineage: Callable[[], Lineage]) -> None:
        """Write the held-out documents, if any, as token shards in the directory of the mix."""
        documents = sum(len(source.held_out) for source in self.plan.sources)
        if not documents:
            return
        assert directory
        lineage = new_lineage()
        lineage.part = HELD_OUT
        with ShardWriter(str(directory / HELD_OUT), self.stores[0].tokenizer, lineage) as writer:
            for store, source in zip(self.stores, self.plan.sources, strict=True):
                names, json_marks = store.sources, store.json_marks
                for i in source.held_out:
                    mark = 0 if json_marks is None else int(json_marks[i])
                    writer.write(store.document(i), store.id(i), names[store.codes[i]], json_mark=mark)
            writer.finish({"documents": documents}, self.inputs)

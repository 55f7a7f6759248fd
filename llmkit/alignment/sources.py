"""Sources of rows with amounts, as `mix` takes them: how often each row is in each epoch.

    llmkit sft MODEL web.jsonl:0.7 code.jsonl:0.3 hard.jsonl:x2 chat.jsonl:50k rules.jsonl -o RUN

Amounts are in tokens of encoded rows, and of one epoch: a weight (scaled until the first source that has one is
exhausted, so that none is repeated), a multiplier, a budget; without one, the whole source once (mixing/specs.py).

An epoch takes as many whole passes over a source as its amount holds, and of the remaining tokens a subset: the rows
are laid in a circle, in the order of a hash of (seed, content of the source, number of the row), and epoch e takes
those whose middle is in the e-th arc of that many tokens. Epochs thus take other rows until all had their turn, none
twice before; rows stay whole, and what an epoch takes too much of the next takes less. It is a function of seed,
source and rows alone. All rows of an epoch are then shuffled together (training/data.py, alignment/pairs.py).
"""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llmkit.alignment.row_cache import RowCache
from llmkit.chat.encode import EncodedDataset, RowEncoding
from llmkit.errors import LlmkitError, UsageError
from llmkit.io.inputs import STDIN, is_remote
from llmkit.io.record import Input
from llmkit.lineage.formats import describe_input
from llmkit.mixing.order import permutation
from llmkit.mixing.request import refuse_duplicate_sources
from llmkit.mixing.specs import SourceSpec, parse_spec, source_budgets
from llmkit.seeds import derive
from llmkit.training.inputs import open_rows, row_inputs

if TYPE_CHECKING:
    from llmkit.io.documents import DocumentReader
    from llmkit.training.runner import Request
    from llmkit.training.session import Session

Numbers = NDArray[np.int64]
MOST_ROWS = 1 << 26  # of a source in all epochs, repeats included
MISSED = 0.01  # of an amount, over the whole run: more is worth a warning


@dataclass(frozen=True, slots=True)
class RowSource:
    """Files of rows, and how much of them an epoch takes; `spec` is None where no source has an amount."""

    files: list[str]
    spec: SourceSpec | None = None


def row_specs(named: Sequence[str]) -> list[SourceSpec]:
    """The sources that a call names; empty where none has an amount. A source without one is taken once.

    Raises UsageError for an invalid amount, and for a source that is a pattern, or stdin twice.
    """
    specs = [parse_spec(text) for text in named]
    if not any(spec.suffix for spec in specs):
        return []
    if [spec.path for spec in specs].count(STDIN) > 1:
        raise UsageError("stdin ('-') is named more than once", "it can be read only once")
    for spec in specs:
        if glob.has_magic(spec.path) and not os.path.exists(spec.path):
            raise UsageError(f"{spec.path}: a pattern is not one source", "name the directory, or each file")
    return [spec if spec.suffix else replace(spec, kind="times") for spec in specs]


def row_sources(named: Sequence[str], expand: Callable[[list[str] | None], list[str]]) -> list[RowSource]:
    """The sources that a call names; `expand` returns the files that paths stand for (of the whole call, for None)."""
    specs = row_specs(named)
    return [RowSource(expand([spec.path]), spec) for spec in specs] or [RowSource(expand(None))]


@dataclass
class RowMixture:
    """The encoded rows of all sources. `epochs`: the numbers of the rows (or pairs) that each takes, or None for all.
    `shares` is a table row for each source with an amount.
    """

    encoded: EncodedDataset
    inputs: list[Input]
    epochs: list[Numbers] | None = None
    shares: list[dict[str, Any]] = field(default_factory=list)

    @property
    def counts(self) -> dict[str, Any]:
        """Counts for the summary."""
        return self.encoded.counts | ({"sources": self.shares} if self.shares else {})


def read_sources(
    request: Request,
    session: Session,
    sources: Sequence[RowSource],
    encoding: RowEncoding,
    epochs: int,
    cache: RowCache | None = None,
) -> RowMixture:
    """Read and encode all sources, decide what each epoch takes, and record the amounts in the lineage.

    Raises LlmkitError where a source, or the whole, holds no rows, and UsageError where one is named twice.
    """
    whole, inputs, datasets, digests = EncodedDataset(), list[Input](), list[EncodedDataset](), list[str]()
    for source in sources:
        reader = open_rows(request, session, source.files, stdin=not source.files or STDIN in source.files)
        datasets.append(encoded_rows(reader, encoding, cache))
        own = row_inputs(reader)
        if source.spec is not None and len(source.files) > 1:
            if is_remote(source.spec.path):
                raise UsageError(f"{source.spec.path}: an amount is for one file", "name each file with its amount")
            own = [describe_input(source.spec.path)]
        inputs += own
        digests += [item.digest for item in own]
    specs = [source.spec for source in sources if source.spec is not None]
    for dataset in datasets:
        whole.extend(dataset)
    mixture = RowMixture(whole, inputs)
    if specs:
        request.record.options["specs"] = ["", *(spec.suffix for spec in specs)]  # the first input is the model
        refuse_duplicate_sources([spec.path for spec in specs], digests)
        if len(weighted := [spec for spec in specs if spec.kind == "weight"]) == 1:
            (spec,) = weighted
            request.warn(
                f"{spec.path}{spec.suffix}: a single weight takes the whole source; {spec.path}:x0.5 takes half"
            )
        for spec, dataset in zip(specs, datasets, strict=True):
            if not dataset.rows:
                raise LlmkitError(f"{spec.path}: no rows to train on", "leave this source out, or see --too-long")
        lengths = [_lengths(dataset, encoding.together) for dataset in datasets]
        seeds = [derive(request.seed, "rows", digest) for digest in digests]
        _take(mixture, specs, lengths, seeds, epochs, request.warn)
        _leave_out_untaken(mixture, encoding.together)
    encoding.refuse_empty(whole)
    if not specs:
        _check_number(1, len(whole.rows) // encoding.together, epochs)
    return mixture


def encoded_rows(reader: DocumentReader, encoding: RowEncoding, cache: RowCache | None) -> EncodedDataset:
    """Every row of `reader`, by way of a cache if there is one."""
    return encoding.dataset(cache.read(reader, encoding)) if cache else encoding.read(reader)


def _lengths(dataset: EncodedDataset, together: int) -> Numbers:
    """Tokens of each row, or of both rows of each pair."""
    return np.array([len(row.tokens) for row in dataset.rows], np.int64).reshape(-1, together).sum(axis=1)


def _take(
    mixture: RowMixture,
    specs: Sequence[SourceSpec],
    lengths: Sequence[Numbers],
    seeds: Sequence[int],
    epochs: int,
    warn: Callable[[str], None],
) -> None:
    """Enter what each epoch takes, and what it comes to."""
    budgets = source_budgets(specs, [int(sizes.sum()) for sizes in lengths], None)
    first = np.cumsum([0, *map(len, lengths)])
    taken = [
        [int(start) + rows for rows in taken_rows(sizes, budget, seed, epochs)]
        for start, sizes, budget, seed in zip(first, lengths, budgets, seeds, strict=False)
    ]
    mixture.epochs = [np.concatenate(rows) for rows in zip(*taken, strict=True)]
    tokens = [int(np.concatenate(lengths)[np.concatenate(rows)].sum()) for rows in taken]
    for spec, sizes, rows, count, budget in zip(specs, lengths, taken, tokens, budgets, strict=True):
        if not count:
            hint = f"its rows have {sizes.mean():,.0f} tokens; ask for more of it, or leave it out"
            raise UsageError(f"{spec.path}{spec.suffix}: {budget:,} tokens are less than half a row", hint)
        goal = budget * epochs
        if abs(count - goal) > goal * MISSED:
            warn(f"{spec.path}: {count:,} tokens instead of {goal:,} ({count / goal - 1:+.1%}): rows stay whole")
        if spec.kind == "tokens" and budget > sizes.sum():
            passes = budget / int(sizes.sum())
            warn(
                f"{spec.path} holds {sizes.sum():,} tokens and gives {budget:,}: repeated, {passes:.2f} passes an epoch"
            )
        mixture.shares.append(
            {
                "source": spec.path,
                "rows": sum(map(len, rows)),
                "tokens": count,
                "share": round(count / sum(tokens), 4),
                "passes": round(count / int(sizes.sum()), 3),
            }
        )


def taken_rows(lengths: Numbers, budget: int, seed: int, epochs: int) -> list[Numbers]:
    """The rows of a source that each epoch takes, int64 [n] with repeats, for `budget` tokens an epoch (to within a
    row, and in all epochs together to within half of one).
    """
    passes, rest = divmod(budget, int(lengths.sum()))
    _check_number(passes + 1, len(lengths), epochs)
    circle = permutation(seed, len(lengths))
    sizes = lengths[circle]
    middles, around = 2 * np.cumsum(sizes) - sizes, 2 * int(sizes.sum())  # in half tokens
    whole = np.tile(np.arange(len(lengths)), passes)
    arcs = ((middles - 2 * rest * epoch) % around < 2 * rest for epoch in range(epochs))
    return [np.concatenate((whole, np.sort(circle[arc]))) for arc in arcs]


def _check_number(passes: int, rows: int, epochs: int) -> None:
    if passes * rows * epochs > MOST_ROWS:
        what = f"{passes:,} passes over {rows:,} rows in each of {epochs:,} epochs"
        raise UsageError(f"{what}: more than {MOST_ROWS:,} rows", "ask for less of this source, or for fewer --epochs")


def _leave_out_untaken(mixture: RowMixture, together: int) -> None:
    """Drop the rows that no epoch takes, which need no memory and no reference."""
    assert mixture.epochs is not None
    used = np.unique(np.concatenate(mixture.epochs))
    rows = mixture.encoded.rows
    mixture.encoded.rows = [rows[together * int(i) + side] for i in used for side in range(together)]
    mixture.epochs = [np.searchsorted(used, rows) for rows in mixture.epochs]

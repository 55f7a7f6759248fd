"""Training order: the order of documents is a pure function of (sources, budgets, seed).

Each source is an endless sequence of documents: pass after pass over it ("epochs"), each in an order of its
own. The stages of a mix take documents from it, one stage after another, until their token budgets are met; the
last document of a stage is taken only if that brings the total closer to the budget; with `cut_last` it is cut, and
the next stage starts with the rest. Within a stage the sources are interleaved by progress: the position of a
document is (tokens of its source before it + a random part of its own length) / tokens taken from that source. Any
stretch of the order therefore holds the shares of the whole, to within one document per source.

`shuffle` decides the order of a pass: global, a seeded permutation of the documents; block, a permutation of
blocks of 2^18 tokens, each read in its stored order; none, the stored order. A document with several copies
occurs that often in a pass, evenly spread; one with no copies is left out, which is how held-out documents are
excluded. Permutations sort splitmix64 hashes, so they do not depend on the version of any library. With a
sequence length the result is packed by best fit (mixing/packing.py).

`OrderedTokens.open` follows a plan (mixing/plan.py) without writing its tokens anywhere, in exactly the order
in which `mix` would write them. Memory: 32 bytes per document of the order, twice that where it is packed,
about 100 while it is computed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmkit.errors import LlmkitError
from llmkit.io.inputs import STDIN
from llmkit.io.record import Input
from llmkit.lineage.formats import describe_input
from llmkit.mixing.holdout import mix64
from llmkit.mixing.packing import pack_sequences
from llmkit.mixing.plan import PLAN_NAME, Plan, locate_source, read_plan
from llmkit.seeds import derive
from llmkit.shards.arrow import Tokens
from llmkit.shards.reader import TokenStore
from llmkit.shards.shard import PADDING_SOURCE
from llmkit.shards.tokenizer_info import TokenizerInfo

MAX_DOCUMENTS = 1 << 31
MAX_PASSES = 1 << 16
BLOCK_TOKENS = 1 << 18  # block size of --shuffle block

Numbers = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Order:
    """Rows in training order: source index int32 [n], document in it int64 [n], epoch int32 [n], size in tokens
    int64 [n].

    The epoch is the number of times that the document occurred before. Stage i ends before row `ends[i]`. In a
    packed order a row is a document, a piece of one that begins at its token `start` int64 [n], or padding
    (source -1). Pieces also come from `cut_last`.
    """

    source: NDArray[np.int32]
    document: Numbers
    epoch: NDArray[np.int32]
    size: Numbers
    ends: Numbers
    start: Numbers | None = None


def _hashes(seed: int, count: int) -> NDArray[np.uint64]:
    """splitmix64 of seed and position, uint64 [count]."""
    return mix64(np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed))


def permutation(seed: int, count: int) -> NDArray[np.int64]:
    """A permutation of 0 to count - 1 that is the same on every machine."""
    return np.argsort(_hashes(seed, count), kind="stable")


def pass_order(seed: int, shuffle: str, lengths: Numbers, copies: Numbers | None) -> tuple[Numbers, NDArray[np.int32]]:
    """Documents of one pass over a source, in order, and how often each occurred earlier in this pass."""
    if shuffle == "global":
        order = permutation(seed, len(lengths))
    elif shuffle == "block":
        blocks = (np.cumsum(lengths) - lengths) // BLOCK_TOKENS
        order = np.argsort(_hashes(seed, int(blocks.max(initial=0)) + 1)[blocks], kind="stable")
    else:
        order = np.arange(len(lengths))
    if copies is None:
        return order, np.zeros(len(order), np.int32)
    times = copies[order]
    nth = np.arange(int(times.sum())) - np.repeat(np.cumsum(times) - times, times)
    if times.max(initial=0) > 1:  # copy c of the document at fraction r of the pass goes to (c + r) / copies
        position = (nth + np.repeat(np.arange(len(order)) / len(order), times)) / np.repeat(times, times)
        spread = np.argsort(position, kind="stable")
        return np.repeat(order, times)[spread], nth[spread].astype(np.int32)
    return np.repeat(order, times), nth.astype(np.int32)


def take_documents(
    lengths: Numbers,
    budgets: Sequence[int],
    seed: int,
    shuffle: str = "global",
    copies: Numbers | None = None,
    *,
    cut_last: bool = False,
) -> tuple[Numbers, NDArray[np.int32], Numbers, Numbers, list[int]]:
    """Documents of one source that meet the budgets of all stages, in order; the epoch of each, the token at which it
    starts and its size; and where each stage ends. With `cut_last` a row may be a piece of a document.
    """
    tokens_per_document = lengths if copies is None else lengths * copies
    total = int(tokens_per_document.sum())
    passes, remainder = divmod(sum(budgets), total)
    documents_per_pass = len(lengths) if copies is None else int(copies.sum())
    if passes > MAX_PASSES or (passes + 1) * documents_per_pass > MAX_DOCUMENTS:
        raise LlmkitError(f"{passes + 1:,} passes over a source of {total:,} tokens", "ask for fewer tokens of it")
    documents, epochs = [np.zeros(0, np.int64)], [np.zeros(0, np.int32)]
    for epoch in range(passes + (remainder > 0)):
        document, seen = pass_order(derive(seed, epoch), shuffle, lengths, copies)
        if epoch == passes:
            sizes = lengths[document]
            reached = int(np.searchsorted(np.cumsum(sizes), remainder)) + 1
            document = document[: reached if cut_last else _nearest(sizes, remainder)]
        documents.append(document)
        epochs.append((epoch * (1 if copies is None else copies[document]) + seen[: len(document)]).astype(np.int32))
    taken, seen = np.concatenate(documents), np.concatenate(epochs)
    sizes, goals = lengths[taken], np.cumsum(budgets)
    if not cut_last:
        ends = [_nearest(sizes, int(goal)) for goal in goals[:-1]]
        return taken, seen, np.zeros(len(taken), np.int64), sizes, [*ends, len(taken)]
    stops = np.cumsum(sizes)
    cuts = np.union1d(stops, goals)  # where a document or a stage ends
    cuts = cuts[(cuts > 0) & (cuts <= goals[-1])]
    begins = np.concatenate(([0], cuts[:-1]))
    row = np.searchsorted(stops, begins, side="right")
    return (
        taken[row],
        seen[row],
        begins - (stops - sizes)[row],
        cuts - begins,
        np.searchsorted(cuts, goals, side="right").tolist(),
    )


def _nearest(sizes: Numbers, tokens: int) -> int:
    """Number of leading documents whose total is closest to `tokens`; the smallest where several are equally close."""
    return int(np.argmin(np.abs(np.concatenate(([0], np.cumsum(sizes))) - tokens)))


def resolve_order(plan: Plan, lengths: Sequence[Numbers], copies: Sequence[Numbers | None] | None = None) -> Order:
    """The order of `plan`.

    `lengths` are the documents' lengths in tokens by source, `copies` how often each occurs in a pass (None: once).
    """
    seen: Counter[str] = Counter()
    taken = []
    for i, (source, counts) in enumerate(zip(plan.sources, lengths, strict=True)):
        # Seeded by content, not by name or position, so that adding a source does not change the others' order.
        seed = derive(plan.seed, "mix", source.digest, seen[source.digest])
        seen[source.digest] += 1
        per_document = copies[i] if copies else None
        if sum(source.tokens) and not (counts if per_document is None else counts * per_document).sum():
            raise LlmkitError(f"{source.path}: no tokens in this source", "leave it out")
        empty = np.zeros(0, np.int64)
        documents, epochs, starts, lengths_taken, ends = (
            take_documents(counts, source.tokens, seed, plan.shuffle, per_document, cut_last=plan.cut_last)
            if sum(source.tokens)
            else (empty, np.zeros(0, np.int32), empty, empty, [0] * len(source.tokens))
        )
        jitter = (_hashes(derive(seed, "place"), len(documents)) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        taken.append((documents, epochs, starts, lengths_taken, jitter, [0, *ends]))
    stages = []
    for stage in range(len(plan.sources[0].tokens)):
        columns, positions = [], []
        for i, (documents, epochs, starts, sizes, jitter, ends) in enumerate(taken):
            rows = slice(ends[stage], ends[stage + 1])
            size = sizes[rows]
            positions.append((np.cumsum(size) - size + jitter[rows] * size) / max(int(size.sum()), 1))
            columns.append((np.full(len(size), i, np.int32), documents[rows], epochs[rows], size, starts[rows]))
        order = np.argsort(np.concatenate(positions), kind="stable")
        stages.append([np.concatenate(column)[order] for column in zip(*columns, strict=True)])
    stage_ends = np.cumsum([len(stage[0]) for stage in stages])
    source_of, document, epoch, size, start = map(np.concatenate, zip(*stages, strict=True))
    return Order(source_of, document, epoch, size, stage_ends, start if plan.cut_last else None)


def pack_order(order: Order, length: int) -> Order:
    """The same documents, packed by best fit into sequences of `length` positions."""
    row, start, size, ends = pack_sequences(order.size, order.ends, length)
    padding = row < 0
    return Order(
        np.where(padding, np.int32(-1), order.source[row]),
        np.where(padding, 0, order.document[row]),
        np.where(padding, np.int32(0), order.epoch[row]),
        size,
        ends,
        start if order.start is None else start + np.where(padding, 0, order.start[row]),
    )


def copies_by_count(ranges: Sequence[tuple[int, int]], counts: Numbers) -> Numbers:
    """How often documents with these counts occur in a pass, given (first count, copies) of ascending ranges;
    without ranges, once.
    """
    first, times = np.array(ranges or [(1, 1)], np.int64).T
    return np.asarray(times)[np.maximum(np.searchsorted(first, counts, side="right") - 1, 0)]


def copies_per_pass(
    store: TokenStore, held_out: Sequence[int], ranges: Sequence[tuple[int, int]] = ()
) -> Numbers | None:
    """How often each document of a store occurs in a pass, by its duplicates; None where all occur once.

    Held-out documents and padding from an earlier packing have 0 copies.
    """
    if not held_out and store.padding is None and not ranges:
        return None
    counts = store.duplicates if ranges else None
    copies = copies_by_count(ranges, np.ones(store.documents, np.int64) if counts is None else counts)
    copies[list(held_out)] = 0
    if store.padding is not None:
        copies[store.padding] = 0
    return copies


class OrderedTokens:
    """Documents of several stores in the order of a plan, with the interface of `TokenStore`. Tokens are copied
    only on access.
    """

    def __init__(self, plan: Plan, stores: list[TokenStore], inputs: list[Input]) -> None:
        """`stores` are the plan's sources. Raises LlmkitError where a content or tokenizer differs from the plan."""
        for source, store in zip(plan.sources, stores, strict=True):
            if [item.digest for item in store.inputs] != [source.digest]:
                raise LlmkitError(
                    f"{source.path}: not the shards that the plan was made for",
                    "their content changed: run mix again",
                )
            if (last := max(source.held_out, default=-1)) >= store.documents:
                raise LlmkitError(
                    f"{source.path}: document {last} is held out, but there are only {store.documents}", "run mix again"
                )
        first = stores[0]
        for source, store in zip(plan.sources, stores, strict=True):
            if (store.tokenizer.digest, store.tokenizer.eos_id) != (first.tokenizer.digest, first.tokenizer.eos_id):
                raise LlmkitError(
                    f"{source.path}: made with another tokenizer than {plan.sources[0].path}",
                    "tokenize all sources with the same one",
                )
            if store.dtype != first.dtype:
                raise LlmkitError(
                    f"{source.path}: {store.dtype} tokens, but {first.dtype} in {plan.sources[0].path}",
                    "tokenize all sources with the same llmkit",
                )
        self.plan = plan
        self.stores = stores
        self.inputs = inputs
        self.sequence_length = plan.sequence_length
        copies = [
            copies_per_pass(store, source.held_out, plan.weight_map)
            for source, store in zip(plan.sources, stores, strict=True)
        ]
        self.unpacked = resolve_order(plan, [np.diff(store.offsets) for store in stores], copies)
        self.order = pack_order(self.unpacked, plan.sequence_length) if plan.sequence_length else self.unpacked
        self.offsets: NDArray[np.int64] = np.concatenate((np.zeros(1, np.int64), np.cumsum(self.order.size)))

    @classmethod
    def open(cls, path: str, *, spool: Path | None = None) -> OrderedTokens | TokenStore:
        """Open shards or a stream ("-") in stored order, or a plan (.toml, or a directory with plan.toml)."""
        file = Path(path)
        if path != STDIN and (file / PLAN_NAME).is_file():
            file = file / PLAN_NAME
        elif path == STDIN or file.suffix != ".toml":
            return TokenStore.open(path, spool=spool)
        plan = read_plan(file)
        stores = [TokenStore.open(str(locate_source(file, source))) for source in plan.sources]
        if any(store.tokenizer.digest != plan.tokenizer for store in stores):
            raise LlmkitError(f"{file}: its sources were made with another tokenizer", "run mix again")
        return cls(plan, stores, [describe_input(path)])

    def verify(self) -> None:
        """LlmkitError where a shard is damaged; reads all of them."""
        for store in self.stores:
            store.verify()

    @property
    def tokenizer(self) -> TokenizerInfo:
        return self.stores[0].tokenizer

    @property
    def documents(self) -> int:
        return len(self.order.document)

    @property
    def tokens(self) -> int:
        return int(self.offsets[-1])

    @property
    def dtype(self) -> Any:
        return self.stores[0].dtype

    @property
    def sources(self) -> list[str]:
        return sorted({name for store in self.stores for name in store.sources})

    @property
    def stages(self) -> list[int]:
        """Tokens after which each stage of the mix ends; the last is the total."""
        return [int(self.offsets[end]) for end in self.order.ends]

    @property
    def padding(self) -> NDArray[np.bool_] | None:
        """Which rows are padding, bool [documents]; None where the order is not packed."""
        return self.order.source < 0 if self.sequence_length else None

    def _locate(self, i: int) -> tuple[TokenStore, int] | None:
        """Store of row `i`, and its document there; None for padding."""
        if not 0 <= i < self.documents:
            raise IndexError(f"document {i} of {self.documents}")
        source = int(self.order.source[i])
        return None if source < 0 else (self.stores[source], int(self.order.document[i]))

    def document(self, i: int) -> Tokens:
        """Token ids of row `i`: a document, in a packed order a piece of one, or end-of-text ids as padding."""
        location, size = self._locate(i), int(self.order.size[i])
        if location is None:
            return np.full(size, self.tokenizer.eos_id, self.dtype)
        tokens = location[0].document(location[1])
        return tokens if self.order.start is None else tokens[int(self.order.start[i]) :][:size]

    def id(self, i: int) -> str:
        """Id of document `i`; empty for padding."""
        location = self._locate(i)
        return location[0].id(location[1]) if location else ""

    def source(self, i: int) -> str:
        """Source of document `i`, as named by its shards; PADDING_SOURCE for padding."""
        location = self._locate(i)
        return location[0].source(location[1]) if location else PADDING_SOURCE

    def epoch(self, i: int) -> int:
        """How often document `i` occurred before, passes made by an earlier `mix` included."""
        location = self._locate(i)
        return int(self.order.epoch[i]) + location[0].epoch(location[1]) if location else 0

    def origins(self) -> tuple[NDArray[np.int32], list[str], NDArray[np.int32]]:
        """Source index of each row int32 [documents], the source names (PADDING_SOURCE last), and the epoch
        of each row."""
        names = [*self.sources, PADDING_SOURCE]
        number = {name: i for i, name in enumerate(names)}
        codes, epochs = np.full(self.documents, len(names) - 1, np.int32), self.order.epoch.copy()
        for i, store in enumerate(self.stores):
            rows = np.flatnonzero(self.order.source == i)
            documents, (store_codes, store_names, store_epochs) = self.order.document[rows], store.origins()
            codes[rows] = np.array([number[name] for name in store_names], np.int32)[store_codes[documents]]
            if store_epochs is not None:
                epochs[rows] += store_epochs[documents]
        return codes, names, epochs

    def span(self, start: int, stop: int) -> Tokens:
        """Tokens `start` to `stop` of the flat order: a view where they are in one document, else a copy."""
        if not 0 <= start <= stop <= self.tokens:
            raise IndexError(f"tokens {start} to {stop} of {self.tokens}")
        if start == stop:
            return np.zeros(0, self.dtype)
        first = int(np.searchsorted(self.offsets, start, side="right")) - 1
        last = int(np.searchsorted(self.offsets, stop, side="left"))
        pieces = [self.document(i) for i in range(first, last)]
        pieces[-1] = pieces[-1][: stop - int(self.offsets[last - 1])]
        pieces[0] = pieces[0][start - int(self.offsets[first]) :]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

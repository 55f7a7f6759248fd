"""Training order: which document comes when is a pure function of (sources, budgets, seed).

Every source is an endless line of documents: pass after pass over it ("epochs"), each in an order of its own, from which the stages of a mix
take one after the other until their token budgets are met; the last document of a stage is taken only if the total comes closer to the budget
with it. Within a stage the sources are interleaved by progress: a document stands at (tokens of its source before it + a random part of its own
length) / tokens taken of that source, so any stretch of the order holds the shares of the whole, to within a document a source.

The order of a pass is by `shuffle`: global, a seeded permutation of its documents; block, a permutation of blocks of 2^18 tokens, read as they
are stored; none, the stored order. A document with several copies comes as often in a pass, evenly spread; one with none is left out, which is
how held-out documents stay out. Permutations sort splitmix64 hashes, so no version of any library changes them. With a sequence length the
result is packed by best fit (mixing/packing.py).

`OrderedTokens.open` follows a plan (mixing/plan.py) without writing its tokens anywhere, in the same order, to the bit, as `mix` writes them. Memory:
32 bytes a document of the order, twice that where it is packed, about 100 while it is made.
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
from llmkit.mixing.holdout import mixed
from llmkit.mixing.packing import packed
from llmkit.mixing.plan import PLAN_NAME, Plan, located, read_plan
from llmkit.seeds import derive
from llmkit.shards.arrow import Tokens
from llmkit.shards.reader import TokenStore
from llmkit.shards.shard import PADDING_SOURCE
from llmkit.shards.tokenizer_info import TokenizerInfo

MAX_DOCUMENTS = 1 << 31
MAX_PASSES = 1 << 16
BLOCK_TOKENS = 1 << 18  # what --shuffle block keeps together

Numbers = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Order:
    """Rows in training order: index of the source int32 [n], of the document in it int64 [n], times seen before int32 [n], tokens int64 [n].

    Stage i ends before row `ends[i]`. In a packed order a row is a document, or a piece of one that begins at its token `start` int64 [n], or
    padding (source -1).
    """

    source: NDArray[np.int32]
    document: Numbers
    epoch: NDArray[np.int32]
    size: Numbers
    ends: Numbers
    start: Numbers | None = None


def _hashes(seed: int, count: int) -> NDArray[np.uint64]:
    """splitmix64 of seed and position, uint64 [count]."""
    return mixed(np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed))


def permutation(seed: int, count: int) -> NDArray[np.int64]:
    """0 to count - 1 in a random order that is the same everywhere."""
    return np.argsort(_hashes(seed, count), kind="stable")


def one_pass(seed: int, shuffle: str, lengths: Numbers, copies: Numbers | None) -> tuple[Numbers, NDArray[np.int32]]:
    """Documents of one pass over a source, in order, and how often each came earlier in this pass."""
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
    if times.max(initial=0) > 1:  # copy c of the document at part r of the pass stands at (c + r) / copies
        place = (nth + np.repeat(np.arange(len(order)) / len(order), times)) / np.repeat(times, times)
        spread = np.argsort(place, kind="stable")
        return np.repeat(order, times)[spread], nth[spread].astype(np.int32)
    return np.repeat(order, times), nth.astype(np.int32)


def take(
    lengths: Numbers, budgets: Sequence[int], seed: int, shuffle: str = "global", copies: Numbers | None = None
) -> tuple[Numbers, NDArray[np.int32], list[int]]:
    """Documents of one source that meet the budgets of all stages, in order, how often each was taken before, and where each stage ends."""
    usual = lengths if copies is None else lengths * copies
    total = int(usual.sum())
    passes, rest = divmod(sum(budgets), total)
    a_pass = len(lengths) if copies is None else int(copies.sum())
    if passes > MAX_PASSES or (passes + 1) * a_pass > MAX_DOCUMENTS:
        raise LlmkitError(f"{passes + 1:,} passes over a source of {total:,} tokens", "ask for fewer tokens of it")
    documents, epochs = [np.zeros(0, np.int64)], [np.zeros(0, np.int32)]
    for epoch in range(passes + (rest > 0)):
        document, seen = one_pass(derive(seed, epoch), shuffle, lengths, copies)
        if epoch == passes:
            document = document[: _nearest(lengths[document], rest)]
        documents.append(document)
        epochs.append((epoch * (1 if copies is None else copies[document]) + seen[: len(document)]).astype(np.int32))
    taken = np.concatenate(documents)
    ends = [_nearest(lengths[taken], int(budget)) for budget in np.cumsum(budgets)[:-1]]
    return taken, np.concatenate(epochs), [*ends, len(taken)]


def _nearest(sizes: Numbers, tokens: int) -> int:
    """How many documents come closest to `tokens`; the fewest of those that are equally close."""
    return int(np.argmin(np.abs(np.concatenate(([0], np.cumsum(sizes))) - tokens)))


def resolve(plan: Plan, lengths: Sequence[Numbers], copies: Sequence[Numbers | None] | None = None) -> Order:
    """The order of `plan`, given the length in tokens of every document of each of its sources, and how often each comes in a pass (once)."""
    seen: Counter[str] = Counter()
    taken = []
    for i, (source, counts) in enumerate(zip(plan.sources, lengths, strict=True)):
        # By content, not by name or position, so that adding a source leaves the others' order as it is.
        seed = derive(plan.seed, "mix", source.digest, seen[source.digest])
        seen[source.digest] += 1
        many = copies[i] if copies else None
        if sum(source.tokens) and not (counts if many is None else counts * many).sum():
            raise LlmkitError(f"{source.path}: no tokens in this source", "leave it out")
        documents, epochs, ends = (
            take(counts, source.tokens, seed, plan.shuffle, many)
            if sum(source.tokens)
            else (np.zeros(0, np.int64), np.zeros(0, np.int32), [0] * len(source.tokens))
        )
        jitter = (_hashes(derive(seed, "place"), len(documents)) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        taken.append((documents, epochs, counts[documents], jitter, [0, *ends]))
    stages = []
    for stage in range(len(plan.sources[0].tokens)):
        columns, places = [], []
        for i, (documents, epochs, sizes, jitter, ends) in enumerate(taken):
            here = slice(ends[stage], ends[stage + 1])
            size = sizes[here]
            places.append((np.cumsum(size) - size + jitter[here] * size) / max(int(size.sum()), 1))
            columns.append((np.full(len(size), i, np.int32), documents[here], epochs[here], size))
        order = np.argsort(np.concatenate(places), kind="stable")
        stages.append([np.concatenate(column)[order] for column in zip(*columns, strict=True)])
    ends_of = np.cumsum([len(stage[0]) for stage in stages])
    source_of, document, epoch, size = map(np.concatenate, zip(*stages, strict=True))
    return Order(source_of, document, epoch, size, ends_of)


def pack(order: Order, length: int) -> Order:
    """The same documents in sequences of `length` positions."""
    row, start, size, ends = packed(order.size, order.ends, length)
    padding = row < 0
    return Order(
        np.where(padding, np.int32(-1), order.source[row]),
        np.where(padding, 0, order.document[row]),
        np.where(padding, np.int32(0), order.epoch[row]),
        size,
        ends,
        start,
    )


def copies_by(ranges: Sequence[tuple[int, int]], counts: Numbers) -> Numbers:
    """How often documents of such counts come in a pass, by (first count, times) of rising ranges; (1, 1) where there are none."""
    first, times = np.array(ranges or [(1, 1)], np.int64).T
    return np.asarray(times)[np.maximum(np.searchsorted(first, counts, side="right") - 1, 0)]


def usable(store: TokenStore, held_out: Sequence[int], ranges: Sequence[tuple[int, int]] = ()) -> Numbers | None:
    """How often each document of a source may be used in a pass, by its duplicates: 0 for held-out ones and for the padding of an earlier packing.
    None: all once."""
    if not held_out and store.padding is None and not ranges:
        return None
    counts = store.duplicates if ranges else None
    copies = copies_by(ranges, np.ones(store.documents, np.int64) if counts is None else counts)
    copies[list(held_out)] = 0
    if store.padding is not None:
        copies[store.padding] = 0
    return copies


class OrderedTokens:
    """Documents of several stores in the order of a plan, with the interface of `TokenStore`; nothing is copied but what is asked for."""

    def __init__(self, plan: Plan, stores: list[TokenStore], inputs: list[Input]) -> None:
        """`stores` are the plan's sources; LlmkitError where one has another content or tokenizer than the plan says."""
        for source, store in zip(plan.sources, stores, strict=True):
            if [item.digest for item in store.inputs] != [source.digest]:
                raise LlmkitError(
                    f"{source.path}: not the shards that the plan was made for", "their content changed; run mix again"
                )
            if (last := max(source.held_out, default=-1)) >= store.documents:
                raise LlmkitError(f"{source.path}: document {last} is held out, of {store.documents}", "run mix again")
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
            usable(store, source.held_out, plan.weight_map) for source, store in zip(plan.sources, stores, strict=True)
        ]
        self.unpacked = resolve(plan, [np.diff(store.offsets) for store in stores], copies)
        self.order = pack(self.unpacked, plan.sequence_length) if plan.sequence_length else self.unpacked
        self.offsets: NDArray[np.int64] = np.concatenate((np.zeros(1, np.int64), np.cumsum(self.order.size)))

    @classmethod
    def open(cls, path: str, *, spool: Path | None = None) -> OrderedTokens | TokenStore:
        """What `train` reads: shards or a stream ("-") in their stored order, or a plan (.toml, or a directory that holds plan.toml)."""
        place = Path(path)
        if path != STDIN and (place / PLAN_NAME).is_file():
            place = place / PLAN_NAME
        elif path == STDIN or place.suffix != ".toml":
            return TokenStore.open(path, spool=spool)
        plan = read_plan(place)
        stores = [TokenStore.open(str(located(place, source))) for source in plan.sources]
        if any(store.tokenizer.digest != plan.tokenizer for store in stores):
            raise LlmkitError(f"{place}: its sources were made with another tokenizer", "run mix again")
        return cls(plan, stores, [describe_input(path)])

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
        """Tokens after which each stage of the mix ends; the last is all of them."""
        return [int(self.offsets[end]) for end in self.order.ends]

    @property
    def padding(self) -> NDArray[np.bool_] | None:
        """Which rows only fill up a sequence, bool [documents]; None where none do."""
        return self.order.source < 0 if self.sequence_length else None

    def _at(self, i: int) -> tuple[TokenStore, int] | None:
        """Where row `i` is stored; None for padding."""
        if not 0 <= i < self.documents:
            raise IndexError(f"document {i} of {self.documents}")
        source = int(self.order.source[i])
        return None if source < 0 else (self.stores[source], int(self.order.document[i]))

    def document(self, i: int) -> Tokens:
        """Token ids of row `i` of the order: a document, in a packed order a piece of one, or end-of-text ids as padding."""
        at, size = self._at(i), int(self.order.size[i])
        if at is None:
            return np.full(size, self.tokenizer.eos_id, self.dtype)
        tokens = at[0].document(at[1])
        return tokens if self.order.start is None else tokens[int(self.order.start[i]) :][:size]

    def id(self, i: int) -> str:
        """Id of document `i`; empty for padding."""
        at = self._at(i)
        return at[0].id(at[1]) if at else ""

    def source(self, i: int) -> str:
        """Source of document `i`, as its shards name it; PADDING_SOURCE for padding."""
        at = self._at(i)
        return at[0].source(at[1]) if at else PADDING_SOURCE

    def epoch(self, i: int) -> int:
        """How often document `i` was seen before; passes that an earlier `mix` made over it are added."""
        at = self._at(i)
        return int(self.order.epoch[i]) + at[0].epoch(at[1]) if at else 0

    def origins(self) -> tuple[NDArray[np.int32], list[str], NDArray[np.int32]]:
        """Index of each row's source int32 [documents], the sources (PADDING_SOURCE last), and how often each was seen before."""
        names = [*self.sources, PADDING_SOURCE]
        number = {name: i for i, name in enumerate(names)}
        codes, epochs = np.full(self.documents, len(names) - 1, np.int32), self.order.epoch.copy()
        for i, store in enumerate(self.stores):
            here = np.flatnonzero(self.order.source == i)
            rows, (own, known, seen) = self.order.document[here], store.origins()
            codes[here] = np.array([number[name] for name in known], np.int32)[own[rows]]
            if seen is not None:
                epochs[here] += seen[rows]
        return codes, names, epochs

    def span(self, start: int, stop: int) -> Tokens:
        """Tokens `start` to `stop` of the flat order; a view where they lie in one document, else a copy."""
        if not 0 <= start <= stop <= self.tokens:
            raise IndexError(f"tokens {start} to {stop} of {self.tokens}")
        if start == stop:
            return np.zeros(0, self.dtype)
        first = int(np.searchsorted(self.offsets, start, side="right")) - 1
        behind = int(np.searchsorted(self.offsets, stop, side="left"))
        pieces = [self.document(i) for i in range(first, behind)]
        pieces[-1] = pieces[-1][: stop - int(self.offsets[behind - 1])]
        pieces[0] = pieces[0][start - int(self.offsets[first]) :]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

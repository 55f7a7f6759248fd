"""Training order: which document comes when is a pure function of (sources, budgets, seed).

Every source gives documents until its token budget is met: whole passes over it and part of one more, each pass ("epoch") in a seeded
permutation of its own; the last document is taken only if the total comes closer to the budget with it. Sources are then interleaved by
progress: a document stands at (tokens of its source before it + a random part of its own length) / tokens taken of that source, so any
stretch of the order holds the shares of the whole, to within a document a source. Permutations sort splitmix64 hashes, so no version of
any library changes them.

A plan is a small TOML of sources (path from the plan's own directory, digest, budget) and the seed:

    version = 1
    seed = 7
    tokenizer = "xxh3:..."
    [[source]]
    path = "../web"
    digest = "xxh3:..."
    tokens = 600000

`OrderedTokens.open` follows one without writing its tokens anywhere, in the same order, to the bit, as `mix` writes them. Memory: about 40
bytes a document of the order; 3 s for 4M documents.
"""

from __future__ import annotations

import json
import tomllib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from llmkit.errors import LlmkitError
from llmkit.io.inputs import STDIN
from llmkit.io.lineage import Input, describe_input
from llmkit.io.shard_part import Tokens
from llmkit.io.store import TokenStore
from llmkit.io.tokenizer import TokenizerInfo
from llmkit.seeds import derive

PLAN_NAME = "plan.toml"
PLAN_VERSION = 1
MAX_DOCUMENTS = 1 << 31


@dataclass(frozen=True, slots=True)
class PlannedSource:
    """One source of a plan: where it is, the digest of its content, and how many tokens it gives."""

    path: str
    digest: str
    tokens: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What decides an order; `tokenizer` is the digest of the shards' tokenizer ("" for documents)."""

    sources: tuple[PlannedSource, ...]
    seed: int
    tokenizer: str = ""


@dataclass(frozen=True, slots=True)
class Order:
    """Documents in training order: index of the source int32 [n], of the document in it int64 [n], times seen before int32 [n]."""

    source: NDArray[np.int32]
    document: NDArray[np.int64]
    epoch: NDArray[np.int32]


def _hashes(seed: int, count: int) -> NDArray[np.uint64]:
    """splitmix64 of seed and position, uint64 [count]."""
    x = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permutation(seed: int, count: int) -> NDArray[np.int64]:
    """0 to count - 1 in a random order that is the same everywhere."""
    return np.argsort(_hashes(seed, count), kind="stable")


def take(lengths: NDArray[np.int64], budget: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Documents of one source that meet `budget` tokens, in order, and how often each was taken before."""
    total = int(lengths.sum())
    passes, rest = divmod(budget, total)
    if (passes + 1) * len(lengths) > MAX_DOCUMENTS:
        raise LlmkitError(f"{passes + 1:,} passes over a source of {total:,} tokens", "ask for fewer tokens of it")
    documents = [permutation(derive(seed, epoch), len(lengths)) for epoch in range(passes)]
    if rest:
        last = permutation(derive(seed, passes), len(lengths))
        reached = np.concatenate(([0], np.cumsum(lengths[last])))
        documents.append(last[: int(np.argmin(np.abs(reached - rest)))])  # the first of two that are equally close
    counts = [len(piece) for piece in documents]
    epochs = np.repeat(np.arange(len(documents), dtype=np.int32), counts)
    return np.concatenate(documents) if documents else np.zeros(0, np.int64), epochs


def resolve(plan: Plan, lengths: Sequence[NDArray[np.int64]]) -> Order:
    """The order of `plan`, given the length in tokens of every document of each of its sources."""
    seen: Counter[str] = Counter()
    documents, epochs, sources, places = [], [], [], []
    for i, (source, counts) in enumerate(zip(plan.sources, lengths, strict=True)):
        # By content, not by name or position, so that adding a source leaves the others' order as it is.
        seed = derive(plan.seed, "mix", source.digest, seen[source.digest])
        seen[source.digest] += 1
        if source.tokens and not counts.sum():
            raise LlmkitError(f"{source.path}: no tokens in this source", "leave it out")
        document, epoch = (
            take(counts, source.tokens, seed) if source.tokens else (np.zeros(0, np.int64), np.zeros(0, np.int32))
        )
        size = counts[document]
        jitter = (_hashes(derive(seed, "place"), len(size)) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        places.append((np.cumsum(size) - size + jitter * size) / max(int(size.sum()), 1))
        documents.append(document)
        epochs.append(epoch)
        sources.append(np.full(len(document), i, np.int32))
    order = np.argsort(np.concatenate(places), kind="stable")
    return Order(np.concatenate(sources)[order], np.concatenate(documents)[order], np.concatenate(epochs)[order])


class OrderedTokens:
    """Documents of several stores in the order of a plan, with the interface of `TokenStore`; nothing is copied but what is asked for."""

    def __init__(self, plan: Plan, stores: list[TokenStore], inputs: list[Input]) -> None:
        """`stores` are the plan's sources; LlmkitError where one has another content or tokenizer than the plan says."""
        for source, store in zip(plan.sources, stores, strict=True):
            if [item.digest for item in store.inputs] != [source.digest]:
                raise LlmkitError(
                    f"{source.path}: not the shards that the plan was made for", "their content changed; run mix again"
                )
        for source, store in zip(plan.sources, stores, strict=True):
            first = stores[0].tokenizer
            if (store.tokenizer.digest, store.tokenizer.eos_id) != (first.digest, first.eos_id):
                raise LlmkitError(
                    f"{source.path}: made with another tokenizer than {plan.sources[0].path}",
                    "tokenize all sources with the same one",
                )
        self.plan = plan
        self.stores = stores
        self.inputs = inputs
        self.order = resolve(plan, [np.diff(store.offsets) for store in stores])
        lengths = np.zeros(len(self.order.document), np.int64)
        for i, store in enumerate(stores):
            mine = self.order.source == i
            lengths[mine] = np.diff(store.offsets)[self.order.document[mine]]
        self.offsets: NDArray[np.int64] = np.concatenate((np.zeros(1, np.int64), np.cumsum(lengths)))

    @classmethod
    def open(cls, path: str, *, spool: Path | None = None) -> OrderedTokens | TokenStore:
        """What `train` reads: shards or a stream ("-") in their stored order, or a plan (.toml, or a directory that holds plan.toml)."""
        place = Path(path)
        if path != STDIN and (place / PLAN_NAME).is_file():
            place = place / PLAN_NAME
        elif path == STDIN or place.suffix != ".toml":
            return TokenStore.open(path, spool=spool)
        plan = read_plan(place)
        stores = [TokenStore.open(str(_located(place, source))) for source in plan.sources]
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

    def _at(self, i: int) -> tuple[TokenStore, int]:
        if not 0 <= i < self.documents:
            raise IndexError(f"document {i} of {self.documents}")
        return self.stores[int(self.order.source[i])], int(self.order.document[i])

    def document(self, i: int) -> Tokens:
        """Token ids of document `i` of the order."""
        store, document = self._at(i)
        return store.document(document)

    def id(self, i: int) -> str:
        """Id of document `i`."""
        store, document = self._at(i)
        return store.id(document)

    def source(self, i: int) -> str:
        """Source of document `i`, as its shards name it."""
        store, document = self._at(i)
        return store.source(document)

    def epoch(self, i: int) -> int:
        """How often document `i` was seen before; passes that an earlier `mix` made over it are added."""
        store, document = self._at(i)
        return int(self.order.epoch[i]) + store.epoch(document)

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


def plan_text(plan: Plan, lineage: dict[str, Any] | None = None) -> str:
    """The plan as TOML, with its lineage under `llmkit`."""
    lines = [
        "# llmkit mix --plan: llmkit train follows it",
        f"version = {PLAN_VERSION}",
        f"seed = {plan.seed}",
        f"tokenizer = {_quoted(plan.tokenizer)}",
    ]
    if lineage:
        text = json.dumps(lineage, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        lines.append(f"llmkit = {_quoted(text)}")
    for source in plan.sources:
        lines += [
            "",
            "[[source]]",
            f"path = {_quoted(source.path)}",
            f"digest = {_quoted(source.digest)}",
            f"tokens = {source.tokens}",
        ]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def read_plan(path: Path) -> Plan:
    """The plan in a TOML file; LlmkitError where it is not one."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LlmkitError(f"{path}: {error.strerror}", "check the path and its permissions") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise LlmkitError(f"{path}: invalid TOML ({error})", "plans come from: llmkit mix --plan") from error
    if content.get("version") != PLAN_VERSION:
        raise LlmkitError(f"{path}: no mix plan of version {PLAN_VERSION}", "plans come from: llmkit mix --plan")
    kinds = {"path": str, "digest": str, "tokens": int}
    rows = content.get("source")
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise LlmkitError(f"{path}: no [[source]] in this plan", "plans come from: llmkit mix --plan")
    for number, row in enumerate(rows, 1):
        for key, kind in kinds.items():
            if type(row.get(key)) is not kind or (key == "tokens" and row[key] < 0):
                raise LlmkitError(
                    f"{path}: source {number}: field {key!r} is missing or wrong", "see llmkit mix --help"
                )
    seed, tokenizer = content.get("seed"), content.get("tokenizer")
    if type(seed) is not int or not isinstance(tokenizer, str):
        raise LlmkitError(f"{path}: field 'seed' or 'tokenizer' is missing or wrong", "see llmkit mix --help")
    return Plan(tuple(PlannedSource(row["path"], row["digest"], row["tokens"]) for row in rows), seed, tokenizer)


def _located(plan: Path, source: PlannedSource) -> Path:
    """Where a source is now: at its path from the plan's directory, else beside the plan under its base name."""
    candidates = [plan.parent / source.path, plan.parent / Path(source.path).name]
    for candidate in candidates:
        if candidate.exists():
            return candidate
    raise LlmkitError(
        f"{plan}: its source {source.path} is not there", f"looked for {candidates[0]} and {candidates[1]}"
    )


def plan_digest(path: str | Path) -> str | None:
    """Digest of what decides the order of a plan (not of where its shards lie); None where the file is no plan of ours."""
    place = Path(path) / PLAN_NAME if Path(path).is_dir() else Path(path)
    try:
        plan = read_plan(place)
    except LlmkitError:
        return None
    kept = [plan.seed, plan.tokenizer, [[source.digest, source.tokens] for source in plan.sources]]
    return "xxh3:" + xxhash.xxh3_128_hexdigest(json.dumps(kept).encode())

"""Filters in a row, and the work on one chunk of documents.

    chain = load_chain(["fineweb"], [], ["gopher_quality.max_symbol_word_ratio=0.2"], "unicode")
    verdict = chain.judge(text)                       # .text (perhaps edited), .drop (None: kept), .filter
    result = filter_chunk(chunk, ReadOptions(), chain)  # in a worker

A document stops at the first filter that drops it, a filter at its first failing rule: that is the reason. Cost: the sum of the filters
(tests/bench/filter_speed.md).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import orjson

from llmkit.corpus.filters import ByTable, Check, Filter
from llmkit.corpus.page import Page
from llmkit.corpus.words import Splitter
from llmkit.engine.local import background_process
from llmkit.errors import LlmkitError
from llmkit.io.documents import BadLine, Chunk, Document, ReadOptions, parse
from llmkit.kernels import cold


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the chain says of one text: the text as edited by filters, fields to set, and who dropped it why (`drop` is None for a kept one)."""

    text: str
    drop: Check | None = None
    filter: str = ""
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Chain:
    """Named filters in order, with the kind of words that they count; `functions` holds (name, file) of those from one's own files."""

    steps: tuple[tuple[str, Filter], ...]
    splitter: Splitter
    functions: tuple[tuple[str, str], ...] = ()

    def judge(self, text: str, where: object = "text", fields: Mapping[str, Any] | None = None) -> Verdict:
        """Run the filters on `text` up to the first broken rule. LlmkitError naming `where` and the filter if one of them raises."""
        page = Page(text, self.splitter, fields)
        for name, check in self.steps:
            if isinstance(check, ByTable):
                if found := check.decide(page):
                    return Verdict(page.text, found, name)
            else:
                for found in _checks(name, check, page, where):
                    if found.broken:
                        return Verdict(page.text, found, name)
        return Verdict(page.text, notes=page.notes)

    def warm_up(self) -> None:
        """Run every filter once, so that kernels are compiled and files read before workers fork. LlmkitError where a file is not as it has to be.

        On a new machine another process compiles from the last filter on: what one has compiled, the other finds in the cache.
        """
        if cold() and len(self.steps) > 1:
            with background_process(replace(self, steps=self.steps[::-1])._run_once):
                self._run_once()
        else:
            self._run_once()

    def _run_once(self) -> None:
        for name, check in self.steps:
            try:
                list(_checks(name, check, Page("Some words. Some more.\n", self.splitter), "warm-up"))
            except LlmkitError:
                if type(check).__module__.startswith("llmkit."):
                    raise  # one of ours raises for its settings only; another may not like the text

    def measure(self, page: Page, where: object = "text") -> list[tuple[str, Check]]:
        """(filter, check) for every rule, whatever is broken. Filters behind one that edits see the edited text."""
        return [(name, found) for name, check in self.steps for found in _checks(name, check, page, where)]


def _checks(name: str, check: Filter, page: Page, where: object) -> Iterator[Check]:
    """What one filter says of a page, whatever the form of its answer."""
    try:
        answer = check(page)
        if isinstance(answer, Check):
            answer = iter((answer,))
        if isinstance(answer, bool) or answer is None:
            yield Check(name.rpartition(":")[2], broken=answer is False)
        else:
            for found in answer:
                value: Any = found.value  # one of another kind, such as numpy's, is no JSON
                plain = value is None or isinstance(value, int | float | str)
                yield found if plain else found._replace(value=float(value))
    except LlmkitError:
        raise
    except Exception as error:
        raise LlmkitError(
            f"{where}: filter {name!r} raised {type(error).__name__}: {error}", "the fault is in that filter"
        ) from error


@dataclass(slots=True)
class Statistics:
    """What --stats prints, of any number of documents.

    `values` holds by (filter, statistic) how often each value occurred, rounded to three digits: bounded, and the same for any order. `alone` counts
    the documents that a rule would drop by itself, `first` those that it drops in its place in the chain.
    """

    documents: int = 0
    values: dict[tuple[str, str], Counter[float]] = field(default_factory=dict)
    alone: dict[tuple[str, str], int] = field(default_factory=dict)
    first: Counter[tuple[str, str]] = field(default_factory=Counter)

    def add(self, checks: list[tuple[str, Check]]) -> None:
        """Count one document."""
        self.documents += 1
        kept, seen = True, set()
        for name, (reason, value, broken, statistic) in checks:
            self.alone[name, reason] = self.alone.get((name, reason), 0) + broken
            if broken and kept:
                self.first[name, reason] += 1
                kept = False
            place = (name, statistic or reason)
            if isinstance(value, int | float) and place not in seen:
                seen.add(place)
                self.values.setdefault(place, Counter())[float(f"{value:.3g}")] += 1

    def merge(self, other: Statistics) -> None:
        """Add the counts of other documents."""
        self.documents += other.documents
        self.first.update(other.first)
        for place, count in other.alone.items():
            self.alone[place] = self.alone.get(place, 0) + count
        for place, values in other.values.items():
            self.values.setdefault(place, Counter()).update(values)


def quantiles(values: Counter[float], shares: tuple[float, ...]) -> list[float]:
    """The smallest values that at least these shares of the documents are at or under."""
    total, found, reached = sum(values.values()), [], 0
    wanted = sorted(shares, reverse=True)
    for value in sorted(values):
        reached += values[value]
        while wanted and reached >= wanted[-1] * total:
            wanted.pop()
            found.append(value)
    return found


@dataclass(slots=True)
class Filtered:
    """A chunk's outcome: lines to keep and to reject, bad lines for the reader, and counts by (filter, reason)."""

    kept: bytes
    rejects: bytes
    bad: list[BadLine]
    documents: int = 0
    edited: int = 0
    characters: int = 0
    characters_kept: int = 0
    dropped: Counter[tuple[str, str]] = field(default_factory=Counter)
    statistics: Statistics = field(default_factory=Statistics)


def filter_chunk(chunk: Chunk, options: ReadOptions, chain: Chain) -> Filtered:
    """Judge every document of a chunk. Pure. Kept lines have their own bytes unless a filter edited the text or set a field.

    Rejected lines are the documents as they came in, with `filter`, `reason` and `value` added, in the place of fields that are called so.
    """
    documents, bad = parse(chunk, options)
    result = Filtered(b"", b"", bad, len(documents))
    kept: list[bytes] = []
    rejects: list[bytes] = []
    for document in documents:
        text = document.text
        verdict = chain.judge(text, document, document.fields)
        result.characters += len(text)
        if verdict.drop is not None:
            result.dropped[verdict.filter, verdict.drop.reason] += 1
            rejects.append(_reject(document, verdict.filter, verdict.drop))
            continue
        if verdict.text != text:
            document.change_text(verdict.text)
            result.edited += 1
        if verdict.notes:
            document.change(**verdict.notes)
        result.characters_kept += len(verdict.text)
        kept.append(document.encode())
    result.kept, result.rejects = b"".join(kept), b"".join(rejects)
    return result


def annotate_chunk(chunk: Chunk, options: ReadOptions, chain: Chain) -> Filtered:
    """Keep every document of a chunk, unedited, with what the chain measured in its field `filter`. Pure.

    `filter` holds by filter's name its statistics, and under `dropped_by` every broken rule as "filter.reason": the first would have dropped it.
    """
    documents, bad = parse(chunk, options)
    result = Filtered(b"", b"", bad, len(documents))
    kept: list[bytes] = []
    for document in documents:
        page = Page(document.text, chain.splitter, document.fields)
        checks = chain.measure(page, document)
        found: dict[str, Any] = {}
        for name, check in checks:
            found.setdefault(name, {})[check.statistic or check.reason] = check.value
        if "dropped_by" not in document.fields.get("filter", {"dropped_by"}):
            raise LlmkitError(
                f"{document}: there is a field 'filter' already", "rename it: --annotate writes one of that name"
            )
        found["dropped_by"] = [f"{name}.{check.reason}" for name, check in checks if check.broken]
        result.characters += len(document.text)
        document.change(**page.notes, filter=found)
        kept.append(document.encode())
    result.characters_kept, result.kept = result.characters, b"".join(kept)
    return result


def measure_chunk(chunk: Chunk, options: ReadOptions, chain: Chain) -> Filtered:
    """Only count what the chain measures in a chunk's documents. Pure."""
    documents, bad = parse(chunk, options)
    result = Filtered(b"", b"", bad, len(documents))
    for document in documents:
        page = Page(document.text, chain.splitter, document.fields)
        result.statistics.add(chain.measure(page, document))
    return result


def _reject(document: Document, name: str, drop: Check) -> bytes:
    row = document.fields | {"filter": name, "reason": drop.reason, "value": drop.value}
    return orjson.dumps(row) + b"\n"

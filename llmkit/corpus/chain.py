"""A sequence of filters, and its application to one chunk of documents.

    chain = load_chain(["fineweb"], [], ["gopher_quality.max_symbol_word_ratio=0.2"], "unicode")
    decision = chain.judge(text)                        # .text (possibly edited), .drop (None: kept), .filter
    result = filter_chunk(chunk, ReadOptions(), chain)  # in a worker

A document is dropped by the first filter that rejects it, and the first broken rule of that filter is the
reason. Cost: the sum of the filters (tests/bench/filter_speed.md).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from llmkit.corpus.added_fields import check_added
from llmkit.corpus.filters import Check, Filter, ThresholdFilter
from llmkit.corpus.page import Page
from llmkit.corpus.words import Splitter
from llmkit.engine.local import background_process
from llmkit.errors import LlmkitError
from llmkit.io.documents import BadLine, Chunk, ReadOptions, parse
from llmkit.kernels import cold


@dataclass(frozen=True, slots=True)
class FilterDecision:
    """The outcome for one text: the text as edited by the filters, the check that dropped it, and the fields to set.

    `drop` is None for a document that is kept; otherwise `filter` names the filter that dropped it.
    """

    text: str
    drop: Check | None = None
    filter: str = ""
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Chain:
    """Named filters in order, and the definition of a word that they share.

    `functions` holds (name, file) of the filters that come from the user's own Python files.
    """

    steps: tuple[tuple[str, Filter], ...]
    splitter: Splitter
    functions: tuple[tuple[str, str], ...] = ()

    def judge(self, text: str, location: object = "text", fields: Mapping[str, Any] | None = None) -> FilterDecision:
        """Run the filters on `text` up to the first broken rule.

        Raises LlmkitError naming `location` and the filter if a filter raises.
        """
        page = Page(text, self.splitter, fields)
        for name, check in self.steps:
            if isinstance(check, ThresholdFilter):
                if result := check.first_failure(page):
                    return FilterDecision(page.text, result, name)
            else:
                for result in _checks(name, check, page, location):
                    if result.broken:
                        return FilterDecision(page.text, result, name)
        return FilterDecision(page.text, notes=page.notes)

    def warm_up(self) -> None:
        """Run every filter once, so that kernels are compiled and files are read before workers fork.

        Raises LlmkitError where a file that a filter reads is invalid. On a machine without compiled kernels a
        second process compiles in the opposite direction, from the last filter; each finds in the cache what
        the other has compiled.
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
                    raise  # our own filters raise for invalid settings only; others may fail on this text

    def measure(self, page: Page, location: object = "text") -> list[tuple[str, Check]]:
        """(filter, check) for every rule, broken or not. Filters after one that edits the text see the edited text."""
        return [(name, result) for name, check in self.steps for result in _checks(name, check, page, location)]


def _checks(name: str, check: Filter, page: Page, location: object) -> Iterator[Check]:
    """The checks of one filter for a page, whichever form its return value has."""
    try:
        answer = check(page)
        if isinstance(answer, Check):
            answer = iter((answer,))
        if isinstance(answer, bool) or answer is None:
            yield Check(name.rpartition(":")[2], broken=answer is False)
        else:
            for result in answer:
                value: Any = result.value  # other types, such as numpy's scalars, cannot be written as JSON
                plain = value is None or isinstance(value, int | float | str)
                yield result if plain else result._replace(value=float(value))
    except LlmkitError:
        raise
    except Exception as error:
        raise LlmkitError(
            f"{location}: filter {name!r} raised {type(error).__name__}: {error}", "the fault is in that filter"
        ) from error


@dataclass(slots=True)
class Statistics:
    """The figures that --stats prints, over any number of documents.

    `values` counts by (filter, statistic) how often each value occurred, rounded to three digits so that memory
    stays bounded; the counts do not depend on the order of documents. `drops_alone` counts the documents that a
    rule would drop by itself, `drops_in_order` those that it drops at its position in the chain.
    """

    documents: int = 0
    values: dict[tuple[str, str], Counter[float]] = field(default_factory=dict)
    drops_alone: dict[tuple[str, str], int] = field(default_factory=dict)
    drops_in_order: Counter[tuple[str, str]] = field(default_factory=Counter)

    def add(self, checks: list[tuple[str, Check]]) -> None:
        """Count one document."""
        self.documents += 1
        kept, seen = True, set()
        for name, (reason, value, broken, statistic) in checks:
            self.drops_alone[name, reason] = self.drops_alone.get((name, reason), 0) + broken
            if broken and kept:
                self.drops_in_order[name, reason] += 1
                kept = False
            key = (name, statistic or reason)
            if isinstance(value, int | float) and key not in seen:
                seen.add(key)
                self.values.setdefault(key, Counter())[float(f"{value:.3g}")] += 1

    def merge(self, other: Statistics) -> None:
        """Add the counts of other documents."""
        self.documents += other.documents
        self.drops_in_order.update(other.drops_in_order)
        for key, count in other.drops_alone.items():
            self.drops_alone[key] = self.drops_alone.get(key, 0) + count
        for key, values in other.values.items():
            self.values.setdefault(key, Counter()).update(values)


def quantiles(values: Counter[float], shares: tuple[float, ...]) -> list[float]:
    """For each share, the smallest value that at least this share of the documents does not exceed."""
    total, result, cumulative = sum(values.values()), [], 0
    remaining = sorted(shares, reverse=True)
    for value in sorted(values):
        cumulative += values[value]
        while remaining and cumulative >= remaining[-1] * total:
            remaining.pop()
            result.append(value)
    return result


@dataclass(slots=True)
class FilteredChunk:
    """The outcome for one chunk: lines to keep and to reject, bad lines for the reader, counts by (filter, reason)."""

    kept: bytes
    rejects: bytes
    bad: list[BadLine]
    documents: int = 0
    edited: int = 0
    characters: int = 0
    characters_kept: int = 0
    dropped: Counter[tuple[str, str]] = field(default_factory=Counter)
    statistics: Statistics = field(default_factory=Statistics)


def filter_chunk(chunk: Chunk, options: ReadOptions, chain: Chain, rejects: bool = True) -> FilteredChunk:
    """Apply the chain to every document of a chunk. Pure.

    Kept lines are unchanged, byte for byte, unless a filter edited the text or set a field. Rejected lines, if wanted,
    are the original documents with the fields `filter`, `reason` and `value` added. LlmkitError where one of the
    fields to set is the user's own (corpus/added_fields.py).
    """
    documents, bad = parse(chunk, options)
    result = FilteredChunk(b"", b"", bad, len(documents))
    kept: list[bytes] = []
    rejected: list[bytes] = []
    for document in documents:
        text = document.text
        decision = chain.judge(text, document, document.exact_fields)
        result.characters += len(text)
        if decision.drop is not None:
            result.dropped[decision.filter, decision.drop.reason] += 1
            if rejects:
                drop = {"filter": decision.filter, "reason": decision.drop.reason, "value": decision.drop.value}
                check_added(document, drop, "--rejects")
                rejected.append(document.with_fields(drop))
            continue
        if decision.text != text:
            document.change_text(decision.text)
            result.edited += 1
        if decision.notes:
            check_added(document, decision.notes, "filter")
            document.change(**decision.notes)
        result.characters_kept += len(decision.text)
        kept.append(document.encode())
    result.kept, result.rejects = b"".join(kept), b"".join(rejected)
    return result


def annotate_chunk(chunk: Chunk, options: ReadOptions, chain: Chain) -> FilteredChunk:
    """Keep every document of a chunk, unedited, and add the chain's measurements in the field `filter`. Pure.

    `filter` holds the statistics under the name of each filter, and under `dropped_by` every broken rule as
    "filter.reason"; the first of these would have dropped the document.
    """
    documents, bad = parse(chunk, options)
    result = FilteredChunk(b"", b"", bad, len(documents))
    kept: list[bytes] = []
    for document in documents:
        page = Page(document.text, chain.splitter, document.exact_fields)
        checks = chain.measure(page, document)
        measurements: dict[str, Any] = {}
        for name, check in checks:
            measurements.setdefault(name, {})[check.statistic or check.reason] = check.value
        check_added(document, (*page.notes, "filter"), "--annotate")
        measurements["dropped_by"] = [f"{name}.{check.reason}" for name, check in checks if check.broken]
        result.characters += len(document.text)
        document.change(**page.notes, filter=measurements)
        kept.append(document.encode())
    result.characters_kept, result.kept = result.characters, b"".join(kept)
    return result


def measure_chunk(chunk: Chunk, options: ReadOptions, chain: Chain) -> FilteredChunk:
    """Collect the chain's statistics for a chunk's documents without writing them. Pure."""
    documents, bad = parse(chunk, options)
    result = FilteredChunk(b"", b"", bad, len(documents))
    for document in documents:
        page = Page(document.text, chain.splitter, document.exact_fields)
        result.statistics.add(chain.measure(page, document))
    return result

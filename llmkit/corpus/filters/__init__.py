"""Filters: rules that keep a document or drop it for a named reason. One file per family of rules.

A filter is a frozen dataclass. Its fields are its thresholds, and calling it with a `Page` yields one `Check`
for each of its rules, in order. The first broken rule drops the document and is recorded as the reason. A
filter may rewrite the text with `page.edit` and set fields with `page.note`. A threshold of None switches its
rule off.

There are three ways to add a filter: write a file in this folder, register an entry point of group `llmkit.filters` in
another package, or name a function in any Python file, as in `--filter ./my_rule.py:shouting`:

    @FILTERS.register("shouting")
    @dataclass(frozen=True)
    class Shouting:
        '''Drop documents in capitals.'''

        max_upper: float | None = 0.5

        def __call__(self, page: Page) -> Iterator[Check]:
            share = sum(map(str.isupper, page.text)) / max(1, len(page.text))
            yield Check("shouting", share, above(share, self.max_upper))

Yield cheap checks first and compute what a later check needs between the two yields, so that a document dropped early
costs little. A plain function may instead return None or True (keep), False (drop), or a single Check.
"""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from math import inf
from typing import ClassVar, NamedTuple, Protocol

from llmkit.corpus.page import Page
from llmkit.registry import Registry


class Check(NamedTuple):
    """The result of one rule for one document: the rule's name, the measured value, and whether the document is
    dropped.

    `statistic` is the name under which the value is written out, where that differs from the rule's name.
    """

    reason: str
    value: float | int | str | None = None
    broken: bool = True
    statistic: str = ""


class Threshold(NamedTuple):
    """One row of a filter's table: the reason, and the name of the field with the limit, an upper or a lower one."""

    reason: str
    limit: str
    upper: bool = True
    statistic: str = ""


class ThresholdFilter(ABC):
    """A filter that measures a page once and compares the values with its table of thresholds, in order.

    `measure` returns one value per threshold, or None for a document without any content, which is dropped as `empty`.
    """

    THRESHOLDS: ClassVar[tuple[Threshold, ...]]

    @abstractmethod
    def measure(self, page: Page) -> Sequence[float] | None: ...

    @cached_property
    def bounds(self) -> list[tuple[float, float]]:
        """The smallest and the largest value that pass each rule."""
        limits = [(threshold.upper, getattr(self, threshold.limit)) for threshold in self.THRESHOLDS]
        return [(-inf, inf) if limit is None else (-inf, limit) if upper else (limit, inf) for upper, limit in limits]

    def first_failure(self, page: Page) -> Check | None:
        """The first broken rule, without the cost of a Check for every other rule."""
        return self.failure_of(self.measure(page))

    def failure_of(self, values: Sequence[float] | None) -> Check | None:
        """The first rule that these values break."""
        if values is None:
            return Check("empty")
        for value, (lowest, highest) in zip(values, self.bounds, strict=True):
            if not lowest <= value <= highest:
                return next(check for check in self._checks(values) if check.broken)
        return None

    def __call__(self, page: Page) -> Iterator[Check]:
        values = self.measure(page)
        return iter((Check("empty"),)) if values is None else self._checks(values)

    def _checks(self, values: Sequence[float]) -> Iterator[Check]:
        for threshold, value, (lowest, highest) in zip(self.THRESHOLDS, values, self.bounds, strict=True):
            yield Check(threshold.reason, value, not lowest <= value <= highest, threshold.statistic)


class Filter(Protocol):
    """The call signature of a filter."""

    def __call__(self, page: Page) -> Iterator[Check] | Check | bool | None: ...


FILTERS = Registry("filter", entry_points="llmkit.filters")


def above(value: float, limit: float | None) -> bool:
    """Whether `value` exceeds an upper limit; None is no limit."""
    return limit is not None and value > limit


def below(value: float, limit: float | None) -> bool:
    """Whether `value` falls below a lower limit; None is no limit."""
    return limit is not None and value < limit


for _module in pkgutil.iter_modules(__path__):  # importing a family registers its filters
    importlib.import_module(f"{__name__}.{_module.name}")

"""Filters: rules that keep a document or drop it for a named reason. One file a family.

A filter is a frozen dataclass whose fields are its thresholds and which is called with a `Page`. It yields one `Check` for each of its rules, in order;
the first broken one drops the document and is the reason. It may rewrite the text with `page.edit` and set fields with `page.note`. A
threshold of None switches its rule off. To add one, write a file here, register an entry point of group `llmkit.filters` in another package,
or name a function of one's own file, `--filter ./my_rule.py:shouting`:

    @FILTERS.register("shouting")
    @dataclass(frozen=True)
    class Shouting:
        '''Drop documents in capitals.'''

        max_upper: float | None = 0.5

        def __call__(self, page: Page) -> Iterator[Check]:
            share = sum(map(str.isupper, page.text)) / max(1, len(page.text))
            yield Check("shouting", share, above(share, self.max_upper))

Cheap checks come first; what a later one needs is computed between the two, so that a document that goes early costs little. A plain function may
answer None or True (keep), False, or one Check instead.
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
    """One rule's look at a document: the rule's name, the value that it measured, and whether the document has to go.

    `statistic` is what the value is called where it is written out, if it is not the rule that names it.
    """

    reason: str
    value: float | int | str | None = None
    broken: bool = True
    statistic: str = ""


class Rule(NamedTuple):
    """A line of a filter's table: its reason, the field that holds its limit, whether that is the most that passes (or the least)."""

    reason: str
    limit: str
    most: bool = True
    statistic: str = ""


class ByTable(ABC):
    """A filter that measures a page once and holds the values against its table of rules, in order.

    `measure` gives a value for each rule, or None for a document without any content, which goes as `empty`.
    """

    RULES: ClassVar[tuple[Rule, ...]]

    @abstractmethod
    def measure(self, page: Page) -> Sequence[float] | None: ...

    @cached_property
    def bounds(self) -> list[tuple[float, float]]:
        """The least and the most that pass, rule by rule."""
        limits = [(rule.most, getattr(self, rule.limit)) for rule in self.RULES]
        return [(-inf, inf) if limit is None else (-inf, limit) if most else (limit, inf) for most, limit in limits]

    def decide(self, page: Page) -> Check | None:
        """The first broken rule, without the cost of a Check for every other."""
        return self.broken(self.measure(page))

    def broken(self, values: Sequence[float] | None) -> Check | None:
        """The first broken rule of those that measured these values."""
        if values is None:
            return Check("empty")
        for value, (least, most) in zip(values, self.bounds, strict=True):
            if not least <= value <= most:
                return next(check for check in self._checks(values) if check.broken)
        return None

    def __call__(self, page: Page) -> Iterator[Check]:
        values = self.measure(page)
        return iter((Check("empty"),)) if values is None else self._checks(values)

    def _checks(self, values: Sequence[float]) -> Iterator[Check]:
        for rule, value, (least, most) in zip(self.RULES, values, self.bounds, strict=True):
            yield Check(rule.reason, value, not least <= value <= most, rule.statistic)


class Filter(Protocol):
    """What a registered filter's instances do."""

    def __call__(self, page: Page) -> Iterator[Check] | Check | bool | None: ...


FILTERS = Registry("filter", entry_points="llmkit.filters")


def above(value: float, limit: float | None) -> bool:
    """Whether `value` breaks an upper limit; a limit of None is off."""
    return limit is not None and value > limit


def below(value: float, limit: float | None) -> bool:
    """Whether `value` breaks a lower limit; a limit of None is off."""
    return limit is not None and value < limit


for _module in pkgutil.iter_modules(__path__):  # every family registers itself
    importlib.import_module(f"{__name__}.{_module.name}")

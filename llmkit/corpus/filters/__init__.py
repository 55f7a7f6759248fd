"""Filters: rules that keep a document or drop it for a named reason. One file a family.

A filter is a frozen dataclass whose fields are its thresholds and which is called with a `Page`; it answers None (keep) or `Drop(reason, value)`
at its first failing rule, and may rewrite the text with `page.edit`. A threshold of None switches its rule off. To add one, write a file
here (or register an entry point of group `llmkit.filters` in another package):

    @FILTERS.register("shouting")
    @dataclass(frozen=True)
    class Shouting:
        '''Drop documents in capitals.'''

        max_upper: float | None = 0.5

        def __call__(self, page: Page) -> Drop | None:
            share = sum(map(str.isupper, page.text)) / max(1, len(page.text))
            return Drop("shouting", share) if above(share, self.max_upper) else None
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from typing import Protocol

from llmkit.corpus.page import Page
from llmkit.registry import Registry


@dataclass(frozen=True, slots=True)
class Drop:
    """Why a document goes: the rule's name and the value that it measured."""

    reason: str
    value: float | int | None = None


class Filter(Protocol):
    """What a registered filter's instances do."""

    def __call__(self, page: Page) -> Drop | None: ...


FILTERS = Registry("filter", entry_points="llmkit.filters")


def above(value: float, limit: float | None) -> bool:
    """Whether `value` breaks an upper limit; a limit of None is off."""
    return limit is not None and value > limit


def below(value: float, limit: float | None) -> bool:
    """Whether `value` breaks a lower limit; a limit of None is off."""
    return limit is not None and value < limit


def repeated(items: list[str]) -> tuple[int, int]:
    """How many of `items` occurred before in the list, and their summed length in characters."""
    seen: set[str] = set()
    count = characters = 0
    for item in items:
        if item in seen:
            count += 1
            characters += len(item)
        else:
            seen.add(item)
    return count, characters


for _module in pkgutil.iter_modules(__path__):  # every family registers itself
    importlib.import_module(f"{__name__}.{_module.name}")

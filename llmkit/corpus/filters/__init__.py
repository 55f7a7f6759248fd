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
from collections.abc import Iterator
from typing import NamedTuple, Protocol

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

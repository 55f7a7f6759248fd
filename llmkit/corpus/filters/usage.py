"""What a page says about its use: its licence, and whether it declines to be used. The fields `licence` and `opt_out` come from `llmkit extract`.

`licence` keeps documents under the licences `allowed` in any version: "cc-by" stands for cc-by-4.0 and cc-by-3.0, not for cc-by-nc-4.0. `opt_out`
drops documents whose page or server declined: robots directives against AI or indexing, and reservations of text and data mining.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from llmkit.corpus.filters import FILTERS, Check
from llmkit.corpus.page import Page

VERSION = re.compile(r"-\d[\d.]*(-[a-z]{2,3})?$")  # and perhaps a country: cc-by-3.0-de


@FILTERS.register("licence")
@dataclass(frozen=True, slots=True)
class Licence:
    """Reason `licence`, value the licence found (null: none declared)."""

    allowed: tuple[str, ...] = ("cc0", "cc-by", "cc-by-sa", "public-domain")
    field: str = "licence"

    def __call__(self, page: Page) -> Iterator[Check]:
        found = page.fields.get(self.field)
        name = found.lower() if isinstance(found, str) else ""
        yield Check("licence", name or None, not {name, VERSION.sub("", name)} & set(map(str.lower, self.allowed)))


@FILTERS.register("opt_out")
@dataclass(frozen=True, slots=True)
class OptOut:
    """Reason `opt_out`, value the signals."""

    ignored: tuple[str, ...] = ()  # signals that do not count, such as noindex

    def __call__(self, page: Page) -> Iterator[Check]:
        found = page.fields.get("opt_out") or []
        signals = [
            str(signal) for signal in (found if isinstance(found, list) else [found]) if signal not in self.ignored
        ]
        yield Check("opt_out", ",".join(signals) or None, bool(signals))

"""Licences and opt-outs that a page declares. The fields `licence` and `opt_out` come from `llmkit extract`.

The filter `licence` keeps documents under the licences `allowed`, in any version: "cc-by" includes cc-by-4.0
and cc-by-3.0, but not cc-by-nc-4.0. The filter `opt_out` drops documents whose page or server opted out of use:
by robots directives against AI or indexing, or by reserving text and data mining.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from llmkit.corpus.filters import FILTERS, Check
from llmkit.corpus.page import Page

VERSION = re.compile(r"-\d[\d.]*(-[a-z]{2,3})?$")  # possibly with a country: cc-by-3.0-de


@FILTERS.register("licence")
@dataclass(frozen=True, slots=True)
class Licence:
    """Reason `licence`; its value is the declared licence (null: none declared)."""

    allowed: tuple[str, ...] = ("cc0", "cc-by", "cc-by-sa", "public-domain")
    field: str = "licence"

    def __call__(self, page: Page) -> Iterator[Check]:
        declared = page.fields.get(self.field)
        name = declared.lower() if isinstance(declared, str) else ""
        yield Check("licence", name or None, not {name, VERSION.sub("", name)} & set(map(str.lower, self.allowed)))


@FILTERS.register("opt_out")
@dataclass(frozen=True, slots=True)
class OptOut:
    """Reason `opt_out`; its value is the list of signals."""

    ignored: tuple[str, ...] = ()  # signals to disregard, such as noindex

    def __call__(self, page: Page) -> Iterator[Check]:
        declared = page.fields.get("opt_out") or []
        signals = [
            str(signal)
            for signal in (declared if isinstance(declared, list) else [declared])
            if signal not in self.ignored
        ]
        yield Check("opt_out", ",".join(signals) or None, bool(signals))

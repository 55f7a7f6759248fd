"""Regular expressions on any field: drop the documents that match, or keep only the documents that match.

    llmkit filter docs.jsonl --filter regex@menus --rule 'regex@menus.pattern=(?i)add to (cart|basket)' llmkit
    filter docs.jsonl --filter regex --rule regex.field=metadata.lang --rule 'regex.pattern=^(en|de)$' --rule
    regex.keep=true

Patterns use the syntax of RE2 (https://github.com/google/re2/wiki/Syntax), which takes time linear in the text
for every pattern: there is no catastrophic backtracking, but also no look-around and no back-references. A
pattern matches anywhere unless it is anchored; ^ and $ match at the ends of the text, or with (?m) at the ends
of a line. Fields other than strings are matched as JSON; a missing field matches nothing.

Cost: linear in the text; long counted repetitions such as [ab][a-z ]{200}zz cost more than usual patterns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from llmkit.corpus.filters import FILTERS, Check
from llmkit.corpus.page import Page
from llmkit.errors import LlmkitError, UsageError
from llmkit.io.splice import dotted, exact_json

MAX_REPORTED = 80  # bytes of a match that are reported


@FILTERS.register("regex")
@dataclass(frozen=True, slots=True)
class Regex:
    """Reason `regex`; its value is the matched text."""

    pattern: str = ""
    field: str = "text"  # a dot selects a nested field: metadata.lang
    keep: bool = False  # keep only documents that match, instead of dropping them

    def __call__(self, page: Page) -> Iterator[Check]:
        if not self.pattern:
            raise UsageError("regex.pattern is empty", "set it: --rule 'regex.pattern=...'")
        match = search(compiled(self.pattern, "regex.pattern"), as_bytes(page, self.field))
        yield Check("regex", match, (match is None) == self.keep)


def as_bytes(page: Page, path: str) -> bytes | None:
    """A field of the document in UTF-8, for `text` as edited by earlier filters; None where it is missing or null."""
    value = page.text if path == "text" else dotted(page.fields, path)
    if value is None:
        return None
    return value.encode() if isinstance(value, str) else exact_json(value)


def search(pattern: Any, data: bytes | None) -> str | None:
    """The first `MAX_REPORTED` bytes of a compiled pattern's first match, or None."""
    match = None if data is None else pattern.search(data)
    return None if match is None else match.group()[:MAX_REPORTED].decode(errors="ignore")


@cache
def compiled(pattern: str, option: str) -> Any:
    """A pattern compiled by RE2.

    Raises UsageError naming `option`, the place that the pattern comes from, if RE2 rejects it, and LlmkitError
    without the package google-re2.
    """
    re2 = engine(option)
    options = re2.Options()
    options.log_errors = False
    try:
        return re2.compile(pattern, options)
    except (re2.error, UnicodeEncodeError) as error:
        message = error.args[0] if error.args else ""
        detail = message.decode(errors="replace") if isinstance(message, bytes) else str(message)
        raise UsageError(
            f"{option}: {pattern!r:.200} is not a valid pattern ({detail:.200})",
            "patterns use RE2's syntax: no look-around, no back-references",
        ) from error


def engine(option: str) -> Any:
    """The module re2. Raises LlmkitError naming `option` where it is not installed."""
    try:
        import re2
    except ImportError as error:
        raise LlmkitError(f"{option}: regular expressions need RE2", "pip install google-re2") from error
    return re2

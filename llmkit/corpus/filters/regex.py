"""Regular expressions on any field: drop the documents that match, or keep only those.

    llmkit filter docs.jsonl --filter regex@menus --rule 'regex@menus.pattern=(?i)add to (cart|basket)'
    llmkit filter docs.jsonl --filter regex --rule regex.field=metadata.lang --rule 'regex.pattern=^(en|de)$' --rule regex.keep=true

Patterns are RE2's (https://github.com/google/re2/wiki/Syntax), which takes time linear in the text whatever the pattern is: there is no catastrophic
backtracking, and no look-around or back-references either. A pattern matches anywhere unless it is anchored; ^ and $ are the ends of the text,
with (?m) of a line. Fields that are no strings are matched as their JSON; a missing field matches nothing.

Cost: linear; long counted repetitions such as [ab][a-z ]{200}zz cost more than usual patterns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import orjson

from llmkit.corpus.filters import FILTERS, Check
from llmkit.corpus.lists import dotted
from llmkit.corpus.page import Page
from llmkit.errors import LlmkitError, UsageError

SHOWN = 80  # bytes of a match that are reported


@FILTERS.register("regex")
@dataclass(frozen=True, slots=True)
class Regex:
    """Reason `regex`; its value is what matched."""

    pattern: str = ""
    field: str = "text"  # a dot leads into nested fields: metadata.lang
    keep: bool = False  # keep only what matches, instead of dropping it

    def __call__(self, page: Page) -> Iterator[Check]:
        if not self.pattern:
            raise UsageError("regex.pattern is empty", "set it: --rule 'regex.pattern=...'")
        found = search(compiled(self.pattern, "regex.pattern"), as_bytes(page, self.field))
        yield Check("regex", found, (found is None) == self.keep)


def as_bytes(page: Page, path: str) -> bytes | None:
    """A field of the document in UTF-8, the text as earlier rules left it; None where it is missing or null."""
    value = page.text if path == "text" else dotted(page.fields, path)
    if value is None:
        return None
    return value.encode() if isinstance(value, str) else orjson.dumps(value)


def search(pattern: Any, data: bytes | None) -> str | None:
    """The beginning of the first match of a compiled pattern."""
    match = None if data is None else pattern.search(data)
    return None if match is None else match.group()[:SHOWN].decode(errors="ignore")


@cache
def compiled(pattern: str, where: str) -> Any:
    """A pattern compiled by RE2. UsageError naming `where` it stands if RE2 does not take it, LlmkitError without the package google-re2."""
    re2 = engine(where)
    options = re2.Options()
    options.log_errors = False
    try:
        return re2.compile(pattern, options)
    except (re2.error, UnicodeEncodeError) as error:
        message = error.args[0] if error.args else ""
        said = message.decode(errors="replace") if isinstance(message, bytes) else str(message)
        raise UsageError(
            f"{where}: {pattern!r:.200} is no valid pattern ({said:.200})",
            "patterns are RE2's: no look-around, no back-references",
        ) from error


def engine(where: str) -> Any:
    """The module re2."""
    try:
        import re2
    except ImportError as error:
        raise LlmkitError(f"{where}: regular expressions need RE2", "pip install google-re2") from error
    return re2

"""Personal data and secrets: email addresses, phone, card and bank account numbers, IP addresses, keys.

What is recognised is described in `llmkit.corpus.pii`. The reasons, where the action is to drop, are `pii_` and
the kind, the most sensitive kind first. The field `pii` of a kept document counts what was found by kind,
`{"email": 2}`; a document without personal data is passed on byte for byte.

Replacements depend on the document alone. Where a standard reserves addresses for examples (user1@example.com,
192.0.2.1, 2001:db8::1), one of these is used, so that prose, code and URLs still parse and a model learns
nobody's address; elsewhere the replacement is a placeholder such as <PHONE_1>. Equal values (apart from
spelling) get the same number within a text, numbers that the text already uses are skipped, and replacements
are not recognised as personal data again.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

from llmkit.corpus.filters import FILTERS, Check
from llmkit.corpus.page import Page
from llmkit.corpus.pii import KINDS, find
from llmkit.corpus.pii.span import PiiSpan
from llmkit.errors import unknown_name

ACTIONS = ("redact", "drop", "annotate")


@FILTERS.register("pii")
@dataclass(frozen=True, slots=True)
class Pii:
    """Actions: `redact` replaces personal data, `drop` drops documents with any, `annotate` only counts it."""

    action: str = "redact"
    kinds: tuple[str, ...] = KINDS

    def __post_init__(self) -> None:
        if self.action not in ACTIONS:
            raise unknown_name("action of the filter pii", self.action, ACTIONS)
        for kind in self.kinds:
            if kind not in KINDS:
                raise unknown_name("kind of personal data", kind, KINDS)

    def __call__(self, page: Page) -> Iterator[Check]:
        spans = find(page.text, self.kinds)
        counts = Counter(span.kind for span in spans)
        for kind in KINDS:
            if kind in self.kinds:
                yield Check(f"pii_{kind}", counts[kind], counts[kind] > 0 and self.action == "drop", kind)
        if spans:
            page.note(pii={kind: counts[kind] for kind in KINDS if counts[kind]})
            if self.action == "redact":
                page.edit(redact(page.text, spans))


# The replacements that `_replacement` can return.
REPLACEMENTS = {
    "email": re.compile(r"user[0-9]+@example\.com"),
    "ipv6": re.compile(r"2001:db8::[0-9a-f:]+"),
    "ipv4": re.compile(r"(?:192\.0\.2|240\.[0-9]+\.[0-9]+)\.[0-9]+"),
}
PLACEHOLDER = re.compile(r"<[A-Z]+_[0-9]+>")


def redact(text: str, spans: Sequence[PiiSpan]) -> str:
    """`text` with every span replaced; equal values get equal replacements."""
    present = {
        found for kind in {span.kind for span in spans} for found in REPLACEMENTS.get(kind, PLACEHOLDER).findall(text)
    }
    numbers: Counter[str] = Counter()
    replacements: dict[tuple[str, str], str] = {}
    parts: list[str] = []
    position = 0
    for kind, start, end in spans:
        key = kind, _normal_form(kind, text[start:end])
        while key not in replacements:
            numbers[kind] += 1
            if (replacement := _replacement(kind, numbers[kind])) not in present:
                replacements[key] = replacement
        parts += text[position:start], replacements[key]
        position = end
    return "".join([*parts, text[position:]])


def _replacement(kind: str, number: int) -> str:
    if kind == "email":
        return f"user{number}@example.com"
    if kind == "ipv6":
        return f"2001:db8::{number:x}" if number < 1 << 16 else str(IPv6Address("2001:db8::") + number)
    if kind == "ipv4":  # 192.0.2.0/24 is for documentation; then 240.0.0.0/4, which is not assigned to anyone
        return f"192.0.2.{number}" if number < 255 else str(IPv4Address("240.0.0.0") + number)
    return f"<{kind.upper()}_{number}>"


def _normal_form(kind: str, value: str) -> str:
    """A form that is equal for all spellings of one value."""
    if kind == "ipv6":
        return IPv6Address(value).compressed
    if kind in ("phone", "card"):
        return "".join(filter(str.isdigit, value))
    return value.casefold() if kind == "email" else re.sub(r"[\s-]", "", value) if kind == "iban" else value

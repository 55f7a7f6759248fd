"""Locating personal data and secrets in a text. Their replacement is in filters/pii.py.

    find(text, KINDS) -> [PiiSpan("email", 10, 27), ...]      in order, without overlaps

Where two kinds match the same characters, the kind that comes first in `KINDS` wins.

| kind | recognised | excluded |
|---|---|---|
| secret | published key prefixes, JWT, PEM private keys, `api_key = "..."` and a random value | samples, words |
| email | local part @ domain with a top-level domain, also international | files, hosts, example.com, git@host:path |
| iban | country, length (ISO 13616 registry) and check digits | |
| ipv6, ipv4 | globally routable addresses (IANA registries) | versions, sections, private, documentation |
| card | issuer's prefix and length (ISO/IEC 7812), Luhn sum, the usual groups | parts of longer numbers |
| phone | +country (E.164) with a valid length; national shapes; numbers after "Tel." | dates, ISBN, order numbers |

Samples are values with EXAMPLE, xxxx and the like; example.com is reserved by RFC 2606, documentation addresses by RFC
5737 and 3849. A number after a word such as "Tel." is a phone number whatever its shape.

Cost: each scan starts at a character that is rare in prose (@, a digit, a colon, a prefix) and examines a bounded
stretch around it, so that the time is linear in the text for any input; figures are in tests/bench/pii.md. Only ASCII
digits are recognised.
"""

from __future__ import annotations

from collections.abc import Collection

from llmkit.corpus.pii.emails import find_emails
from llmkit.corpus.pii.numbers import NUMBERS, find_ipv6, find_numbers
from llmkit.corpus.pii.secrets import find_secrets
from llmkit.corpus.pii.span import PiiSpan

KINDS = ("secret", "email", "iban", "ipv6", "ipv4", "card", "phone")
SCANS = (("secret", find_secrets), ("email", find_emails), ("ipv6", find_ipv6))


def find(text: str, kinds: Collection[str] = KINDS) -> list[PiiSpan]:
    """Spans of `kinds`, in order and without overlaps."""
    candidates = [span for kind, scan in SCANS if kind in kinds for span in scan(text)]
    if not NUMBERS.isdisjoint(kinds):
        candidates += (span for span in find_numbers(text) if span.kind in kinds)
    if len(candidates) < 2:
        return candidates
    occupied = bytearray(len(text))
    spans = []
    for span in sorted(candidates, key=lambda span: KINDS.index(span.kind)):
        _, start, end = span
        if occupied.find(1, start, end) < 0:
            occupied[start:end] = b"\1" * (end - start)
            spans.append(span)
    return sorted(spans, key=lambda span: span.start)

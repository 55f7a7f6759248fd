"""IPv6 addresses, and in one scan IBAN, IPv4 addresses, card and phone numbers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from ipaddress import AddressValueError, IPv4Address, IPv6Address, ip_network

from llmkit.corpus.pii.phones import DASH, GAP, phone_end
from llmkit.corpus.pii.span import PiiSpan

IPV6_ANCHOR = re.compile(r":(?=[0-9A-Fa-f]{0,4}:)")
PART_OF_NAME = re.compile(r"\w|\.\w")
IPV6_RUN = re.compile(r"[0-9A-Fa-f:]++(?:(?:\.[0-9]{1,3}){3})?")
NOT_NETWORK = (1 << 80) - 1  # an address that ends in this many zeros names a provider's network
# IANA's special-purpose registries, listed here because Python's `is_global` changes between versions. Of IPv6
# only 2000::/3 is allocated.
SPECIAL = [
    ip_network(network)
    for network in (
        "0.0.0.0/8 10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 169.254.0.0/16 172.16.0.0/12 192.0.0.0/24 192.0.2.0/24"
        " 192.88.99.0/24 192.168.0.0/16 198.18.0.0/15 198.51.100.0/24 203.0.113.0/24 224.0.0.0/3 ::/3 4000::/2 8000::/1"
        " 2001::/23 2001:db8::/32 3fff::/20"
    ).split()
]
IBAN_LENGTHS = {
    entry[:2]: int(entry[2:])
    for entry in (
        "AD24 AE23 AL28 AT20 AZ28 BA20 BE16 BG22 BH22 BI27 BR29 BY28 CH21 CR22 CY28 CZ24 DE22 DJ27 DK18 DO28 EE20 EG29 "
        "ES24 FI18 FK18 FO18 FR27 GB22 GE22 GI23 GL18 GR27 GT28 HN28 HR21 HU28 IE22 IL23 IQ23 IS26 IT27 JO30 KW30 KZ20 "
        "LB28 LC32 LI21 LT20 LU20 LV21 LY25 MC27 MD24 ME22 MK19 MN20 MR27 MT31 MU30 NI28 NL18 NO15 OM23 PK24 PL28 PS29 "
        "PT25 QA29 RO24 RS22 RU33 SA24 SC31 SD18 SE24 SI19 SK24 SM27 SO23 ST25 SV28 TL23 TN24 TR26 UA29 VA22 VG24 XK20 "
        "YE30"
    ).split()
}
# A preceding word that introduces a dotted number, or name-1.2.3.4, name/1.2.3.4, ==1.2.3.4
VERSION = re.compile(
    r"(?:\b(?:v|ver|version|release|rev|revision|build|firmware|driver|section|sections|sect|sec|chapter|clause"
    r"|paragraph|figure|table|oid|kernel)[.:]?\s{0,2}|§\s?|[A-Za-z_]-|[A-Za-z0-9)]/|[=<>~^!]=\s?)\Z",
    re.IGNORECASE,
)
NO_GAPS = dict.fromkeys(map(ord, " \u00a0\u2009\u202f-"))
# First and last prefix, lengths: Visa; Mastercard; American Express; Diners; JCB; Discover; UnionPay.
ISSUERS = [
    ("4", "4", (13, 16)), ("51", "55", (16,)), ("2221", "2720", (16,)), ("34", "34", (15,)), ("37", "37", (15,)),
    ("300", "305", (14,)), ("36", "36", (14,)), ("38", "39", (14, 16)), ("3528", "3589", (16,)),
    ("6011", "6011", (16, 19)), ("644", "659", (16, 19)), ("62", "62", (16, 17, 18, 19)),
]  # fmt: skip
NUMBERS = frozenset(("iban", "ipv4", "card", "phone"))
# One character first and then the assertions about its surroundings: a search for a set of characters is fast,
# one that begins with an assertion is not.
NUMBER = re.compile(
    rf"[0-9+(](?:(?<!\w.)(?=[0-9+()./{GAP}{DASH}]{{6}})"
    rf"|((?<=[A-Z]{{2}}[0-9])(?<!\w...)(?=[0-9][{GAP}{DASH}]?[A-Z0-9]{{3}})))"
)
SHAPE = re.compile(
    rf"""
    (?P<ipv4> (?!0[0-9]) (?:[0-9]{{1,3}}\.){{3}} [0-9]{{1,3}} (?![\w(] | \.\w | [+-][0-9]{{0,4}}[A-Za-z]) )
  | (?P<card> [2-6][0-9]{{12,18}} (?![\w] | [.{DASH}][0-9])
        | [2-6][0-9]{{3}} (?P<gap>[{GAP}-]) (?: [0-9]{{4}}(?P=gap)[0-9]{{4}}(?P=gap)[0-9]{{4}} (?: (?P=gap)[0-9]{{3}} )?
        | [0-9]{{6}}(?P=gap)[0-9]{{4,5}} ) (?![\w] | (?P=gap)[0-9]{{4}} | [.{DASH}][0-9]) )
  | (?P<international> \(? (?: \+ | 00[{GAP}{DASH}]?(?=[(1-9]) )
        \(? [1-9] (?: [./(){GAP}{DASH}]{{0,3}} [0-9] ){{6,17}} (?![0-9]) )
  | (?P<american> (?: 1[.{GAP}{DASH}] )?
        (?: \([2-9][0-9]{{2}}\)[{GAP}{DASH}]?
        | [2-9][0-9]{{2}}
            (?: \.(?=[0-9]{{3}}\.) | [{DASH}](?=[0-9]{{3}}[{DASH}]) | [/{GAP}](?=[0-9]{{3}}[{GAP}{DASH}]) ) )
        [2-9][0-9]{{2}} [.{GAP}{DASH}] [0-9]{{4}} (?!(?!x[0-9])[\w%°€] | [.,/{DASH}][0-9]) )
  | (?P<national> \(? [0-9]{{1,13}}+ \)?
        (?: (?: [{GAP}]?[/.{DASH}][{GAP}]? | [{GAP}] | (?<=\)) ) \(?[0-9]{{1,8}}+\)? ){{0,6}}+
        (?![\w%°€] | [.,/:{DASH}][0-9]) )
    """,
    re.VERBOSE,
)


def find_ipv6(text: str) -> Iterator[PiiSpan]:
    position = 0
    while anchor := IPV6_ANCHOR.search(text, position):
        run = IPV6_RUN.match(text, anchor.start())
        position = run.end() if run else anchor.end()
        before = text[max(0, anchor.start() - 46) : anchor.start()]
        start = anchor.start() - len(before) + len(before.rstrip("0123456789abcdefABCDEF:"))
        value = text[start:position]
        if value[-1] == ":" != value[-2]:
            value = value[:-1]
        end = start + len(value)
        if len(value) > 45 or not ("::" in value or value.count(":") >= 6):
            continue
        if PART_OF_NAME.match(text, end) or (start and PART_OF_NAME.match(text, start - 1)):
            continue
        try:
            address = IPv6Address(value)
        except AddressValueError:
            continue
        mapped = address.ipv4_mapped
        if _is_public(mapped) if mapped else _is_public(address) and int(address) & NOT_NETWORK:
            yield PiiSpan("ipv6", start, end)


def _is_public(address: IPv4Address | IPv6Address) -> bool:
    return not any(address in network for network in SPECIAL)


def find_numbers(text: str) -> Iterator[PiiSpan]:
    """Spans of IBAN, IPv4, cards and phones. All begin with a digit, "+" or "(" followed by enough digits."""
    end = 0
    for match in NUMBER.finditer(text):
        start = match.start()
        if start < end:
            continue
        if match[1] is not None:
            start -= 2
            kind, stop = "iban", _iban_end(text, start)
        elif (shape := SHAPE.match(text, start)) is None:
            continue
        elif shape.lastgroup == "ipv4":
            kind, stop = "ipv4", shape.end() if _is_public_ipv4(text, start, shape[0]) else 0
        elif shape.lastgroup == "card":
            kind, stop = "card", shape.end() if _is_card(text, start, shape) else 0
        else:
            kind, stop = "phone", phone_end(text, start, shape)
        if stop:
            end = stop
            if text.count("(", start, end) > text.count(")", start, end):
                start += 1
            yield PiiSpan(kind, start, end)


def _iban_end(text: str, start: int) -> int:
    """End of the IBAN at `start`; 0 if there is none."""
    length = IBAN_LENGTHS.get(text[start : start + 2])
    match = length and re.compile(rf"(?:[A-Z0-9][{GAP}{DASH}]?){{{length - 1}}}[A-Z0-9](?!\w)").match(text, start)
    if not match:
        return 0
    value = re.sub(r"[^A-Z0-9]", "", match[0])
    return match.end() if int("".join(str(int(c, 36)) for c in value[4:] + value[:4])) % 97 == 1 else 0


def _is_public_ipv4(text: str, start: int, value: str) -> bool:
    before = text[max(0, start - 16) : start]
    if before[-1:] == "." or VERSION.search(before):
        return False
    if value.endswith((".0", ".255")) or sum(len(part) > 1 for part in value.split(".")) < 2:
        # Networks and netmasks; sections and versions such as 3.1.4.12. Real addresses of that shape are mostly
        # public resolvers.
        return False
    try:
        return _is_public(IPv4Address(value))
    except AddressValueError:
        return False


def _is_card(text: str, start: int, shape: re.Match[str]) -> bool:
    before = text[max(0, start - 2) : start]
    if before[-1:] in (".", "-", "/") or (shape["gap"] and before[-1:] == shape["gap"] and before[:1].isdigit()):
        return False  # part of something longer
    number = shape[0].translate(NO_GAPS)
    issued = any(first <= number[: len(first)] <= last and len(number) in lengths for first, last, lengths in ISSUERS)
    digits = list(map(int, number))
    doubled = (sum(divmod(2 * digit, 10)) for digit in digits[-2::-2])
    return issued and (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0

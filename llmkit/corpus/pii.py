"""Personal data and secrets in a text: where they are. What replaces them is in filters/pii.py.

    find(text, KINDS) -> [Span("email", 10, 27), ...]      in order, none overlapping another

Where two kinds claim the same characters, the one that comes first in `KINDS` has them.

| kind | found | not taken for it |
|---|---|---|
| secret | keys and tokens by their published prefixes, JWT, PEM private keys, `api_key = "..."` with a random value | samples (EXAMPLE, xxxx), words |
| email | local part @ domain with a top-level domain, international ones too | names of files and hosts, example.com (RFC 2606), git@host:path |
| iban | country, length (ISO 13616 registry) and check digits | |
| ipv6, ipv4 | globally routable ones (IANA registries) | versions, sections, private, documentation (RFC 5737, 3849) |
| card | issuer's prefix and length (ISO/IEC 7812), Luhn sum, the usual groups | parts of longer numbers |
| phone | +country (E.164) with that country's length; national forms by shape, or any number behind a word such as "Tel." | dates, ISBN, order numbers |

Cost: each scan starts at a character that prose seldom has (@, a digit, a colon, a prefix) and looks at a bounded stretch around it, so the time is
linear in the text whatever it holds; figures are in tests/bench/pii.md. ASCII digits only.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterator
from ipaddress import AddressValueError, IPv4Address, IPv6Address, ip_network
from typing import NamedTuple

KINDS = ("secret", "email", "iban", "ipv6", "ipv4", "card", "phone")


class Span(NamedTuple):
    """text[start:end] is of this kind."""

    kind: str
    start: int
    end: int


def find(text: str, kinds: Collection[str] = KINDS) -> list[Span]:
    """Spans of `kinds`, in order and apart."""
    found = [span for kind, scan in SCANS if kind in kinds for span in scan(text)]
    if not NUMBERS.isdisjoint(kinds):
        found += (span for span in _numbers(text) if span.kind in kinds)
    if len(found) < 2:
        return found
    taken = bytearray(len(text))
    spans = []
    for span in sorted(found, key=lambda span: KINDS.index(span.kind)):
        _, start, end = span
        if taken.find(1, start, end) < 0:
            taken[start:end] = b"\1" * (end - start)
            spans.append(span)
    return sorted(spans, key=lambda span: span.start)


# ---- secrets

# Literals one of which begins every key, with what follows it. What must not stand before comes after the literal, so that the search is for a literal.
KEYS = [
    (prefix, re.compile(rf"{re.escape(prefix)}(?<![A-Za-z0-9_-]{re.escape(prefix)}){rest}(?![A-Za-z0-9_])"))
    for prefixes, rest in [
        ("AKIA ASIA", r"[A-Z2-7]{16}"),  # AWS
        ("AIza", r"[A-Za-z0-9_-]{35}"),  # Google
        ("Bearer ", r"[A-Za-z0-9._~+/-]{20,2048}+"),
        ("eyJ", r"[A-Za-z0-9_-]{12,4096}+\.eyJ[A-Za-z0-9_-]{8,16384}+\.[A-Za-z0-9_-]{0,2048}+"),  # JSON Web Token
        ("glpat-", r"[A-Za-z0-9_.-]{20,255}+"),  # GitLab
        ("hooks.slack.com/services/", r"T[A-Z0-9]{6,12}+/B[A-Z0-9]{6,12}+/[A-Za-z0-9]{20,32}+"),
        ("pypi-", r"AgEIcHlwaS5vcmc[A-Za-z0-9_-]{50,255}+"),
        ("SG.", r"[A-Za-z0-9_-]{16,32}+\.[A-Za-z0-9_-]{16,64}+"),  # SendGrid
        ("sk-", r"(?:(?:ant|proj|svcacct|admin|or)-[A-Za-z0-9_-]{32,255}+|[A-Za-z0-9]{32,64}+)"),  # Anthropic, OpenAI
        ("xox", r"[abeprs]-[A-Za-z0-9-]{20,255}+"),  # Slack
        ("ghp_ gho_ ghu_ ghs_ ghr_", r"[A-Za-z0-9]{36,255}+"),  # GitHub
        ("github_pat_", r"[A-Za-z0-9_]{40,255}+"),
        ("hf_", r"[A-Za-z0-9]{34,40}+"),  # Hugging Face
        ("npm_", r"[A-Za-z0-9]{36}"),
        ("sk_live_ rk_live_ sk_test_ rk_test_ whsec_", r"[A-Za-z0-9]{16,255}+"),  # Stripe
    ]
    for prefix in prefixes.split()
]
PEM = re.compile(r"-----BEGIN (?:[A-Z0-9]{2,12} ){0,2}PRIVATE KEY(?: BLOCK)?-----")
PEM_LENGTH = 16_384
# One pattern for each literal that it may begin with: a search for one character is far quicker than one for a set.
ASSIGNED = [
    re.compile(sign + r"[ \t]{0,4}+[\"'`]?+([A-Za-z0-9+/_~-]{16,256}+={0,2})(?![A-Za-z0-9+/_~.=(\[-])")
    for sign in ("=>?", ":=?")
]
SECRET_NAME = re.compile(
    r"(?:(?:api|access|secret|private|auth|encryption|signing|account|storage|subscription|service|app|client|master|shared)[_. -]?key"
    r"|secret|(?<!public)(?<!publickey)token|passwd|password|passphrase|pwd)[\"'`\]]{0,2}\s{0,3}\Z",
    re.IGNORECASE,
)
SAMPLE = re.compile(r"example|xxxx|your|placeholder|change.?me|dummy|sample|redacted|123456789|abcdefgh|(.)\1{5}", re.I)


def _secrets(text: str) -> Iterator[Span]:
    underscore = "_" in text  # most texts have none, and half of the prefixes one
    for prefix, pattern in KEYS:
        if (underscore or "_" not in prefix) and prefix in text:
            for match in pattern.finditer(text):
                if _random(match[0].removeprefix(prefix), 2.8):
                    yield Span("secret", *match.span())
    if "PRIVATE KEY-" in text:
        for match in PEM.finditer(text):
            end = text.find("-----END ", match.end(), match.end() + PEM_LENGTH)
            close = text.find("-----", end + 9, end + 60)
            if end > 0 < close and re.search(r"[A-Za-z0-9+/]{40}", text[match.end() : end]):
                yield Span("secret", match.start(), close + 5)
    for pattern in ASSIGNED:
        for match in pattern.finditer(text):
            start, end = match.span(1)
            if SECRET_NAME.search(text, max(0, match.start() - 32), match.start()) and _random(match[1], 3.0):
                yield Span("secret", start, end)


def _random(value: str, bits: float) -> bool:
    """Whether a key could be a real one: letters and digits mixed, at least `bits` of entropy a character, no sample's words."""
    letters, digits = sum(map(str.isalpha, value)), sum(map(str.isdigit, value))
    if letters < 2 or digits < 2 or SAMPLE.search(value):
        return False
    return -sum(n / len(value) * math.log2(n / len(value)) for n in Counter(value).values()) >= bits


# ---- email addresses

CREDENTIALS = re.compile(r"(?://(?:[^\s/@:]{1,40}:)?|@)\Z")  # user:password@host in a URL, @user@host
# The local part is matched backwards from the @, against the reversed text before it.
UNSPACED = "\u2e80-\U0003ffff"  # scripts that do not part words by spaces, so that an address ends where they begin
LOCAL = re.compile(r"[A-Za-z0-9_.+%&'*~!#$-]{1,64}+")
LOCAL_ANY = re.compile(rf"(?:[^\W{UNSPACED}]|[.+%&'*~!#$-]){{1,64}}+")
DOMAIN = re.compile(r"[A-Za-z0-9-]{1,63}+(?:\.[A-Za-z0-9-]{1,63}+){1,8}+")
DOMAIN_ANY = re.compile(rf"(?:[^\W_{UNSPACED}]|-){{1,63}}+(?:\.(?:[^\W_{UNSPACED}]|-){{1,63}}+){{1,8}}+")
# RFC 2606 and 6761, names of private networks, and suffixes of files that an @ occurs in (icon@2x.png, getty@tty1.service).
NOT_DOMAINS = frozenset(
    "example test invalid localhost local localdomain internal lan home corp png jpg jpeg gif svg webp ico bmp css js mjs ts json html htm php xml"
    " txt pdf md py zip gz tar exe service socket target timer mount slice".split()
)
EXAMPLE = re.compile(r"(?:.+\.)?example\.(?:com|net|org)", re.IGNORECASE)


def _emails(text: str) -> Iterator[Span]:
    for at in (match.start() for match in re.finditer("@", text)):
        domain = _domain(text, at + 1)
        if domain and (local := _local(text[max(0, at - 65) : at])):
            start, end = at - len(local), at + 1 + len(domain)
            after = text[end : end + 1]
            remote = local == "git" and after in (":", "/")
            if not (remote or after in ("@", "(") or CREDENTIALS.search(text, max(0, start - 64), start)):
                yield Span("email", start, end)


def _local(before: str) -> str:
    """The local part that `before` ends with; "" if there is none."""
    match = LOCAL.match(before[::-1])
    size = match.end() if match else 0
    if size == 0 or (size < len(before) and _of_a_word(before[-size - 1])):
        match = LOCAL_ANY.match(before[::-1])
        size = match.end() if match else 0
    if size == 0 or size > 64 or (size == 64 < len(before) and before[-65].isalnum()):
        return ""
    local = before[-size:].rpartition("..")[2].lstrip(".+%&'*~!#$-")
    return "" if local[-1:] in (".", "") else local


def _domain(text: str, start: int) -> str:
    """The domain at `start`; "" if there is none or it is nobody's."""
    match = DOMAIN.match(text, start)
    if match is None or _of_a_word(text[match.end() : match.end() + 1]):
        match = DOMAIN_ANY.match(text, start)
    if match is None:
        return ""
    labels = match[0].rstrip("-").split(".")
    while len(labels) > 2 and (
        len(labels[-1]) < 2 or not labels[-1].isalpha() or (labels[-1].istitle() and labels[-2].islower())
    ):
        labels.pop()  # "a.com.5" and "a.com.Then": a sentence that begins without a space
    last = labels[-1].lower()
    if not (2 <= len(last) <= 24 and (last.isalpha() or last.startswith("xn--"))) or last in NOT_DOMAINS:
        return ""
    if any(not label or label[0] == "-" or label[-1] == "-" for label in labels):
        return ""
    domain = ".".join(labels)
    return "" if EXAMPLE.fullmatch(domain) else domain


def _of_a_word(character: str) -> bool:
    """Whether this is a letter beyond ASCII that belongs to the word beside it."""
    return "\x7f" < character < UNSPACED[0] and character.isalpha()


# ---- numbers: IPv6, then IBAN, IPv4, cards and phones in one scan

IPV6_ANCHOR = re.compile(r":(?=[0-9A-Fa-f]{0,4}:)")
PART_OF_NAME = re.compile(r"\w|\.\w")
IPV6_RUN = re.compile(r"[0-9A-Fa-f:]++(?:(?:\.[0-9]{1,3}){3})?")
NOT_NETWORK = (1 << 80) - 1  # an address that ends in so many zeros names a provider's network
# IANA's special-purpose registries; written out, as what Python calls global changes with its version. Of IPv6 only 2000::/3 is given out.
SPECIAL = [
    ip_network(network)
    for network in (
        "0.0.0.0/8 10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 169.254.0.0/16 172.16.0.0/12 192.0.0.0/24 192.0.2.0/24 192.88.99.0/24 192.168.0.0/16"
        " 198.18.0.0/15 198.51.100.0/24 203.0.113.0/24 224.0.0.0/3 ::/3 4000::/2 8000::/1 2001::/23 2001:db8::/32 3fff::/20"
    ).split()
]
IBAN_LENGTHS = {
    entry[:2]: int(entry[2:])
    for entry in (
        "AD24 AE23 AL28 AT20 AZ28 BA20 BE16 BG22 BH22 BI27 BR29 BY28 CH21 CR22 CY28 CZ24 DE22 DJ27 DK18 DO28 EE20 EG29 ES24 FI18 FK18 FO18 FR27 "
        "GB22 GE22 GI23 GL18 GR27 GT28 HN28 HR21 HU28 IE22 IL23 IQ23 IS26 IT27 JO30 KW30 KZ20 LB28 LC32 LI21 LT20 LU20 LV21 LY25 MC27 MD24 ME22 "
        "MK19 MN20 MR27 MT31 MU30 NI28 NL18 NO15 OM23 PK24 PL28 PS29 PT25 QA29 RO24 RS22 RU33 SA24 SC31 SD18 SE24 SI19 SK24 SM27 SO23 ST25 SV28 "
        "TL23 TN24 TR26 UA29 VA22 VG24 XK20 YE30"
    ).split()
}
# A word for a number of parts before it, or name-1.2.3.4, name/1.2.3.4, ==1.2.3.4
VERSION = re.compile(
    r"(?:\b(?:v|ver|version|release|rev|revision|build|firmware|driver|section|sections|sect|sec|chapter|clause|paragraph|figure|table|oid|kernel)"
    r"[.:]?\s{0,2}|§\s?|[A-Za-z_]-|[A-Za-z0-9)]/|[=<>~^!]=\s?)\Z",
    re.IGNORECASE,
)
NO_GAPS = dict.fromkeys(map(ord, " \u00a0\u2009\u202f-"))
# First and last prefix, lengths: Visa; Mastercard; American Express; Diners; JCB; Discover; UnionPay.
ISSUERS = [
    ("4", "4", (13, 16)), ("51", "55", (16,)), ("2221", "2720", (16,)), ("34", "34", (15,)), ("37", "37", (15,)), ("300", "305", (14,)),
    ("36", "36", (14,)), ("38", "39", (14, 16)), ("3528", "3589", (16,)), ("6011", "6011", (16, 19)), ("644", "659", (16, 19)),
    ("62", "62", (16, 17, 18, 19)),
]  # fmt: skip
NUMBERS = frozenset(("iban", "ipv4", "card", "phone"))
GAP = r" \u00a0\u2009\u202f"  # spaces within a number
DASH = r"\u2010\u2011\u2013-"
# One character first, and then what must stand around it: a search for a set of characters is fast, one that begins with an assertion is not.
NUMBER = re.compile(
    rf"[0-9+(](?:(?<!\w.)(?=[0-9+()./{GAP}{DASH}]{{6}})|((?<=[A-Z]{{2}}[0-9])(?<!\w...)(?=[0-9][{GAP}{DASH}]?[A-Z0-9]{{3}})))"
)
SHAPE = re.compile(
    rf"""
    (?P<ipv4> (?!0[0-9]) (?:[0-9]{{1,3}}\.){{3}} [0-9]{{1,3}} (?![\w(] | \.\w | [+-][0-9]{{0,4}}[A-Za-z]) )
  | (?P<card> [2-6][0-9]{{12,18}} (?![\w] | [.{DASH}][0-9])
        | [2-6][0-9]{{3}} (?P<gap>[{GAP}-]) (?: [0-9]{{4}}(?P=gap)[0-9]{{4}}(?P=gap)[0-9]{{4}} (?: (?P=gap)[0-9]{{3}} )?
        | [0-9]{{6}}(?P=gap)[0-9]{{4,5}} ) (?![\w] | (?P=gap)[0-9]{{4}} | [.{DASH}][0-9]) )
  | (?P<international> \(? (?: \+ | 00[{GAP}{DASH}]?(?=[(1-9]) ) \(? [1-9] (?: [./(){GAP}{DASH}]{{0,3}} [0-9] ){{6,17}} (?![0-9]) )
  | (?P<american> (?: 1[.{GAP}{DASH}] )?
        (?: \([2-9][0-9]{{2}}\)[{GAP}{DASH}]?
        | [2-9][0-9]{{2}} (?: \.(?=[0-9]{{3}}\.) | [{DASH}](?=[0-9]{{3}}[{DASH}]) | [/{GAP}](?=[0-9]{{3}}[{GAP}{DASH}]) ) )
        [2-9][0-9]{{2}} [.{GAP}{DASH}] [0-9]{{4}} (?!(?!x[0-9])[\w%°€] | [.,/{DASH}][0-9]) )
  | (?P<national> \(? [0-9]{{1,13}}+ \)? (?: (?: [{GAP}]?[/.{DASH}][{GAP}]? | [{GAP}] | (?<=\)) ) \(?[0-9]{{1,8}}+\)? ){{0,6}}+ (?![\w%°€] | [.,/:{DASH}][0-9]) )
    """,
    re.VERBOSE,
)


def _ipv6(text: str) -> Iterator[Span]:
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
        if _public(mapped) if mapped else _public(address) and int(address) & NOT_NETWORK:
            yield Span("ipv6", start, end)


def _public(address: IPv4Address | IPv6Address) -> bool:
    return not any(address in network for network in SPECIAL)


def _numbers(text: str) -> Iterator[Span]:
    """Spans of IBAN, IPv4, cards and phones: all begin with a digit, "+" or "(" that enough digits follow."""
    end = 0
    for match in NUMBER.finditer(text):
        start = match.start()
        if start < end:
            continue
        if match[1] is not None:
            start -= 2
            kind, stop = "iban", _iban(text, start)
        elif (shape := SHAPE.match(text, start)) is None:
            continue
        elif shape.lastgroup == "ipv4":
            kind, stop = "ipv4", shape.end() if _public_ipv4(text, start, shape[0]) else 0
        elif shape.lastgroup == "card":
            kind, stop = "card", shape.end() if _card(text, start, shape) else 0
        else:
            kind, stop = "phone", _phone(text, start, shape)
        if stop:
            end = stop
            if text.count("(", start, end) > text.count(")", start, end):
                start += 1
            yield Span(kind, start, end)


def _iban(text: str, start: int) -> int:
    """Where the IBAN at `start` ends; 0 if it is none."""
    length = IBAN_LENGTHS.get(text[start : start + 2])
    match = length and re.compile(rf"(?:[A-Z0-9][{GAP}{DASH}]?){{{length - 1}}}[A-Z0-9](?!\w)").match(text, start)
    if not match:
        return 0
    value = re.sub(r"[^A-Z0-9]", "", match[0])
    return match.end() if int("".join(str(int(c, 36)) for c in value[4:] + value[:4])) % 97 == 1 else 0


def _public_ipv4(text: str, start: int, value: str) -> bool:
    before = text[max(0, start - 16) : start]
    if before[-1:] == "." or VERSION.search(before):
        return False
    if value.endswith((".0", ".255")) or sum(len(part) > 1 for part in value.split(".")) < 2:
        return False  # networks and netmasks; sections and versions such as 3.1.4.12, of which the real addresses are mostly public resolvers
    try:
        return _public(IPv4Address(value))
    except AddressValueError:
        return False


def _card(text: str, start: int, shape: re.Match[str]) -> bool:
    before = text[max(0, start - 2) : start]
    if before[-1:] in (".", "-", "/") or (shape["gap"] and before[-1:] == shape["gap"] and before[:1].isdigit()):
        return False  # part of something longer
    number = shape[0].translate(NO_GAPS)
    issued = any(first <= number[: len(first)] <= last and len(number) in lengths for first, last, lengths in ISSUERS)
    digits = list(map(int, number))
    doubled = (sum(divmod(2 * digit, 10)) for digit in digits[-2::-2])
    return issued and (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


# ---- phones

# Country calling codes (ITU E.164) of one and two digits, with the fewest and most digits of a national number; all others have three.
CALLING_CODES = {
    "1": (10, 10), "7": (10, 10), "20": (8, 10), "27": (9, 9), "30": (10, 10), "31": (9, 9), "32": (8, 9), "33": (9, 9), "34": (9, 9),
    "36": (8, 9), "39": (6, 11), "40": (9, 9), "41": (9, 9), "43": (7, 13), "44": (9, 10), "45": (8, 8), "46": (7, 10), "47": (8, 8),
    "48": (9, 9), "49": (6, 11), "51": (8, 9), "52": (10, 11), "53": (6, 8), "54": (10, 11), "55": (10, 11), "56": (9, 9), "57": (8, 10),
    "58": (10, 10), "60": (8, 10), "61": (9, 9), "62": (7, 12), "63": (8, 10), "64": (8, 10), "65": (8, 8), "66": (8, 9), "81": (9, 10),
    "82": (8, 10), "84": (9, 10), "86": (9, 11), "90": (10, 10), "91": (10, 10), "92": (9, 10), "93": (9, 9), "94": (9, 9), "95": (7, 10),
    "98": (10, 10),
}  # fmt: skip
LONG_CODES = re.compile(
    "21[12368]|2[2346][0-9]|25[0-8]|29[01789]|35[0-9]|37[0-9]|38[0-35-79]|42[013]|50[0-9]|59[0-9]|67[02-9]|68[0-35-9]|69[0-2]"
    "|80[08]|85[02356]|87[08]|88[01236]|96[0-8]|97[0-79]|99[2-68]"
)
PHONE_WORDS = frozenset(
    "tel phone phone_number phones telephone fax mobile mob cell cellphone call calling dial ph sms whatsapp hotline helpline toll ring tél téléphone appelez"
    " portable telefon telefono teléfono telefone telefoon celular móvil cellulare handy mobil rufnummer gsm тел телефон моб".split()
)
PHONE_SIGN = re.compile(r"[☎📞📱]|电话|電話|手机|传真|\b[TMPF]:")
NUMBER_WORDS = frozenset(
    "isbn issn doi order invoice item sku part parts serial model ref reference id no nr n num number code case ticket tracking patent ean upc vat"
    " account acct catalog catalogue lot batch pmid oclc ssn page pages pp grant contract permit license licence commande pedido rechnung".split()
)
CONTEXT = 40  # characters before a number
BEFORE = re.compile(r"[^0-9\n]*+")
EXTENSION = re.compile(r" ?(?:x|,? ?ext\.?|,? ?extension) ?[0-9]{1,6}(?![\w.])", re.IGNORECASE)
AMERICAN_MARK = re.compile(rf"[.(/{DASH}]")
DECIMAL = re.compile(r"\+?[0-9]+\.[0-9]+")
HEX_PAIR = re.compile(r"\s[0-9A-Fa-f]{2}\b")  # the number is in a dump or a table
OPENING = frozenset(" \t\n\r\u00a0\u2009\u202f([{<>\"'“„«`|,;:*•·、，：（")


def _phone(text: str, start: int, shape: re.Match[str]) -> int:
    """Where the phone number at `start` ends, its extension included; 0 if it is none."""
    before = text[max(0, start - CONTEXT) : start]
    national = shape.lastgroup == "national"
    if national and before[-1:].isspace() and before[-2:-1].isdigit():  # in a row of numbers
        return 0
    value = shape[0]
    parts = re.findall("[0-9]+", value)
    if before.endswith(("+", ")", ".")) or (DECIMAL.fullmatch(value) and (value[0] != "+" or len(parts[0]) > 3)):
        return 0
    while national and len(parts) > 1 and sum(map(len, parts)) > 13:  # a number and what follows it
        parts.pop()
    if national and (not 7 <= sum(map(len, parts)) <= 13 or min(map(len, parts[1:]), default=2) < 2 or _dated(parts)):
        return 0
    same_line = BEFORE.match(before[::-1]).group()[::-1]  # type: ignore[union-attr]
    words = re.findall(r"[^\W\d]+", same_line.lower())[len(same_line) == CONTEXT :]  # the first may be the end of one
    named = not PHONE_WORDS.isdisjoint(words) or PHONE_SIGN.search(same_line) is not None
    opened = (not before or before[-1] in OPENING) and not (words and words[-1] in NUMBER_WORDS)
    ends = [start + match.end() for match in re.finditer("[0-9]+", value)]
    end = ends[len(parts) - 1]
    if shape.lastgroup == "international":
        if not ("+" in value or named or (opened and len(parts) > 1)):
            return 0
        end = _international(text, list(zip(ends, parts, strict=True)))
    elif not named:
        if national:
            likely = _long_distance(value, parts, before, text[end : end + 3])
        else:  # and no row of numbers
            neighbours = before[-2:-1] + text[end + 1 : end + 2]
            likely = AMERICAN_MARK.search(value) is not None or not any(map(str.isdigit, neighbours))
        if not (opened and likely):
            return 0
    extension = EXTENSION.match(text, end) if end else None
    return extension.end() if extension else end


def _long_distance(value: str, parts: list[str], before: str, after: str) -> bool:
    """Whether a number without a word such as "Tel." has the shape of one with an area code: 0, 9 or 10 more digits, in 2 to 5 groups."""
    digits = "".join(parts)
    return (
        digits[:1] == "0" != digits[1:2]
        and 10 <= len(digits) <= 11
        and 2 <= len(parts) <= 5
        and 2 <= len(parts[0]) <= 5
        and len({c for c in value if c in "./"}) < 2
        and len({int(b) - int(a) for a, b in zip(parts, parts[1:], strict=False)}) + (len(parts) < 3)
        > 1  # 01 02 03 04 05
        and not HEX_PAIR.match(before[:-4:-1])
        and not HEX_PAIR.match(after)
    )


def _international(text: str, groups: list[tuple[int, str]]) -> int:
    """Where the longest run of whole groups of digits ends that is as long as numbers of its country are; 0 if none is."""
    groups = [group for group in groups if group[1] != "0" or text[group[0] - 2 : group[0] + 1] != "(0)"]
    digits = "".join(part for _, part in groups)
    trunk = 2 if digits.startswith("00") else 0  # in the place of +
    code = next((digits[trunk : trunk + n] for n in (1, 2) if digits[trunk : trunk + n] in CALLING_CODES), "")
    if not code and LONG_CODES.match(digits, trunk):
        code = digits[trunk : trunk + 3]
    if not code or (code == "1" and digits[trunk + 1 : trunk + 2] in ("0", "1")):
        return 0
    fewest, most = CALLING_CODES.get(code, (5, 11))
    while groups and not fewest <= len(digits) - len(code) - trunk <= most:
        digits = digits[: -len(groups.pop()[1])]
    return groups[-1][0] if groups else 0


def _dated(parts: list[str]) -> bool:
    """Dates and ranges of years: 01 02 2003, 2003 01 02, 1999 2003."""
    years = [len(part) == 4 and part[:2] in ("18", "19", "20") for part in parts[:3]]
    shape = "".join(
        "y" if year else "n" if len(part) <= 2 and int(part) <= 31 else "?"
        for year, part in zip(years, parts, strict=False)
    )
    return shape in ("nny", "ynn", "yn", "ny", "yy", "yyy", "nyy")


SCANS = (("secret", _secrets), ("email", _emails), ("ipv6", _ipv6))

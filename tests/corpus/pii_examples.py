"""Labelled sentences for the detection of personal data: positives built from specifications, and look-alikes.

    examples(seed=0, each=150) -> [Example(text, {(kind, start, end), ...}, source), ...]

The examples are independent of the tested patterns. Values are built from the definitions of each kind: RFC 5322 and 6531
(email), RFC 4291 and 5952 and the IANA registries
(addresses), E.164 and national numbering plans (phones), ISO/IEC 7812 (cards), the registry of ISO 13616 (IBAN), the issuers' own descriptions (keys).
"""

from __future__ import annotations

import base64
import ipaddress
import json
import random
import string
import uuid
from collections.abc import Callable
from typing import NamedTuple

ALNUM = string.ascii_letters + string.digits
UPPER = string.ascii_uppercase + string.digits
Random = random.Random


class Example(NamedTuple):
    text: str
    labels: frozenset[tuple[str, int, int]]  # empty: no personal data
    source: str  # the kind of a positive, the name of the look-alike of a negative


def examples(seed: int = 0, each: int = 150) -> list[Example]:
    """`each` positives of every kind, and `each` / 5 negatives of every look-alike."""
    made = []
    for kind, (value, contexts) in POSITIVES.items():
        rng = random.Random(f"{seed} {kind}")
        for _ in range(each):
            text, before = value(rng), ""
            if isinstance(text, tuple):  # a value that fits into some sentences only
                text, own = text
                before, after = rng.choice(own).split("{}")
            else:
                before, after = rng.choice(contexts).split("{}")
            made.append(Example(before + text + after, frozenset({(kind, len(before), len(before) + len(text))}), kind))
    for name, trap in TRAPS.items():
        rng = random.Random(f"{seed} {name}")
        made += [Example(trap(rng), frozenset(), name) for _ in range(max(1, each // 5))]
    return made


# ---- email

NAMES = "anna bob chen dmitri elif fatima george hanna ivan jose kim lena mario nadia omar petra quentin rosa sven tara".split()
HOSTS = (
    "mail northwind contoso uni-bonn acme hospital stadtwerke bluesky riverside tokyo-tech smtp hq alumni press".split()
)
SUFFIXES = "com org net de fr io co.uk ac.jp gov.au museum travel info edu nl ch com.br ai".split()


def email(rng: Random) -> str:
    first, last = rng.choice(NAMES), rng.choice(NAMES)
    if rng.random() < 0.1:
        return rng.choice(
            [
                "müller@bücher.de",
                "josé@correo.es",
                "иван@почта.рф",
                "rené.dupont@société.fr",
                "info@xn--bcher-kva.example-shop.de",
            ]
        )
    local = rng.choice(
        [
            f"{first}.{last}",
            f"{first[0]}{last}",
            f"{first}_{last}{rng.randrange(99)}",
            f"{first}+{last}",
            f"{first}-{last}",
            first.upper(),
            f"o'{last}",
            f"{rng.randrange(10**6)}",
        ]
    )
    return f"{local}@{'.'.join(rng.sample(HOSTS, rng.choice([1, 1, 1, 2])))}.{rng.choice(SUFFIXES)}"


EMAIL_CONTEXTS = [
    "Write to {}.", "Contact: {}", "<{}>", "From: A. Person <{}>", "mailto:{}", '<a href="mailto:{}">', "(see {})", "{}, or call", "`{}`", "'{}',", '"email": "{}"}',
    "{}\n", "E-Mail:{};", "Please ask {} about it", "author = {}", "连络{}谢谢", "Is it {}?", "**{}**", "|{}|",
]  # fmt: skip

# ---- addresses

SPECIAL_V4 = [ipaddress.ip_network(net) for net in (
    "0.0.0.0/8 10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 169.254.0.0/16 172.16.0.0/12 192.0.0.0/24 192.0.2.0/24 192.88.99.0/24 192.168.0.0/16 198.18.0.0/15"
    " 198.51.100.0/24 203.0.113.0/24 224.0.0.0/3"
).split()]  # fmt: skip


def ipv4(rng: Random) -> str:
    while True:  # hosts: neither the first nor the last address of a /24
        address = ipaddress.IPv4Address(rng.randrange(1 << 32))
        if not any(address in net for net in SPECIAL_V4) and int(address) & 255 not in (0, 255):
            return str(address)


IPV4_CONTEXTS = [
    "Connection from {} refused", "http://{}/index.html", "http://{}:8080/", "{}:22", "[{}]", "{} - - [12/Mar/2019:10:01:22 +0000]", "ping {}.", "ip={}&x=1", "ssh root@{}",
    "client {}, server: x", "Received: from mx ({})", "The address is {}.", "{}/32", '"host": "{}"', "IP:{}", "<td>{}</td>", "{}\n", "route add {} gw", "blocked {} and others",
]  # fmt: skip
BLOCKS_V6 = [
    "2001:4860",
    "2a00:1450",
    "2600:1f18",
    "2400:cb00",
    "2a02:8071",
    "2804:14d",
    "2c0f:f248",
    "2001:1af8",
    "2620:fe",
]


def ipv6(rng: Random) -> str:
    number = int(ipaddress.IPv6Address(rng.choice(BLOCKS_V6) + "::")) + rng.choice(
        [
            rng.randrange(1, 1 << 96),
            rng.randrange(1 << 48, 1 << 64) * 0x10001,
            (rng.randrange(1, 1 << 30) << 64) + rng.randrange(1, 999),
        ]
    )
    address = ipaddress.IPv6Address(number)
    form = rng.randrange(6)
    if form == 0:
        return address.exploded
    if form == 1:
        return address.compressed.upper()
    if form == 2:
        return ":".join(f"{int(group, 16):x}" for group in address.exploded.split(":"))
    if form == 3:
        return "::ffff:" + ipv4(rng)
    if form == 4:
        return ":".join(address.exploded.split(":")[:6]) + ":" + ipv4(rng)
    return address.compressed


IPV6_CONTEXTS = [
    "[{}]:443", "{}/64", "{}%eth0", "http://[{}]/", "ping6 {}", "It resolved to {}.", "({})", "inet6 {} prefixlen 64", "AAAA {}\n", "from={}, to=x", '"{}"', "peer {} is down",
]  # fmt: skip

# ---- phones: # is a digit, 9 one from 2 to 9

INTERNATIONAL = [
    "+1 9## 9## ####", "+1-9##-9##-####", "+1 (9##) 9##-####", "+19##9######", "+44 20 7### ####", "+44 (0)20 7### ####", "+44 7### ######", "+49 30 #######", "+49 (0)171 #######",
    "+49-89-########", "+4917########", "+33 6 ## ## ## ##", "+33 (0)1 ## ## ## ##", "+34 6## ## ## ##", "+39 06 #### ####", "+39 3## #######", "+31 20 ### ####", "+32 2 ### ## ##", "+41 44 ### ## ##",
    "+43 1 #######", "+46 8 ### ### ##", "+47 9## ## ###", "+45 ## ## ## ##", "+48 22 ### ## ##", "+7 (495) ###-##-##", "+81 3-####-####", "+82-2-####-####", "+86 138 #### ####", "+91 98### #####",
    "+91-22-########", "+55 (11) 9####-####", "+52 55 #### ####", "+54 11 ####-####", "+61 2 #### ####", "+64 9 ### ####", "+65 6### ####", "+852 2### ####", "+972 3-###-####", "+971 4 ### ####",
    "+27 11 ### ####", "+234 803 ### ####", "+353 1 ### ####", "+358 9 ### ####", "+380 44 ### ## ##", "+420 2## ### ###", "+1.9##9######", "0049 30 #######", "00 33 6 ## ## ## ##", "(+49) 30 #######",
]  # fmt: skip
NATIONAL = [  # forms that are recognised by their shape
    "(9##) 9##-####", "9##-9##-####", "9##.9##.####", "1-800-9##-####", "9## 9## ####", "(9##)9##-####", "020 7### ####", "0161 4## ####", "07### ######", "06 ## ## ## ##", "01.4#.##.##.##",
    "030 #######", "0171/#######", "(030) ########", "089-########", "02 9### ####", "03-####-####", "090-####-####", "044 ### ## ##", "020-#######", "08-### ### ##", "06 #### ####",
]  # fmt: skip
LOCAL = [  # forms that are recognised by a preceding word only
    "9##-####", "9######", "9##9######", "91# ### ###", "6## ## ## ##", "22 ### ## ##", "98### #####", "138 #### ####", "8 (495) ###-##-##", "01 ### ####", "02 ### ## ##", "0123 #####", "##.##.##.##",
]  # fmt: skip
PHONE_CONTEXTS = [
    "Phone: {}", "Tel. {}", "call {} today", "Fax: {}.", "Reach us at {} or by mail", "12 High Street, Springfield\n{}\n", "{} (mobile)", "tel:{}", "Call us on {}!", "Anna, {}, Berlin",
    "WhatsApp {}", "Téléphone : {}", "Telefon: {}", "Teléfono {}", "My number is {}.", "电话：{}", "<b>{}</b>", "\u260e {}", "Contact ({}) for details", "Mobile - {}\n",
]  # fmt: skip
NAMED_CONTEXTS = [
    context
    for context in PHONE_CONTEXTS
    if any(word in context for word in ("hone", "Tel", "tel", "all", "Fax", "WhatsApp", "电", "\u260e", "Mobile -"))
]


def phone(rng: Random) -> str | tuple[str, list[str]]:
    forms, own = rng.choice(
        [(INTERNATIONAL, None), (INTERNATIONAL, None), (NATIONAL, None), (NATIONAL, None), (LOCAL, NAMED_CONTEXTS)]
    )
    value = rng.choice(forms)
    value = "".join(
        rng.choice("23456789") if c == "9" and "9##" in value else str(rng.randrange(10)) if c == "#" else c
        for c in value
    )
    if rng.random() < 0.1:
        value = value.replace(" ", "\u00a0")
    return (value, own) if own else value


# ---- cards and accounts

CARDS = [
    ("4", 16),
    ("4", 16),
    ("51", 16),
    ("55", 16),
    ("2221", 16),
    ("2720", 16),
    ("34", 15),
    ("37", 15),
    ("6011", 16),
    ("65", 16),
    ("36", 14),
    ("3530", 16),
    ("62", 16),
    ("4", 13),
]


def luhn(digits: str) -> str:
    """The digit that makes the sum of ISO/IEC 7812-1 annex B a multiple of ten."""
    total = sum(int(d) if i % 2 else sum(divmod(2 * int(d), 10)) for i, d in enumerate(reversed(digits)))
    return str(-total % 10)


def digits(rng: Random, count: int) -> str:
    return "".join(rng.choice(string.digits) for _ in range(count))


def card(rng: Random) -> str:
    prefix, length = rng.choice(CARDS)
    number = prefix + digits(rng, length - 1 - len(prefix))
    number += luhn(number)
    sizes = {16: (4, 4, 4, 4), 15: (4, 6, 5), 14: (4, 6, 4)}.get(length, (length,))
    gap = rng.choice([" ", "-", "", "\u00a0", " "])
    return gap.join(number[sum(sizes[:i]) : sum(sizes[: i + 1])] for i in range(len(sizes)))


CARD_CONTEXTS = [
    "Card number: {}", "Visa {} exp 09/27", "pay with {}, please", "<td>{}</td>", '"pan": "{}"', "{}\n", "cc={}&", "My card {} was charged.", "MC {} 12/25 123", "({})", "number {}.",
]  # fmt: skip
IBANS = {  # BBAN: n digits, a capitals, c both
    "DE": "18n", "GB": "4a14n", "FR": "10n11c2n", "NL": "4a10n", "ES": "20n", "IT": "1a10n12c", "CH": "5n12c", "AT": "16n", "BE": "12n", "PL": "24n", "SE": "20n", "NO": "11n", "DK": "14n", "PT": "21n",
    "IE": "4a14n", "FI": "14n", "MT": "4a5n18c", "TR": "6n16c", "SA": "2n18c", "BR": "23n1a1c", "LC": "4a24c", "GR": "7n16c", "CZ": "20n", "AE": "19n", "UA": "6n19c",
}  # fmt: skip


def iban(rng: Random) -> str:
    country = rng.choice(list(IBANS))
    body, count = "", ""
    for c in IBANS[country]:
        if c.isdigit():
            count += c
        else:
            body += "".join(
                rng.choice({"n": string.digits, "a": string.ascii_uppercase, "c": UPPER}[c]) for _ in range(int(count))
            )
            count = ""
    check = 98 - int("".join(str(int(c, 36)) for c in body + country + "00")) % 97
    value = f"{country}{check:02}{body}"
    gap = rng.choice(["", " ", " ", "\u00a0"])
    return gap.join(value[i : i + 4] for i in range(0, len(value), 4))


IBAN_CONTEXTS = [
    "IBAN: {}",
    "IBAN {}, BIC COBADEFF",
    "Konto {}.",
    "transfer to {} today",
    '"iban":"{}"',
    "{}\n",
    "({})",
    "<td>{}</td>",
    "IBAN={};",
]

# ---- secrets


def some(rng: Random, alphabet: str, count: int) -> str:
    return "".join(rng.choice(alphabet) for _ in range(count))


def token(rng: Random, alphabet: str, count: int) -> str:
    """Random characters with digits among them, as in nearly all real keys."""
    while True:
        value = some(rng, alphabet, count)
        if sum(c.isdigit() for c in value) > 1 and sum(c.isalpha() for c in value) > 1:
            return value


def b64url(data: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(data).encode()).decode().rstrip("=")


def secret(rng: Random) -> str | tuple[str, list[str]]:
    form = rng.randrange(15)
    url = ALNUM + "-_"
    if form == 0:
        return "AKIA" + token(rng, string.ascii_uppercase + "234567", 16)
    if form == 1:
        return rng.choice(["ghp_", "gho_", "ghs_"]) + token(rng, ALNUM, 36)
    if form == 2:
        return "github_pat_" + token(rng, ALNUM, 22) + "_" + token(rng, ALNUM, 59)
    if form == 3:
        return "glpat-" + token(rng, ALNUM, 20)
    if form == 4:
        return f"xoxb-{digits(rng, 12)}-{digits(rng, 12)}-{token(rng, ALNUM, 24)}"
    if form == 5:
        return "AIza" + token(rng, url, 34) + rng.choice(ALNUM)
    if form == 6:
        return rng.choice(["sk_live_", "rk_live_", "sk_test_"]) + token(rng, ALNUM, rng.choice([24, 99]))
    if form == 7:
        return "sk-" + rng.choice(["", "proj-"]) + token(rng, ALNUM, 48)
    if form == 8:
        return "sk-ant-api03-" + token(rng, url, 92) + "AA"
    if form == 9:
        return "hf_" + token(rng, ALNUM, 34)
    if form == 10:
        return ".".join(
            [
                b64url({"alg": "HS256", "typ": "JWT"}),
                b64url({"sub": digits(rng, 10), "name": rng.choice(NAMES), "iat": rng.randrange(10**9)}),
                token(rng, ALNUM, 43),
            ]
        )
    if form == 11:
        kind = rng.choice(["RSA ", "EC ", "", "OPENSSH "])
        lines = "\n".join(some(rng, ALNUM + "+/", 64) for _ in range(rng.randrange(3, 20)))
        return f"-----BEGIN {kind}PRIVATE KEY-----\n{lines}\n-----END {kind}PRIVATE KEY-----"
    value = token(rng, rng.choice([ALNUM, "0123456789abcdef", ALNUM + "+/"]), rng.choice([20, 32, 40]))
    return value.replace("//", "/a"), ASSIGNMENTS


SECRET_CONTEXTS = [
    'key = "{}"',
    "export TOKEN={}",
    "curl -H 'X-Auth: {}'",
    "{}\n",
    "I leaked {} by mistake.",
    "<{}>",
    '{"k":"{}"}'.replace('{"k":"{}"}', '"k": "{}"'),
    "?key={}&a=b",
    "({})",
]
ASSIGNMENTS = [
    'api_key = "{}"', "API_KEY={}\n", '"access_token": "{}",', "secret: {}\n", "AWS_SECRET_ACCESS_KEY={}\n", "client_secret='{}'", 'password = "{}"', "  auth_token: '{}'", "config['apikey'] = '{}'",
    'private_key="{}"', "SECRET_KEY = '{}'", "--token={} ",
]  # fmt: skip

Value = Callable[[Random], "str | tuple[str, list[str]]"]
POSITIVES: dict[str, tuple[Value, list[str]]] = {
    "email": (email, EMAIL_CONTEXTS),
    "ipv4": (ipv4, IPV4_CONTEXTS),
    "ipv6": (ipv6, IPV6_CONTEXTS),
    "phone": (phone, PHONE_CONTEXTS),
    "card": (card, CARD_CONTEXTS),
    "iban": (iban, IBAN_CONTEXTS),
    "secret": (secret, SECRET_CONTEXTS),
}

# ---- look-alikes


def broken(value: str, rng: Random) -> str:
    """One digit changed, so that the check digits are wrong."""
    place = rng.choice([i for i, c in enumerate(value) if c.isdigit() and i > 3])
    return value[:place] + str((int(value[place]) + rng.randrange(1, 9)) % 10) + value[place + 1 :]


def dotted(rng: Random, parts: int, most: int) -> str:
    return ".".join(str(rng.randrange(most)) for _ in range(parts))


def isbn(rng: Random) -> str:
    body = "978" + digits(rng, 9)
    return body + str(-sum(int(d) * (1 + 2 * (i % 2)) for i, d in enumerate(body)) % 10)


def reserved(rng: Random) -> str:
    net = rng.choice([net for net in SPECIAL_V4 if net.network_address != ipaddress.ip_address("192.88.99.0")])
    return str(net[rng.randrange(1, net.num_addresses - 1)])


def hexadecimal(rng: Random, count: int) -> str:
    return some(rng, "0123456789abcdef", count)


def choose(*forms: Callable[[Random], str]) -> Callable[[Random], str]:
    return lambda rng: rng.choice(forms)(rng)


TRAPS: dict[str, Callable[[Random], str]] = {
    "version": choose(
        lambda r: f"v{dotted(r, 5, 20)} is out", lambda r: f"version {dotted(r, 4, 200)} fixes it", lambda r: f"Chrome/{r.randrange(50, 130)}.0.{r.randrange(256, 6000)}.{r.randrange(200)} Safari/537.36",
        lambda r: f"pip install x=={dotted(r, 4, 99)}", lambda r: f"linux-{dotted(r, 4, 60)}.tar.gz", lambda r: f"upgraded to {dotted(r, 3, 30)}", lambda r: f"app-{dotted(r, 4, 40)}-beta", lambda r: f"release {dotted(r, 4, 30)}",
    ),
    "section": choose(
        lambda r: f"see section {dotted(r, 4, 20)} below", lambda r: f"{dotted(r, 4, 9)} Scope of the rules", lambda r: f"§ {dotted(r, 4, 15)}", lambda r: f"OID 1.3.6.1.4.1.{r.randrange(99999)}.{dotted(r, 3, 20)}",
    ),
    "reserved ipv4": choose(lambda r: f"bind to {reserved(r)}:80", lambda r: f"http://{reserved(r)}/", lambda r: f"netmask 255.255.{r.randrange(256)}.0"),
    "impossible ipv4": choose(lambda r: f"value {r.randrange(256, 999)}.{dotted(r, 3, 256)}", lambda r: f"{dotted(r, 3, 256)}.{r.randrange(256, 999)}", lambda r: f"0{dotted(r, 4, 99)}x"),
    "reserved ipv6": choose(lambda r: f"http://[2001:db8::{r.randrange(1, 65536):x}]/", lambda r: f"fe80::{r.randrange(65536):x}:{r.randrange(65536):x}%eth0", lambda r: f"fd00:{r.randrange(65536):x}::1/48", lambda r: "listen on [::1]:80", lambda r: "ff02::1"),
    "colons": choose(
        lambda r: f"{r.choice(['std', 'ab', 'face', 'dead'])}::{r.choice(['map', 'cafe', 'be', 'string'])}<int> x;", lambda r: f"at {r.randrange(24):02}:{r.randrange(60):02}:{r.randrange(60):02} it stopped",
        lambda r: ":".join(f"{r.randrange(256):02x}" for _ in range(6)) + " dev eth0", lambda r: f"a ratio of {r.randrange(9)}:{r.randrange(9)}:{r.randrange(9)}", lambda r: "x[::2], y[1::3], z[2001::]", lambda r: "use Foo::Bar::Baz;",
        lambda r: ":".join(f"{r.randrange(256):02X}" for _ in range(16)),
    ),
    "isbn": choose(
        lambda r: f"ISBN {isbn(r)}", lambda r: (lambda i: f"ISBN-13: {i[:3]}-{i[3]}-{i[4:8]}-{i[8:12]}-{i[12]}")(isbn(r)), lambda r: f"ISBN 0-{digits(r, 3)}-{digits(r, 5)}-{r.randrange(10)}", lambda r: f"EAN {isbn(r)}", lambda r: f"ISSN {digits(r, 4)}-{digits(r, 4)}",
        lambda r: f"doi:10.{r.randrange(1000, 9999)}/j.cell.{r.randrange(2000, 2024)}.{digits(r, 2)}.{digits(r, 3)}", lambda r: f"arXiv:{digits(r, 4)}.{digits(r, 5)}", lambda r: f"US patent {r.randrange(1, 9)},{digits(r, 3)},{digits(r, 3)}",
    ),
    "hash": choose(
        lambda r: f"commit {hexadecimal(r, 40)}", lambda r: f"md5: {hexadecimal(r, 32)}", lambda r: f'sha256 = "{hexadecimal(r, 64)}"', lambda r: f'integrity="sha384-{some(r, ALNUM + "+/", 64)}"', lambda r: str(uuid.UUID(int=r.getrandbits(128))),
        lambda r: f"<img src='data:image/png;base64,iVBOR{some(r, ALNUM + '+/', 80)}'>", lambda r: f"etag: {hexadecimal(r, 16)}-{hexadecimal(r, 6)}", lambda r: f"id={uuid.UUID(int=r.getrandbits(128))}",
    ),
    "coordinates": choose(lambda r: f"{r.uniform(-90, 90):.6f}, {r.uniform(-180, 180):.6f}", lambda r: f"at {r.uniform(0, 90):.4f} {r.uniform(-180, 0):.4f}", lambda r: f"{r.randrange(90)}°{r.randrange(60)}'{r.randrange(60)}\"N"),
    "date": choose(
        lambda r: f"on {r.randrange(1990, 2025)}-{r.randrange(1, 13):02}-{r.randrange(1, 29):02} {r.randrange(24):02}:{r.randrange(60):02}", lambda r: f"{r.randrange(1, 29):02}.{r.randrange(1, 13):02}.{r.randrange(1990, 2025)}",
        lambda r: f"{r.randrange(1, 29):02}/{r.randrange(1, 13):02}/{r.randrange(1990, 2025)} {r.randrange(24):02}:{r.randrange(60):02}", lambda r: f"the years {r.randrange(1800, 1900)}-{r.randrange(1900, 2000)}", lambda r: f"phones sold in {r.randrange(2000, 2010)}-{r.randrange(2010, 2020)}",
        lambda r: f"2021-03-04T{r.randrange(24):02}:{r.randrange(60):02}:{r.randrange(60):02}.{digits(r, 9)}+01:00", lambda r: f"{r.randrange(1, 29):02} {r.randrange(1, 13):02} {r.randrange(1990, 2025)} {digits(r, 2)}", lambda r: f"{r.randrange(2000, 2024)}{r.randrange(1, 13):02}{r.randrange(1, 29):02}{digits(r, 6)}",
    ),
    "number": choose(
        lambda r: f"{r.random():.{r.randrange(5, 17)}f}", lambda r: f"x = {r.uniform(-1e6, 1e6):.8f}", lambda r: f"{r.randrange(10**6, 10**9):,}", lambda r: f"{r.randrange(10**6, 10**9):,}".replace(",", " "), lambda r: f"${r.randrange(10**6, 10**8):,}.00",
        lambda r: f"{r.uniform(1, 9):.6e}", lambda r: " ".join(f"{r.uniform(0, 99):.2f}" for _ in range(8)), lambda r: " ".join(str(r.randrange(1000)) for _ in range(10)), lambda r: " ".join(f"{i:02}" for i in range(r.randrange(9), 20)), lambda r: f"{r.randrange(999)} + {r.randrange(9999)} = ?",
        lambda r: f"seed {r.getrandbits(63)}", lambda r: f"a = +{r.randrange(10**5, 10**6)}", lambda r: f"timestamp {r.randrange(1_500_000_000, 1_700_000_000)}", lambda r: f"{r.randrange(1_500_000_000_000, 1_700_000_000_000)} ms", lambda r: f"0x{hexadecimal(r, 16)}",
        lambda r: "\t".join(digits(r, 3) for _ in range(8)), lambda r: " ".join(digits(r, 4) for _ in range(12)),
    ),
    "reference": choose(
        lambda r: f"Order no. {digits(r, 3)}-{digits(r, 7)}-{digits(r, 7)}", lambda r: f"invoice 0{digits(r, 4)}-{digits(r, 5)}", lambda r: f"ticket #{digits(r, 10)}", lambda r: f"SSN {digits(r, 3)}-{digits(r, 2)}-{digits(r, 4)}", lambda r: f"Springfield, IL {digits(r, 5)}-{digits(r, 4)}",
        lambda r: f"P/N {digits(r, 3)}-{digits(r, 4)}-{digits(r, 4)}", lambda r: f"tracking 1Z{some(r, UPPER, 16)}", lambda r: f"EN 60068-2-{r.randrange(99)}:{r.randrange(1990, 2020)}", lambda r: f"item {r.choice('23456789')}{digits(r, 2)}-{r.choice('23456789')}{digits(r, 2)}-{digits(r, 4)}",
        lambda r: f"won 21-{r.randrange(20)}, 21-{r.randrange(20)}, 21-{r.randrange(20)}", lambda r: f"AB-{digits(r, 3)}-{digits(r, 3)}-{digits(r, 4)}", lambda r: f"https://site.org/p/{digits(r, 10)}/{digits(r, 3)}-{digits(r, 3)}-{digits(r, 4)}", lambda r: f"call number QA{digits(r, 2)}.{digits(r, 2)} .K{digits(r, 3)}",
    ),
    "card-like": choose(
        lambda r: "Card " + broken(card(r), r), lambda r: f"id 9{digits(r, 15)}", lambda r: f"1{digits(r, 15)}", lambda r: (lambda n: n + luhn(n))("4" + digits(r, 23)), lambda r: "x" + card(r), lambda r: f"0.{card(r).replace(' ', '').replace('-', '')}", lambda r: f"7{digits(r, 3)} {digits(r, 4)} {digits(r, 4)} {digits(r, 4)}",
    ),
    "iban-like": choose(lambda r: "IBAN " + broken(iban(r), r), lambda r: "IBAN " + iban(r).replace(" ", "") + r.choice(ALNUM), lambda r: f"ZZ{digits(r, 20)}", lambda r: f"part DE{digits(r, 9)}", lambda r: f"VAT GB{digits(r, 9)}"),
    "at sign": choose(
        lambda r: f"icon@2x.{r.choice(['png', 'jpg', 'webp'])}", lambda r: f"git@github.com:{r.choice(NAMES)}/repo.git", lambda r: f"{r.choice(NAMES)}@localhost", lambda r: f"{r.choice(NAMES)}@example.{r.choice(['com', 'org'])}", lambda r: f"npm i react@{dotted(r, 3, 20)}", lambda r: f"follow @{r.choice(NAMES)}.{r.choice(NAMES)}",
        lambda r: f"@{r.choice(NAMES)}@mastodon.social", lambda r: f"https://{r.choice(NAMES)}:pw@host.net/x", lambda r: "@property\ndef f(self): ...", lambda r: "y = a@b.T + W @ x", lambda r: "A@B.dot(c)", lambda r: f"getty@tty{r.randrange(9)}.service", lambda r: f"3 apples @ $1.{digits(r, 2)}", lambda r: "meet @ cafe.later", lambda r: "\\@ifnextchar",
        lambda r: f"ssh {r.choice(NAMES)}@server.local",
    ),
    "secret-like": choose(
        lambda r: "AKIAIOSFODNN7EXAMPLE", lambda r: f'api_key = "{r.choice(["YOUR_API_KEY_HERE_123", "xxxxxxxxxxxxxxxxxxxxxxxx", "<your-api-key-goes-here>", "REPLACE_ME_WITH_API_KEY"])}"', lambda r: "token = get_auth_token_from_session(request)", lambda r: 'SECRET_KEY = os.environ["DJANGO_SECRET_KEY_V2"]', lambda r: 'password = "********************"',
        lambda r: "a sk-learn pipeline and task-oriented-dialogue-systems-2019-overview-of-everything", lambda r: f'public_id = "{token(r, ALNUM, 24)}"', lambda r: f'checksum: "{token(r, ALNUM, 40)}"', lambda r: "ghp_xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx", lambda r: "-----BEGIN RSA PRIVATE KEY-----\n... (base64) ...\n-----END RSA PRIVATE KEY-----",
        lambda r: f"-----BEGIN CERTIFICATE-----\n{some(r, ALNUM + '+/', 64)}\n-----END CERTIFICATE-----", lambda r: "password: correct-horse-battery-staple", lambda r: "secret = self.config.client_secret_value.strip()", lambda r: f"token_count = {r.randrange(10**15, 10**17)}", lambda r: "eyJhbGciOiJIUzI1NiJ9 is a header", lambda r: "tokenizer=AutoTokenizerForPreTraining2",
        lambda r: f'publicKeyToken="{hexadecimal(r, 16)}"',
    ),
    "dump": choose(lambda r: f"{r.randrange(65536):08x}  " + " ".join(hexadecimal(r, 2) for _ in range(16)), lambda r: " ".join(hexadecimal(r, 4) for _ in range(8)), lambda r: "\\x" + "\\x".join(hexadecimal(r, 2) for _ in range(12)), lambda r: "08 00 45 00 00 3c 1c 46 40 00", lambda r: f"#{hexadecimal(r, 6)}; #{hexadecimal(r, 3)}"),
}  # fmt: skip

# ---- repetitions of any of these slow down a scan that restarts at every character

HOSTILE = [
    "a@", "a@a.", "a.a@", "1.1.", "12.34.56.78 ", "1", "1 ", "12 ", "06 12 34 ", "4111 ", "(1", "+1", "+49 ", "((((1", ":", "a:", "2001::1 ", "eyJ", "eyJhbGciOiJI.", "eyJhbGciOiJIUz.eyJhbGciOiJI.",
    "-----BEGIN PRIVATE KEY-----", "sk-", "ghp_a1", "Bearer ", "=a1b2c3d4e5f6g7h8", "secret=a1b2c3d4e5f6g7h8i9 ", "DE89", "AB12 ", "tel 1", "\uff11", "\u00a01", "bob@acme.com ",
    "Zm9vYmFyMTIzNDU2Nzg5MGFiY2RlZmdoaWprbG1u",
]  # fmt: skip

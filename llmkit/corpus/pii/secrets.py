"""Keys, tokens and passwords: published key prefixes, PEM private keys, random values assigned to a revealing name."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator

from llmkit.corpus.pii.span import PiiSpan

# Every key begins with one of these literals; each is paired with the pattern of the whole key. The look-behind
# for what must not precede the key comes after the literal, so that the regex engine searches for a literal.
KEYS = [
    (prefix, re.compile(rf"{re.escape(prefix)}(?<![A-Za-z0-9_-]{re.escape(prefix)}){body}(?![A-Za-z0-9_])"))
    for prefixes, body in [
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
# One pattern for each literal that it may begin with: searching for one character is far faster than for a set.
ASSIGNED = [
    re.compile(sign + r"[ \t]{0,4}+[\"'`]?+([A-Za-z0-9+/_~-]{16,256}+={0,2})(?![A-Za-z0-9+/_~.=(\[-])")
    for sign in ("=>?", ":=?")
]
SECRET_NAME = re.compile(
    r"(?:(?:api|access|secret|private|auth|encryption|signing|account|storage|subscription|service|app|client|master"
    r"|shared)[_. -]?key|secret|(?<!public)(?<!publickey)token|passwd|password|passphrase|pwd)[\"'`\]]{0,2}\s{0,3}\Z",
    re.IGNORECASE,
)
SAMPLE = re.compile(r"example|xxxx|your|placeholder|change.?me|dummy|sample|redacted|123456789|abcdefgh|(.)\1{5}", re.I)


def find_secrets(text: str) -> Iterator[PiiSpan]:
    underscore = "_" in text  # half of the prefixes contain one, and most texts do not
    for prefix, pattern in KEYS:
        if (underscore or "_" not in prefix) and prefix in text:
            for match in pattern.finditer(text):
                if _looks_random(match[0].removeprefix(prefix), 2.8):
                    yield PiiSpan("secret", *match.span())
    if "PRIVATE KEY-" in text:
        for match in PEM.finditer(text):
            end = text.find("-----END ", match.end(), match.end() + PEM_LENGTH)
            close = text.find("-----", end + 9, end + 60)
            if end > 0 < close and re.search(r"[A-Za-z0-9+/]{40}", text[match.end() : end]):
                yield PiiSpan("secret", match.start(), close + 5)
    for pattern in ASSIGNED:
        for match in pattern.finditer(text):
            start, end = match.span(1)
            if SECRET_NAME.search(text, max(0, match.start() - 32), match.start()) and _looks_random(match[1], 3.0):
                yield PiiSpan("secret", start, end)


def _looks_random(value: str, bits: float) -> bool:
    """Whether a key could be real: letters and digits, at least `bits` of entropy per character, no sample's words."""
    letters, digits = sum(map(str.isalpha, value)), sum(map(str.isdigit, value))
    if letters < 2 or digits < 2 or SAMPLE.search(value):
        return False
    return -sum(n / len(value) * math.log2(n / len(value)) for n in Counter(value).values()) >= bits

"""Email addresses with a domain that can exist, in ASCII or internationalised."""

from __future__ import annotations

import re
from collections.abc import Iterator

from llmkit.corpus.pii.span import PiiSpan

CREDENTIALS = re.compile(r"(?://(?:[^\s/@:]{1,40}:)?|@)\Z")  # user:password@host in a URL, @user@host
# The local part is matched backwards from the @, against the reversed text before it.
UNSPACED = "\u2e80-\U0003ffff"  # scripts without spaces between words, so that an address ends where they begin
LOCAL = re.compile(r"[A-Za-z0-9_.+%&'*~!#$-]{1,64}+")
LOCAL_ANY = re.compile(rf"(?:[^\W{UNSPACED}]|[.+%&'*~!#$-]){{1,64}}+")
DOMAIN = re.compile(r"[A-Za-z0-9-]{1,63}+(?:\.[A-Za-z0-9-]{1,63}+){1,8}+")
DOMAIN_ANY = re.compile(rf"(?:[^\W_{UNSPACED}]|-){{1,63}}+(?:\.(?:[^\W_{UNSPACED}]|-){{1,63}}+){{1,8}}+")
# RFC 2606 and 6761, names of private networks, and suffixes of file names that contain an @ (icon@2x.png,
# getty@tty1.service).
NOT_DOMAINS = frozenset(
    "example test invalid localhost local localdomain internal lan home corp png jpg jpeg gif svg webp ico bmp css js"
    " mjs ts json html htm php xml txt pdf md py zip gz tar exe service socket target timer mount slice".split()
)
EXAMPLE = re.compile(r"(?:.+\.)?example\.(?:com|net|org)", re.IGNORECASE)


def find_emails(text: str) -> Iterator[PiiSpan]:
    for at in (match.start() for match in re.finditer("@", text)):
        domain = _domain(text, at + 1)
        if domain and (local := _local(text[max(0, at - 65) : at])):
            start, end = at - len(local), at + 1 + len(domain)
            after = text[end : end + 1]
            remote = local == "git" and after in (":", "/")
            if not (remote or after in ("@", "(") or CREDENTIALS.search(text, max(0, start - 64), start)):
                yield PiiSpan("email", start, end)


def _local(before: str) -> str:
    """The local part that `before` ends with; "" if there is none."""
    match = LOCAL.match(before[::-1])
    size = match.end() if match else 0
    if size == 0 or (size < len(before) and _continues_word(before[-size - 1])):
        match = LOCAL_ANY.match(before[::-1])
        size = match.end() if match else 0
    if size == 0 or size > 64 or (size == 64 < len(before) and before[-65].isalnum()):
        return ""
    local = before[-size:].rpartition("..")[2].lstrip(".+%&'*~!#$-")
    return "" if local[-1:] in (".", "") else local


def _domain(text: str, start: int) -> str:
    """The domain at `start`; "" if there is none or it cannot belong to anyone."""
    match = DOMAIN.match(text, start)
    if match is None or _continues_word(text[match.end() : match.end() + 1]):
        match = DOMAIN_ANY.match(text, start)
    if match is None:
        return ""
    labels = match[0].rstrip("-").split(".")
    while len(labels) > 2 and (
        len(labels[-1]) < 2 or not labels[-1].isalpha() or (labels[-1].istitle() and labels[-2].islower())
    ):
        labels.pop()  # "a.com.5" and "a.com.Then": the next sentence begins without a space
    last = labels[-1].lower()
    if not (2 <= len(last) <= 24 and (last.isalpha() or last.startswith("xn--"))) or last in NOT_DOMAINS:
        return ""
    if any(not label or label[0] == "-" or label[-1] == "-" for label in labels):
        return ""
    domain = ".".join(labels)
    return "" if EXAMPLE.fullmatch(domain) else domain


def _continues_word(character: str) -> bool:
    """Whether this is a non-ASCII letter that belongs to the adjacent word."""
    return "\x7f" < character < UNSPACED[0] and character.isalpha()

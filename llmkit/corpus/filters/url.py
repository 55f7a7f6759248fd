"""Block lists for URLs. Every list is a file of the user's, plain or compressed, with one entry per line; none
is shipped.

    llmkit filter docs.jsonl --filter url --rule url.domains=blocked.txt.gz --rule url.patterns=patterns.txt

Reasons, in order:

- `domain`: the host or one of its parents is listed ("example.com" covers www.example.com, "ru" all of .ru);
- `subdomain`: the exact host;
- `url`: the exact URL, apart from scheme, fragment and trailing slash;
- `hard_blacklisted`: a word of the URL;
- `soft_blacklisted`: several different words of a softer list;
- `blacklisted_subword`: a substring of the URL's letters and digits written together;
- `pattern`: a regular expression (RE2).

These are the rules of RefinedWeb and FineWeb (Penedo et al. 2023, arXiv:2306.01116, section 3.1) in datatrove's
order. Datatrove compares words case-sensitively, so that upper case escapes its lists. Here the URL is
lower-cased and percent-decoded first, except for `patterns`. Hosts are compared in ASCII, so that an
internationalised name equals its xn-- form.

A public-suffix list is not needed, since each parent of the host is looked up. A document without a URL is kept unless
`require_url` is set (`no_url`).

Cost: one look-up for each parent of the host and each word. Memory: 8 bytes per domain, shared by workers;
about 200 bytes per substring.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from urllib.parse import unquote, urlsplit

from llmkit.corpus.filters import FILTERS, Check
from llmkit.corpus.filters.regex import compiled, search
from llmkit.corpus.lists import StringSet, entries
from llmkit.corpus.page import Page
from llmkit.io.splice import dotted

MAX_URL = 1 << 16  # characters of a URL that are examined
WORD = re.compile(r"[^\W_]+")
NAME = re.compile(r"[a-z0-9-]+(?:\.[a-z0-9-]+)+")
KEY = 8  # length of the prefix by which substrings are looked up, at most


def lists() -> Any:
    """A field whose value names list files."""
    return field(default=(), metadata={"file": True})


@FILTERS.register("url")
@dataclass(frozen=True, slots=True)
class Url:
    """Each list setting names one or several files; the value of a check is the entry that matched."""

    domains: tuple[str, ...] = lists()
    hosts: tuple[str, ...] = lists()
    urls: tuple[str, ...] = lists()
    words: tuple[str, ...] = lists()
    soft_words: tuple[str, ...] = lists()
    substrings: tuple[str, ...] = lists()
    patterns: tuple[str, ...] = lists()
    min_soft_words: int | None = 2  # this many different soft words drop the document
    require_url: bool = False
    field: str = "url"  # a dot selects a nested field: metadata.url

    def __call__(self, page: Page) -> Iterator[Check]:
        value = dotted(page.fields, self.field)
        url = value.strip()[:MAX_URL] if isinstance(value, str) else ""
        yield Check("no_url", None, self.require_url and not url)
        domains, hosts, urls = (_entries(files, kind) for files, kind in _exact_lists(self))
        host = host_of(url)
        yield _check("domain", domains.first_member(parents(host)))
        yield _check("subdomain", hosts.first_member([host]))
        yield _check("url", urls.first_member([normalized_url(url)]))
        words = WORD.findall(unquote(url).lower()) if url else []
        yield _check("hard_blacklisted", _entries(self.words, "word").first_member(words))
        soft_words = set(_entries(self.soft_words, "word").members(words))
        over_limit = self.min_soft_words is not None and bool(soft_words) and len(soft_words) >= self.min_soft_words
        yield Check("soft_blacklisted", ",".join(sorted(soft_words)) or None, over_limit)
        yield _check("blacklisted_subword", _Substrings.of(self.substrings).first("".join(words)))
        yield _check("pattern", _first_match(_patterns(self.patterns), url))


def _exact_lists(url: Url) -> Iterator[tuple[tuple[str, ...], str]]:
    yield from ((url.domains, "host"), (url.hosts, "host"), (url.urls, "url"))


def _check(reason: str, entry: str | None) -> Check:
    return Check(reason, entry, entry is not None)


def host_of(url: str) -> str:
    """The host in lower case and ASCII, without port, user and trailing dot; empty if there is none. Never raises."""
    try:
        parts = urlsplit(url if "//" in url else "//" + url)
        host = parts.hostname or ""
    except ValueError:  # for example an unclosed bracket
        host = re.split(r"[/?#]", url.partition("//")[2] or url)[0].rpartition("@")[2].partition(":")[0].lower()
    host = host.rstrip(".")
    if not host.isascii():
        with contextlib.suppress(UnicodeError):  # not a resolvable name; compared unchanged
            host = host.encode("idna").decode()
    return host


def parents(host: str) -> list[str]:
    """The host and each domain above it: a.b.com, b.com, com. IP addresses and overlong names have no parents."""
    labels = host.split(".") if len(host) <= 253 else []
    if not labels:
        return [host]
    if ":" in host or labels[-1].isdigit():
        return [host]
    return [".".join(labels[i:]) for i in range(len(labels))] if host else []


def normalized_url(url: str) -> str:
    """A URL in the form that is compared: lower case, percent-decoded, without scheme, fragment and trailing slash."""
    return re.sub(r"^(?:[a-z][a-z0-9+.-]*:)?//", "", unquote(url.partition("#")[0]).lower()).rstrip("/")


@cache
def _entries(files: tuple[str, ...], kind: str) -> StringSet:
    """The entries of some files, normalized as hosts, URLs or words."""
    normalize = {"host": _listed_host, "url": normalized_url, "word": str.lower}[kind]
    return StringSet(normalize(entry) for _, entry in entries(files))


def _listed_host(entry: str) -> str:
    """The host that an entry names: usually the entry itself, but also that of a URL, a pattern such as
    *.example.com, or a name that needs its ASCII form."""
    return entry if NAME.fullmatch(entry) else host_of(entry.removeprefix("*."))


class _Substrings:
    """Strings to search for anywhere, grouped by their first few characters: each position needs one look-up."""

    def __init__(self, files: tuple[str, ...]) -> None:
        items = {"".join(WORD.findall(entry.lower())) for _, entry in entries(files)} - {""}
        self.width = min(KEY, min(map(len, items), default=KEY))
        self.starts: dict[str, list[str]] = {}
        for item in sorted(items):
            self.starts.setdefault(item[: self.width], []).append(item)

    def first(self, text: str) -> str | None:
        """The string with the earliest occurrence in `text`."""
        if self.starts:
            for i in range(len(text) - self.width + 1):
                for item in self.starts.get(text[i : i + self.width], ()):
                    if text.startswith(item, i):
                        return item
        return None

    @staticmethod
    @cache
    def of(files: tuple[str, ...]) -> _Substrings:
        return _Substrings(files)


@cache
def _patterns(files: tuple[str, ...]) -> tuple[tuple[str, Any], ...]:
    return tuple((entry, compiled(entry, location)) for location, entry in entries(files))


def _first_match(patterns: tuple[tuple[str, Any], ...], url: str) -> str | None:
    data = url.encode()
    return next((entry for entry, pattern in patterns if search(pattern, data) is not None), None) if url else None

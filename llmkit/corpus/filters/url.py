"""Block lists for the page's address. Every list is a file of the user's, plain or compressed, one entry a line; none is shipped.

    llmkit filter docs.jsonl --filter url --rule url.domains=blocked.txt.gz --rule url.patterns=patterns.txt

Reasons, in order: `domain` (the host or a parent of it is listed: "example.com" covers www.example.com, "ru" all of .ru), `subdomain` (this very host),
`url` (this very address, scheme, fragment and last slash apart), `hard_blacklisted` (a word of the address), `soft_blacklisted` (several different ones
of softer words), `blacklisted_subword` (a part of its letters and digits written together), `pattern` (a regular expression, RE2's). These are
the rules of RefinedWeb and FineWeb (Penedo et al. 2023, arXiv:2306.01116, section 3.1) as datatrove orders them. Datatrove compares words
without folding their case, so that upper case passes its lists: here the address is lower-cased and percent escapes are decoded first, everywhere but in
`patterns`. Hosts are compared in ASCII: an internationalised name and its xn-- form are one.

A public-suffix list is not needed: each parent of the host is looked up. A document without an address stays unless `require_url` is set (`no_url`).

Cost: a look-up for each parent of the host and each word. Memory: 8 bytes a domain, which workers share; substrings some 200 bytes each.
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
from llmkit.corpus.lists import Table, dotted, entries
from llmkit.corpus.page import Page

LONGEST = 1 << 16  # characters of an address that are looked at
WORD = re.compile(r"[^\W_]+")
NAME = re.compile(r"[a-z0-9-]+(?:\.[a-z0-9-]+)+")
KEY = 8  # characters by which substrings are looked up, at most


def lists() -> Any:
    """A setting that names files of entries."""
    return field(default=(), metadata={"file": True})


@FILTERS.register("url")
@dataclass(frozen=True, slots=True)
class Url:
    """Files of entries, each setting one or several; the value of a check is the entry that was found."""

    domains: tuple[str, ...] = lists()
    hosts: tuple[str, ...] = lists()
    urls: tuple[str, ...] = lists()
    words: tuple[str, ...] = lists()
    soft_words: tuple[str, ...] = lists()
    substrings: tuple[str, ...] = lists()
    patterns: tuple[str, ...] = lists()
    min_soft_words: int | None = 2  # so many different soft words drop the document
    require_url: bool = False
    field: str = "url"  # a dot leads into nested fields: metadata.url

    def __call__(self, page: Page) -> Iterator[Check]:
        value = dotted(page.fields, self.field)
        url = value.strip()[:LONGEST] if isinstance(value, str) else ""
        yield Check("no_url", None, self.require_url and not url)
        domains, hosts, urls = (_table(files, form) for files, form in _exact(self))
        host = host_of(url)
        yield _found("domain", domains.first(parents(host)))
        yield _found("subdomain", hosts.first([host]))
        yield _found("url", urls.first([plain(url)]))
        pieces = WORD.findall(unquote(url).lower()) if url else []
        yield _found("hard_blacklisted", _table(self.words, "word").first(pieces))
        soft = set(_table(self.soft_words, "word").all(pieces))
        enough = self.min_soft_words is not None and bool(soft) and len(soft) >= self.min_soft_words
        yield Check("soft_blacklisted", ",".join(sorted(soft)) or None, enough)
        yield _found("blacklisted_subword", _Substrings.of(self.substrings).first("".join(pieces)))
        yield _found("pattern", _first_match(_patterns(self.patterns), url))


def _exact(url: Url) -> Iterator[tuple[tuple[str, ...], str]]:
    yield from ((url.domains, "host"), (url.hosts, "host"), (url.urls, "url"))


def _found(reason: str, entry: str | None) -> Check:
    return Check(reason, entry, entry is not None)


def host_of(url: str) -> str:
    """The host in lower case and ASCII, without port, user and last dot; empty where there is none. Never raises."""
    try:
        parts = urlsplit(url if "//" in url else "//" + url)
        host = parts.hostname or ""
    except ValueError:  # such as a bracket that is never closed
        host = re.split(r"[/?#]", url.partition("//")[2] or url)[0].rpartition("@")[2].partition(":")[0].lower()
    host = host.rstrip(".")
    if not host.isascii():
        with contextlib.suppress(UnicodeError):  # no name that could be resolved; compared as it is
            host = host.encode("idna").decode()
    return host


def parents(host: str) -> list[str]:
    """The host and each domain above it: a.b.com, b.com, com. An IP address has none, nor what is too long for a name."""
    labels = host.split(".") if len(host) <= 253 else []
    if not labels:
        return [host]
    if ":" in host or labels[-1].isdigit():
        return [host]
    return [".".join(labels[i:]) for i in range(len(labels))] if host else []


def plain(url: str) -> str:
    """An address as it is compared: lower case, percent escapes decoded, without scheme, fragment and last slash."""
    return re.sub(r"^(?:[a-z][a-z0-9+.-]*:)?//", "", unquote(url.partition("#")[0]).lower()).rstrip("/")


@cache
def _table(files: tuple[str, ...], form: str) -> Table:
    """The entries of some files, in the form in which they are looked up."""
    normal = {"host": _listed_host, "url": plain, "word": str.lower}[form]
    return Table(normal(entry) for _, entry in entries(files))


def _listed_host(entry: str) -> str:
    """The host that an entry names: itself in most cases, but it may be an address, a pattern such as *.example.com, or need its ASCII form."""
    return entry if NAME.fullmatch(entry) else host_of(entry.removeprefix("*."))


class _Substrings:
    """Strings to be found anywhere: those that begin with the same few characters lie together, so that each place is looked up once."""

    def __init__(self, files: tuple[str, ...]) -> None:
        items = {"".join(WORD.findall(entry.lower())) for _, entry in entries(files)} - {""}
        self.width = min(KEY, min(map(len, items), default=KEY))
        self.starts: dict[str, list[str]] = {}
        for item in sorted(items):
            self.starts.setdefault(item[: self.width], []).append(item)

    def first(self, text: str) -> str | None:
        """The string that stands first in `text`."""
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
    return tuple((entry, compiled(entry, where)) for where, entry in entries(files))


def _first_match(patterns: tuple[tuple[str, Any], ...], url: str) -> str | None:
    data = url.encode()
    return next((entry for entry, pattern in patterns if search(pattern, data) is not None), None) if url else None

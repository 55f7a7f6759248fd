"""Heads of archive records: WARC (ISO 28500) and ARC, parsed leniently and found again after damage.

A WARC head is a version line, `Name: value` lines and a blank line; an ARC head is one line, `URL IP date type length`
(five more fields before the length in version 2). Both become a `RecordHead` with the fields of WARC. Whatever other
tools write is read: any version number, LF line ends, folded lines, unknown fields.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

MAX_HEAD = 1 << 16  # bytes; a longer head is damaged
BLANK = b"\r\n\xef\xbb\xbf"  # before a head: line ends, and the byte order mark of UTF-8
WARC_START = re.compile(rb"WARC/\S{1,12}[ \t]*\r?\n")
BLANK_LINE = re.compile(rb"\n\r?\n")
FOLD = re.compile(r"\r?\n[ \t]+")
ARC_LINE = re.compile(rb"([A-Za-z][\w+.-]*:[^\r\n]*) (\S+) (\d{12,18}) ([^\r\n]*?\S) (-?\w+)[ \t]*\r?\n")
# What a search accepts inside damaged data is stricter than what is accepted where a head is expected.
CANDIDATE = re.compile(
    rb"WARC/\d+\.\d+[ \t]*\r?\n(?=[A-Za-z-]+[ \t]*:)|(?<= )\d{12,18} (?=[^\r\n]{1,200}? \d+[ \t]*\r?\n)"
)
ARC_SCHEME = re.compile(rb"(?:https?|ftp|dns|whois|filedesc|gopher|nntp|mms|rtsp):\S")
ARC_REMAINS = re.compile(rb" \d+\.\d+\.\d+\.\d+ | \d{12,18} ")  # in a URL: a head that was cut off precedes it
MAX_URL = 8 << 10


@dataclass(slots=True)
class RecordHead:
    """Type (lower case), length of the block in bytes (None if missing or not a number), and fields of a record."""

    kind: str
    length: int | None
    size: int  # of the head itself, in bytes
    fields: dict[str, str]  # names in lower case
    is_arc: bool = False


def starts_record(data: bytes) -> bool:
    """Whether `data` begins with the start of a head; line ends and a byte order mark before it do not count."""
    data = data.lstrip(BLANK)
    return data.startswith(b"WARC/") or ARC_LINE.match(data) is not None


def parse_head(data: bytes | bytearray, start: int = 0) -> RecordHead | None:
    """The head that begins at `start`; None if none does, or if it is not complete within MAX_HEAD bytes."""
    if data.startswith(b"WARC/", start):
        first, last = WARC_START.match(data, start), BLANK_LINE.search(data, start, start + MAX_HEAD)
        if first is None or last is None or _is_cut(data, first.end(), last.start()):
            return None
        fields = header_fields(_text(bytes(data[first.end() : last.start()])))
        kind, length = fields.get("warc-type", "").lower(), _length(fields.get("content-length", ""))
        return RecordHead(kind, length, last.end() - start, fields)
    match = ARC_LINE.match(data, start, start + MAX_HEAD)
    if match is None:
        return None
    if ARC_REMAINS.search(match[1]):
        return None
    url, address, digits, media, length_digits = map(_text, match.groups())
    fields = {
        "warc-target-uri": url,
        "warc-ip-address": address,
        "warc-date": _date(digits),
        "content-type": media.partition(" ")[0],
    }
    kind = "warcinfo" if url.startswith("filedesc:") else "response"
    return RecordHead(kind, _length(length_digits), match.end() - start, fields, is_arc=True)


def header_fields(lines: str, *, last: bool = False) -> dict[str, str]:
    """`Name: value` lines, folded or not, with names in lower case; of several with one name, the first (or `last`)."""
    if "\n " in lines or "\n\t" in lines:
        lines = FOLD.sub(" ", lines)
    split = lines.split("\n")
    pairs = (line.partition(":") for line in (split if last else reversed(split)))
    return {name.strip().lower(): value.strip() for name, _, value in pairs}


def find_head(data: bytes | bytearray, start: int, end: int) -> int:
    """Index of the first complete, plausible head that begins in `data[start:end]`, or -1."""
    for match in CANDIDATE.finditer(data, start):
        found = match.start()
        if data[found] != ord("W"):  # the date in an ARC line: its URL is before it
            line = max(start, data.rfind(b"\n", max(start, found - MAX_URL), found) + 1)
            starts = [scheme.start() for scheme in ARC_SCHEME.finditer(data, line, found)]
        else:
            starts = [found]
        for found in starts:
            head = parse_head(data, found) if found < end else None
            if head is not None and head.length is not None and head.kind:
                return found
        if match.start() >= end + MAX_URL:
            return -1
    return -1


def _is_cut(data: bytes | bytearray, start: int, end: int) -> bool:
    """Whether another head begins before the blank line that ends a WARC head: the record before it was cut off."""
    return data.find(b"WARC/", start, end) >= 0 and any(
        data[match.start()] == ord("W") for match in CANDIDATE.finditer(data, start, end)
    )


def _length(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 30 else None


def _date(digits: str) -> str:
    """`20140216050221` as RFC 3339."""
    d = digits.ljust(14, "0")
    return f"{d[:4]}-{d[4:6]}-{d[6:8]}T{d[8:10]}:{d[10:12]}:{d[12:14]}Z"


def _text(data: bytes) -> str:
    """A head, or a part of one, in UTF-8; each line that is not is Latin-1, so that two URLs never become one."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        lines = data.split(b"\n")
        return "\n".join(map(_text, lines)) if len(lines) > 1 else data.decode("latin-1")

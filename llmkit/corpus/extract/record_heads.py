"""Heads of archive records: WARC (ISO 28500) and ARC, parsed leniently and found again after damage.

A WARC head is a version line, `Name: value` lines and a blank line; an ARC head is one line, `URL IP date type length`
(five more fields before the length in version 2). Both become a `RecordHead` with the fields of WARC. Whatever other
tools write is read: any version number, LF line ends, folded lines, unknown fields.

Cost: linear in the data, whatever they are. No pattern backtracks over a line, and a search looks at each byte a few
times only, however many heads begin there and are not complete.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

MAX_HEAD = 1 << 16  # bytes; a longer head is damaged
BLANK = b"\r\n\xef\xbb\xbf"  # before a head: line ends, and the byte order mark of UTF-8
WARC_START = re.compile(rb"WARC/\S{1,12}[ \t]*\r?\n")
BLANK_LINE = re.compile(rb"\n\r?\n")
FOLD = re.compile(r"\r?\n[ \t]+")
ARC_DATE, ARC_LENGTH = re.compile(rb"(?<= )\d{12,18}(?= )"), re.compile(rb"-?\w+")
ARC_URL = re.compile(rb"[A-Za-z][\w+.-]{0,40}:")
ARC_ADDRESS = re.compile(rb"\d{1,3}(?:\.\d{1,3}){3}|[\da-fA-F]*:[\da-fA-F:.]+|-")
# What a search accepts inside damaged data is stricter than what is accepted where a head is expected.
CANDIDATE = re.compile(
    rb"WARC/\d+\.\d+[ \t]*\r?\n(?=[A-Za-z-]+[ \t]*:)|(?<= )\d{12,18} (?=[^\r\n]{1,200}? \d{1,30}[ \t]*\r?\n)"
)
ARC_SCHEME = re.compile(rb"(?:https?|ftp|dns|whois|filedesc|gopher|nntp|mms|rtsp):\S")
ARC_REMAINS = re.compile(rb" (?:\d+\.\d+\.\d+\.\d+|\d{12,18})(?= )")  # in a URL: a head that was cut off precedes it
ONCE = {"warc-type", "warc-record-id", "warc-target-uri", "warc-date", "content-length"}
MAX_URL = 8 << 10
MAX_LINE = 16 << 10  # of an ARC head

ArcFields = tuple[bytes, bytes, bytes, bytes, bytes, int]  # URL, address, date, media type, length; size of the head


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
    return data.startswith(b"WARC/") or _arc_fields(data, 0) is not None


def starts_archive(data: bytes) -> bool:
    """Whether `data` begins with a head that no other text has: of WARC, a version, a field of WARC and a blank line.

    Of ARC, all fields must be of their kind. A head that the end of the data cuts off needs no blank line.
    """
    data = data.lstrip(BLANK)
    if first := WARC_START.match(data):
        last = BLANK_LINE.search(data, first.end() - 1, MAX_HEAD)
        if last is None and len(data) >= MAX_HEAD:
            return False
        fields = header_fields(_text(data[first.end() : last.start() if last else None]))
        return any(name.startswith("warc-") or name in ("content-length", "content-type") for name in fields)
    parts = _arc_fields(data, 0) if ARC_SCHEME.match(data) else None
    return parts is not None and ARC_ADDRESS.fullmatch(parts[1]) is not None and parts[4].isdigit()


def parse_head(data: bytes | bytearray, start: int = 0) -> RecordHead | None:
    """The head that begins at `start`; None if none does, or if it is not complete within MAX_HEAD bytes."""
    if data.startswith(b"WARC/", start):
        last = BLANK_LINE.search(data, start, start + MAX_HEAD)
        return _warc_head(data, start, last) if last else None
    parts = _arc_fields(data, start)
    if parts is None or ARC_REMAINS.search(parts[0]):
        return None
    url, address, digits, media, length_digits = map(_text, parts[:5])
    fields = {
        "warc-target-uri": url,
        "warc-ip-address": address,
        "warc-date": _date(digits),
        "content-type": media.partition(" ")[0],
    }
    kind = "warcinfo" if url.startswith("filedesc:") else "response"
    return RecordHead(kind, _length(length_digits), parts[5], fields, is_arc=True)


def _warc_head(data: bytes | bytearray, start: int, last: re.Match[bytes]) -> RecordHead | None:
    """The WARC head between `start` and its blank line."""
    first = WARC_START.match(data, start)
    if first is None or _is_cut(data, first.end(), last.start()) or data.find(b"\0", start, last.start()) >= 0:
        return None
    lines = _text(bytes(data[first.end() : last.start()]))
    fields = header_fields(lines)
    if _is_of_two(lines, fields):
        return None
    kind, length = fields.get("warc-type", "").lower(), _length(fields.get("content-length", ""))
    return RecordHead(kind, length, last.end() - start, fields)


def _arc_fields(data: bytes | bytearray, start: int) -> ArcFields | None:
    """The fields of the ARC head that begins at `start`; None if there is none."""
    parts = _split_line(data, start) if ARC_URL.match(data, start, start + MAX_LINE) else None
    return parts if parts and ARC_URL.match(parts[0]) and b"\0" not in parts[0] else None


def _split_line(data: bytes | bytearray, start: int) -> ArcFields | None:
    """The fields of an ARC head in the line from `start` on, whatever precedes its URL, which may contain spaces.

    The last field that can be the date is the date.
    """
    end = data.find(b"\n", start, start + MAX_LINE)
    line = bytes(data[start : max(start, end)]).removesuffix(b"\r").rstrip(b" \t")
    before, _, length = line.rpartition(b" ")
    if not ARC_LENGTH.fullmatch(length) or b"\r" in line:
        return None
    for date in reversed(list(ARC_DATE.finditer(before))):
        url, _, address = before[: date.start() - 1].rpartition(b" ")
        media = before[date.end() + 1 :]
        if url and address.split() == [address] and media[-1:].strip():
            return url, address, date[0], media, length, end + 1 - start
    return None


def header_fields(lines: str, *, last: bool = False) -> dict[str, str]:
    """`Name: value` lines, folded or not, with names in lower case; of several with one name, the first (or `last`)."""
    if "\n " in lines or "\n\t" in lines:
        lines = FOLD.sub(" ", lines)
    split = lines.split("\n")
    pairs = (line.partition(":") for line in (split if last else reversed(split)))
    return {name.strip().lower(): value.strip() for name, _, value in pairs}


def _is_of_two(lines: str, fields: dict[str, str]) -> bool:
    """Whether a field that a head has once occurs with two values: the lines between two heads were lost."""
    if lines.count("\n") < len(fields):
        return False
    last = header_fields(lines, last=True)
    return any(last[name] != fields[name] for name in ONCE & fields.keys())


def find_head(data: bytes | bytearray, start: int, end: int) -> int:
    """Index of the first complete, plausible head that begins in `data[start:end]`, or -1."""
    blank, searched = None, start  # the next blank line, and where the search for it ended
    line = -1  # the line that was examined last
    for match in CANDIDATE.finditer(data, start, min(len(data), end + MAX_LINE)):
        begin = match.start()
        if data[begin] == ord("W"):
            if begin >= end:
                return -1
            if blank is None or blank.start() < begin:
                blank = BLANK_LINE.search(data, max(begin, searched - 2), begin + MAX_HEAD)
                searched = blank.end() if blank else begin + MAX_HEAD
            head = _warc_head(data, begin, blank) if blank else None
            if head is not None and head.length is not None and head.kind:
                return begin
            continue
        lowest = max(start, begin - MAX_URL)  # the date in an ARC line: its URL is before it
        begin_of_line = max(lowest, data.rfind(b"\n", lowest, begin) + 1, data.rfind(b"\r", lowest, begin) + 1)
        if begin_of_line != line:
            line = begin_of_line
            found = _arc_start(data, line)
            if 0 <= found < end:
                return found
    return -1


def _arc_start(data: bytes | bytearray, line: int) -> int:
    """Where the ARC head in a line begins, or -1; other bytes may be in the line before it."""
    parts = _split_line(data, line)
    if parts is None or _length(_text(parts[4])) is None:
        return -1
    remains = max((match.start() + 1 for match in ARC_REMAINS.finditer(parts[0])), default=0)
    scheme = ARC_SCHEME.search(parts[0], remains)
    return line + scheme.start() if scheme and parts[0].find(b"\0", scheme.start()) < 0 else -1


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

"""Records of a WARC or ARC archive from its decompressed pieces; after damage, the next intact record.

A record is trusted if another one, or the end, follows its block. Otherwise its Content-Length is wrong, or what
follows is damaged: the next plausible head is searched for, inside the block first. What lies between is one `Fault`,
with its offset and size. Memory: one record of at most `max_bytes`, and what `members` holds; longer records are
passed over.

A head inside a block is a quotation, or the next record, which a loss of bytes moved there (`_is_moved`).

Cost: linear. A block is copied when it is accepted, and what is hashed without that is limited (`Text.may_hash`).
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass

import xxhash

from llmkit.corpus.extract.record_heads import (
    BLANK,
    MAX_HEAD,
    MAX_LINE,
    RecordHead,
    find_head,
    parse_head,
    starts_record,
)
from llmkit.corpus.extract.stored import Stored, is_compressed
from llmkit.corpus.extract.text import AFTER, STEP, Place, Text

PAGES = frozenset(("response", "resource", "conversion"))
IDENTITY = ("warc-record-id", "warc-target-uri", "warc-date")  # with its block, fields that make a record unique
MAX_LENGTH = 1 << 40  # bytes; a longer record is not plausible
HTTP_HEAD_END = re.compile(rb"\n\r?\n")
LINE_ENDS = re.compile(rb"[\r\n]*")
CUT = "unspecified"  # the value of WARC-Truncated where the reason is not known
HTTP_LENGTH = re.compile(rb"\ncontent-length:[ \t]*(\d{1,15})[ \t]*\r?\n", re.IGNORECASE)
DIGESTS = ("md5:", "sha1:", "sha256:", "sha512:")


@dataclass(slots=True)
class Record:
    """A complete record. `size` in bytes as in `Fault`."""

    head: RecordHead
    block: bytes
    place: Place
    size: int = 0

    @property
    def offset(self) -> int:
        """Where to find it in the stored file: its own offset in plain text, otherwise that of its member."""
        return self.place.member

    @property
    def has_digest(self) -> bool:
        """Whether the head has a WARC-Block-Digest of a known kind."""
        return self.head.fields.get("warc-block-digest", "").lower().startswith(DIGESTS)

    def digest_is_wrong(self) -> bool:
        """Whether the block differs from the WARC-Block-Digest, in base 32 or hexadecimal; False if there is none."""
        if not self.has_digest:
            return False
        name, _, value = self.head.fields["warc-block-digest"].lower().partition(":")
        digest = hashlib.new(name, self.block, usedforsecurity=False).digest()
        return value.strip().rstrip("=") not in (base64.b32encode(digest).decode().rstrip("=").lower(), digest.hex())


@dataclass(frozen=True, slots=True)
class Fault:
    """Bytes that hold no readable record: offset in the stored file, number of bytes skipped, and the reason."""

    offset: int
    size: int
    reason: str


def read_records(stored: Stored, max_bytes: int) -> Iterator[Record | Fault]:
    """The records of an archive, and the faults between them, in order."""
    text = Text(stored)
    fault: tuple[Place, str] | None = None
    while True:
        if not text.skip_blank():
            if text.gap is not None and fault is None:
                fault = text.place(), text.gap.reason
            if text.resume():
                continue
            if fault:
                yield Fault(fault[0].member, fault[0].size(text.place()), fault[1])
            return
        text.fill(MAX_HEAD)
        head, place = parse_head(text.buffer, text.start), text.place()
        if head is None or not head.kind or head.length is None:
            if head is None and text.reopen():
                continue
            is_zero = text.buffer[text.start] == 0
            if is_zero and text.ended and text.gap is None and not text.buffer[text.start :].strip(b"\0"):
                text.advance(len(text.buffer) - text.start)  # padding
                continue
            reason = "not the head of a record" if head is None else _what_lacks(head)
            fault = fault or (place, text.gap.reason if text.gap and head is None else reason)
            text.advance(1)
            text.search()
            continue
        if fault:
            yield Fault(fault[0].member, fault[0].size(place), fault[1])
            fault = None
        if head.length > max_bytes:
            reason, is_whole = _pass_over(text, head, max_bytes)
            if not is_whole:
                fault = place, reason
            elif head.kind in PAGES:
                text.skip_blank()
                yield Fault(place.member, place.size(text.place()), reason)
            continue
        record = Record(head, b"", place)
        end, reason = _read_block(text, record)
        if reason:
            fault = place, reason
            text.advance(1)
            text.search()
            continue
        text.advance(end)
        text.skip_blank()
        record.size = place.size(text.place())
        key = *map(head.fields.get, IDENTITY), xxhash.xxh3_64_intdigest(record.block)
        if not text.is_repeated(place, key):
            yield record


def _read_block(text: Text, record: Record) -> tuple[int, str]:
    """Set the block of a record. Returns the size of the record, and why it is not to be trusted, otherwise empty."""
    head = record.head
    assert head.length is not None
    text.fill(head.size + head.length + AFTER)
    begin = text.start + head.size
    size, reason = _block_size(text, record, begin, begin + head.length)
    if not reason:
        record.block = bytes(memoryview(text.buffer)[begin : begin + size])
    return head.size + size, reason


def _block_size(text: Text, record: Record, begin: int, stop: int) -> tuple[int, str]:
    """The size of a block that should be `text.buffer[begin:stop]`, and why it is not to be trusted."""
    length, available = stop - begin, min(stop, len(text.buffer)) - begin
    after = bytes(text.buffer[stop : stop + AFTER])
    is_complete, rest = available == length, after.lstrip(BLANK)
    gap = text.gap if text.gap and text.gap.member == record.place.member else None
    if is_complete and (rest.startswith(b"WARC/") or (record.place.is_plain and is_compressed(rest[:8]))):
        return length, ""
    if is_complete and not rest:
        is_intact = gap is None or gap.truncated or (not gap.checksum and after.count(b"\n") > 1)
        return length, "" if is_intact else gap.reason  # type: ignore[union-attr]
    text.fill(stop - text.start + STEP)
    if is_complete and starts_record(bytes(text.buffer[stop : stop + AFTER + MAX_LINE])):
        return length, ""
    # No record follows: the length is wrong, or what follows is damaged.
    is_ended = after.startswith((b"\n", b"\r\n") if record.head.is_arc else (b"\n\n", b"\r\n\r\n"))
    is_confirmed = is_complete and _confirmed_size(text, record, begin, stop) == length
    if is_confirmed and (record.has_digest or not _is_moved(text, begin, stop, is_ended)):
        return length, ""
    if gap and not is_complete and not gap.truncated:
        return length, gap.reason
    following = find_head(text.buffer, begin, len(text.buffer))
    size = _confirmed_size(text, record, begin, following if following >= 0 else len(text.buffer))
    if size is not None:
        return size, ""
    wrong = f"its Content-Length of {length:,} is wrong"
    if 0 <= following < stop or text.next_member(begin, stop) >= 0:
        return length, wrong
    if not is_complete:
        return length, gap.reason if gap else f"truncated: {available:,} of {length:,} bytes"
    if is_ended:
        return length, ""
    if gap and not gap.truncated:
        return length, gap.reason
    # In plain text behind a damaged member, bytes of its format may lie between those of a record.
    is_doubtful = record.has_digest or _http_size(text.buffer, begin, stop) > length
    if is_doubtful or (record.place.is_plain and text.has_members):
        return length, wrong
    record.head.fields.setdefault("warc-truncated", CUT)  # what follows the block may be the rest of it
    return length, ""


def _is_moved(text: Text, begin: int, stop: int, is_ended: bool) -> bool:
    """Whether a head in the block `text.buffer[begin:stop]` is that of the next record, and not a quotation.

    The records from there on decide, by their lengths: those of a quotation end inside the block. `is_ended`: the line
    ends that belong after a block are at `stop`, which decides where it is not known what follows those records.
    """
    while (begin := find_head(text.buffer, begin, stop)) >= 0:
        head = parse_head(text.buffer, begin)
        end = begin + head.size + (head.length or 0) if head else begin + 1
        rest = LINE_ENDS.match(text.buffer, end) if end <= len(text.buffer) else None
        begin = rest.end() if rest else end
        if begin > stop:
            is_last = begin == len(text.buffer) and text.ended
            return is_last or starts_record(bytes(text.buffer[begin : begin + MAX_LINE])) or not is_ended
    return False


def _confirmed_size(text: Text, record: Record, begin: int, stop: int) -> int | None:
    """The size of the block in `text.buffer[begin:stop]`, without line ends after it, if its digest or the length in
    the response confirms it.
    """
    if record.has_digest:
        if not text.may_hash(stop - begin):
            return None
        data, size = bytes(memoryview(text.buffer)[begin:stop]), -1
        for line_ends in (b"", b"\n", b"\r\n", b"\n\n", b"\r\n\r\n"):
            record.block = data.removesuffix(line_ends)
            if len(record.block) != size and not record.digest_is_wrong():
                return len(record.block)
            size = len(record.block)
        return None
    size = _http_size(text.buffer, begin, stop)
    rest = LINE_ENDS.match(text.buffer, begin + size, stop) if 0 < size <= stop - begin else None
    return size if rest and rest.end() == stop else None


def _http_size(data: bytearray, begin: int, stop: int) -> int:
    """The size of a block according to the Content-Length of the HTTP response in it; 0 if that is not given."""
    limit = min(stop, begin + MAX_HEAD)
    end = HTTP_HEAD_END.search(data, begin, limit) if data.startswith(b"HTTP/", begin, limit) else None
    # A head with zeros or fields of WARC has lost its end, and goes on in that of another record.
    if end and (data.find(b"\0", begin, end.end()) >= 0 or data.find(b"\nWARC-", begin, end.end()) >= 0):
        return 0
    length = HTTP_LENGTH.search(data, begin, end.end()) if end else None
    return end.end() - begin + int(length[1]) if end and length else 0


def _pass_over(text: Text, head: RecordHead, max_bytes: int) -> tuple[str, bool]:
    """Move past a record that is too long to be held, to what follows it, or else to a record inside of its length.

    Returns the reason, and whether the record is whole: then a head in it is a quotation. That can be seen if the
    response confirms the length, or once the end is near; until then, a head counts if another record follows its own.
    """
    assert head.length is not None
    wrong = f"its Content-Length of {head.length:,} is wrong"
    near, left = max(max_bytes, STEP), head.length
    text.advance(head.size)
    text.fill(MAX_HEAD)
    is_confirmed = _http_size(text.buffer, text.start, len(text.buffer)) == left
    while left > near and text.fill(1):
        position = text.position
        if is_confirmed:
            text.fill(STEP)
            text.advance(min(STEP, left - near, len(text.buffer) - text.start))
        elif text.search(min(STEP, left - near), members=False):
            quoted = parse_head(text.buffer, text.start)
            size = quoted.size + (quoted.length or 0) if quoted else 0
            if head.length > MAX_LENGTH or (0 < size <= near and _is_followed(text, size)):
                return wrong, False
            text.advance(1)
        left -= text.position - position
    if not text.fill(left):
        reason = text.gap.reason if text.gap else f"truncated: fewer than {head.length:,} bytes"
        return (wrong if text.search() else reason), False
    if _is_followed(text, left) or (is_confirmed and text.buffer.startswith((b"\n", b"\r\n"), text.start + left)):
        text.advance(left)
    elif text.search(left, members=False):
        return wrong, False
    return f"longer than {max_bytes:,} bytes", True


def _is_followed(text: Text, size: int) -> bool:
    """Whether a record, a member or the end follows the next `size` bytes."""
    text.fill(size + AFTER)
    stop = text.start + size
    rest = bytes(text.buffer[stop : stop + AFTER]).lstrip(BLANK)
    if stop > len(text.buffer) or not rest or rest.startswith(b"WARC/") or is_compressed(rest[:8]):
        return stop <= len(text.buffer)
    text.fill(size + AFTER + MAX_LINE)
    return starts_record(bytes(text.buffer[stop : stop + AFTER + MAX_LINE]))


def _what_lacks(head: RecordHead) -> str:
    if not head.kind:
        return "it has no WARC-Type"
    value = head.fields.get("content-length")
    return "it has no Content-Length" if value is None else f"its Content-Length {value[:40]!r} is not a number"

"""Records of a WARC or ARC archive from its decompressed pieces; after damage, the next intact record.

A record is trusted if another one, or the end, follows its block. Otherwise its Content-Length is wrong, or what
follows is damaged: the next plausible head is searched for, inside the block first. What lies between is one `Fault`,
with its offset and size. Memory: one record of at most `max_bytes`, and what `members` holds; longer records are
passed over.

Cost: linear. A block is copied when it is accepted, and what is hashed without that is limited (`Text.may_hash`).
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import xxhash

from llmkit.corpus.extract.decoders import is_compressed
from llmkit.corpus.extract.members import MAX_MAGIC, MEMBER, PLAIN, Gap, Piece, member_content, pieces
from llmkit.corpus.extract.record_heads import (
    BLANK,
    MAX_HEAD,
    MAX_LINE,
    RecordHead,
    find_head,
    parse_head,
    starts_record,
)
from llmkit.corpus.extract.stored import Stored

PAGES = frozenset(("response", "resource", "conversion"))
AFTER = 64  # bytes after a record that usually show whether another one follows
STEP = 1 << 20  # bytes per step of a search
GIVEN = 1024  # records of a member that are remembered until its end
IDENTITY = ("warc-record-id", "warc-target-uri", "warc-date")
MAX_LENGTH = 1 << 40  # bytes; a longer record is not plausible
HASHED, HASHED_SHARE = 64 << 20, 4  # bytes hashed to confirm doubtful records: a constant, and a share of all
HTTP_HEAD_END = re.compile(rb"\n\r?\n")
LINE_ENDS = re.compile(rb"[\r\n]*")
HTTP_LENGTH = re.compile(rb"\ncontent-length:[ \t]*(\d{1,15})[ \t]*\r?\n", re.IGNORECASE)
DIGESTS = ("md5:", "sha1:", "sha256:", "sha512:")


class Place(NamedTuple):
    """A place in an archive, in bytes."""

    position: int  # in the decompressed text
    offset: int  # in the stored file: exact for plain text, otherwise near
    member: int  # offset of the member that holds it
    inner: int  # position in this member
    is_plain: bool = False

    def size(self, end: Place) -> int:
        """Stored bytes up to `end`; decompressed ones if both places are in the same member.

        A damaged member may seem to extend beyond what follows it: then it counts from its beginning.
        """
        if self.member == end.member and not self.is_plain:
            return end.position - self.position
        return end.offset - (self.offset if self.offset <= end.offset else min(self.member, end.offset))


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


class Text:
    """The decompressed bytes up to the next gap; `start` is the index of the first unread one in `buffer`."""

    def __init__(self, stored: Stored) -> None:
        self._stored = stored
        self._pieces = pieces(stored)
        self._buffer_position = 0
        self._marks: deque[Place] = deque()  # the beginning of each piece
        self._hashed = 0
        self._given: deque[tuple[str | int | None, ...]] = deque(maxlen=GIVEN)  # records of the current member
        self._member, self._covered = 0, 0  # its offset, and where the damage was that the last gap is for
        self.buffer = bytearray()
        self.start = 0
        self.ended = False  # at a gap, or at the end of the archive
        self.gap: Gap | None = None
        self.has_members = False  # whether anything was compressed

    def fill(self, size: int) -> bool:
        """Whether there are `size` unread bytes, after reading on as needed."""
        while len(self.buffer) - self.start < size and not self.ended:
            piece = next(self._pieces, None)
            if not isinstance(piece, Piece):
                self.gap, self.ended = piece, True
                break
            position = self._buffer_position + len(self.buffer)
            self.has_members = self.has_members or not piece.is_plain
            if piece.starts or not self._marks:
                self._marks.append(Place(position, piece.offset, piece.offset, 0, piece.is_plain))
            else:
                last = self._marks[-1]
                inner = last.inner + position - last.position
                self._marks.append(Place(position, piece.offset, last.member, inner))
            self.buffer += piece.data
        return len(self.buffer) - self.start >= size

    def advance(self, size: int) -> None:
        """Move on by bytes that are there."""
        self.start += size
        if self.start > STEP or self.start == len(self.buffer):
            del self.buffer[: self.start]
            self._buffer_position, self.start = self._buffer_position + self.start, 0

    @property
    def position(self) -> int:
        """The current position in the decompressed text."""
        return self._buffer_position + self.start

    def may_hash(self, size: int) -> bool:
        """Whether `size` more bytes may be hashed to confirm a record; they are counted."""
        if self._hashed + size > HASHED + HASHED_SHARE * self.position:
            return False
        self._hashed += size
        return True

    def skip_blank(self) -> bool:
        """Move to the next byte that can begin a head. Returns False if the text ends before."""
        while self.fill(1):
            ahead = bytes(self.buffer[self.start : self.start + AFTER])
            rest = ahead.lstrip(BLANK)
            self.advance(len(ahead) - len(rest))
            if rest:
                return True
        return False

    def place(self) -> Place:
        """The current place."""
        position = self.position
        if not self.fill(1):
            member, offset = (self.gap.member, self.gap.offset) if self.gap else (self._stored.offset,) * 2
            return Place(position, offset, member, 0)
        while len(self._marks) > 1 and self._marks[1].position <= position:
            self._marks.popleft()
        mark = self._marks[0]
        ahead = position - mark.position
        if mark.is_plain:
            return Place(position, mark.offset + ahead, mark.offset + ahead, 0, True)
        return Place(position, mark.offset, mark.member, mark.inner + ahead)

    def search(self, size: int | None = None, members: bool = True) -> bool:
        """Move to the next plausible head, with `members` also in compressed members behind plain text.

        Without one, move on by `size` bytes (None: to the end of the text).
        """
        while size is None or size > 0:
            self.fill(STEP + MAX_HEAD)
            available = len(self.buffer) - self.start
            step = available if self.ended else STEP
            step = step if size is None else min(step, size)
            found = find_head(self.buffer, self.start, self.start + step)
            member = self.next_member(self.start, found if found >= 0 else self.start + step) if members else -1
            if member >= 0:
                step = member - self.start
                self.advance(step)
                if self.reopen():
                    return True
                self.advance(1)
                step += 1
            elif found >= 0:
                self.advance(found - self.start)
                return True
            else:
                self.advance(step)
            size = None if size is None else size - step
            if self.ended and not self.fill(1):
                break
        return False

    def next_member(self, begin: int, stop: int) -> int:
        """Index of the first compressed member with records in the plain text of `buffer[begin:stop]`, or -1."""
        if not self._marks or not self._marks[-1].is_plain:
            return -1
        plain = next(mark.position for mark in self._marks if mark.is_plain) - self._buffer_position
        for match in MEMBER.finditer(self.buffer, max(begin, plain), stop + MAX_MAGIC - 1):
            content = member_content(self.buffer, match.start()) if match.start() < stop else None
            if content is not None and (not content or starts_record(content)):
                return match.start()
        return -1

    def reopen(self) -> bool:
        """Whether plain text is followed by a compressed member here, which is then read as such."""
        here = self.place()
        if not here.is_plain or not is_compressed(bytes(self.buffer[self.start : self.start + 8])):
            return False
        if not self._stored.rewind(here.offset, free=2 * PLAIN):
            return False
        self._buffer_position, self.start, self.ended = here.position, 0, False
        self.buffer.clear()
        self._marks.clear()
        self._pieces = pieces(self._stored)
        return True

    def resume(self) -> bool:
        """Continue after the gap; False at the end of the archive."""
        gap, self.gap, self.ended = self.gap, None, False
        self._covered = max(self._covered, gap.offset if gap else 0)
        return gap is not None

    def is_repeated(self, record: Record) -> bool:
        """Whether a record was given before, in a damaged member that seemed to extend beyond its end."""
        place = record.place
        if place.member != self._member and place.offset >= self._covered:
            self._given.clear()
        self._member = place.member
        key = *map(record.head.fields.get, IDENTITY), xxhash.xxh3_64_intdigest(record.block)
        if place.offset < self._covered and key in self._given:
            return True
        self._given.append(key)
        return False


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
        if not text.is_repeated(record):
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
    if is_complete and _confirmed_size(text, record, begin, stop) == length:
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
    if after.startswith((b"\n", b"\r\n") if record.head.is_arc else (b"\n\n", b"\r\n\r\n")):
        return length, ""
    if gap and not gap.truncated:
        return length, gap.reason
    # In plain text behind a damaged member, bytes of its format may lie between those of a record.
    is_doubtful = record.has_digest or _http_size(text.buffer, begin, stop) > length
    return length, wrong if is_doubtful or (record.place.is_plain and text.has_members) else ""


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
    is_whole = 0 < size <= stop - begin and LINE_ENDS.match(text.buffer, begin + size, stop).end() == stop  # type: ignore[union-attr]
    return size if is_whole else None


def _http_size(data: bytearray, begin: int, stop: int) -> int:
    """The size of a block according to the Content-Length of the HTTP response in it; 0 if that is not given."""
    limit = min(stop, begin + MAX_HEAD)
    end = HTTP_HEAD_END.search(data, begin, limit) if data.startswith(b"HTTP/", begin, limit) else None
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
    if is_confirmed or _is_followed(text, left):
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

"""The stored bytes of an archive, decompressed, with their offsets, across damage.

An archive is a sequence of compressed members (gzip members, zstd frames, xz, bzip2) or plain text, or first one and
then the other, as `cat` makes it. A member may hold one record, a part of one, or all. `pieces` yields what can be
decompressed, in order. Where a member is damaged it yields a `Gap`, and continues with the next member that can be
decompressed, or with the next record head in plain text. It never seeks, so that a pipe is read like a file.

What a damaged member stores uncompressed (gzip level 0, raw zstd blocks) has been given already, and does not count as
plain text that follows: else its records would be read twice. Where a damaged member ends is unknown, even if only its
checksum is wrong: decoders have been seen to continue through the next member, to its very end.

Memory: KEEP stored bytes behind the current position, SCAN ahead of it, TAIL decompressed ones, and the window of the
decompressor (memory.window). Cost: linear, also for crafted data, since what is read again is limited (stored.py).
"""

from __future__ import annotations

import bz2
import lzma
import re
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from llmkit.corpus.extract.record_heads import MAX_HEAD, find_head, parse_head, starts_record
from llmkit.corpus.extract.stored import (
    FEED,
    KEEP,
    MAX_BLOCK,
    REREAD,
    REREAD_SHARE,
    Damaged,
    Stored,
    block_size,
    decoder_of,
)
from llmkit.io.compression import GZIP_MAGIC, XZ_MAGIC, ZSTD_MAGIC, is_zstd
from llmkit.memory import window, zstd_decompressor

PLAIN = 64 << 10  # bytes of plain text in a piece
SCAN = 1 << 20  # stored bytes per step of a search
PROBE = MAX_BLOCK + (1 << 10)  # bytes from which a member is recognised, and a head
FIRST_PROBE = 1 << 10  # of these, which nearly always suffice
PROBE_OUTPUT = 4 << 10  # decompressed bytes after which a member is accepted
TAIL = 1 << 20  # decompressed bytes of a member among which its plain text is found again
MEMBER = re.compile(rb"\x1f\x8b\x08[\x00-\x1f]|\x28\xb5\x2f\xfd|\xfd7zXZ\x00|BZh[1-9]1AY&SY")
MAX_MAGIC = 10  # bytes
DICTIONARY = b"\x5d\x2a\x4d\x18"  # skippable frame with the dictionary of a .warc.zst


@dataclass(frozen=True, slots=True)
class Piece:
    """Decompressed bytes. `offset`: of the stored bytes they come from; `starts`: they are the first of a member."""

    data: bytes
    offset: int
    starts: bool = False
    is_plain: bool = False


@dataclass(frozen=True, slots=True)
class Gap:
    """Where decompression stopped: offsets of the member and of the damage, the reason, and how it was noticed."""

    member: int
    offset: int
    reason: str
    checksum: bool = False  # the member is complete, but something in it is wrong
    truncated: bool = False  # what precedes the gap is intact


def pieces(stored: Stored) -> Iterator[Piece | Gap]:
    """What can be decompressed of the stored bytes, and the gaps between."""
    dictionary: Any = None
    begin = 0  # of the last member
    tail: _Tail | None = None
    search = _Search(stored)
    while magic := stored.peek(8):
        here, decoder = stored.offset, decoder_of(magic)
        if is_zstd(magic) and magic[:4] != ZSTD_MAGIC:
            payload = _skippable(stored, keep=magic[:4] == DICTIONARY and here == 0)
            dictionary = _dictionary(payload) if payload else dictionary
            continue
        if decoder is None:
            head = stored.peek(MAX_HEAD)
            if starts_record(head):
                yield from _plain(stored)
                return
            if tail and not head.strip(b"\0\r\n"):  # padding
                stored.advance(len(head))
                continue
            yield Gap(here, here, "not the head of a record")
            if tail and tail.end != here:  # without a checksum, a member may have lost its end, and taken what follows
                tail.end = here
                stored.rewind(begin + 1)
            search.move(dictionary, tail or _Tail())
            continue
        begin, tail, starts = here, _Tail(), True
        try:
            for offset, data in decoder(stored, dictionary):
                stored.decompressed(len(data))
                tail.add(offset, data)
                yield Piece(data, begin if starts else offset, starts)
                starts = False
        except Damaged as damage:
            place = begin if starts else stored.offset
            yield Gap(begin, place, damage.reason, damage.checksum, damage.truncated)
            tail.end = stored.offset
            if not stored.rewind(begin + 1) and stored.offset == begin:
                stored.advance(1)
            search.move(dictionary, tail)


def _plain(stored: Stored) -> Iterator[Piece]:
    while data := stored.peek(PLAIN):
        stored.advance(len(data))
        yield Piece(data, stored.offset - len(data), starts=True, is_plain=True)


class _Tail:
    """The last TAIL bytes that a member gave, up to the damage at offset `end`."""

    __slots__ = ("_pieces", "_positions", "_size", "_text", "end")

    def __init__(self) -> None:
        self.end = 0
        self._pieces: deque[tuple[int, bytes]] = deque()
        self._size = 0
        self._text: bytes | None = None
        self._positions: dict[str, int] = {}

    def add(self, offset: int, data: bytes) -> None:
        """Append what was decompressed from the bytes at `offset`."""
        self._pieces.append((offset, data))
        self._size += len(data)
        while self._size >= TAIL and self._size - len(self._pieces[0][1]) >= TAIL:
            self._size -= len(self._pieces.popleft()[1])

    def holds(self, kind: str, offset: int, data: bytes) -> bool:
        """Whether the stored bytes at `offset` were given as they are, which is assumed of those before the tail.

        Asked for one `kind` in the order of the offsets, so that the tail is searched once.
        """
        if offset >= self.end or not self._pieces:
            return False
        if offset < self._pieces[0][0]:
            return True
        if self._text is None:
            self._text = b"".join(piece for _, piece in self._pieces)
        position = self._text.find(data, self._positions.get(kind, 0))
        self._positions[kind] = position + 1 if position >= 0 else len(self._text)
        return position >= 0


class _Search:
    """The search for what can be read behind damage. Heads are searched for once, also if members are tried again."""

    def __init__(self, stored: Stored) -> None:
        self._stored = stored
        self._head = -1  # offset of the next record head, if it has been found
        self._searched = 0  # offset before which there is no other
        self._probed = 0  # bytes in which members were looked for

    def move(self, dictionary: Any, tail: _Tail) -> None:
        """Move to the next member that can be decompressed, or record head in plain text, or to the end."""
        stored, size = self._stored, 2 * PROBE
        while window := stored.peek(size):
            base, last = stored.offset, len(window) < size
            end = len(window) if last else size - PROBE  # what begins after that is examined in the next step
            text = self._next_head(window, base, end, tail)
            for match in MEMBER.finditer(window, 0, text if text >= 0 else len(window)):
                start = match.start()
                content = member_content(window, start, dictionary, self._may_probe) if start < end else None
                if content is None:
                    continue
                if starts_record(content) or not tail.holds("member", base + start, window[start : start + 32]):
                    stored.advance(start)
                    return
            stored.advance(text if text >= 0 else end)
            if text >= 0:
                return
            size = min(2 * size, SCAN)

    def _next_head(self, window: bytes, base: int, end: int, tail: _Tail) -> int:
        """Index of the first record head in `window[:end]` that was not read already, or -1."""
        while True:
            if self._head < base:
                begin = max(self._searched - base, 0)
                if begin >= end:
                    return -1
                found = find_head(window, begin, end)
                self._head, self._searched = (base + found, base + found + 1) if found >= 0 else (-1, base + end)
            index = self._head - base
            if not 0 <= index < end:
                return -1
            head = parse_head(window, index)
            if not tail.holds("head", self._head, window[index : index + (head.size if head else 1)]):
                return index
            self._head = -1

    def _may_probe(self) -> bool:
        self._probed += PROBE
        return self._probed <= REREAD + REREAD_SHARE * self._stored.offset


def member_content(
    data: bytes | bytearray, start: int, dictionary: Any = None, may_probe: Callable[[], bool] = lambda: False
) -> bytes | None:
    """The first decompressed bytes of the member at `start`, empty if unknown; None if there is no member.

    `may_probe` decides whether more than FIRST_PROBE bytes of a gzip member may be tried.
    """
    magic = bytes(data[start : start + 8])
    if magic.startswith(ZSTD_MAGIC):
        return _first_block(data, start, dictionary)
    if not magic.startswith(GZIP_MAGIC):  # more than PROBE bytes may be needed for the first that are decompressed
        member: Any = lzma.LZMADecompressor(memlimit=window()) if magic.startswith(XZ_MAGIC) else bz2.BZ2Decompressor()
        try:
            content: bytes = member.decompress(data[start : start + FIRST_PROBE], PROBE_OUTPUT)
        except (lzma.LZMAError, OSError, ValueError):
            return None
        return content
    for size in (FIRST_PROBE, PROBE):
        member = zlib.decompressobj(wbits=31)
        try:
            content = member.decompress(data[start : start + size], PROBE_OUTPUT)
        except zlib.error:
            return None
        if member.eof or len(content) >= PROBE_OUTPUT:
            return content
        if not may_probe():
            break
    return content or None


def _first_block(window: bytes | bytearray, start: int, dictionary: Any) -> bytes | None:
    """The content of the first block of a zstd frame, empty if it is not in `window`; None if there is no frame."""
    import zstandard

    try:
        begin = start + zstandard.frame_header_size(window[start : start + 18])
        kind, size = block_size(window[begin : begin + 3])
        if size > 3 + MAX_BLOCK or kind == 3 or begin + 3 > len(window):
            return None
        if begin + size > len(window):
            return b""
        frame = zstd_decompressor(dictionary).decompressobj()
        content: bytes = frame.decompress(window[start:begin]) + frame.decompress(window[begin : begin + size])
        return content
    except zstandard.ZstdError:
        return None


def _skippable(stored: Stored, keep: bool) -> bytes:
    """Pass over a skippable frame. Returns its content if it is to be kept and no longer than KEEP."""
    size = int.from_bytes(stored.peek(8)[4:], "little")
    stored.advance(len(stored.peek(8)))
    content = stored.peek(size) if keep and size <= KEEP else b""
    while size and (data := stored.peek(min(size, FEED))):
        stored.advance(len(data))
        size -= len(data)
    return content


def _dictionary(content: bytes) -> Any:
    import zstandard

    try:
        if content.startswith(ZSTD_MAGIC):
            if zstandard.frame_content_size(content) > KEEP:
                return None
            content = zstandard.ZstdDecompressor().decompress(content, max_output_size=KEEP)
        return zstandard.ZstdCompressionDict(content)
    except zstandard.ZstdError:
        return None  # the frames that need it will be reported

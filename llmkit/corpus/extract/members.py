"""The stored bytes of an archive, decompressed, with their offsets, across damage.

An archive is a sequence of compressed members (gzip members, zstd frames, xz, bzip2) or plain text, or first one and
then the other, as `cat` makes it. A member may hold one record, a part of one, or all. `pieces` yields what can be
decompressed, in order. Where a member is damaged it yields a `Gap`, and continues with the next member that can be
decompressed, or with the next record head in plain text. It never seeks, so that a pipe is read like a file.

Memory: KEEP stored bytes behind the current position, SCAN ahead of it, LIMIT decompressed ones, and the window of the
decompressor (128 MiB at most).
"""

from __future__ import annotations

import bz2
import lzma
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from llmkit.corpus.extract.record_heads import MAX_HEAD, find_head, starts_record
from llmkit.errors import LlmkitError
from llmkit.io.compression import BZIP2_MAGIC, GZIP_MAGIC, XZ_MAGIC, ZSTD_MAGIC, is_zstd

KEEP = 4 << 20  # stored bytes that can be read again after a damaged member
FEED, LIMIT = 32 << 10, 256 << 10  # of a decompressor: bytes in, bytes out
READ = 256 << 10  # bytes of a read
FIRST_FEED = 4 << 10  # of a member: most are small, and what it does not use is copied back
SCAN, PROBE = 1 << 20, 64 << 10  # stored bytes per step of a search; bytes from which a member is recognised
PROBE_OUTPUT = 4 << 10  # decompressed bytes after which a member is accepted
REREAD = 256 << 20  # bytes that may be read again without limit, after that REREAD_SHARE of all bytes
REREAD_SHARE = 8
MEMBER = re.compile(rb"\x1f\x8b\x08[\x00-\x1f]|\x28\xb5\x2f\xfd|\xfd7zXZ\x00|BZh[1-9]1AY&SY")
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


class Damaged(Exception):
    """Raised where a member cannot be decompressed further."""

    def __init__(self, reason: str, *, checksum: bool = False, truncated: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.checksum, self.truncated = reason, checksum, truncated


class Stored:
    """The bytes of an unseekable stream; the last KEEP of them can be read again."""

    def __init__(self, raw: Any, name: str = "") -> None:
        self._raw, self._name = raw, name
        self._window = bytearray()
        self._base = 0  # offset of the window
        self._ended = False
        self._reread = 0
        self.offset = 0

    def peek(self, size: int) -> bytes:
        """The next `size` bytes, fewer at the end."""
        start = self.offset - self._base
        while len(self._window) - start < size and not self._ended:
            surplus = start - KEEP
            if surplus > 0:
                del self._window[:surplus]
                self._base += surplus
                start = KEEP
            try:
                block = self._raw.read(max(READ, size))
            except OSError as error:
                raise LlmkitError(f"{self._name}: {error.strerror or error}", "check the disk") from error
            self._ended = not block
            self._window += block
        return bytes(memoryview(self._window)[start : start + size])

    def read(self, size: int) -> bytes:
        """The next bytes, as of a file."""
        data = self.peek(size)
        self.offset += len(data)
        return data

    def advance(self, size: int) -> None:
        """Move on by bytes that were peeked at."""
        self.offset += size

    def rewind(self, offset: int) -> bool:
        """Go back to `offset`, or as far as bytes are kept. Returns whether it was reached.

        The total is limited, since crafted data could have every part of it read again and again.
        """
        target = max(offset, self._base)
        if self._reread + self.offset - target > REREAD + REREAD_SHARE * self.offset:
            return False
        self._reread += self.offset - target
        self.offset = target
        return target == offset


def is_compressed(data: bytes) -> bool:
    """Whether `data`, 8 bytes or more, begins a compressed member."""
    return _decoder(data) is not None or is_zstd(data)


def pieces(stored: Stored) -> Iterator[Piece | Gap]:
    """What can be decompressed of the stored bytes, and the gaps between."""
    dictionary: Any = None
    compressed = False  # whether a member has been read
    while magic := stored.peek(8):
        begin, decoder = stored.offset, _decoder(magic)
        if is_zstd(magic) and magic[:4] != ZSTD_MAGIC:
            payload = _skippable(stored, keep=magic[:4] == DICTIONARY and begin == 0)
            dictionary = _dictionary(payload) if payload else dictionary
            continue
        if decoder is None:
            head = stored.peek(MAX_HEAD)
            if starts_record(head):
                yield from _plain(stored)
                return
            if compressed and not head.strip(b"\0\r\n"):  # padding
                stored.advance(len(head))
                continue
            yield Gap(begin, begin, "not the head of a record")
            _resynchronise(stored, dictionary)
            continue
        compressed = starts = True
        try:
            for offset, data in decoder(stored, dictionary):
                yield Piece(data, begin if starts else offset, starts)
                starts = False
        except Damaged as damage:
            place = begin if starts else stored.offset
            yield Gap(begin, place, damage.reason, damage.checksum, damage.truncated)
            stored.rewind(begin + 1)
            _resynchronise(stored, dictionary)


def _plain(stored: Stored) -> Iterator[Piece]:
    while data := stored.peek(LIMIT):
        stored.advance(len(data))
        yield Piece(data, stored.offset - len(data), starts=True, is_plain=True)


def _resynchronise(stored: Stored, dictionary: Any) -> None:
    """Move to the next member that can be decompressed, or record head in plain text, or to the end."""
    while window := stored.peek(SCAN):
        last = len(window) < SCAN
        end = len(window) if last else SCAN - PROBE  # what begins after that is examined in the next step
        text = find_head(window, 0, end)
        for match in MEMBER.finditer(window, 0, text if text >= 0 else len(window)):
            start = match.start()
            if start < end and _is_member(window[start : start + PROBE], dictionary):
                stored.advance(start)
                return
        stored.advance(text if text >= 0 else end)
        if text >= 0:
            return


def _is_member(data: bytes, dictionary: Any) -> bool:
    """Whether `data` begins with a member of which PROBE_OUTPUT bytes, or all, can be decompressed."""
    size, decoder = 0, _decoder(data)
    try:
        for _, out in decoder(Stored(BytesIO(data)), dictionary):
            size += len(out)
            if size >= PROBE_OUTPUT:
                return True
    except Damaged as damage:
        return size > 0 and damage.truncated
    return True


# ---- decoders: the pieces of one member, each with the offset of the stored bytes it begins in; Damaged ends them


def _decoder(magic: bytes) -> Any:
    if magic.startswith(GZIP_MAGIC):
        return _gzip
    if magic[:4] == ZSTD_MAGIC:
        return _zstd
    if magic.startswith(XZ_MAGIC):
        return _xz
    return _bzip2 if magic.startswith(BZIP2_MAGIC) and magic[4:8] == b"1AY&" else None


def _gzip(stored: Stored, _: Any) -> Iterator[tuple[int, bytes]]:
    member, before = zlib.decompressobj(wbits=31), None
    while not member.eof:
        data, offset = stored.peek(FEED if before else FIRST_FEED), stored.offset
        before = member.copy() if before else zlib.decompressobj(wbits=31)
        try:
            out = member.decompress(data, LIMIT)
        except zlib.error as error:
            yield from ((offset, out) for out in _before_error(before, data))
            reason = str(error).rpartition(": ")[2]
            raise Damaged(
                f"its gzip member is damaged ({reason})", checksum=reason.startswith("incorrect data")
            ) from error
        rest = member.unused_data if member.eof else member.unconsumed_tail  # at the end, both may hold the same
        stored.advance(len(data) - len(rest))
        if out:
            yield offset, out
        elif not data:
            raise Damaged("its gzip member is truncated", truncated=True)


def _before_error(member: Any, data: bytes) -> Iterator[bytes]:
    """The output of a decompressor before the byte that it fails at, in ever smaller steps."""
    start = 0
    for step in (1024, 32, 1):
        while start < len(data):
            before = member.copy()
            try:
                out = member.decompress(data[start : start + step])
            except zlib.error:
                member = before
                break
            start += step
            if out:
                yield out


def _zstd(stored: Stored, dictionary: Any) -> Iterator[tuple[int, bytes]]:
    """One frame, fed block by block (RFC 8878, section 3.1.1), since a failing call loses its output."""
    import zstandard

    truncated = Damaged("its zstd frame is truncated", truncated=True)
    try:
        size = zstandard.frame_header_size(stored.peek(18))
        checked = zstandard.get_frame_parameters(stored.peek(18)).has_checksum
        frame = zstandard.ZstdDecompressor(max_window_size=1 << 27, dict_data=dictionary).decompressobj()
        frame.decompress(stored.peek(size))
        stored.advance(size)
        is_last = False
        while not is_last:
            header, offset = stored.peek(3), stored.offset
            if len(header) < 3:
                raise truncated
            fields = int.from_bytes(header, "little")
            is_last = bool(fields & 1)
            size = 3 + (1 if fields >> 1 & 3 == 1 else fields >> 3)  # a run stores one byte
            if size > 3 + (1 << 17):
                raise Damaged("its zstd frame is damaged (a block is too long)")
            block = stored.peek(size)
            out = frame.decompress(block)
            if out:
                yield offset, out
            stored.advance(len(block))
            if len(block) < size:
                raise truncated
        if checked:
            check = stored.peek(4)
            stored.advance(len(check))
            out = frame.decompress(check)
            if len(check) < 4:
                raise truncated
            if out:
                yield stored.offset, out
    except zstandard.ZstdError as error:
        reason = str(error).rpartition(": ")[2]
        if len(stored.peek(18)) < 18 and "checksum" not in reason:
            raise truncated from error
        raise Damaged(f"its zstd frame is damaged ({reason})", checksum="checksum" in reason) from error


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


def _xz(stored: Stored, _: Any) -> Iterator[tuple[int, bytes]]:
    return _stdlib(stored, lzma.LZMADecompressor(memlimit=1 << 30), "xz stream")


def _bzip2(stored: Stored, _: Any) -> Iterator[tuple[int, bytes]]:
    return _stdlib(stored, bz2.BZ2Decompressor(), "bzip2 stream")


def _stdlib(stored: Stored, member: Any, name: str) -> Iterator[tuple[int, bytes]]:
    while not member.eof:
        data, offset = stored.peek(FEED) if member.needs_input else b"", stored.offset
        if member.needs_input and not data:
            raise Damaged(f"its {name} is truncated", truncated=True)
        stored.advance(len(data))
        try:
            out = member.decompress(data, LIMIT)
        except (lzma.LZMAError, OSError, ValueError) as error:
            raise Damaged(f"its {name} is damaged ({error})") from error
        if out:
            yield offset, out
    stored.rewind(stored.offset - len(member.unused_data))

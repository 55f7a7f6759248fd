"""The stored bytes of an archive, and the decoders of its members: gzip, zstd, xz, bzip2.

    stored = Stored(file)
    for offset, data in decoder_of(stored.peek(8))(stored, dictionary):
        ...

yields the decompressed bytes of one member, each with the offset of the stored bytes it comes from, and leaves `stored`
behind the member. All that precedes damage is yielded; then Damaged is raised, with `stored` near the damage.

The bytes are read once and in order; the last of them can be read again. Crafted data could have every part of it read
again and again. What is read again, and what is decompressed from it, is limited to REREAD bytes and REREAD_SHARE times
what was read once.
"""

from __future__ import annotations

import lzma
import zlib
from collections.abc import Generator, Iterator
from typing import Any

from llmkit.errors import LlmkitError
from llmkit.io.compression import BZIP2_MAGIC, GZIP_MAGIC, XZ_MAGIC, ZSTD_MAGIC, Bzip2Decoder, is_zstd
from llmkit.memory import over_window, window, zstd_decompressor

KEEP = 4 << 20  # stored bytes that can be read again
READ = 256 << 10  # bytes of a read
REREAD, REREAD_SHARE = 16 << 20, 4
FEED, LIMIT = 32 << 10, 256 << 10  # of a decompressor: bytes in, bytes out
FIRST_FEED = 4 << 10  # of a member: most are small, and what it does not use is copied back
MAX_BLOCK = 1 << 17  # of zstd, bytes


class Stored:
    """The bytes of an unseekable stream; the last KEEP of them can be read again."""

    def __init__(self, raw: Any, name: str = "") -> None:
        self._raw, self._name = raw, name
        self._window = bytearray()
        self._base = 0  # offset of the window
        self._ended = False
        self._furthest = 0  # stored bytes that were read
        self._output = 0  # bytes that were decompressed from them
        self._again = 0  # stored and decompressed bytes of what was read before
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

    def give_back(self, size: int) -> None:
        """Go back by bytes that were read just now, and not used."""
        self.offset -= size

    def decompressed(self, size: int) -> None:
        """Count `size` bytes that came from those before the current position."""
        if self.offset >= self._furthest:
            self._furthest = self.offset
            self._output += size
        else:
            self._again += size

    def rewind(self, offset: int, free: int = 0) -> bool:
        """Go to `offset`, or back as far as bytes are kept. Returns whether it was reached.

        Going back more than `free` bytes is limited in total.
        """
        self._furthest = max(self._furthest, self.offset)
        target = max(offset, self._base)
        again = self._again + max(0, self.offset - target - free)
        if target < self.offset and again > REREAD + REREAD_SHARE * (self._furthest + self._output):
            return False
        self._again, self.offset = again, target
        return target == offset


class Damaged(Exception):
    """Raised where a member cannot be decompressed further.

    `checksum`: only that of its content is wrong; `truncated`: the stored bytes end within it.
    """

    def __init__(self, reason: str, *, checksum: bool = False, truncated: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.checksum, self.truncated = reason, checksum, truncated


def is_compressed(data: bytes) -> bool:
    """Whether `data`, 8 bytes or more, begins a compressed member."""
    return decoder_of(data) is not None or is_zstd(data)


def decoder_of(magic: bytes) -> Any:
    """The decoder of the member that begins with `magic`, 8 bytes or more; None if none does."""
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
            stored.advance((yield from _before_error(before, data, offset)))
            reason = str(error).rpartition(": ")[2]
            text = f"its gzip member is damaged ({reason})"
            raise Damaged(text, checksum=reason == "incorrect data check") from error
        rest = member.unused_data if member.eof else member.unconsumed_tail  # at the end, both may hold the same
        stored.advance(len(data) - len(rest))
        if out:
            yield offset, out
        elif not data:
            raise Damaged("its gzip member is truncated", truncated=True)


def _before_error(member: Any, data: bytes, offset: int) -> Generator[tuple[int, bytes], None, int]:
    """The output of a decompressor before the byte that it fails at, in ever smaller steps; returns its index."""
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
                yield offset, out
    return min(start, len(data))


def _zstd(stored: Stored, dictionary: Any) -> Iterator[tuple[int, bytes]]:
    """One frame, fed block by block (RFC 8878, section 3.1.1), since a failing call loses its output."""
    import zstandard

    truncated = Damaged("its zstd frame is truncated", truncated=True)
    try:
        head = stored.peek(18)
        size, checked = zstandard.frame_header_size(head), zstandard.get_frame_parameters(head).has_checksum
        frame = zstd_decompressor(dictionary).decompressobj()
        frame.decompress(stored.peek(size))
        stored.advance(size)
        is_last = False
        while not is_last:
            header, offset = stored.peek(3), stored.offset
            if len(header) < 3:
                raise truncated
            is_last, size = bool(header[0] & 1), block_size(header)[1]
            if size > 3 + MAX_BLOCK:
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
        if too_large := over_window(error, head):
            raise Damaged(f"its zstd frame {too_large} (see --memory)") from error
        reason = str(error).rpartition(": ")[2]
        if len(stored.peek(18)) < 18 and "checksum" not in reason:
            raise truncated from error
        raise Damaged(f"its zstd frame is damaged ({reason})", checksum="checksum" in reason) from error


def block_size(header: bytes | bytearray) -> tuple[int, int]:
    """The type of a zstd block and its stored size, with its header: a run stores one byte."""
    fields = int.from_bytes(header, "little")
    return fields >> 1 & 3, 3 + (1 if fields >> 1 & 3 == 1 else fields >> 3)


def _xz(stored: Stored, _: Any) -> Iterator[tuple[int, bytes]]:
    return _stdlib(stored, lzma.LZMADecompressor(memlimit=window()), "xz stream")


def _bzip2(stored: Stored, _: Any) -> Iterator[tuple[int, bytes]]:
    return _stdlib(stored, Bzip2Decoder(), "bzip2 stream")


def _stdlib(stored: Stored, member: Any, name: str) -> Iterator[tuple[int, bytes]]:
    while not member.eof:
        data, offset = stored.peek(FEED) if member.needs_input else b"", stored.offset
        if member.needs_input and not data:
            raise Damaged(f"its {name} is truncated", truncated=True)
        stored.advance(len(data))
        try:
            out = member.decompress(data, LIMIT)
        except (lzma.LZMAError, OSError, ValueError) as error:
            if too_large := over_window(error):
                raise Damaged(f"its {name} {too_large} (see --memory)") from error
            raise Damaged(f"its {name} is damaged ({error})") from error
        if out:
            yield offset, out
    stored.give_back(len(member.unused_data))

"""Decoders of the members of an archive: gzip, zstd, xz, bzip2.

    for offset, data in decoder_of(magic)(stored, dictionary):
        ...

yields the decompressed bytes of one member, each with the offset of the stored bytes it comes from, and leaves `stored`
behind the member. All that precedes damage is yielded; then Damaged is raised, with `stored` near the damage.
"""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Generator, Iterator
from typing import Any

from llmkit.corpus.extract.stored import Stored
from llmkit.io.compression import BZIP2_MAGIC, GZIP_MAGIC, XZ_MAGIC, ZSTD_MAGIC, is_zstd

FEED, LIMIT = 32 << 10, 256 << 10  # of a decompressor: bytes in, bytes out
FIRST_FEED = 4 << 10  # of a member: most are small, and what it does not use is copied back
MAX_BLOCK = 1 << 17  # of zstd, bytes


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
        reason = str(error).rpartition(": ")[2]
        if len(stored.peek(18)) < 18 and "checksum" not in reason:
            raise truncated from error
        raise Damaged(f"its zstd frame is damaged ({reason})", checksum="checksum" in reason) from error


def block_size(header: bytes | bytearray) -> tuple[int, int]:
    """The type of a zstd block and its stored size, with its header: a run stores one byte."""
    fields = int.from_bytes(header, "little")
    return fields >> 1 & 3, 3 + (1 if fields >> 1 & 3 == 1 else fields >> 3)


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
    stored.give_back(len(member.unused_data))

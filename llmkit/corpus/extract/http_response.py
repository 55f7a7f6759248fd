"""HTTP responses in archive records: status, headers, and the body with its codings removed.

Archives of proxies often store a body that is already decoded below headers that still name its codings. A coding that
the body evidently does not have is therefore ignored. Decoded data is limited to `max_bytes`, the number of codings to
MAX_CODINGS, and that of chunks and members, each of which has a cost of its own, to MAX_CHUNKS and MAX_MEMBERS.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass, field
from itertools import count
from typing import NamedTuple

from llmkit.corpus.extract.record_heads import header_fields
from llmkit.io.compression import GZIP_MAGIC, ZSTD_MAGIC
from llmkit.memory import zstd_decompressor

MAX_HEAD = 1 << 20  # bytes of status line and headers; servers limit them to 8 to 64 KiB
MAX_CODINGS = 8  # of one body; servers send one or two
MAX_CHUNKS, MAX_MEMBERS = 1 << 20, 1 << 17  # the members of gzip, or the frames of zstd; a second or less of each
FEED, FIRST_FEED = 64 << 10, 4 << 10  # bytes of gzip data per call; what a member does not use is copied
BLANK_LINE = re.compile(rb"\r?\n\r?\n")
CHUNK = re.compile(rb"[ \t]*([0-9A-Fa-f]{1,16})[ \t]*(?:;[^\r\n]*)?\r?\n")
ALIASES = {"x-gzip": "gzip", "x-compress": "compress", "brotli": "br"}


class Decoded(NamedTuple):
    """Data without a coding, and whether the coding's own end was missing."""

    data: bytes
    is_cut: bool = False


class ContentError(Exception):
    """Raised for a body that cannot be used; the message is the reason."""


@dataclass(slots=True)
class HttpResponse:
    """`headers` with names in lower case; the last of several with one name counts."""

    status: int
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)
    is_cut: bool = False  # the body, or a coding of it, ends early


def parse_response(block: bytes, max_bytes: int) -> HttpResponse | None:
    """The response in a block, its body decoded; None if it does not begin with a status line.

    Raises ContentError for headers that are too long, and if the body is longer than `max_bytes` or cannot be decoded.
    """
    if not block.startswith(b"HTTP/"):
        block = block.lstrip(b"\r\n")
        if not block.startswith(b"HTTP/"):
            return None
    end = BLANK_LINE.search(block, 0, MAX_HEAD)
    if end is None and len(block) > MAX_HEAD:
        raise ContentError(f"its HTTP headers are longer than {MAX_HEAD:,} bytes")
    head, body = (block[: end.start()], block[end.end() :]) if end else (block, b"")
    status, _, lines = head.decode("latin-1").replace("\x00", "").partition("\n")
    headers = header_fields(lines, last=True)
    match = re.match(r"HTTP/[\d.]+\s+(\d{3})\b", status)
    codings = _codings(headers, "content-encoding") + _codings(headers, "transfer-encoding")
    if len(codings) > MAX_CODINGS:
        raise ContentError(f"its headers name {len(codings):,} codings")
    length = headers.get("content-length", "")
    is_cut = not codings and length.isdecimal() and len(length) < 16 and 0 < len(body) < int(length)
    for coding in reversed(codings):
        decoded = decode_body(body, coding, max_bytes)
        body, is_cut = decoded.data, is_cut or decoded.is_cut
    return HttpResponse(int(match[1]) if match else 200, body, headers, is_cut)


def _codings(headers: dict[str, str], name: str) -> list[str]:
    names = [coding.strip(" \t\"'").lower() for coding in headers.get(name, "").split(",")]
    return [ALIASES.get(coding, coding) for coding in names if coding]


def decode_body(body: bytes, coding: str, max_bytes: int) -> Decoded:
    """`body` without one coding (chunked, gzip, deflate, br, zstd); as it is if it does not have it.

    What a truncated body holds is returned, and that it is. Raises ContentError for damaged data, for data longer than
    `max_bytes`, and for a coding of which the library is missing.
    """
    decoded: Decoded | None = Decoded(body)
    if coding == "chunked":
        return _without_chunks(body)
    if coding == "gzip":
        decoded = _inflate(body, 31, max_bytes) if body.startswith(GZIP_MAGIC) else decoded
    elif coding == "deflate":
        decoded = _deflate(body, max_bytes)
    elif coding == "br":
        decoded = _brotli(body, max_bytes)
    elif coding == "zstd":
        decoded = _zstd(body, max_bytes) if body.startswith(ZSTD_MAGIC) else decoded
    if decoded is None:
        raise ContentError(f"its {coding} content is damaged")
    if len(decoded.data) > max_bytes:
        raise ContentError(f"longer than {max_bytes:,} bytes once it is decompressed")
    return decoded


def is_readable(data: bytes) -> bool:
    """Whether data that should have been compressed is not: text, or a PDF."""
    head = data[:1024]
    if head.startswith((b"\xff\xfe", b"\xfe\xff", b"%PDF-")):
        return True
    control = sum(head.count(byte) for byte in (*range(9), *range(14, 27), *range(28, 32), 127))
    return control * 50 <= len(head)


def _limit(number: int, limit: int) -> None:
    if number >= limit:
        raise ContentError(f"its content is in more than {limit:,} pieces")


def _without_chunks(body: bytes) -> Decoded:
    """The content of chunks. Data that is not in chunks stays, also what follows an invalid chunk."""
    content = bytearray()
    start = chunks = 0
    while match := CHUNK.match(body, start):
        size = int(match[1], 16)
        begin = match.end()
        end = begin + size
        ending = body[end : end + 2]
        if size and end < len(body) and not ending.startswith((b"\r\n", b"\n")):
            break
        if end > len(body) and not chunks and is_readable(rest := body[begin:]) and not rest.lstrip().startswith(b"<"):
            break  # a text that begins with a line such as 2024, rather than its first chunk cut short
        if not size and not chunks and body[end:].strip():
            break  # a text that begins with the digit 0
        _limit(chunks, MAX_CHUNKS)
        content += body[begin:end]
        chunks += 1
        start = end + (2 if ending == b"\r\n" else 1)
        if not size or end >= len(body):
            return Decoded(bytes(content), size > 0)
    return Decoded(bytes(content) + body[start:], chunks > 0 and start >= len(body))


def _inflate(body: bytes, wbits: int, max_bytes: int) -> Decoded | None:
    """The members in `body` before a damaged one, up to a byte more than `max_bytes`; None if the first is damaged."""
    parts: list[bytes] = []
    size = start = complete = 0
    for members in count():
        _limit(members, MAX_MEMBERS)
        member, feed = zlib.decompressobj(wbits), FIRST_FEED if start else FEED
        while not member.eof and start < len(body) and size <= max_bytes:
            data = body[start : start + feed]
            try:
                parts.append(member.decompress(data, max_bytes + 1 - size))
            except zlib.error:
                return Decoded(b"".join(parts[:complete])) if complete else None
            start += len(data) - len(member.unused_data)
            size += len(parts[-1])
            feed = FEED
        if wbits == 15 or not member.eof or not body.startswith(GZIP_MAGIC, start) or size > max_bytes:
            return Decoded(b"".join(parts), not member.eof)
        complete = len(parts)
    raise AssertionError


def _deflate(body: bytes, max_bytes: int) -> Decoded | None:
    """zlib data (RFC 1950), or raw deflate data (RFC 1951), which some servers send."""
    if body[:1] and body[0] & 15 == 8 and int.from_bytes(body[:2], "big") % 31 == 0:
        decoded = _inflate(body, 15, max_bytes)
        if decoded is not None:
            return decoded
    try:
        member = zlib.decompressobj(-15)
        data = member.decompress(body, max_bytes + 1)
    except zlib.error:
        return Decoded(body) if is_readable(body) else None
    is_whole = (member.eof and not member.unused_data) or len(data) > max_bytes
    return Decoded(data, not member.eof) if is_whole or not is_readable(body) else Decoded(body)


def _brotli(body: bytes, max_bytes: int) -> Decoded | None:
    try:
        import brotli
    except ImportError:
        if is_readable(body):
            return Decoded(body)
        raise ContentError("its Brotli content needs the package brotli (pip install brotli)") from None
    decoder = brotli.Decompressor()
    parts: list[bytes] = []
    size = 0
    try:
        parts.append(decoder.process(body, output_buffer_limit=max_bytes + 1))
        size = len(parts[0])
        while size <= max_bytes and not decoder.is_finished():
            part = decoder.process(b"", output_buffer_limit=max_bytes + 1 - size)
            if not part:
                break
            parts.append(part)
            size += len(part)
    except brotli.error:
        return Decoded(body) if is_readable(body) else None
    is_cut = not decoder.is_finished() and size <= max_bytes
    return Decoded(body) if is_cut and is_readable(body) else Decoded(b"".join(parts), is_cut)


def _zstd(body: bytes, max_bytes: int) -> Decoded | None:
    import zstandard

    parts: list[bytes] = []
    size = start = 0
    decompressor = zstd_decompressor()
    for frames in count():
        _limit(frames, MAX_MEMBERS)
        frame = decompressor.decompressobj()
        try:
            while not frame.eof and start < len(body) and size <= max_bytes:
                data = body[start : start + FIRST_FEED]
                parts.append(frame.decompress(data))
                start += len(data) - len(frame.unused_data)
                size += len(parts[-1])
        except zstandard.ZstdError:
            return None
        if not frame.eof or not body.startswith(ZSTD_MAGIC, start) or size > max_bytes:
            return Decoded(b"".join(parts), not frame.eof)
    raise AssertionError

"""Reading pages from web archives and files: WARC and WET (FastWARC), ARC, single HTML, PDF and text files.

    for record in read_pages("crawl.warc.gz"):
        ...  # a PageRecord or a BrokenRecord

The first bytes of a file determine its format, not its name. A broken record is yielded with its offset, and reading
continues with the next record that can be found. Memory: one record at a time, of at most `max_bytes`.
"""

from __future__ import annotations

import gzip
import io
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import xxhash

from llmkit.errors import LlmkitError
from llmkit.io.inputs import STDIN, display_name, open_raw
from llmkit.io.record import base_name

MAX_PAGE_BYTES = 16 << 20
HEAD = 1 << 16  # bytes from which the format of a file is determined
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
ARC_LINE = re.compile(rb"^(\S.*) (\S+) (\d{14}) (\S+) (\d+)\r?\n$")


@dataclass(slots=True)
class PageRecord:
    """The contents of one record or file. `headers` are those of the HTTP response, with names in lower case."""

    id: str
    content: bytes
    url: str = ""
    date: str = ""  # RFC 3339
    content_type: str = ""  # without parameters; empty if unknown
    charset: str = ""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    language: str = ""
    is_text: bool = False  # text extracted earlier, as in WET files
    fields: dict[str, Any] = field(default_factory=dict)  # other fields of a JSON row


@dataclass(frozen=True, slots=True)
class BrokenRecord:
    """A record that cannot be read or is skipped: its offset (in bytes of the stored file) and the reason."""

    file: str
    offset: int
    reason: str


def read_pages(
    path: str, *, max_bytes: int = MAX_PAGE_BYTES, verify: bool = False, digest: list[str] | None = None
) -> Iterator[PageRecord | BrokenRecord]:
    """The pages of one file, URL or stdin (`-`). With `verify`, records with a wrong digest are broken.

    The digest of the data that were read is appended to `digest`, since for a stream it cannot be computed later.
    """
    with open_raw(path) as raw:
        source = _HashedStream(raw)
        stream: io.BufferedReader[Any] = io.BufferedReader(source, HEAD)
        head = _decompressed_head(stream.peek(HEAD)[:HEAD])
        if head.startswith(b"WARC/"):
            yield from _warc(stream, path, max_bytes, verify)
        elif head.startswith(b"filedesc:"):
            yield from _arc(stream, path, max_bytes)
        else:
            yield from _single(stream, path, max_bytes)
        if digest is not None:
            while stream.read(1 << 20):
                pass  # data that the reader skipped as too long or damaged
            digest.append("xxh3:" + source.digest.hexdigest())


class _HashedStream(io.RawIOBase):
    """A raw stream for BufferedReader over any stream that `open_raw` returns; it hashes what is read."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self.digest = xxhash.xxh3_128()
        self._position = self._hashed = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return bool(getattr(self._raw, "seekable", lambda: False)())

    def seek(self, offset: int, whence: int = 0) -> int:
        self._position = self._raw.seek(offset, whence)
        return self._position

    def tell(self) -> int:
        return self._raw.tell()

    def readinto(self, buffer: Any) -> int:
        data = self._raw.read(len(buffer))
        buffer[: len(data)] = data
        self.digest.update(data[max(0, self._hashed - self._position) :])  # each byte once, even if read again
        self._position += len(data)
        self._hashed = max(self._hashed, self._position)
        return len(data)


def _decompressed_head(head: bytes) -> bytes:
    """The beginning of the data compressed in `head`, or `head` itself if it is not compressed."""
    try:
        if head.startswith(b"\x1f\x8b"):
            return zlib.decompressobj(31).decompress(head, HEAD)
        if head.startswith(ZSTD_MAGIC):
            import zstandard

            return zstandard.ZstdDecompressor().stream_reader(head).read(64)
    except Exception:  # the reader of the whole file will report the problem
        return head
    return head


# ---- WARC


def _warc(
    stream: io.BufferedReader[Any], path: str, max_bytes: int, verify: bool
) -> Iterator[PageRecord | BrokenRecord]:
    """Records of a WARC or WET file. After a broken record, reading resumes where the next one seems to begin."""
    from fastwarc.warc import ArchiveIterator, WarcRecordType, any_type

    page_types = WarcRecordType.response | WarcRecordType.resource | WarcRecordType.conversion
    damaged = WarcRecordType.unknown | WarcRecordType.no_type
    name, start = display_name(path), 0
    while True:
        record_start = start
        try:
            for record in ArchiveIterator(stream, record_types=any_type, parse_http=False, fsspec_args=False):
                record_start = start + record.stream_pos
                if record.record_type & damaged:
                    yield BrokenRecord(name, record_start, "its head is damaged")
                elif record.record_type & page_types:
                    yield _page(record, name, record_start, max_bytes, verify)
            return
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno:
                raise LlmkitError(f"{name}: {error.strerror}", "check the disk") from error
            yield BrokenRecord(name, record_start, f"no readable record follows this one ({_first_line(error)})")
        if not stream.seekable():
            raise LlmkitError(
                f"{name}: the stream is damaged after offset {record_start:,}",
                "name the file instead: reading then continues after the damage",
            )
        next_start = _next_record(stream, record_start + 1)
        if next_start is None:
            return
        start = next_start
        stream.seek(start)


def _next_record(stream: io.BufferedReader[Any], offset: int) -> int | None:
    """Offset of the next gzip or zstd member, or plain text, that begins a WARC record, from `offset` on; or None."""
    stream.seek(offset)
    before, position = b"", offset
    while block := stream.read(1 << 20):
        data, base = before + block, position - len(before)
        for match in re.finditer(
            rb"\x1f\x8b\x08|\x28\xb5\x2f\xfd|WARC/1\.",
            data[: max(0, len(data) - HEAD)] if len(block) == 1 << 20 else data,
        ):
            if _decompressed_head(data[match.start() : match.start() + HEAD]).startswith(b"WARC/"):
                return base + match.start()
        before, position = data[-HEAD:], position + len(block)
    return None


def _page(record: Any, name: str, offset: int, max_bytes: int, verify: bool) -> PageRecord | BrokenRecord:
    """The page in a FastWARC record."""
    from fastwarc.warc import has_block_digest

    if record.content_length > max_bytes:
        return BrokenRecord(name, offset, f"longer than {max_bytes:,} bytes")
    try:
        content = record.reader.read()
        if len(content) != record.content_length:
            return BrokenRecord(name, offset, f"truncated: {len(content):,} of {record.content_length:,} bytes")
        record.set_bytes_content(content)
        if verify and has_block_digest(record) and not record.verify_block_digest():
            return BrokenRecord(name, offset, "its digest is not that of its content")
        url = _clean(record.headers.get("WARC-Target-URI", "")).strip("<> ")
        page = PageRecord(
            id=record.record_id.removeprefix("<").removesuffix(">").removeprefix("urn:uuid:")
            or f"{base_name(name)}#{offset}",
            content=b"",
            url=url,
            date=_clean(record.headers.get("WARC-Date", "")),
            language=_clean(record.headers.get("WARC-Identified-Content-Language", "")).partition(",")[0],
        )
        kind = record.headers.get("Content-Type", "") or ""
        if "conversion" in str(record.record_type):
            page.is_text = True
        if record.is_http and "application/http" in kind:
            record.parse_http(auto_decode="all")
            page.status = _status(record.http_headers.status_line if record.http_headers else "")
            page.headers = {key.lower(): _clean(value) for key, value in record.http_headers or ()}
            kind = page.headers.get("content-type", "")
        page.content_type, page.charset = _media_type(kind)
        page.content = record.reader.read(max_bytes + 1)
    except (OSError, ValueError, UnicodeError) as error:
        return BrokenRecord(name, offset, _first_line(error))
    if len(page.content) > max_bytes:
        return BrokenRecord(name, offset, f"longer than {max_bytes:,} bytes once it is decompressed")
    return page


def _status(line: str) -> int:
    match = re.match(r"(?:HTTP/[\d.]+\s+)?(\d{3})\b", line or "")
    return int(match[1]) if match else 200


def _media_type(value: str) -> tuple[str, str]:
    """`text/html; charset=utf-8` -> ("text/html", "utf-8")."""
    kind, _, parameters = value.partition(";")
    match = re.search(r"charset\s*=\s*[\"']?([\w.:-]+)", parameters, re.IGNORECASE)
    return kind.strip().lower(), match[1].lower() if match else ""


def _clean(text: str) -> str:
    """Header text that can be written as JSON."""
    return text.encode("utf-8", "replace").decode("utf-8", "replace").replace("\x00", "").strip()


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


# ---- ARC, the format before WARC


def _arc(stream: io.BufferedReader[Any], path: str, max_bytes: int) -> Iterator[PageRecord | BrokenRecord]:
    """Records of an ARC file: a line `URL IP date type length`, then that many bytes.

    Versions 1 and 2 differ in the first record only.
    """
    name, offset = display_name(path), 0
    source: Any = gzip.GzipFile(fileobj=stream) if stream.peek(2)[:2] == b"\x1f\x8b" else stream
    try:
        while line := source.readline(HEAD):
            offset += len(line)
            if not line.strip():
                continue
            match = ARC_LINE.match(line)
            if match is None:
                yield BrokenRecord(name, offset - len(line), "not the head of an ARC record")
                return
            length = int(match[5])
            content = source.read(min(length, max_bytes))
            remaining = length - len(content)
            while remaining > 0 and (skipped := source.read(min(remaining, 1 << 20))):
                remaining -= len(skipped)
            offset += length - remaining
            if remaining:
                yield BrokenRecord(name, offset, "truncated: the file ends in a record")
                return
            if match[1].startswith(b"filedesc:"):
                continue
            if length > max_bytes:
                yield BrokenRecord(name, offset, f"longer than {max_bytes:,} bytes")
            else:
                yield _arc_page(match, content, f"{base_name(name)}#{offset - length}")
    except (OSError, EOFError, zlib.error) as error:
        yield BrokenRecord(name, offset, f"truncated or damaged ({_first_line(error)})")


def _arc_page(match: re.Match[bytes], content: bytes, name: str) -> PageRecord:
    d = match[3].decode()
    date = f"{d[:4]}-{d[4:6]}-{d[6:8]}T{d[8:10]}:{d[10:12]}:{d[12:14]}Z"
    page = PageRecord(name, content, match[1].decode("utf-8", "replace"), date)
    page.content_type, page.charset = _media_type(match[4].decode("latin-1"))
    head, blank, body = content.partition(b"\r\n\r\n")
    if content.startswith(b"HTTP/") and blank:
        lines = head.decode("latin-1").split("\r\n")
        page.status, page.content = _status(lines[0]), body
        page.headers = {
            key.strip().lower(): _clean(value)
            for key, colon, value in (line.partition(":") for line in lines[1:])
            if colon
        }
        page.content_type, page.charset = _media_type(page.headers.get("content-type", match[4].decode("latin-1")))
    return page


# ---- single files


def _single(stream: io.BufferedReader[Any], path: str, max_bytes: int) -> Iterator[PageRecord | BrokenRecord]:
    """A file that is a single page; the id is its name."""
    from llmkit.io.compression import Notes, decompress

    name, blocks, size = display_name(path), [], 0
    for block in decompress(stream, name, Notes()):
        blocks.append(block)
        size += len(block)
        if size > max_bytes:
            yield BrokenRecord(name, 0, f"longer than {max_bytes:,} bytes")
            return
    yield PageRecord("stdin" if path == STDIN else base_name(path), b"".join(blocks))

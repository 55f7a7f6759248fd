"""Pages out of web archives and files: WARC and WET (FastWARC), ARC, single HTML, PDF and text files.

    for found in read_pages("crawl.warc.gz"):
        ...                                   # a Page, or a Broken record

What a file is, its first bytes say, not its name. A broken record is yielded with its offset, and reading goes on with the next one that can be found.
Memory: one record at a time, no longer than `max_bytes`.
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
HEAD = 1 << 16  # bytes that tell what a file is
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
ARC_LINE = re.compile(rb"^(\S.*) (\S+) (\d{14}) (\S+) (\d+)\r?\n$")


@dataclass(slots=True)
class Page:
    """What one record or file holds. `headers` are those of the HTTP response, names in lower case."""

    id: str
    content: bytes
    url: str = ""
    date: str = ""  # RFC 3339
    content_type: str = ""  # without parameters; empty where nobody says
    charset: str = ""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    language: str = ""
    is_text: bool = False  # extracted before, as in WET files
    fields: dict[str, Any] = field(default_factory=dict)  # what else a row holds


@dataclass(frozen=True, slots=True)
class Broken:
    """A record that cannot be read, or is left out: where it begins (bytes, in the file as it is stored), and why."""

    file: str
    offset: int
    reason: str


def read_pages(
    path: str, *, max_bytes: int = MAX_PAGE_BYTES, verify: bool = False, digest: list[str] | None = None
) -> Iterator[Page | Broken]:
    """The pages of one file, URL or stdin (`-`). With `verify` a record whose digest is not that of its content is broken.

    `digest` takes the digest of what was read, which for a stream cannot be had later.
    """
    with open_raw(path) as raw:
        source = _Source(raw)
        stream: io.BufferedReader[Any] = io.BufferedReader(source, HEAD)
        head = _unpacked(stream.peek(HEAD)[:HEAD])
        if head.startswith(b"WARC/"):
            yield from _warc(stream, path, max_bytes, verify)
        elif head.startswith(b"filedesc:"):
            yield from _arc(stream, path, max_bytes)
        else:
            yield from _single(stream, path, max_bytes)
        if digest is not None:
            while stream.read(1 << 20):
                pass  # what a reader left because it was too long or damaged
            digest.append("xxh3:" + source.digest.hexdigest())


class _Source(io.RawIOBase):
    """A stream that BufferedReader takes, whatever `open_raw` gave."""

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
        self.digest.update(data[max(0, self._hashed - self._position) :])  # each byte once, though some are read again
        self._position += len(data)
        self._hashed = max(self._hashed, self._position)
        return len(data)


def _unpacked(head: bytes) -> bytes:
    """The beginning of what is compressed in `head`, or `head`."""
    try:
        if head.startswith(b"\x1f\x8b"):
            return zlib.decompressobj(31).decompress(head, HEAD)
        if head.startswith(ZSTD_MAGIC):
            import zstandard

            return zstandard.ZstdDecompressor().stream_reader(head).read(64)
    except Exception:  # the reader of the whole says what is wrong with it
        return head
    return head


# ---- WARC


def _warc(stream: io.BufferedReader[Any], path: str, max_bytes: int, verify: bool) -> Iterator[Page | Broken]:
    """Records of a WARC or WET file; behind a broken one, those from the next place on that looks like a record."""
    from fastwarc.warc import ArchiveIterator, WarcRecordType, any_type

    wanted = WarcRecordType.response | WarcRecordType.resource | WarcRecordType.conversion
    damaged = WarcRecordType.unknown | WarcRecordType.no_type
    name, start = display_name(path), 0
    while True:
        last = start
        try:
            for record in ArchiveIterator(stream, record_types=any_type, parse_http=False, fsspec_args=False):
                last = start + record.stream_pos
                if record.record_type & damaged:
                    yield Broken(name, last, "its head is damaged")
                elif record.record_type & wanted:
                    yield _page(record, name, last, max_bytes, verify)
            return
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno:
                raise LlmkitError(f"{name}: {error.strerror}", "check the disk") from error
            yield Broken(name, last, f"no readable record follows this one ({_first_line(error)})")
        if not stream.seekable():
            raise LlmkitError(
                f"{name}: the stream is damaged behind offset {last:,}",
                "give the file by its name: reading then goes on",
            )
        found = _next_record(stream, last + 1)
        if found is None:
            return
        start = found
        stream.seek(start)


def _next_record(stream: io.BufferedReader[Any], offset: int) -> int | None:
    """Where the next member of gzip or zstd, or the next plain record, that holds the beginning of one lies, from `offset` on."""
    stream.seek(offset)
    before, position = b"", offset
    while block := stream.read(1 << 20):
        data, base = before + block, position - len(before)
        for match in re.finditer(
            rb"\x1f\x8b\x08|\x28\xb5\x2f\xfd|WARC/1\.",
            data[: max(0, len(data) - HEAD)] if len(block) == 1 << 20 else data,
        ):
            if _unpacked(data[match.start() : match.start() + HEAD]).startswith(b"WARC/"):
                return base + match.start()
        before, position = data[-HEAD:], position + len(block)
    return None


def _page(record: Any, name: str, offset: int, max_bytes: int, verify: bool) -> Page | Broken:
    """The page in a record of FastWARC's."""
    from fastwarc.warc import has_block_digest

    if record.content_length > max_bytes:
        return Broken(name, offset, f"longer than {max_bytes:,} bytes")
    try:
        content = record.reader.read()
        if len(content) != record.content_length:
            return Broken(name, offset, f"truncated: {len(content):,} of {record.content_length:,} bytes")
        record.set_bytes_content(content)
        if verify and has_block_digest(record) and not record.verify_block_digest():
            return Broken(name, offset, "its digest is not that of its content")
        url = _clean(record.headers.get("WARC-Target-URI", "")).strip("<> ")
        page = Page(
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
        return Broken(name, offset, _first_line(error))
    if len(page.content) > max_bytes:
        return Broken(name, offset, f"longer than {max_bytes:,} bytes once it is decompressed")
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
    """Header text that JSON can hold."""
    return text.encode("utf-8", "replace").decode("utf-8", "replace").replace("\x00", "").strip()


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


# ---- ARC, the format before WARC


def _arc(stream: io.BufferedReader[Any], path: str, max_bytes: int) -> Iterator[Page | Broken]:
    """Records of an ARC file: a line `URL IP date type length`, then so many bytes; version 1 and 2 differ in the first record alone."""
    name, offset = display_name(path), 0
    source: Any = gzip.GzipFile(fileobj=stream) if stream.peek(2)[:2] == b"\x1f\x8b" else stream
    try:
        while line := source.readline(HEAD):
            offset += len(line)
            if not line.strip():
                continue
            match = ARC_LINE.match(line)
            if match is None:
                yield Broken(name, offset - len(line), "not the head of an ARC record")
                return
            length = int(match[5])
            content = source.read(min(length, max_bytes))
            rest = length - len(content)
            while rest > 0 and (skipped := source.read(min(rest, 1 << 20))):
                rest -= len(skipped)
            offset += length - rest
            if rest:
                yield Broken(name, offset, "truncated: the file ends in a record")
                return
            if match[1].startswith(b"filedesc:"):
                continue
            if length > max_bytes:
                yield Broken(name, offset, f"longer than {max_bytes:,} bytes")
            else:
                yield _arc_page(match, content, f"{base_name(name)}#{offset - length}")
    except (OSError, EOFError, zlib.error) as error:
        yield Broken(name, offset, f"truncated or damaged ({_first_line(error)})")


def _arc_page(match: re.Match[bytes], content: bytes, name: str) -> Page:
    d = match[3].decode()
    date = f"{d[:4]}-{d[4:6]}-{d[6:8]}T{d[8:10]}:{d[10:12]}:{d[12:14]}Z"
    page = Page(name, content, match[1].decode("utf-8", "replace"), date)
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


def _single(stream: io.BufferedReader[Any], path: str, max_bytes: int) -> Iterator[Page | Broken]:
    """A file that is one page; its name is the id."""
    from llmkit.io.compression import Notes, decompress

    name, blocks, size = display_name(path), [], 0
    for block in decompress(stream, name, Notes()):
        blocks.append(block)
        size += len(block)
        if size > max_bytes:
            yield Broken(name, 0, f"longer than {max_bytes:,} bytes")
            return
    yield Page("stdin" if path == STDIN else base_name(path), b"".join(blocks))

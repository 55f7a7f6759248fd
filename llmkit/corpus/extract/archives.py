"""Reading pages from web archives and files: WARC, WET and ARC, single HTML, PDF and text files.

    for record in read_pages("crawl.warc.gz"):
        ...  # a PageRecord or a BrokenRecord

The first bytes of a file determine its format, not its name. A broken record is yielded with its offset and size, and
reading continues with the next one that can be found (records.py). Memory: one record of at most `max_bytes`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, BinaryIO

import xxhash

from llmkit.corpus.extract.file_formats import (
    HEAD,
    beginnings,
    is_archive,
    is_html,
    refuse_binary,
    refuse_other_formats,
)
from llmkit.corpus.extract.http_response import ContentError, is_readable, parse_response
from llmkit.corpus.extract.records import CUT, PAGES, Fault, Record, read_records
from llmkit.corpus.extract.segments import join_segments
from llmkit.corpus.extract.stored import Stored
from llmkit.errors import LlmkitError
from llmkit.io.compression import Notes, decompress, refuse_empty
from llmkit.io.inputs import STDIN, display_name, open_raw
from llmkit.io.record import base_name

MAX_PAGE_BYTES = 16 << 20
OTHER_KINDS = frozenset(("warcinfo", "request", "metadata", "revisit", "continuation"))
UNKNOWN_TYPES = frozenset(("no-type", "unknown", "unknown/unknown", "application/unknown"))  # as crawlers write them


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
    is_text: bool = False  # plain text, or text extracted earlier, as in WET files
    skip: str = ""  # why there is no document in it
    truncated: str = ""  # why the content is cut: a value of WARC-Truncated, or "segmented"
    fields: dict[str, Any] = field(default_factory=dict)  # other fields of a JSON row


@dataclass(frozen=True, slots=True)
class BrokenRecord:
    """A record that cannot be read or is skipped: its offset in the stored file, the reason, and its size, in bytes.

    In the middle of a compressed member, the offset is that of the member, and the size that of the decompressed bytes.
    """

    file: str
    offset: int
    reason: str
    size: int = 0


def read_pages(
    path: str,
    *,
    max_bytes: int = MAX_PAGE_BYTES,
    verify: bool = False,
    digest: list[str] | None = None,
    allow_empty: bool = True,
) -> Iterator[PageRecord | BrokenRecord]:
    """The pages of one file, URL or stdin (`-`). With `verify`, records with a wrong digest are broken.

    The digest of the data that were read is appended to `digest`, since for a stream it cannot be computed later.
    Raises LlmkitError for a format that cannot be read and, unless `allow_empty`, for an archive without any page.
    """
    name = display_name(path)
    with open_raw(path) as raw:
        source = _HashedStream(raw)
        stored = Stored(source, name)
        head = stored.peek(HEAD)
        if not head:
            refuse_empty(name)
        runs = beginnings(head)
        refuse_other_formats(runs[0] or head, name)
        if is_archive(runs, head, name):
            yield from _archive(stored, name, max_bytes, verify, allow_empty)
        else:
            yield from _single(stored, path, max_bytes)
        if digest is not None:
            source.drain()
            digest.append("xxh3:" + source.digest.hexdigest())


class _HashedStream:
    """The bytes of a raw stream, in order and once; it hashes them."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self.digest = xxhash.xxh3_128()

    def read(self, size: int) -> bytes:
        data = self._raw.read(size)
        self.digest.update(data)
        return data

    def drain(self) -> None:
        """Read what no reader needed."""
        while self.read(1 << 20):
            pass


# ---- archives


def _archive(
    stored: Stored, name: str, max_bytes: int, verify: bool, allow_empty: bool
) -> Iterator[PageRecord | BrokenRecord]:
    kinds: Counter[str] = Counter()
    first, pages = "", 0
    for record in join_segments(read_records(stored, max_bytes), max_bytes):
        if isinstance(record, Fault):
            result: PageRecord | BrokenRecord = BrokenRecord(name, record.offset, record.reason, record.size)
        elif record.head.kind in PAGES:
            result = _page(record, name, max_bytes, verify)
        else:
            kinds[record.head.kind] += 1
            if record.head.kind not in OTHER_KINDS:  # perhaps a page whose type is damaged
                page = _page(record, name, max_bytes, verify=False)
                yield replace(page, skip="unknown type of record") if isinstance(page, PageRecord) else page
            continue
        if isinstance(result, PageRecord):
            pages += 1
        elif not first:
            first = f" (offset {result.offset:,}: {result.reason})"
        yield result
    if not pages and not allow_empty:
        others = ", ".join(f"{count:,} {kind}" for kind, count in kinds.items())
        raise LlmkitError(
            f"{name}: no page could be read from this archive{first}{f'; other records: {others}' if others else ''}",
            "--allow-empty accepts archives without pages",
        )


def _page(record: Record, name: str, max_bytes: int, verify: bool) -> PageRecord | BrokenRecord:
    """The page in a record. Whatever goes wrong is the record's fault."""
    try:
        if verify and record.digest_is_wrong():
            raise ContentError("its digest is not that of its content")
        return _read_page(record, name, max_bytes)
    except ContentError as error:
        reason = str(error)
    except MemoryError:
        raise
    except Exception as error:
        reason = f"cannot be read ({type(error).__name__}: {(str(error).splitlines() or [''])[0]})"
    return BrokenRecord(name, record.offset, reason, record.size)


def _read_page(record: Record, name: str, max_bytes: int) -> PageRecord:
    head, place = record.head, record.place
    if head.is_arc:
        page_id = f"{base_name(name)}#{place.position + head.size}"
    else:
        inner = f"+{place.inner}" if place.inner else ""
        page_id = _clean(head.fields.get("warc-record-id", "")).removeprefix("<").removesuffix(">")
        page_id = page_id.removeprefix("urn:uuid:") or f"{base_name(name)}#{place.member}{inner}"
    declared = head.fields.get("content-type", "")
    page = PageRecord(
        page_id,
        record.block,
        url=_clean(head.fields.get("warc-target-uri", "")).strip("<> "),
        date=_clean(head.fields.get("warc-date", "")),
        language=_clean(head.fields.get("warc-identified-content-language", "")).partition(",")[0],
        is_text=head.kind == "conversion",
        truncated=_clean(head.fields.get("warc-truncated", "")),
    )
    if head.is_arc or head.kind == "response" or "application/http" in declared:
        response = parse_response(record.block, max_bytes)
        if response is not None:
            page.status, page.content, page.headers = response.status, response.body, response.headers
            page.truncated = page.truncated or CUT * response.is_cut
            declared = response.headers.get("content-type", declared if head.is_arc else "")
    page.content_type, page.charset = _media_type(declared)
    if page.content_type in UNKNOWN_TYPES:
        is_plain = is_readable(page.content) and not is_html(page.content, "")
        page.content_type = "text/plain" if is_plain else ""
    return page


def _media_type(value: str) -> tuple[str, str]:
    """`text/html; charset=utf-8` -> ("text/html", "utf-8")."""
    kind, _, parameters = value.partition(";")
    match = re.search(r"charset\s*=\s*[\"']?([\w.:-]+)", parameters, re.IGNORECASE)
    return kind.strip().lower(), match[1].lower() if match else ""


def _clean(text: str) -> str:
    """Header text without NUL."""
    return text.replace("\x00", "").strip()


# ---- single files


def _single(stored: Stored, path: str, max_bytes: int) -> Iterator[PageRecord | BrokenRecord]:
    """A file that is a single page or text; the id is its name."""
    name, blocks, size = display_name(path), [], 0
    for block in decompress(stored, name, Notes()):  # type: ignore[arg-type]
        blocks.append(block)
        size += len(block)
        if size > max_bytes:
            yield BrokenRecord(name, 0, f"longer than {max_bytes:,} bytes", size)
            return
    content = b"".join(blocks)
    refuse_binary(content, name)
    is_text = not content.startswith(b"%PDF-") and not is_html(content, name)
    yield PageRecord("stdin" if path == STDIN else base_name(path), content, is_text=is_text)

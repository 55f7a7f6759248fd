"""Records of archives for tests, and what is read of them."""

from __future__ import annotations

from pathlib import Path

from llmkit.corpus.extract.archives import BrokenRecord, PageRecord, read_pages

WORDS = "Plain words of page {0}, enough of them to count as text. " * 6


def body(i: int) -> bytes:
    return f"<html><body><p>{WORDS.format(i)}</p></body></html>".encode()


def warc(i: int, content: bytes | None = None, headers: str = "", kind: str = "response", end: str = "\r\n") -> bytes:
    """One WARC record."""
    lines = ["HTTP/1.1 200 OK", "Content-Type: text/html", *([headers] if headers else []), "", ""]
    block = end.join(lines).encode() + (body(i) if content is None else content)
    head = [
        "WARC/1.0",
        f"WARC-Type: {kind}",
        f"WARC-Target-URI: http://e.org/{i}",
        f"WARC-Record-ID: <urn:uuid:{i}>",
        "Content-Type: application/http; msgtype=response",
        f"Content-Length: {len(block)}",
        "",
        "",
    ]
    return end.join(head).encode() + block + (end * 2).encode()


def arc(i: int, content: bytes | None = None, headers: str = "") -> bytes:
    """One ARC record."""
    block = f"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n{headers}\r\n".encode()
    block += body(i) if content is None else content
    return f"http://e.org/{i} 1.2.3.4 20200101000000 text/html {len(block)}\n".encode() + block + b"\n"


def read(data: bytes, tmp_path: Path, name: str = "a.warc") -> tuple[list[str], list[BrokenRecord]]:
    """The last parts of the URLs of the pages, and the broken records."""
    (tmp_path / name).write_bytes(data)
    found = list(read_pages(str(tmp_path / name)))
    pages = [page.url.rpartition("/")[2] for page in found if isinstance(page, PageRecord) and not page.skip]
    return pages, [record for record in found if isinstance(record, BrokenRecord)]


def others(count: int, *missing: int) -> list[str]:
    return [str(i) for i in range(count) if i not in missing]


def chunked(data: bytes) -> bytes:
    return b"%x;name=value\r\n%s\r\n0\r\n\r\n" % (len(data), data)

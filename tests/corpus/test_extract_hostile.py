"""Archives that are damaged or crafted so that a reader repeats, loses or is slowed down."""

from __future__ import annotations

import bz2
import gzip
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from archive_records import arc, body, others, read, warc
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.corpus.extract import http_response
from llmkit.corpus.extract.archives import BrokenRecord, PageRecord, read_pages
from llmkit.corpus.extract.engines import ENGINES, document_of
from llmkit.errors import LlmkitError
from llmkit.io.compression import StoredFrame


def gzip_stored(data: bytes) -> bytes:
    return gzip.compress(data, 0, mtime=0)


def zstd_stored(data: bytes) -> bytes:
    frame = StoredFrame()
    return frame.compress(data) + frame.flush()


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0xA5]) + data[at + 1 :]


STORED = {"gzip": gzip_stored, "zstd": zstd_stored}


@pytest.mark.parametrize("pack", STORED)
@pytest.mark.parametrize("damage", ["content", "checksum", "truncated", "length"])
@pytest.mark.parametrize("many", [1, 3])
def test_stored_members_are_read_once(tmp_path: Path, pack: str, damage: str, many: int) -> None:
    """Behaviour: no record of a damaged member that is stored uncompressed is found again as plain text."""
    data = b"".join(warc(i) for i in range(1, 1 + many))
    member = STORED[pack](data)
    at = {"content": -40, "checksum": -6 if pack == "gzip" else -2, "length": 11 if pack == "gzip" else 7}
    member = member[:-300] if damage == "truncated" else flipped(member, at[damage] % len(member))
    for after in (b"", gzip.compress(warc(7)) + zstandard.compress(warc(8))):
        pages, broken = read(gzip.compress(warc(0)) + member + after, tmp_path)
        assert len(set(pages)) == len(pages) and pages[0] == "0" and set(pages) <= set("012378")
        assert ("8" in pages) == (after != b"")
        assert broken and all(0 <= record.size <= len(data) + len(member) for record in broken)
        if damage in ("content", "checksum"):
            assert pages[1:many] == [str(i) for i in range(1, many)] and str(many) not in pages
            assert [record.offset for record in broken] == [len(gzip.compress(warc(0)))]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_nothing_is_read_twice(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Property: whatever is done to members that are stored uncompressed, the others are found, each page once, and
    no number of bytes is negative or larger than the archive.
    """
    pack = STORED[data.draw(st.sampled_from(list(STORED)))]
    records = [pack(warc(i)) for i in range(6)]
    touched = data.draw(st.integers(0, 5))
    one = records[touched]
    start = data.draw(st.integers(0, len(one) - 1))
    end = data.draw(st.integers(start + 1, len(one)))
    junk = random.Random(start * 7919 + end).randbytes(data.draw(st.sampled_from([0, 1, end - start])))
    records[touched] = one[:start] + junk + one[end:]
    archive = b"".join(records)
    pages, broken = read(archive, tmp_path_factory.mktemp("stored"))
    assert len(pages) == len(set(pages)) and [page for page in pages if page in others(6, touched)] == others(
        6, touched
    )
    assert all(0 <= record.size <= len(archive) for record in broken)


def test_members_behind_damage(tmp_path: Path) -> None:
    """Behaviour: an intact member is found whose first block is longer than what is tried: bzip2, raw zstd."""
    noise = random.Random(1).randbytes(150_000).hex().encode()
    for pack in (bz2.compress, zstd_stored, zstandard.compress):
        for large in (warc(1, noise), warc(1, random.Random(2).randbytes(200_000), "Content-Type: image/png")):
            pages, _ = read(pack(warc(0)) + b"junk" + pack(large) + pack(warc(2)), tmp_path)
            assert pages == others(3)


def test_members_that_a_neighbour_swallowed(tmp_path: Path) -> None:
    """Behaviour: bytes that are missing in one record or member cost none of the compressed ones behind it."""
    noise = warc(0, random.Random(1).randbytes(60_000))
    for pack in (gzip.compress, zstandard.compress, bz2.compress, zstd_stored):
        for first in (warc(0), zstandard.compress(noise), gzip_stored(noise), zstd_stored(noise)):
            shorter = first[:300] + first[310:] if len(first) < 1000 else first[:9000] + first[9002:]
            pages, _ = read(shorter + b"".join(pack(warc(i)) for i in range(1, 4)), tmp_path)
            assert pages[-3:] == ["1", "2", "3"] and len(pages) <= 4
    pages, _ = read(
        warc(0) + b"junk" * 9 + gzip.compress(warc(1)) + b"junk" + warc(2) + zstandard.compress(warc(3)), tmp_path
    )
    assert pages == others(4)
    assert read(arc(0) + b"junk\rof \0 bytes" + arc(1) + arc(2), tmp_path, "a.arc")[0] == others(3)


NESTED_TAIL = b"\r\n\r\n</pre>" + b"x y z " * 20_000


@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstd_stored])
@pytest.mark.parametrize("quoted", [warc(8), warc(8) + warc(9), b"\r\n\r\n" + warc(8) * 300])
@pytest.mark.parametrize("headers", ["X-A: b", "Content-Length: {}"])
def test_oversize_records(tmp_path: Path, pack: Callable[[bytes], bytes], quoted: bytes, headers: str) -> None:
    """Behaviour: a record over the limit is one fault, whatever it quotes; its size is that of the whole record."""
    content = b"<pre>\r\n" + quoted + NESTED_TAIL
    parts = [pack(record) for record in (warc(0), warc(1, content, headers.format(len(content))), warc(2))]
    (tmp_path / "a").write_bytes(b"".join(parts))
    first, broken, last = read_pages(str(tmp_path / "a"), max_bytes=50_000)
    assert isinstance(first, PageRecord) and isinstance(last, PageRecord) and last.url == "http://e.org/2"
    assert broken == BrokenRecord(str(tmp_path / "a"), len(parts[0]), "longer than 50,000 bytes", len(parts[1]))


def test_oversize_record_far_longer_than_the_limit(tmp_path: Path) -> None:
    """Behaviour: the quoted record is skipped also where the end is out of reach, and a wrong length is noticed."""
    content = b"<pre>\r\n" + warc(8) + b"</pre>" + b"x y z " * 500_000
    (tmp_path / "a").write_bytes(warc(0) + warc(1, content) + warc(2))
    _, broken, last = read_pages(str(tmp_path / "a"), max_bytes=50_000)
    assert isinstance(broken, BrokenRecord) and "longer than" in broken.reason and isinstance(last, PageRecord)
    wrong = warc(1).replace(b"Content-Length: ", b"Content-Length: 9999")
    (tmp_path / "b").write_bytes(warc(0) + wrong + warc(2) + warc(3) + warc(4, content))
    found = list(read_pages(str(tmp_path / "b"), max_bytes=50_000))
    assert [page.url[-1] for page in found if isinstance(page, PageRecord)] == ["0", "2", "3"]


def gzip_heads(count: int) -> bytes:
    return gzip.compress(warc(0)) + b"zz" + b"\x1f\x8b\x08\x08" * count + gzip.compress(warc(1))


def bzip2_heads(count: int) -> bytes:
    return gzip.compress(warc(0)) + b"zz" + b"BZh91AY&SY" * count + gzip.compress(warc(1))


def nested_chunks(count: int) -> bytes:
    content, sizes = body(2), []
    size = len(content)
    for _ in range(count):
        sizes.append(b"%x\r\n" % size)
        size += len(sizes[-1])
    content = b"".join(reversed(sizes)) + content
    return warc(0) + warc(2, content, "Transfer-Encoding: " + "chunked," * count) + warc(1)


def arc_lines(count: int) -> bytes:
    return warc(0) + b"junk\n" + (b"http:x " * 1100 + b"123456789012 " * 14 + b" 1\n") * count + warc(1)


HUGE = b"WARC/1.0\r\nWARC-Type: response\r\nContent-Length: 2000003\r\n\r\n"
DIGEST = HUGE[:-2] + b"WARC-Block-Digest: sha1:3I42H3S6NNFQ2MSVX7XZKYAYSCX5QBYJ\r\n\r\n"
FILL = b"x" * 2_100_000  # so that the records are complete
CRAFTED: dict[str, tuple[Callable[[int], bytes], int]] = {
    "heads without a blank line": (lambda n: warc(0) + b"WARC/1.0\nA:\n" * n + b"\n" + warc(1), 15_000),
    "heads of long records": (lambda n: warc(0) + HUGE * n + FILL + warc(1), 4_000),
    "heads with digests": (lambda n: warc(0) + DIGEST * n + FILL + warc(1), 2_000),
    "lines like heads": (arc_lines, 40),
    "gzip heads": (gzip_heads, 20_000),
    "bzip2 heads": (bzip2_heads, 30_000),
    "gzip members in a body": (
        lambda n: warc(0) + warc(2, gzip.compress(b"x", mtime=0) * n, "Content-Encoding: gzip") + warc(1),
        40_000,
    ),
    "codings": (nested_chunks, 50_000),
}


@pytest.mark.parametrize("name", CRAFTED)
def test_time_is_linear(tmp_path: Path, name: str) -> None:
    """Behaviour: what is hard to read takes at most seconds, and twice as much of it no more than three times as long.

    The limits are far from what was measured: below a second, where the first readers took between ten and thousands.
    """
    make, count = CRAFTED[name]

    def is_linear() -> bool:
        taken = []
        for size in (count, 2 * count):
            data = make(size)
            start = time.process_time()
            pages, _ = read(data, tmp_path)
            taken.append(time.process_time() - start)
            assert (pages[0], pages[-1]) == ("0", "1")
        return taken[1] < max(3 * taken[0], 1.0) and taken[1] < 5.0

    assert any(is_linear() for _ in range(3))  # a busy machine slows one reading or the other


@pytest.mark.parametrize("kind", ["chunked", "gzip", "zstd", "headers"])
def test_a_response_has_a_limit_of_pieces(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Behaviour: more chunks, members, frames or bytes of headers than any server sends are a fault of their record."""
    monkeypatch.setattr(http_response, "MAX_CHUNKS", 100)
    monkeypatch.setattr(http_response, "MAX_MEMBERS", 100)
    monkeypatch.setattr(http_response, "MAX_HEAD", 100)
    piece = {
        "chunked": b"1\r\nx\r\n",
        "gzip": gzip.compress(b"x"),
        "zstd": zstandard.compress(b"x"),
        "headers": b"a:\n",
    }
    if kind == "headers":
        with pytest.raises(http_response.ContentError, match="headers are longer than 100 bytes"):
            http_response.parse_response(b"HTTP/1.1 200 OK\r\n" + piece[kind] * 100 + b"\n\nx", 1000)
        return
    assert http_response.decode_body(piece[kind] * 100, kind, 1000).data == b"x" * 100
    with pytest.raises(http_response.ContentError, match="more than 100 pieces"):
        http_response.decode_body(piece[kind] * 101, kind, 1000)


def test_a_chunk_is_not_looked_into(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behaviour: whether a body is text is asked once at most, not for each of its chunks, of which there may be many."""
    asked: list[int] = []
    monkeypatch.setattr(http_response, "is_readable", lambda data: asked.append(len(data)) or True)
    content = http_response.decode_body(b"1\r\nx\r\n" * 1000 + b"0\r\n\r\n", "chunked", 1 << 20)
    assert content.data == b"x" * 1000 and len(asked) <= 1


def test_lines_like_heads_in_texts(tmp_path: Path) -> None:
    """Behaviour: pages and texts are recognised in no time too."""
    start = time.process_time()
    for name, content in (("a.html", b"<html><body>" + b"http:x " * 9000), ("a", b"a:" + b" a 123456789012" * 4300)):
        assert read(content + b"\n", tmp_path, name)[1] == []
    assert time.process_time() - start < 2.0


TEXTS = {
    "format": "WARC/1.0 is a format.\n\nIts records have a head.\n",
    "version": "WARC/1.0\n\nThis is what a record begins with.\n",
    "fields": "WARC/1.0\nsee: below\nand: above\n\nNo field of a record is here.\n",
    "order": "Order: item 202401010000 was shipped in box 5\nThis is a text.\n",
    "address": "http://e.org/ at home 202401010000 is text 500\nThis is a text.\n",
}


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("suffix", ["", ".txt", ".txt.gz"])
def test_texts_that_begin_like_archives(tmp_path: Path, name: str, suffix: str) -> None:
    """Behaviour: only a complete head makes an archive; without it, the file is the text that it is."""
    data = TEXTS[name].encode()
    (tmp_path / f"a{suffix}").write_bytes(gzip.compress(data) if suffix.endswith("gz") else data)
    (page,) = read_pages(str(tmp_path / f"a{suffix}"))
    assert isinstance(page, PageRecord) and page.content == data and page.is_text


def test_archives_whose_first_head_is_cut(tmp_path: Path) -> None:
    """Behaviour: an archive that ends in its first head is an archive without pages."""
    (tmp_path / "a").write_bytes(warc(0)[:60])
    with pytest.raises(LlmkitError, match="no page"):
        list(read_pages(str(tmp_path / "a"), allow_empty=False))


@pytest.mark.parametrize(
    "text", ["    indented\nsecond\x0c\n  third\n\n", "\n\nlines\r\n", "nul \0 in it\n" * 200, "\tx"]
)
def test_plain_text_keeps_its_bytes(tmp_path: Path, text: str) -> None:
    """Behaviour: white space at the beginning and end stays, in files, WET records and responses."""
    (tmp_path / "a.txt").write_text(text, newline="")
    response = warc(1, text.encode(), "Content-Type: text/plain")
    wet = b"WARC/1.0\r\nWARC-Type: conversion\r\nContent-Length: %d\r\n\r\n%s\r\n\r\n" % (len(text), text.encode())
    (tmp_path / "a.warc").write_bytes(response + wet)
    if "\0" in text:
        (tmp_path / "a.txt").write_text("no NUL in the first bytes\n" * 50 + text, newline="")
    for name in ("a.txt", "a.warc"):
        for page in read_pages(str(tmp_path / name)):
            assert isinstance(page, PageRecord)
            assert document_of(page, ENGINES["resiliparse"])["text"] == page.content.decode()
            assert page.content.endswith(text.encode())


def segment(number: int, content: bytes, extra: str = "", origin: str = "urn:uuid:1", kind: str = "") -> bytes:
    fields = [f"WARC-Type: {kind or ('response' if number == 1 else 'continuation')}", f"WARC-Segment-Number: {number}"]
    fields += ["WARC-Record-ID: <urn:uuid:1>", "WARC-Target-URI: http://e.org/1"] if number == 1 else []
    fields += [] if number == 1 else [f"WARC-Segment-Origin-ID: <{origin}>"]
    fields += [extra] if extra else []
    head = "\r\n".join(["WARC/1.0", *fields, f"Content-Length: {len(content)}", "", ""])
    return head.encode() + content + b"\r\n\r\n"


WHOLE = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n" + body(1)


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_segments_are_joined(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    """Behaviour: the segments of a record in one archive become one page, also with other records between them."""
    total = f"WARC-Segment-Total-Length: {len(WHOLE)}"
    parts = [segment(1, WHOLE[:150]), warc(9, b"GET / HTTP/1.0", kind="request"), segment(2, WHOLE[150:300])]
    parts.append(segment(3, WHOLE[300:], total))
    (tmp_path / "a").write_bytes(b"".join(map(pack, [warc(0), *parts, warc(2)])))
    found = list(read_pages(str(tmp_path / "a")))
    assert [page.content for page in found if isinstance(page, PageRecord)] == [body(0), body(1), body(2)]
    assert [getattr(page, "truncated", None) for page in found] == ["", "", ""]


def test_segments_that_are_missing(tmp_path: Path) -> None:
    """Behaviour: a page without its continuations is marked as cut; a continuation without its beginning is a fault."""
    orphan = segment(2, b"x" * 50, origin="urn:uuid:7")
    truncated = warc(2).replace(b"WARC-Target", b"WARC-Truncated: length\r\nWARC-Target")
    (tmp_path / "a").write_bytes(segment(1, WHOLE[:300]) + orphan + truncated + segment(1, WHOLE))
    found = list(read_pages(str(tmp_path / "a")))
    kinds = [getattr(page, "truncated", "fault") for page in found]
    assert sorted(kinds) == ["fault", "length", "segmented", "segmented"]
    (fault,) = (page for page in found if isinstance(page, BrokenRecord))
    assert "segment" in fault.reason and fault.size == len(orphan)
    rows = [document_of(page, ENGINES["plain"]) for page in found if isinstance(page, PageRecord)]
    assert sorted(row["truncated"] for row in rows) == ["length", "segmented", "segmented"]
    (tmp_path / "a").write_bytes(segment(1, WHOLE[:300]) + segment(2, WHOLE[300:], "WARC-Segment-Total-Length: 1"))
    (fault,) = read_pages(str(tmp_path / "a"), max_bytes=310)
    assert isinstance(fault, BrokenRecord) and "with its segments" in fault.reason


def test_types_that_are_unknown(tmp_path: Path) -> None:
    """Behaviour: pages of an ARC without a type are sniffed: HTML, text, or neither."""
    contents = (body(0), b"Line one\n  line two\n", b"\x89PNG\r\n\0\0")
    heads = (b"http://e.org/%d 1.2.3.4 20200101000000 no-type %d\n" % (i, len(c)) for i, c in enumerate(contents))
    (tmp_path / "a.arc").write_bytes(b"".join(head + c + b"\n" for head, c in zip(heads, contents, strict=True)))
    pages = [page for page in read_pages(str(tmp_path / "a.arc")) if isinstance(page, PageRecord)]
    assert [page.content_type for page in pages] == ["", "text/plain", ""]
    assert document_of(pages[0], ENGINES["resiliparse"])["content_type"] == "text/html"
    assert document_of(pages[1], ENGINES["resiliparse"])["text"] == contents[1].decode()


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".xz", ".bz2"])
@pytest.mark.parametrize("kind", [".warc", ".html", ".txt", ""])
def test_empty_compressed_files_are_truncated(tmp_path: Path, kind: str, suffix: str) -> None:
    """Behaviour: a file of zero bytes with the name of a compressed one is damage, with --allow-empty too."""
    (tmp_path / f"a{kind}{suffix}").write_bytes(b"")
    with pytest.raises(LlmkitError, match=r"truncated \w+ stream: the file is empty"):
        list(read_pages(str(tmp_path / f"a{kind}{suffix}"), allow_empty=True))


def test_gzip_bodies_of_several_members(tmp_path: Path) -> None:
    """Behaviour: all members of a body are decoded, also long ones, and ones that are cut short."""
    noise = random.Random(3).randbytes(90_000).hex().encode()
    for contents in ([b"a", b"", noise, b"b"], [noise, noise]):
        packed = b"".join(map(gzip.compress, contents))
        (tmp_path / "a").write_bytes(
            warc(0, packed, "Content-Encoding: gzip") + arc(1, packed, "Content-Encoding: gzip\r\n")
        )
        pages = list(read_pages(str(tmp_path / "a")))
        assert [page.content for page in pages if isinstance(page, PageRecord)] == [b"".join(contents)] * 2


def test_a_head_with_zeros_is_damaged(tmp_path: Path) -> None:
    """Behaviour: a zero-filled part from one head to the next joins no page to the address of another."""
    first, second, third = warc(1), warc(2), warc(3)
    cut = second.index(b"WARC-Target"), len(second) + third.index(b"Content-Length")
    joined = second + third
    data = first + joined[: cut[0]] + b"\0" * (cut[1] - cut[0]) + joined[cut[1] :]
    pages, faults = read(data, tmp_path)
    assert pages == ["1"] and len(faults) == 1


def test_decompression_of_beginnings_is_bounded(tmp_path: Path) -> None:
    """Behaviour: a small file of bombs behind damage is refused at once."""
    (tmp_path / "a.txt").write_bytes(b"junk\n" + bz2.compress(bytes(1 << 24)) * 60)
    begin = time.process_time()
    with pytest.raises(LlmkitError):
        list(read_pages(str(tmp_path / "a.txt")))
    assert time.process_time() - begin < 20  # decompressing all takes minutes

"""Damaged archives, odd records, bodies that do not match their headers, and files of other formats."""

from __future__ import annotations

import gzip
import io
import random
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from archive_records import arc, body, chunked, others, read, warc
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.corpus.extract import archives
from llmkit.corpus.extract.archives import BrokenRecord, PageRecord, read_pages
from llmkit.errors import LlmkitError


class Pipe(io.RawIOBase):
    """A stream that cannot seek and returns little at a time."""

    def __init__(self, data: bytes) -> None:
        self._data = io.BytesIO(data)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        return self._data.readinto(memoryview(buffer)[:1000])


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.ZstdCompressor(write_checksum=True).compress])
@pytest.mark.parametrize("piped", [False, True])
def test_damaged_members_lose_themselves_alone(
    tmp_path: Path, pack: Callable[[bytes], bytes], piped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behaviour: several damaged members among intact ones, by name and in a pipe; each is named with offset and size."""
    members = [pack(warc(i)) for i in range(60)]
    offsets = [sum(map(len, members[:i])) for i in range(60)]
    for i in (20, 25, 59):
        middle = len(members[i]) // 2
        members[i] = (
            members[i][:middle]
            + bytes(byte ^ 0xA5 for byte in members[i][middle : middle + 20])
            + members[i][middle + 20 :]
        )
    data = b"".join(members)
    if piped:
        monkeypatch.setattr(archives, "open_raw", lambda path: Pipe(data))
    pages, broken = read(data, tmp_path)
    assert pages == others(60, 20, 25, 59)
    assert [(record.offset, record.size) for record in broken] == [(offsets[i], len(members[i])) for i in (20, 25, 59)]


LENGTHS = ["1000000000000000", "99999", "900", "12", "1", "-5", "many", "", "9" * 40]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize("form", [warc, arc])
def test_wrong_lengths(
    tmp_path: Path, length: str, pack: Callable[[bytes], bytes], form: Callable[[int], bytes]
) -> None:
    """Behaviour: the records after one whose length is wrong, missing or not a number are found; bytes are counted."""
    records = [form(i) for i in range(6)]
    before, marker, after = records[2].partition(b"text/html " if form is arc else b"Content-Length: ")
    records[2] = before + marker + length.encode() + b"\n" + after.partition(b"\n")[2]
    if form is arc:
        records.insert(0, b"filedesc://a.arc 0.0.0.0 20200101000000 text/plain 9\n1 0 Live\n\n")
    pages, broken = read(b"".join(map(pack, records)), tmp_path)
    assert [page for page in pages if page != "2"] == others(6, 2)
    assert broken and all(record.size > 0 for record in broken)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_intact_record_is_lost(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Property: whatever bytes of an archive are overwritten, cut out or inserted, every untouched record is found."""
    form = data.draw(st.sampled_from([warc, arc]))
    pack = data.draw(st.sampled_from([bytes, gzip.compress, zstandard.compress]))
    lines = "" if data.draw(st.booleans()) else f"Content-Length: {len(body(0))}" + "\r\n" * (form is arc)
    records = [pack(form(i, None, lines)) for i in range(8)]
    touched = data.draw(st.integers(0, 7))
    one = records[touched]
    start = data.draw(st.integers(0, len(one) - 1))
    end = data.draw(st.integers(start + 1, len(one)))
    junk = random.Random(start * 7919 + end).randbytes(data.draw(st.sampled_from([0, end - start, 100])))
    records[touched] = one[:start] + junk + one[end:]
    pages, _ = read(b"".join(records), tmp_path_factory.mktemp("damage"), "a.warc" if form is warc else "a.arc")
    assert [page for page in pages if page in others(8, touched)] == others(8, touched)


QUOTED = {
    "one": warc(8) + b"</pre> and a tail",
    "several": warc(8) * 3 + b"</pre>",
    "at the end": warc(8),
    "of another length": warc(8).replace(b"Content-Length: ", b"Content-Length: 12") + b"</pre>",
    "without its end": warc(8)[:-200],
}


@pytest.mark.parametrize("form", [warc, arc])
@pytest.mark.parametrize("case", QUOTED)
def test_a_quotation_is_no_record(tmp_path: Path, case: str, form: Callable[..., bytes]) -> None:
    """Behaviour: a page that quotes records stays whole where the record after it is damaged, also right behind a
    quotation that ends inside the page; with bytes cut out of the page, the next record is read, not a part of it."""
    content = b"<pre>\r\n" + QUOTED[case]
    quoting = form(1, content, f"Content-Length: {len(content)}" + "\r\n" * (form is arc))
    damaged, behind = b"#" * 40 + form(2)[40:], [form(i) for i in (3, 4)]
    expected = others(5, 2)
    for first in [quoting] + [quoting.rstrip() + b"##"] * (case in ("one", "several")):
        pages, broken = read(b"".join([form(0), first, damaged, *behind]), tmp_path)
        assert pages == expected and len(broken) == 1, (first[-9:], broken)
        page = list(read_pages(str(tmp_path / "a.warc")))[1]
        assert isinstance(page, PageRecord) and page.content == content and not page.truncated
    pages, _ = read(b"".join([form(0), quoting.replace(b"<pre>", b"", 1), form(2), *behind]), tmp_path)
    assert [page for page in pages if page not in "18"] == ["0", "2", "3", "4"]


def test_cut_pages_are_marked(tmp_path: Path) -> None:
    """Behaviour: a document is marked where its record's length is too small, as if characters had been counted and not
    bytes, or where its body is shorter than the response tells; not where a coding explains the difference."""
    content = "<p>é è ê à â</p>".encode() * 20
    whole = len(warc(1, content).partition(b"\r\n\r\n")[2]) - 4
    small = warc(1, content).replace(b": %d\r\n" % whole, b": %d\r\n" % (whole - 100))
    short, packed = f"Content-Length: {len(content) + 5}", "Content-Encoding: br\r\nContent-Length: 9999"
    cases = [
        small,
        warc(2, content, short),
        warc(3, content, packed),
        warc(4, content, "Content-Length: 7²"),
        warc(5, b"", short),
    ]
    (tmp_path / "a").write_bytes(b"".join([warc(0), *cases, warc(6)]))
    found = list(read_pages(str(tmp_path / "a")))
    pages = [page for page in found if isinstance(page, PageRecord)]
    assert [page.truncated for page in pages] == ["", "unspecified", "unspecified", "", "", "", ""]
    assert [page.content == content for page in pages[1:5]] == [False, True, True, True]
    assert [record.reason for record in found if isinstance(record, BrokenRecord)] == ["not the head of a record"]


@pytest.mark.parametrize("front", [b"\r\n", b"\n\n\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\r\n"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_what_precedes_a_record(tmp_path: Path, front: bytes, pack: Callable[[bytes], bytes]) -> None:
    """Behaviour: line ends and a byte order mark before any record are passed over, whatever the name of the file."""
    assert read(b"".join(pack(front + warc(i)) for i in range(3)), tmp_path, "page") == (others(3), [])


def test_unusual_heads(tmp_path: Path) -> None:
    """Behaviour: LF line ends, folded lines, other versions, other types and missing ids are no damage."""
    folded = warc(1).replace(b"WARC-Target-URI: ", b"WARC-Target-URI:\r\n  ")
    version = warc(2).replace(b"WARC/1.0", b"WARC/0.18", 1)
    unknown = warc(9, kind="unknown") + warc(9, kind="our-own")
    anonymous = warc(3).replace(b"WARC-Record-ID: <urn:uuid:3>\r\n", b"")
    data = warc(0, end="\n") + folded + version + unknown + anonymous
    assert read(data, tmp_path) == (others(4), [])
    pages = [page for page in read_pages(str(tmp_path / "a.warc")) if isinstance(page, PageRecord)]
    assert [page.skip for page in pages] == ["", "", "", "unknown type of record", "unknown type of record", ""]
    ids = [
        [page.id for page in read_pages(str(tmp_path / "a.warc")) if isinstance(page, PageRecord) and not page.skip]
        for _ in range(2)
    ]
    assert ids[0] == ids[1] and len(set(ids[0])) == 4 and ids[0][3] == f"a.warc#{len(data) - len(anonymous)}"
    (tmp_path / "b.warc.gz").write_bytes(gzip.compress(anonymous * 3))
    assert len({page.id for page in read_pages(str(tmp_path / "b.warc.gz")) if isinstance(page, PageRecord)}) == 3


def test_mixed_archives(tmp_path: Path) -> None:
    """Behaviour: concatenated archives of different compression are read to the end, also members that split records."""
    plain, packed = warc(0) + warc(1), gzip.compress(warc(2)) + zstandard.compress(warc(3))
    assert read(plain + packed, tmp_path) == (others(4), [])
    assert read(gzip.compress(warc(0)) + warc(1) + gzip.compress(warc(2)), tmp_path) == (others(3), [])
    whole = b"".join(map(warc, range(20)))
    blocks = b"".join(gzip.compress(whole[i : i + 700]) for i in range(0, len(whole), 700))
    assert read(blocks, tmp_path) == (others(20), [])


@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstandard.compress])
def test_long_records(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    """Behaviour: records of many times the size of the buffers, compressible or not, of random lengths."""
    source = random.Random(1)
    parts = [source.randbytes(300_000).hex().encode(), b"word " * 150_000, b"x", source.randbytes(270_000) * 3]
    records = [pack(warc(i, parts[i % 4] + bytes(source.randrange(70_000)))) for i in range(12)]
    assert read(b"".join(records), tmp_path) == (others(12), [])


def test_zstd_dictionary(tmp_path: Path) -> None:
    """Behaviour: the dictionary in the first skippable frame of a .warc.zst is used, compressed or not."""
    dictionary = zstandard.ZstdCompressionDict(body(0) * 3)
    for stored in (dictionary.as_bytes(), zstandard.compress(dictionary.as_bytes())):
        frame = b"\x5d\x2a\x4d\x18" + len(stored).to_bytes(4, "little") + stored
        compressor = zstandard.ZstdCompressor(dict_data=dictionary)
        assert read(frame + b"".join(compressor.compress(warc(i)) for i in range(3)), tmp_path) == (others(3), [])


def raw_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(data) + packer.flush()


BODIES = {
    "chunked": ("Transfer-Encoding: chunked", chunked),
    "not chunked": ("Transfer-Encoding: chunked", bytes),
    "gzip": ("Content-Encoding: gzip", gzip.compress),
    "not gzip": ("Content-Encoding: gzip", bytes),
    "zlib": ("Content-Encoding: deflate", zlib.compress),
    "raw deflate": ("Content-Encoding: deflate", raw_deflate),
    "not deflate": ("Content-Encoding: deflate", bytes),
    "zstd": ("Content-Encoding: zstd", zstandard.compress),
    "not brotli": ("Content-Encoding: br", bytes),
    "unknown": ("Content-Encoding: none", bytes),
    "several": ("Content-Encoding: deflate, x-gzip", lambda data: gzip.compress(zlib.compress(data))),
    "gzip in chunks": (
        "Content-Encoding: gzip\r\nTransfer-Encoding: chunked",
        lambda data: chunked(gzip.compress(data)),
    ),
}


@pytest.mark.parametrize("form", [warc, arc])
@pytest.mark.parametrize("case", BODIES)
def test_bodies(tmp_path: Path, case: str, form: Callable[..., bytes]) -> None:
    """Behaviour: codings are removed, also wrongly declared ones, in WARC and ARC; the neighbours are untouched."""
    headers, pack = BODIES[case]
    record = form(1, pack(body(1)), headers + ("\r\n" if form is arc else ""))
    (tmp_path / "a").write_bytes(form(0) + record + form(2))
    assert [page.content for page in read_pages(str(tmp_path / "a")) if isinstance(page, PageRecord)] == [
        body(i) for i in range(3)
    ]


@pytest.mark.parametrize("case", [name for name in BODIES if "not" not in name and name != "unknown"])
def test_bodies_whose_coding_ends_early_are_marked(tmp_path: Path, case: str) -> None:
    """Behaviour: what there is of such a page is kept and marked as truncated; whole ones are not marked."""
    headers, pack = BODIES[case]
    packed = pack(body(1) * 40)
    (tmp_path / "a").write_bytes(warc(0, packed, headers) + warc(1, packed[: len(packed) - 9], headers) + warc(2))
    pages = [page for page in read_pages(str(tmp_path / "a")) if isinstance(page, PageRecord)]
    assert [page.truncated for page in pages] == ["", "unspecified", ""]
    assert pages[0].content == body(1) * 40 and pages[0].content.startswith(pages[1].content)


def test_the_last_chunk_is_missing(tmp_path: Path) -> None:
    """Behaviour: a page of whole chunks without the last, empty one is marked, a page that is not in chunks is not."""
    headers, whole = "Transfer-Encoding: chunked", chunked(body(1))
    records = [warc(0, whole.removesuffix(b"0\r\n\r\n"), headers), warc(1, whole, headers), warc(2, body(2), headers)]
    (tmp_path / "a").write_bytes(b"".join(records))
    pages = [page for page in read_pages(str(tmp_path / "a")) if isinstance(page, PageRecord)]
    assert [page.truncated for page in pages] == ["unspecified", "", ""]
    assert [page.content for page in pages] == [body(1), body(1), body(2)]


@pytest.mark.parametrize(
    ("begin", "end"), [(b"Content-Type: app", b"WARC-Target"), (b"Content-Length", b"WARC-Record")]
)
@pytest.mark.parametrize("zeros", [False, True])
def test_two_heads_are_not_one(tmp_path: Path, begin: bytes, end: bytes, zeros: bool) -> None:
    """Behaviour: with the bytes lost from within one head to an earlier line of the next, no page has the URL of another."""
    data = b"".join(warc(i) for i in range(4))
    start, stop = data.index(begin, len(warc(0))), data.index(end, len(warc(0)) + len(warc(1)))
    damaged = data[:start] + bytes(stop - start) * zeros + data[stop:]
    found, broken = read(damaged, tmp_path)
    assert found == ["0", "3"] and len(broken) == 1


@pytest.mark.parametrize("zeros", [False, True])
def test_a_length_in_the_next_head_confirms_nothing(tmp_path: Path, zeros: bool) -> None:
    """Behaviour: with all bytes lost from within a response's head to within the next record's, that record's length is
    not taken for the response's."""
    headers = f"Content-Length: {len(body(1))}"
    data = b"".join(warc(i, body(i), headers) for i in range(4))
    start = data.index(b"Content-Type: text/html", len(warc(0)) + 60)
    stop = data.index(b"WARC-Target-URI: http://e.org/2")
    damaged = data[:start] + bytes(stop - start) * zeros + data[stop:]
    (tmp_path / "a").write_bytes(damaged)
    pages = [page for page in read_pages(str(tmp_path / "a")) if isinstance(page, PageRecord)]
    assert [page.content for page in pages if page.content.startswith(b"<html")] == [body(0), body(3)]
    assert any(isinstance(record, BrokenRecord) for record in read_pages(str(tmp_path / "a")))


def test_a_field_that_is_repeated_or_folded(tmp_path: Path) -> None:
    """Behaviour: a head may repeat a field with its value, fold it, and have several of others."""
    more = (
        b"WARC-Concurrent-To: <urn:a>\r\nWARC-Concurrent-To: <urn:b>\r\nWARC-Type: response\r\nWARC-Note: a\r\n b\r\n"
    )
    data = warc(0).replace(b"WARC-Target", more + b"WARC-Target")
    assert read(data + warc(1), tmp_path) == (["0", "1"], [])


def test_first_line_of_hexadecimal_digits(tmp_path: Path) -> None:
    """Behaviour: a text that begins like a chunk, longer than the text, is no chunk; a compressed one cut short is."""
    text = b"2024\r\nAnnual report of the harbour\r\n"
    cut = b"2024\r\n" + gzip.compress(body(1))
    records = warc(0, text, "Transfer-Encoding: chunked"), warc(1, cut, BODIES["gzip in chunks"][0])
    (tmp_path / "a").write_bytes(b"".join(records))
    contents = [page.content for page in read_pages(str(tmp_path / "a")) if isinstance(page, PageRecord)]
    assert contents == [text, body(1)]


def test_urls_that_are_not_utf8_stay_apart(tmp_path: Path) -> None:
    """Behaviour: they are read as Latin-1, as warcio does."""
    for form, url in ((warc, b"http://e.org/1"), (arc, b"http://e.org/1")):
        data = form(1)
        assert url in data
        (tmp_path / "a").write_bytes(
            data.replace(url, b"http://e.org/caf\xe9") + data.replace(url, b"http://e.org/caf\xe8")
        )
        urls = [page.url for page in read_pages(str(tmp_path / "a")) if isinstance(page, PageRecord)]
        assert urls == ["http://e.org/caf\xe9", "http://e.org/caf\xe8"]


def test_brotli(tmp_path: Path) -> None:
    """Behaviour: Brotli is decoded, and a bomb is reported and costs no neighbour."""
    brotli = pytest.importorskip("brotli")
    bomb = brotli.compress(bytes(50_000_000))
    data = warc(0, brotli.compress(body(0)), "Content-Encoding: br") + warc(1, bomb, "Content-Encoding: br") + warc(2)
    (tmp_path / "a").write_bytes(data)
    first, broken, last = read_pages(str(tmp_path / "a"), max_bytes=1 << 20)
    assert isinstance(first, PageRecord) and first.content == body(0) and isinstance(last, PageRecord)
    assert isinstance(broken, BrokenRecord) and "longer than" in broken.reason


def test_an_exception_is_the_fault_of_its_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behaviour: whatever is raised while a record is handled names it, and the others are read."""
    parse = archives.parse_response

    def fragile(block: bytes, max_bytes: int):
        if b"page 1," in block:
            raise RecursionError("what no test had thought of")
        return parse(block, max_bytes)

    monkeypatch.setattr(archives, "parse_response", fragile)
    pages, (broken,) = read(b"".join(map(warc, range(3))), tmp_path)
    assert pages == others(3, 1) and broken.offset == len(warc(0)) and "what no test" in broken.reason


OTHER_FILES = {
    "a.warc.lz4": (b"\x04\x22\x4d\x18" + bytes(50), "LZ4"),
    "a.zip": (b"PK\x03\x04" + bytes(50), "ZIP"),
    "a.7z": (b"7z\xbc\xaf\x27\x1c" + bytes(50), "7-Zip"),
    "a.tar": (b"name".ljust(257, b"\0") + b"ustar\x0000" + bytes(300), "tar file"),
    "a.tar.gz": (gzip.compress(b"name".ljust(257, b"\0") + b"ustar\x0000" + bytes(300)), "tar file"),
    "a.bin": (bytes(range(256)) * 4, "unknown format"),
    "a.png": (b"\x89PNG\r\n\x1a\n\0\0", "PNG"),
}


@pytest.mark.parametrize("name", OTHER_FILES)
def test_other_formats_are_named(tmp_path: Path, name: str) -> None:
    """Behaviour: a file that cannot be read is an error that names its format."""
    content, named = OTHER_FILES[name]
    with pytest.raises(LlmkitError, match=named) as caught:
        read(content, tmp_path, name)
    assert caught.value.hint


BOOK = "Chapter <unk>\n\n  It was 5 < 6 and a@b.org <a@b.org>.\n\n" + "A line\nof verse &amp; more <s>\n" * 20


@pytest.mark.parametrize("name", ["book.txt", "book", "book.txt.gz", "spec.txt"])
def test_plain_text_stays(tmp_path: Path, name: str) -> None:
    """Behaviour: text keeps every line and every `<unk>`, by content; a quoted record does not make it an archive."""
    from llmkit.corpus.extract.engines import ENGINES, document_of

    text = "ID3 tags, PAR1 and " + BOOK + (warc(1).decode() if name == "spec.txt" else "")
    (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    (page,) = read_pages(str(tmp_path / name))
    assert isinstance(page, PageRecord) and document_of(page, ENGINES["resiliparse"])["text"] == text


@pytest.mark.parametrize(
    "html", ["<p>One.</p><p>Two.</p>", "Intro<p>One.</p>", "<!-- x -->One. <b>Two</b>", "\n <DIV>One.</DIV>"]
)
def test_fragments_are_html(tmp_path: Path, html: str) -> None:
    """Behaviour: HTML without `<html>` is extracted, whether it has a name or not."""
    for name in ("a.html", "stdin"):
        (tmp_path / name).write_text(html)
        (page,) = read_pages(str(tmp_path / name))
        assert isinstance(page, PageRecord) and not page.is_text

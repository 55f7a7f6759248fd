"""Reading pages from archives, their declared metadata, their text."""

from __future__ import annotations

import gzip
import io
import random
from collections import Counter
from html import unescape
from pathlib import Path

import pytest
import xxhash
import zstandard

from llmkit.corpus.extract.archives import BrokenRecord, PageRecord, read_pages
from llmkit.corpus.extract.engines import ENGINES, Skip, document_of
from llmkit.corpus.extract.extractor import Extractor

STORY = "The quick brown fox jumps over the lazy dog, and then it sleeps in the warm sun until the evening comes. " * 3
HTML = f"<html lang='en-GB'><head><title> A  tale </title></head><body><nav>Home About</nav><article><p>{STORY}</p></article></body></html>"


def record(content: bytes, url: str = "http://a.example/", kind: str = "response", **headers: str) -> bytes:
    """One WARC record; an HTTP response if that is its `kind`."""
    if kind == "response":
        lines = "".join(
            f"{key.replace('_', '-')}: {value}\r\n" for key, value in ({"Content_Type": "text/html"} | headers).items()
        )
        content = f"HTTP/1.1 200 OK\r\n{lines}\r\n".encode() + content
    media = "application/http; msgtype=response" if kind == "response" else "text/plain"
    head = (
        f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: {url}\r\nWARC-Date: 2024-05-18T01:58:10Z\r\n"
        f"WARC-Record-ID: <urn:uuid:00000000-0000-0000-0000-{abs(hash(url)) % 10**12:012d}>\r\n"
        f"Content-Type: {media}\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content + b"\r\n\r\n"


def pages(path: Path, **how: object) -> list[PageRecord | BrokenRecord]:
    return list(read_pages(str(path), **how))  # type: ignore[arg-type]


PACKERS = {
    "plain": lambda records: b"".join(records),
    "gzip per record": lambda records: b"".join(map(gzip.compress, records)),
    "gzip": lambda records: gzip.compress(b"".join(records)),
    "zstd per record": lambda records: b"".join(map(zstandard.compress, records)),
    "zstd": lambda records: zstandard.compress(b"".join(records)),
}


@pytest.mark.parametrize("packed", PACKERS)
def test_warc_in_every_compression(tmp_path: Path, packed: str) -> None:
    """Behaviour: the first bytes determine the format; URL, date, type and charset come from record and response."""
    records = [
        record(HTML.encode("latin-1"), f"http://a.example/{i}", Content_Type="text/html; charset=ISO-8859-1")
        for i in range(3)
    ]
    (tmp_path / "whatever").write_bytes(PACKERS[packed](records))
    found = pages(tmp_path / "whatever")
    assert [page.url for page in found if isinstance(page, PageRecord)] == [f"http://a.example/{i}" for i in range(3)]
    page = found[0]
    assert isinstance(page, PageRecord)
    assert (page.date, page.content_type, page.charset) == ("2024-05-18T01:58:10Z", "text/html", "iso-8859-1")
    assert page.content == HTML.encode()


def test_wet_and_encoded_responses(tmp_path: Path) -> None:
    """Behaviour: the text of WET records is unchanged; transfer and content encodings are decoded."""
    body = gzip.compress(HTML.encode())
    chunked = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    packed = record(chunked, Content_Encoding="gzip", Transfer_Encoding="chunked")
    (tmp_path / "a").write_bytes(packed + record("Bonjour à tous".encode(), kind="conversion"))
    first, second = pages(tmp_path / "a")
    assert isinstance(first, PageRecord) and first.content == HTML.encode()
    assert isinstance(second, PageRecord) and second.is_text
    assert document_of(second, ENGINES["plain"])["text"] == "Bonjour à tous"


def test_arc(tmp_path: Path) -> None:
    """Behaviour: records of the older format, also URLs with spaces; a truncated record is reported with its offset."""
    response = b"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\n\r\n" + HTML.encode()
    head = b"filedesc://a.arc 0.0.0.0 20140216050221 text/plain 9\n1 0 Live\n\n"
    line = b"http://a.example/a b 1.2.3.4 20140216050221 text/html %d\n" % len(response)
    (tmp_path / "a.arc").write_bytes(head + line + response + b"\n")
    (tmp_path / "b.arc.gz").write_bytes(gzip.compress(head) + gzip.compress(line + response + b"\n"))
    for name in ("a.arc", "b.arc.gz"):
        (page,) = pages(tmp_path / name)
        assert isinstance(page, PageRecord)
        assert (page.url, page.date, page.charset) == ("http://a.example/a b", "2014-02-16T05:02:21Z", "utf-8")
        assert page.content == HTML.encode()
    (tmp_path / "cut.arc").write_bytes(head + line + response[:50])
    (broken,) = pages(tmp_path / "cut.arc")
    assert isinstance(broken, BrokenRecord) and "truncated" in broken.reason


@pytest.mark.parametrize("packed", ["plain", "gzip per record", "zstd per record"])
def test_reading_continues_after_a_broken_record(tmp_path: Path, packed: str) -> None:
    """Behaviour: an unreadable record is reported with its offset, and the records after it are found."""
    good = [record(HTML.encode(), f"http://a.example/{i}") for i in range(4)]
    parts = [PACKERS[packed]([one]) for one in good]
    parts[1] = parts[1][:4] + random.Random(1).randbytes(300) + parts[1][80:]
    (tmp_path / "a.warc").write_bytes(b"".join(parts))
    found = pages(tmp_path / "a.warc")
    urls = [page.url for page in found if isinstance(page, PageRecord)]
    assert "http://a.example/0" in urls and urls[-2:] == ["http://a.example/2", "http://a.example/3"]
    assert any(isinstance(page, BrokenRecord) for page in found)


def test_truncated_and_mislabelled_archives(tmp_path: Path) -> None:
    """Behaviour: truncated files and wrong Content-Lengths are reported; readable records are still returned."""
    records = [record(HTML.encode(), f"http://a.example/{i}") for i in range(3)]
    whole = b"".join(map(gzip.compress, records))
    (tmp_path / "cut.warc.gz").write_bytes(whole[:-100])
    found = pages(tmp_path / "cut.warc.gz")
    assert [page.url for page in found if isinstance(page, PageRecord)][:2] == [
        "http://a.example/0",
        "http://a.example/1",
    ]
    assert any(isinstance(page, BrokenRecord) for page in found)
    wrong = records[0].replace(b"Content-Length: ", b"Content-Length: 9", 1)
    (tmp_path / "wrong.warc").write_bytes(wrong + b"".join(records[1:]))
    assert any(isinstance(page, BrokenRecord) for page in pages(tmp_path / "wrong.warc"))


def test_size_and_digest(tmp_path: Path) -> None:
    """Behaviour: oversized pages are skipped and reported, also if compressed, and with verify those with wrong digests."""
    bomb = record(gzip.compress(b"x" * 5_000_000), Content_Encoding="gzip")
    (tmp_path / "a").write_bytes(record(b"y" * 300_000) + bomb + record(HTML.encode()))
    found = pages(tmp_path / "a", max_bytes=100_000)
    assert [type(page).__name__ for page in found] == ["BrokenRecord", "BrokenRecord", "PageRecord"]
    signed = record(HTML.encode()).replace(
        b"Content-Type: application",
        b"WARC-Block-Digest: sha1:3I42H3S6NNFQ2MSVX7XZKYAYSCX5QBYJ\r\nContent-Type: application",
        1,
    )
    (tmp_path / "b").write_bytes(signed)
    assert isinstance(pages(tmp_path / "b")[0], PageRecord)
    (broken,) = pages(tmp_path / "b", verify=True)
    assert isinstance(broken, BrokenRecord) and "digest" in broken.reason


def text_of(html: str | bytes, engine: str = "resiliparse", **changes: object) -> dict:
    content = html if isinstance(html, bytes) else html.encode()
    return document_of(PageRecord("i", content, **changes), ENGINES[engine])  # type: ignore[arg-type]


@pytest.mark.parametrize("engine", ENGINES)
def test_engines(engine: str) -> None:
    """Behaviour: every engine finds the story; only `plain` includes the navigation."""
    row = text_of(HTML, engine)
    assert STORY.strip() in " ".join(row["text"].split())
    assert ("Home" in row["text"]) == (engine == "plain")
    assert (row["title"], row["language"], row["content_type"]) == ("A tale", "en-GB", "text/html")


def test_boilerplate_blocks_are_removed() -> None:
    """Behaviour: headings, lists and code of the text are kept; share bars, link lists and teasers are removed."""
    story = "".join(f"<p>{STORY} It was day {i}.</p>" for i in range(8))
    links = "".join(
        f"<li><a href='/{i}'>Another tale of an entirely different animal in the woods {i}</a></li>" for i in range(6)
    )
    html = (
        "<html><body><main><h1>A tale of two animals</h1><p>By A. Writer</p>"
        f"{story}<h2>What they ate</h2><ol><li>Grass, as far as anybody in the village could tell, and little else of note.</li>"
        "<li>Mice, when the evening came and the sun had gone down behind the hills again.</li></ol>"
        "<pre>  for mouse in mice:\n\n      eat(mouse)</pre>"
        f"<p>And that is how it ended, for the fox as well as for the dog of the house.</p><p>Share this</p><ul>{links}</ul><p>Subscribe</p></main></body></html>"
    )
    text = text_of(html)["text"]
    assert text.startswith("A tale of two animals\n\n") and text.endswith("for the dog of the house.")
    assert "• Grass, as" in text and "\n• Mice, when" in text and "  for mouse in mice:\n\n      eat(mouse)" in text
    assert "Another tale" not in text and "Share this" not in text and "Subscribe" not in text


@pytest.mark.parametrize(
    "paragraphs",
    [
        ["光合作用是植物和藻类利用光能，把二氧化碳和水转化为有机物并释放氧气的过程。", "这一过程是地球上几乎所有生命的能量来源。"],
        ["蟋蟀が一匹とまっている。羅生門が、朱雀大路にある以上は、この男のほかにもありそうなものである。", "それがこの男のほかには誰もいない。"],
        ["กรุงเทพมหานครเป็นเมืองหลวงและนครที่มีประชากรมากที่สุดของประเทศไทย เป็นศูนย์กลางการปกครอง", "เมืองนี้ตั้งอยู่บนสามเหลี่ยมปากแม่น้ำเจ้าพระยา"],
    ],
)  # fmt: skip
def test_scripts_without_spaces(paragraphs: list[str]) -> None:
    """Behaviour: paragraphs of such a script count as text, also on a page with one in English."""
    html = "".join(f"<p>{paragraph}</p>" for paragraph in [paragraphs[0], f"About this page: {STORY}", *paragraphs[1:]])
    text = text_of(f"<body><main>{html}</main></body>")["text"]
    assert all(paragraph in text for paragraph in paragraphs)


@pytest.mark.parametrize(
    "content", ["不", "別", "€", "≤", "−", "’", "이", "。", "&rsquo;", "&#8804;", " 不 ", "é", "😀", "ab"]
)
def test_single_characters_in_elements_are_kept(content: str) -> None:
    """Behaviour: no piece of text is lost for being a single character, whichever way it is written; icons are."""
    for template in (f"one<b>{content}</b>two", f"<i>one</i>{content}<i>two</i>"):
        text = text_of(f"<body><main><p>{STORY}</p><p>{template} {STORY}</p></main></body>")["text"]
        one, other = text.index("one"), text.index("two")
        assert "".join(text[one + 3 : other].split()) == unescape(content).strip()
    assert "→" not in text_of(f"<body><main><p>{STORY} <span>→</span></p></main></body>")["text"]


@pytest.mark.parametrize("charset", ["", "utf-8"])
@pytest.mark.parametrize("damage", [(b"", ""), (b"\xff", "\ufffd"), (b"\xc3", "\ufffd")])
def test_damaged_utf8_stays_utf8(charset: str, damage: tuple[bytes, str]) -> None:
    """Behaviour: a bad byte becomes U+FFFD and leaves the others as they are; another encoding that is declared counts."""
    text = "Les élèves étaient allés à la plage, le café était fermé. 光合作用 😀"
    meta = f"<meta charset={charset}>" if charset else ""
    content = f"<body>{meta}<p>{text} ".encode() + damage[0] + b"</p>"
    for declared in ("", "utf-8"):
        page = PageRecord("a", content, charset=declared)
        assert document_of(page, ENGINES["plain"])["text"] == f"{text} {damage[1]}".strip()
    latin = "<meta charset=windows-1252><p>Ã© déjà, là, où €".encode("windows-1252")
    assert document_of(PageRecord("a", latin), ENGINES["plain"])["text"] == "Ã© déjà, là, où €"


def test_markdown_may_begin_with_a_tag(tmp_path: Path) -> None:
    """Behaviour: a .md file keeps its bytes; one that is a whole page is HTML all the same."""
    text = "<p align='center'>x</p>\n\n```c\nint a;\nif (a<b) x;\n```\nLast line.\n"
    for content, is_text in ((text, True), ("<!doctype html><p>Some words", False)):
        (tmp_path / "README.md").write_text(content)
        (page,) = read_pages(str(tmp_path / "README.md"))
        assert isinstance(page, PageRecord) and page.is_text == is_text


def test_a_page_without_sentences_is_kept() -> None:
    """Behaviour: if no block looks like text, all blocks of the main content are kept."""
    assert (
        text_of("<body><main><h1>Prices</h1><p>Apples 3</p><p>Pears 4</p></main></body>")["text"]
        == "Prices\n\nApples 3\n\nPears 4"
    )


@pytest.mark.parametrize(
    ("head", "headers", "expected"),
    [
        ("<a rel='nofollow license' href='https://creativecommons.org/licenses/by-nc-sa/4.0/deed.de'>c</a>", {}, {"licence": "cc-by-nc-sa-4.0"}),
        ("<a href='http://creativecommons.org/publicdomain/zero/1.0/'>c</a>", {}, {"licence": "cc0-1.0"}),
        ("<link rel=license href='/terms'>", {}, {"licence": "/terms"}),
        ("<meta name='DC.rights' content='All rights reserved'>", {}, {"licence": "All rights reserved"}),
        ("<a href='/licenses'>our licenses</a>", {}, {}),
        ("<meta name=ROBOTS content='NoAI, noimageai'>", {}, {"opt_out": ["noai", "noimageai"]}),
        ("<meta name=robots content='index, follow'>", {}, {}),
        ("", {"x-robots-tag": "googlebot: noindex"}, {"opt_out": ["noindex"]}),
        ("<meta name='tdm-reservation' content='1'>", {}, {"opt_out": ["tdm-reservation"]}),
        ("", {"tdm-reservation": "1"}, {"opt_out": ["tdm-reservation"]}),
        ("", {"tdm-reservation": "0"}, {}),
        ("", {"content-language": "de, en"}, {"language": "de"}),
    ],
)  # fmt: skip
def test_declared_metadata(head: str, headers: dict[str, str], expected: dict) -> None:
    """Behaviour: licence, language and opt-outs, from links, meta tags and headers."""
    row = text_of(f"<html><head>{head}</head><body><p>{STORY}</p></body></html>", headers=headers)
    assert {key: row[key] for key in ("licence", "opt_out", "language") if key in row} == expected


@pytest.mark.parametrize(
    ("encoding", "declared"),
    [("windows-1251", ""), ("utf-8", "iso-8859-1"), ("utf-16", "utf-16"), ("shift_jis", "shift_jis"), ("iso-8859-1", "utf-8"), ("gb18030", "nonsense")],
)  # fmt: skip
def test_encodings(encoding: str, declared: str) -> None:
    """Behaviour: a page in a common encoding is decoded, whether that is declared correctly, wrongly, or not at all."""
    texts = {
        "windows-1251": "Съешь же ещё этих мягких французских булок, да выпей чаю. ",
        "shift_jis": "いろはにほへとちりぬるを、わかよたれそつねならむ。",
        "gb18030": "天地玄黄，宇宙洪荒。日月盈昃，辰宿列张。",
    }
    text = texts.get(encoding, "Grüße aus Köln, schöne Straßen und süße Äpfel. ") * 5
    if (encoding, declared) == ("utf-8", "iso-8859-1"):
        declared = ""  # a charset that decodes anything cannot be detected
    row = text_of(f"<html><body><p>{text}</p></body></html>".encode(encoding), charset=declared)
    assert text.strip() in row["text"]


def test_pages_without_a_document() -> None:
    """Behaviour: errors, images, empty pages and damaged PDFs are skipped with a reason."""
    for page, reason in (
        (PageRecord("i", HTML.encode(), status=404), "http status"),
        (PageRecord("i", b"\x89PNG\x00\x00", content_type="image/png"), "content type"),
        (PageRecord("i", b"\x00\x01\x02", content_type="text/html"), "content type"),
        (PageRecord("i", b"<html><body></body></html>"), "no text"),
        (PageRecord("i", b""), "no text"),
        (PageRecord("i", b"%PDF-1.4 nothing"), "damaged pdf"),
    ):
        with pytest.raises(Skip, match=reason):
            document_of(page, ENGINES["resiliparse"])


def pdf(*texts: str) -> bytes:
    """A PDF with one page per text."""
    objects = [b"<</Type/Catalog/Pages 2 0 R>>", b"", b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>"]
    kids = []
    for text in texts:
        stream = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET".encode() if text else b""
        objects.append(b"<</Length %d>>stream\n%s\nendstream" % (len(stream), stream))
        objects.append(
            b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 612 792]/Resources<</Font<</F1 3 0 R>>>>/Contents %d 0 R>>"
            % len(objects)
        )
        kids.append(f"{len(objects)} 0 R")
    objects[1] = f"<</Type/Pages/Kids[{' '.join(kids)}]/Count {len(kids)}>>".encode()
    out, offsets = io.BytesIO(), []
    out.write(b"%PDF-1.4\n")
    for number, content in enumerate(objects, 1):
        offsets.append(out.tell())
        out.write(b"%d 0 obj\n%s\nendobj\n" % (number, content))
    start = out.tell()
    out.write(b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1))
    out.write(b"".join(b"%010d 00000 n \n" % offset for offset in offsets))
    out.write(b"trailer<</Size %d/Root 1 0 R>>\nstartxref\n%d\n%%%%EOF\n" % (len(objects) + 1, start))
    return out.getvalue()


def test_pdf() -> None:
    """Behaviour: the text layer of every page; pages without one are counted."""
    row = document_of(PageRecord("i", pdf("Hello there", "", "and goodbye")), ENGINES["resiliparse"])
    assert row["text"] == "Hello there\n\nand goodbye"
    assert (row["pages"], row["pages_without_text"], row["content_type"]) == (3, 1, "application/pdf")


def test_hostile_pages_are_limited() -> None:
    """Behaviour: a page that would take minutes is skipped; the others are extracted in order, for any -j."""
    deep = PageRecord("deep", b"<div>" * 100_000 + b"x")
    wide = PageRecord("wide", b"<p title='" + b"x" * 3_000_000 + b"'>" + STORY.encode())
    given = [PageRecord("a", HTML.encode()), deep, wide, PageRecord("b", HTML.encode())]
    for jobs in (1, 2):
        extractor = Extractor("resiliparse", seconds=1.0, max_bytes=4 << 20)
        outcomes = list(extractor.run(given, jobs))
        kept = b"".join(outcome.kept for outcome in outcomes)
        assert [line.split(b'"')[3] for line in kept.splitlines()] == [b"a", b"wide", b"b"]
        assert sum((outcome.skipped for outcome in outcomes), Counter()) == {"time limit": 1}


def test_a_parser_error_skips_one_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behaviour: an exception in a library becomes the reason for that page, and the run continues."""

    def fragile(tree: object, source: str) -> str:
        if "bad" in source:
            raise LookupError("what no test had thought of")
        return source

    monkeypatch.setitem(ENGINES, "fragile", fragile)
    extractor = Extractor("fragile", seconds=5.0, max_bytes=1 << 20)
    (outcome,) = extractor.run([PageRecord("a", b"bad"), PageRecord("b", b"good")])
    assert outcome.kept.count(b"\n") == 1 and outcome.skipped == {"engine failed (LookupError)": 1}


def test_digest_of_a_stream_that_is_read_twice(tmp_path: Path) -> None:
    """Behaviour: the digest covers the stored bytes, also damaged ones and if reading seeks back; ids omit directories."""
    good = [gzip.compress(record(HTML.encode(), f"http://a.example/{i}")) for i in range(4)]
    good[1] = good[1][:4] + random.Random(1).randbytes(300) + good[1][80:]
    for name, content, limit in (("a.warc.gz", b"".join(good), 1 << 20), ("b.html", HTML.encode() * 50, 1000)):
        (tmp_path / name).write_bytes(content)
        digest: list[str] = []
        pages(tmp_path / name, max_bytes=limit, digest=digest)
        assert digest == ["xxh3:" + xxhash.xxh3_128_hexdigest(content)]
    response = b"HTTP/1.1 200 OK\r\n\r\n" + HTML.encode()
    (tmp_path / "c.arc").write_bytes(
        b"http://a.example/ 1.2.3.4 20140216050221 text/html %d\n" % len(response) + response
    )
    head = b"filedesc://c.arc 0.0.0.0 20140216050221 text/plain 0\n"
    (tmp_path / "c.arc").write_bytes(head + (tmp_path / "c.arc").read_bytes())
    (page,) = pages(tmp_path / "c.arc")
    assert isinstance(page, PageRecord) and page.id.startswith("c.arc#")


def test_real_archives(shared_data: Path) -> None:
    """Behaviour: every record of real archives becomes a document or is counted."""
    counts = {}
    for name in ("aut_example.warc.gz", "cc_whirlwind.warc.wet.gz", "resiliparse_warcfile.warc.gz"):
        extractor = Extractor("resiliparse", 10.0, 16 << 20)
        found = list(extractor.run(read_pages(str(shared_data / "web" / "warc" / name))))
        documents, pages_, broken = (
            sum(map(of, found)) for of in (lambda o: o.documents, lambda o: o.pages, lambda o: len(o.broken))
        )
        assert documents + sum(outcome.skipped.total() for outcome in found) == pages_
        counts[name] = (documents, pages_, broken)
    assert counts == {
        "aut_example.warc.gz": (137, 299, 0),
        "cc_whirlwind.warc.wet.gz": (1, 1, 0),
        "resiliparse_warcfile.warc.gz": (16, 16, 0),
    }

"""Extracting the text of a page with one of several engines, and converting a page to a document.

`resiliparse` selects the main content by rules over a fast parser's tree and classifies its blocks (blocks.py);
`trafilatura` uses many more rules at a fraction of the speed; `plain` keeps all visible text. Their scores on
gold text are in tests/bench/extraction.md.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import xxhash

from llmkit.corpus.extract.archives import PageRecord
from llmkit.corpus.extract.blocks import main_text
from llmkit.corpus.extract.page_metadata import declared

HTML = ("text/html", "application/xhtml+xml", "application/xml", "text/xml", "")
META_CHARSET = re.compile(rb"<meta\b[^>]{0,200}?\bcharset\s*=\s*[\"']?\s*([\w.:-]{1,40})", re.IGNORECASE)
META_BYTES = 4096  # in which a page declares its encoding


class Skip(Exception):
    """Raised for a page without a document; the message is the reason in a word or two."""


def document_of(page: PageRecord, engine: Callable[[Any, str], str]) -> dict[str, Any]:
    """The document in a page: id, text, url, date, content_type and what the page declares. Raises Skip if none.

    Plain text is kept as it is, with the white space at its beginning and end.
    """
    if page.skip:
        raise Skip(page.skip)
    if not 200 <= page.status < 300:
        raise Skip("http status")
    if page.is_text:
        extracted: dict[str, Any] = {"text": _decode(page.content, "utf-8"), "language": page.language}
    elif page.content.startswith(b"%PDF-"):
        extracted = {"content_type": "application/pdf"} | _pdf(page.content)
    elif page.content_type == "text/plain":
        extracted = {"content_type": "text/plain", "text": _decode(page.content, page.charset)}
    elif page.content_type in HTML and _is_text(page.content):
        extracted = {"content_type": page.content_type or "text/html"} | _html(page, engine)
    else:
        raise Skip("content type")
    text = extracted["text"].replace("\x00", "").strip()
    if not text:
        raise Skip("no text")
    if page.is_text or extracted.get("content_type") == "text/plain":
        text = extracted["text"]  # as it is
    row = {"id": page.id or xxhash.xxh3_128_hexdigest(text.encode()), "text": text, "url": page.url, "date": page.date}
    row = {key: value for key, value in (row | extracted | {"text": text}).items() if value != ""}
    if page.truncated:
        row["truncated"] = page.truncated
    return row | {key: value for key, value in page.fields.items() if key != "text"}


def _is_text(content: bytes) -> bool:
    """Whether the content can be a page.

    Images and archives that are labelled text/html contain NUL bytes near the start, and so does UTF-16, which
    is allowed.
    """
    head = content[:1024]
    return b"\x00" not in head or head.startswith((b"\xff\xfe", b"\xfe\xff"))


def _decode(content: bytes, charset: str) -> str:
    """The text of `content` in the encoding `charset`, or in a detected one if it is missing or wrong.

    Content that is UTF-8 but for a few bytes stays UTF-8, with U+FFFD for these, unless another encoding is declared.
    """
    from resiliparse.parse.encoding import bytes_to_str, detect_encoding, map_encoding_to_html5

    declared_encoding = map_encoding_to_html5(charset, False) if charset else None
    if declared_encoding:
        try:
            return content.decode(declared_encoding)
        except (UnicodeDecodeError, LookupError):
            pass  # the declared encoding is wrong
    if not content.isascii():
        match = META_CHARSET.search(content, 0, META_BYTES)
        meta = map_encoding_to_html5(match[1].decode("ascii"), False) if match else None
        if {declared_encoding, meta} <= {None, "utf-8"}:
            decoded = content.decode("utf-8", "replace")
            replaced = decoded.count("\ufffd")
            if len(decoded) - len(decoded.encode("ascii", "ignore")) > 2 * replaced:
                return decoded.removeprefix("\ufeff")
    text: str = bytes_to_str(content, detect_encoding(content, from_html_meta=True) or "utf-8")
    return text


def _html(page: PageRecord, engine: Callable[[Any, str], str]) -> dict[str, Any]:
    from resiliparse.parse.html import HTMLTree

    source = _decode(page.content, page.charset)
    if not source.strip():
        raise Skip("no text")
    if not source.isascii():
        source = source.encode("utf-8", "replace").decode()
    tree = HTMLTree.parse(source)
    return declared(tree, page.headers) | {"text": engine(tree, source)}


def _pdf(content: bytes) -> dict[str, Any]:
    """Text layer of a PDF, page by page; pages without text are counted."""
    import pypdfium2

    try:
        document = pypdfium2.PdfDocument(content)
    except pypdfium2.PdfiumError as error:
        raise Skip("damaged pdf") from error
    texts = []
    try:
        for number in range(len(document)):
            page = document[number].get_textpage()
            texts.append(page.get_text_bounded().replace("\r\n", "\n").strip())
        title = (document.get_metadata_dict().get("Title") or "").strip()
    except pypdfium2.PdfiumError as error:
        raise Skip("damaged pdf") from error
    finally:
        document.close()
    row: dict[str, Any] = {"text": "\n\n".join(text for text in texts if text), "pages": len(texts)}
    empty = sum(1 for text in texts if not text)
    return row | ({"pages_without_text": empty} if empty else {}) | ({"title": title} if title else {})


def _resiliparse(tree: Any, source: str) -> str:
    return main_text(tree, source)


def _plain(tree: Any, source: str) -> str:
    from resiliparse.extract.html2text import extract_plain_text

    text: str = extract_plain_text(tree, alt_texts=False)
    return text


def _trafilatura(tree: Any, source: str) -> str:
    import trafilatura

    return trafilatura.extract(source, include_comments=False, favor_precision=True, deduplicate=False) or ""


# name -> function that returns the text of a page, given its parsed tree and its source
ENGINES: dict[str, Callable[[Any, str], str]] = {
    "resiliparse": _resiliparse,
    "trafilatura": _trafilatura,
    "plain": _plain,
}

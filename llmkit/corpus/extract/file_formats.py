"""What a file is, from its first bytes: an archive, a page, plain text, or something that `extract` cannot read."""

from __future__ import annotations

import re
from io import BytesIO

from llmkit.corpus.extract.members import Gap, pieces
from llmkit.corpus.extract.record_heads import BLANK, starts_archive
from llmkit.corpus.extract.stored import Stored
from llmkit.errors import LlmkitError
from llmkit.io.inputs import COMPRESSIONS

HEAD = 1 << 16  # bytes from which the format of a file is determined
ARCHIVES = tuple(kind + packed for kind in (".warc", ".arc", ".wet", ".wat") for packed in COMPRESSIONS)
HTML_FILES = tuple(kind + packed for kind in (".html", ".htm", ".xhtml") for packed in COMPRESSIONS)
TEXT_FILES = tuple(kind + packed for kind in (".txt", ".text", ".md", ".rst") for packed in COMPRESSIONS)

READABLE = "extract reads WARC, WET and ARC files, HTML, plain text, PDF, and JSON rows with HTML"
UNZIP = "unzip it, and name the files in it"
# (offset, magic) -> name, hint. The first that matches counts.
OTHER_FORMATS = (
    (0, b"PK\x03\x04", "a ZIP file (also .docx, .xlsx, .epub, .wacz)", UNZIP),
    (0, b"PK\x05\x06", "an empty ZIP file", UNZIP),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7-Zip file", "unpack it with 7z x, and name the files in it"),
    (0, b"Rar!\x1a\x07", "a RAR file", "unpack it with unrar x, and name the files in it"),
    (0, b"\x04\x22\x4d\x18", "compressed with LZ4", "lz4 -dc FILE | llmkit extract"),
    (0, b"\x02\x21\x4c\x18", "compressed with LZ4", "lz4 -dc FILE | llmkit extract"),
    (0, b"\x1f\x9d", "compressed with compress (.Z)", "gzip -dc FILE | llmkit extract"),
    (0, b"LZIP", "compressed with lzip", "lzip -dc FILE | llmkit extract"),
    (0, b"\xff\x06\x00\x00sNaPpY", "compressed with Snappy", "decompress it, and pipe it into llmkit extract"),
    (257, b"ustar", "a tar file", "unpack it with tar -xf, and name the files in it"),
    (0, b"PAR1", "a Parquet file", "name it with the suffix .parquet; --html-key names the column with the page"),
    (0, b"ARROW1", "an Arrow file", "write the pages as Parquet or JSON lines"),
    (0, b"SQLite format 3\x00", "an SQLite database", "write the pages as JSON lines"),
    (0, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Microsoft Office file", "convert it to HTML or PDF"),
    (0, b"{\\rtf", "an RTF file", "convert it to HTML or PDF"),
    (0, b"%!PS", "a PostScript file", "convert it with ps2pdf"),
    (0, b"AT&TFORM", "a DjVu file", "convert it to PDF, or its text with djvutxt"),
    (0, b"\x89PNG", "an image (PNG)", ""),
    (0, b"\xff\xd8\xff", "an image (JPEG)", ""),
    (0, b"GIF8", "an image (GIF)", ""),
    (0, b"RIFF", "a media file (RIFF)", ""),
    (0, b"OggS", "a media file (Ogg)", ""),
    (0, b"ID3", "a media file (MP3)", ""),
    (4, b"ftyp", "a media file (MP4)", ""),
    (0, b"\x7fELF", "a program", ""),
)
TAG = re.compile(
    rb"</?(?:html|head|body|title|meta|link|script|style|article|section|main|nav|header|footer|div|p|h[1-6]|ul|ol|li"
    rb"|dl|dt|dd|table|thead|tbody|tr|td|th|br|hr|pre|blockquote"
    rb"|span|img|a|form|font|center|em|strong)(?:\s[^<>]*)?/?>",
    re.IGNORECASE,
)
HTML_START = re.compile(rb"<(?:!doctype\s+html|html|\?xml|!--)", re.IGNORECASE)
WHOLE_PAGE = re.compile(rb"<(?:!doctype\s+html|html[\s>])", re.IGNORECASE)  # Markdown may begin with another tag
MAX_BEGINNINGS = 16 << 20  # decompressed bytes of the first ones of a file
TAG_SPACING = 500  # a text without a name is HTML if it has a tag in so many bytes


def beginnings(head: bytes) -> list[bytes]:
    """The first decompressed bytes of `head`, and those after each damaged place."""
    runs, size = [b""], 0
    for piece in pieces(Stored(BytesIO(head))):
        if isinstance(piece, Gap):
            runs.append(b"")
        elif len(runs[-1]) < HEAD:
            runs[-1] += piece.data[:HEAD]
        size += 0 if isinstance(piece, Gap) else len(piece.data)
        if len(runs[0]) >= HEAD or size > MAX_BEGINNINGS:
            break
    return runs


def is_archive(runs: list[bytes], head: bytes, name: str) -> bool:
    """Whether a file is a WARC or ARC archive, perhaps a damaged one, by its `beginnings`, first bytes and name.

    A page or text that quotes a record is none.
    """
    if starts_archive(runs[0]) or name.lower().endswith(ARCHIVES):
        return True
    is_page = not runs[0] and (name.lower().endswith(TEXT_FILES) or is_html(head, name))
    return not is_page and any(starts_archive(run) for run in runs[1:])


def is_html(content: bytes, name: str) -> bool:
    """Whether text is HTML, by its first tags; for a text without them, by its name and how many tags follow.

    A fragment without `<html>` is HTML, but a text that mentions a tag now and then is not.
    """
    head = content[:HEAD]
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        head = head.decode("utf-16", "replace").encode()
    head = head.lstrip(BLANK + b" \t")
    name = name.lower()
    if name.endswith(TEXT_FILES):
        return WHOLE_PAGE.match(head) is not None
    if HTML_START.match(head) or TAG.match(head) or name.endswith(HTML_FILES):
        return True
    return len(TAG.findall(head)) * TAG_SPACING > len(head)


def refuse_other_formats(head: bytes, file: str) -> None:
    """Raise LlmkitError for a known format that cannot be read, naming it."""
    for offset, magic, name, hint in OTHER_FORMATS:
        is_word = magic.isalnum()  # a text may begin with it
        if head.startswith(magic, offset) and (not is_word or b"\x00" in head[:1024]):
            message = f"{file}: this is {name}, not an archive or page that can be read"
            raise LlmkitError(message, hint.replace("FILE", file) or READABLE)


def refuse_binary(content: bytes, file: str) -> None:
    """Raise LlmkitError for data that are neither text nor PDF."""
    if b"\x00" in content[:1024] and not content.startswith((b"\xff\xfe", b"\xfe\xff", b"%PDF-")):
        raise LlmkitError(f"{file}: neither an archive nor a page: binary data of an unknown format", READABLE)

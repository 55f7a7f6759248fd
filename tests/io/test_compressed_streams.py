"""Compressed streams in every reader: several members are all read, and no damage passes for content."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmkit.corpus.extract.archives import BrokenRecord, PageRecord, read_pages
from llmkit.corpus.lists import entries
from llmkit.errors import LlmkitError
from llmkit.io.compression import BLOCK, Bzip2Decoder, Notes, decompress
from llmkit.io.digest import digest_content
from llmkit.io.documents import DocumentReader, ReadOptions

COMPRESSORS = {
    "gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress,
    "zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}  # fmt: skip
Compress = Callable[[bytes], bytes]


def records(start: int) -> bytes:
    """Ten WARC records."""
    form = "WARC/1.0\r\nWARC-Type: resource\r\nWARC-Target-URI: {0}\r\nContent-Type: text/plain\r\nContent-Length: 4\r\n\r\n{0:04}\r\n\r\n"
    return "".join(form.format(number) for number in range(start, start + 10)).encode()


def documents(path: Path) -> list[str]:
    with DocumentReader([str(path)], ReadOptions()) as reader:
        return [document.text for document in reader.documents()]


def text_file(path: Path) -> list[str]:
    (page,) = read_pages(str(path))
    assert isinstance(page, PageRecord)
    return page.content.decode().split()


def archive(path: Path) -> list[str]:
    pages = list(read_pages(str(path)))
    if broken := [page.reason for page in pages if isinstance(page, BrokenRecord)]:
        assert {page.content for page in pages if isinstance(page, PageRecord)} >= {b"%04d" % n for n in range(10)}
        raise LlmkitError(broken[0])
    return [str(int(page.content)) for page in pages if isinstance(page, PageRecord)]


def rows(start: int) -> bytes:
    return b"".join(b'{"text": "%d"}\n' % number for number in range(start, start + 10))


def words(start: int) -> bytes:
    return b"".join(b"%d\n" % number for number in range(start, start + 10))


READERS: dict[str, tuple[Callable[[Path], list[str]], Callable[[int], bytes], str]] = {
    "documents": (documents, rows, "a.jsonl"),
    "text file": (text_file, words, "a.txt"),
    "archive": (archive, records, "a.warc"),
    "list": (lambda path: [entry for _, entry in entries([str(path)])], words, "a.txt"),
    "digest": (lambda path: [digest_content(str(path))], words, "a.txt"),
}


@pytest.mark.parametrize("suffix", COMPRESSORS)
@pytest.mark.parametrize("reader", READERS)
def test_concatenated_members(tmp_path: Path, reader: str, suffix: str) -> None:
    """Property: of `cat a.zst b.zst`, all is read; where the second is cut, wherever that is, this is reported, and
    what precedes is intact."""
    read, content, name = READERS[reader]
    compress: Compress = COMPRESSORS[suffix]
    path, plain = tmp_path / f"{name}.{suffix}", tmp_path / name
    first, second = compress(content(0)), compress(content(10))
    path.write_bytes(first + second)
    plain.write_bytes(content(0) + content(10))
    assert read(path) == read(plain) and (reader == "digest" or read(path) == list(map(str, range(20))))
    for size in (1, 3, 5, 9, 13, len(second) // 2, len(second) - 5, len(second) - 1):
        path.write_bytes(first + second[:size])
        with pytest.raises(LlmkitError, match="truncated|corrupt|follow|not the head"):
            read(path)


@pytest.mark.parametrize("reader", READERS)
def test_lz4_is_named(tmp_path: Path, reader: str) -> None:
    """Behaviour: a format that is not read is not taken for text."""
    (tmp_path / "a.lz4").write_bytes(b"\x04\x22\x4d\x18\x64\x40\xa7" + bytes(20))
    with pytest.raises(LlmkitError, match="LZ4"):
        READERS[reader][0](tmp_path / "a.lz4")


TEXT = random.Random(7).randbytes(800_000).hex().encode()  # two blocks, of which the second is read in two parts
PACKED = bz2.compress(TEXT)


class Trickle:
    """A stream whose reads return `size` bytes."""

    def __init__(self, data: bytes, size: int) -> None:
        self._data, self._size, self._at = data, size, 0

    def read(self, _: int) -> bytes:
        self._at += self._size
        return self._data[self._at - self._size : self._at]


@settings(max_examples=8, deadline=None)
@given(st.integers(0, len(PACKED) - 1), st.integers(0, 7), st.sampled_from([8191, 1 << 20]))
@example(len(PACKED) * 3 // 4, 0, 1 << 20)
@example(len(PACKED) * 4 // 5, 3, 1 << 20)
def test_a_damaged_block_of_bzip2_gives_nothing(at: int, bit: int, size: int) -> None:
    """Property: with any bit flipped, all that is read before the error is a part of the content from its beginning."""
    damaged = bytearray(PACKED)
    damaged[at] ^= 1 << bit
    parts: list[bytes] = []
    try:
        parts.extend(decompress(Trickle(bytes(damaged), size), "x", Notes(), 1))  # type: ignore[arg-type]
    except LlmkitError as error:
        assert "x: " in error.message
    if damaged.startswith(b"BZh"):
        assert TEXT.startswith(b"".join(parts))


def test_a_damaged_block_of_bzip2_gives_no_page(tmp_path: Path) -> None:
    """Behaviour: of an archive in bzip2, pages of a damaged block are missing, and none is garbled."""
    pages = [random.Random(number).randbytes(20_000).hex().encode() for number in range(40)]
    form = b"WARC/1.0\r\nWARC-Type: resource\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n\r\n%s\r\n\r\n"
    packed = bytearray(bz2.compress(b"".join(form % (len(page), page) for page in pages)))
    packed[len(packed) * 3 // 4] ^= 1
    (tmp_path / "a.warc.bz2").write_bytes(packed)
    *found, broken = read_pages(str(tmp_path / "a.warc.bz2"))
    assert [page.content for page in found if isinstance(page, PageRecord)] == pages[: len(found)] and len(found) > 15
    assert isinstance(broken, BrokenRecord)


@pytest.mark.parametrize("size", [1, 700, 1 << 20])
@pytest.mark.parametrize("level", [1, 9])
def test_bzip2_as_the_standard_library_reads_it(size: int, level: int) -> None:
    """Parity with bz2: content and what follows it, whatever the reads; blocks that expand a thousandfold too."""
    content = (TEXT[:300_000] + bytes(3 << 20))[: 50_000 if size == 1 else None]
    packed, decoder, parts = bz2.compress(content, level) + b"more", Bzip2Decoder(), []
    while not decoder.eof:
        data, packed = (packed[:size], packed[size:]) if decoder.needs_input else (b"", packed)
        parts.append(decoder.decompress(data, BLOCK))
    assert b"".join(parts) == content and max(map(len, parts)) <= BLOCK and decoder.unused_data + packed == b"more"


@pytest.mark.parametrize(("suffix", "pack"), [(".bz2", bz2.compress), (".gz", gzip.compress), (".xz", lzma.compress)])
def test_many_small_streams_take_linear_time(suffix: str, pack: Compress) -> None:
    """Property: thousands of streams are read in the time of a few times as many bytes, and zeros may follow each."""
    one, seconds = pack(b"line\n") + bytes(8) * (suffix != ".bz2"), []
    for count in (4000, 32000):
        begin = time.process_time()
        content = b"".join(decompress(io.BytesIO(one * count), "a" + suffix, Notes()))
        seconds.append(time.process_time() - begin)
        assert content == b"line\n" * count
    assert seconds[1] < 24 * max(seconds[0], 0.02)

"""Reading and writing documents: every compression, bad lines, chunking, Parquet, lineage notes."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import re
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import orjson
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.errors import LlmkitError, UsageError
from llmkit.io.compression import BLOCK, STORED, StoredFrame, ZstdOutput
from llmkit.io.document_writer import DocumentWriter
from llmkit.io.documents import Chunk, DocumentReader, ReadOptions, parse
from llmkit.io.record import Lineage
from llmkit.lineage.formats import digest_path, read_lineage

LINES = b"".join(
    orjson.dumps({"id": str(i), "text": f"text {i} \u00e9", "extra": {"n": i}}) + b"\n" for i in range(500)
)


def read_all(path: Path, **options: object) -> bytes:
    with DocumentReader([str(path)], ReadOptions(**options)) as reader:  # type: ignore[arg-type]
        return b"".join(document.encode() for document in reader.documents())


def write(path: Path, data: bytes = LINES) -> None:
    with DocumentWriter(str(path), Lineage("test", {"a": 1})) as writer:
        writer.write(data)
        writer.finish({"documents": data.count(b"\n")}, [])


@pytest.mark.parametrize(
    "compress", [bytes, gzip.compress, bz2.compress, lzma.compress, zstandard.ZstdCompressor().compress]
)
def test_reads_every_compression_by_its_first_bytes(tmp_path: Path, compress) -> None:
    """Parity with the standard compressors; the name of the file does not matter."""
    path = tmp_path / "no-suffix"
    path.write_bytes(compress(LINES))
    assert read_all(path) == LINES


def test_reads_concatenated_members(tmp_path: Path) -> None:
    """Behaviour: `cat a.zst b.zst` and multi-member gzip are one stream each."""
    (tmp_path / "z").write_bytes(zstandard.compress(LINES) + zstandard.compress(LINES))
    (tmp_path / "g").write_bytes(gzip.compress(LINES) + gzip.compress(LINES))
    assert read_all(tmp_path / "z") == read_all(tmp_path / "g") == LINES * 2


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.zst", ".jsonl.gz"])
def test_untouched_documents_keep_their_bytes(tmp_path: Path, suffix: str) -> None:
    """Property: documents are written as they were read, unusual spacing included."""
    odd = b'{ "text" :"a" , "x": 1.50}\n'
    write(tmp_path / f"a{suffix}", odd + LINES)
    assert read_all(tmp_path / f"a{suffix}") == odd + LINES


def test_other_readers_skip_lineage(tmp_path: Path) -> None:
    """Parity: gzip, python-zstandard and pyarrow read the content only."""
    import pyarrow as pa

    write(tmp_path / "a.jsonl.zst")
    write(tmp_path / "a.jsonl.gz")
    assert gzip.decompress((tmp_path / "a.jsonl.gz").read_bytes()) == LINES
    with open(tmp_path / "a.jsonl.zst", "rb") as raw:
        reader = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
        assert reader.read() == LINES
    with pa.CompressedInputStream(str(tmp_path / "a.jsonl.zst"), "zstd") as stream:
        assert stream.read() == LINES


@pytest.mark.parametrize("suffix", [".jsonl.zst", ".jsonl.gz", ".parquet"])
def test_lineage_is_read_back(tmp_path: Path, suffix: str) -> None:
    """Behaviour: command, options and counts are read back from every format with room for them."""
    write(tmp_path / f"a{suffix}")
    record = read_lineage(tmp_path / f"a{suffix}")
    assert record is not None
    assert (record["command"], record["options"], record["counts"]) == ("test", {"a": 1}, {"documents": 500})


@pytest.mark.filterwarnings("ignore:.*lineage record")
def test_damaged_parquet_is_an_error_of_one_line(tmp_path: Path) -> None:
    """Property: with changed bytes anywhere, content and lineage are read, or an LlmkitError names the file; as an output, a
    damaged file is not replaced without -f."""
    path = tmp_path / "a.parquet"
    write(path)
    intact, random = path.read_bytes(), np.random.default_rng(1)
    damaged = [b"", b"PAR1", intact[:-9], b"PAR1" + bytes(40) + b"PAR1"]
    for _ in range(200):  # most of them in the footer
        data = np.frombuffer(intact, np.uint8).copy()
        data[random.integers(len(data) - 3000, len(data), 3)] = random.integers(0, 256, 3)
        damaged.append(data.tobytes())
    failed = 0
    for data in damaged:
        path.write_bytes(data)
        for read in (read_lineage, read_all):
            try:
                read(path)
            except LlmkitError as error:
                assert error.message.startswith(f"{path}:"), error.message
                failed += 1
    assert failed > 200
    path.write_bytes(b"PAR1")
    with pytest.raises(LlmkitError, match="exists"):
        write(path)


def test_gzip_lineage_longer_than_one_extra_field(tmp_path: Path) -> None:
    """Behaviour: 200 kB of lineage span several gzip members and are read back complete."""
    path = tmp_path / "a.jsonl.gz"
    with DocumentWriter(str(path), Lineage("test", {"long": "x" * 200_000})) as writer:
        writer.write(LINES)
        writer.finish({}, [])
    record = read_lineage(path)
    assert record is not None and len(record["options"]["long"]) == 200_000
    assert gzip.decompress(path.read_bytes()) == LINES


def test_parquet_round_trip(tmp_path: Path) -> None:
    """Parity with pyarrow.parquet: it reads the rows that were written."""
    import pyarrow.parquet as pq

    rows = [
        {"id": "a", "text": "one"},
        {"id": "b", "text": "two", "score": 0.5},
        {"id": "c", "text": "three", "score": None},
    ]
    write(tmp_path / "a.parquet", b"".join(orjson.dumps(row) + b"\n" for row in rows))
    assert pq.read_table(tmp_path / "a.parquet").column("text").to_pylist() == ["one", "two", "three"]
    assert [orjson.loads(line).get("score") for line in read_all(tmp_path / "a.parquet").splitlines()] == [
        None,
        0.5,
        None,
    ]


def test_parquet_with_clashing_types_is_refused(tmp_path: Path) -> None:
    """Behaviour: a field that holds text and lists has no column type; no file is left."""
    with pytest.raises(LlmkitError, match="field 'x', row 2"):
        write(tmp_path / "a.parquet", b'{"text":"a","x":"t"}\n{"text":"a","x":[1]}\n')
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{bad", "invalid JSON"),
        (b'{"text":"\xff"}', "invalid UTF-8"),
        (b'{"x":1}', "no field 'text'"),
        (b'{"text":3}', "not a string"),
        (b"[1]", "not a JSON object"),
        (b'{"text":"\\ud800"}', "invalid JSON"),
    ],
)
def test_bad_line_stops_with_file_and_line(tmp_path: Path, line: bytes, reason: str) -> None:
    """Behaviour: the message names file, line and reason; skip counts the line; quarantine stores it."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text":"ok"}\n\n' + line + b"\n" + b'{"text":"last"}')
    with pytest.raises(LlmkitError, match=f"a.jsonl:3: .*{reason}"):
        read_all(path)
    assert read_all(path, on_bad_line="skip") == b'{"text":"ok"}\n{"text":"last"}\n'
    aside = tmp_path / "aside.jsonl"
    read_all(path, on_bad_line=f"quarantine={aside}")
    row = json.loads(aside.read_bytes())
    assert row["line"] == 3 and reason in row["reason"]


def test_a_failing_run_leaves_no_quarantine_file(tmp_path: Path) -> None:
    """Behaviour: an exception inside the block leaves neither the file nor its partial."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"{bad\n")
    with (
        pytest.raises(RuntimeError),
        DocumentReader([str(path)], ReadOptions(on_bad_line=f"quarantine={tmp_path}/q.jsonl")) as reader,
    ):
        list(reader.documents())
        raise RuntimeError
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl"]


def test_line_over_the_limit(tmp_path: Path) -> None:
    """Behaviour: a line over the limit is one bad line, and the next ones are read."""
    path = tmp_path / "a.jsonl"
    long = b'{"text":"' + b"x" * 5_000_000 + b'"}\n'
    path.write_bytes(b'{"text":"a"}\n' + long + b'{"text":"b"}\n{"text":"' + b"y" * 2000 + b'"}\n')
    assert read_all(path, max_line_bytes=1000, on_bad_line="skip") == b'{"text":"a"}\n{"text":"b"}\n'
    with pytest.raises(LlmkitError, match="a.jsonl:2: line of over 1000 bytes"):
        read_all(path, max_line_bytes=1000)


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress, zstandard.ZstdCompressor().compress])
def test_truncated_and_corrupt_streams(tmp_path: Path, compress) -> None:
    """Behaviour: a truncated or damaged file is named, for every compression."""
    import random

    noise = b"".join(orjson.dumps({"text": random.Random(i).randbytes(40).hex()}) + b"\n" for i in range(3000))
    packed = compress(noise)
    path = tmp_path / "a.jsonl"
    path.write_bytes(packed[: len(packed) // 2])
    with pytest.raises(LlmkitError, match="a.jsonl: (truncated|corrupt)"):
        read_all(path, on_bad_line="skip")
    damaged = bytearray(packed)
    damaged[len(damaged) // 2] ^= 0xFF
    path.write_bytes(bytes(damaged))
    try:
        assert read_all(path, on_bad_line="skip") != noise
    except LlmkitError as error:
        assert "a.jsonl" in error.message


def test_stream_without_its_trailer_is_refused(tmp_path: Path) -> None:
    """Behaviour: a complete zstd frame whose writer died before the trailer is not accepted as a complete file."""
    path = tmp_path / "a.jsonl.zst"
    write(path)
    data = path.read_bytes()
    path.write_bytes(data[: data.rindex(b"\x5b\x2a\x4d\x18")])
    with pytest.raises(LlmkitError, match="ends before its trailer"):
        read_all(path)


def test_bomb_uses_bounded_memory(tmp_path: Path) -> None:
    """Behaviour: 1 GiB of zeros in a few kB is one line over the limit, read in less than 600 MiB."""
    path = tmp_path / "bomb.jsonl.zst"
    packer = zstandard.ZstdCompressor().compressobj()
    with open(path, "wb") as sink:
        for _ in range(1024):
            sink.write(packer.compress(bytes(1 << 20)))
        sink.write(packer.flush())
    code = f"""
from llmkit.io.documents import DocumentReader, ReadOptions
reader = DocumentReader([{str(path)!r}], ReadOptions(on_bad_line="skip"))
assert not list(reader.documents()) and reader.bad == 1
# VmHWM: ru_maxrss would hold what the test runner had in use when it forked.
print(next(int(line.split()[1]) // 1024 for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 600


def test_xz_dictionary_over_the_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behaviour: what xz -9 writes is read; a dictionary of 1.5 GiB in a few bytes is refused before it is allocated."""
    path = tmp_path / "a.jsonl.xz"
    for preset in (0, 9):
        path.write_bytes(lzma.compress(b'{"text":"a"}\n', preset=preset))
        assert read_all(path) == b'{"text":"a"}\n'
    packed = bytearray(path.read_bytes())
    position = packed.index(b"\x21\x01") + 2  # filter LZMA2, one byte of properties: the size of the dictionary
    packed[position] = 37
    end = 12 + 4 * packed[12]  # of the block header, before its CRC32
    packed[end : end + 4] = zlib.crc32(packed[12:end]).to_bytes(4, "little")
    path.write_bytes(packed)
    with pytest.raises(LlmkitError, match="needs more than 256 MiB"):
        read_all(path)


def test_windows_follow_one_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behaviour: zstd windows and xz dictionaries up to 256 MiB are read, or up to --memory; an error says the way out."""
    import zstandard

    from llmkit import memory

    text = b'{"text":"a"}\n'
    parameters = zstandard.ZstdCompressionParameters(window_log=31, write_content_size=False)
    large = {
        "a.zst": zstandard.ZstdCompressor(compression_params=parameters).compressobj(),
        "a.xz": lzma.LZMACompressor(filters=[{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 1 << 26}]),
    }
    for name, compressor in large.items():
        (tmp_path / name).write_bytes(compressor.compress(text) + compressor.flush())
        monkeypatch.setattr(memory, "WINDOW", 1 << 24)
        monkeypatch.setattr(memory, "_budget", 0)
        with pytest.raises(LlmkitError, match="MiB of memory to decompress") as error:
            read_all(tmp_path / name)
        assert (
            "--memory" in error.value.hint
            and f"{'zstd -dc --long=31' if name == 'a.zst' else 'xz -dc'} FILE" in error.value.hint
        )
        monkeypatch.setattr(memory, "_budget", 2 << 30)
        assert read_all(tmp_path / name) == text
        monkeypatch.setattr(memory, "_budget", 0)


@pytest.mark.parametrize("exponent", range(32))
def test_any_window_in_a_frame_s_header(exponent: int, tmp_path: Path) -> None:
    """Behaviour: every window that a header can declare is read, or an error says what is wrong with the file."""
    text = b'{"text":"a"}\n'
    compressor = zstandard.ZstdCompressor(
        compression_params=zstandard.ZstdCompressionParameters(write_content_size=False)
    )
    stream = compressor.compressobj()
    frame = bytearray(stream.compress(text) + stream.flush())
    assert not frame[4] & 0x20  # a window follows
    frame[5] = exponent << 3
    (tmp_path / "a.zst").write_bytes(frame)
    outcome: bytes | str
    try:
        outcome = read_all(tmp_path / "a.zst")
    except LlmkitError as error:
        outcome = error.message
    if exponent <= 18:  # 2 ** 28 bytes
        assert outcome == text
    else:
        assert re.search("MiB of memory to decompress" if exponent <= 21 else "corrupt zstd data", str(outcome))


def test_notes_of_any_number_are_read_in_linear_time(tmp_path: Path) -> None:
    """Behaviour: a note in many gzip members is gathered without copying it each time, and dropped over the limit; one
    of very many values is unreadable."""
    from llmkit.io import compression

    def member(part: bytes) -> bytes:
        extra = b"LK" + len(part).to_bytes(2, "little") + part
        head = b"\x1f\x8b\x08\x04" + bytes(6) + len(extra).to_bytes(2, "little") + extra
        return head + b"\x03\x00" + bytes(8)

    one = member(b"\1" + b" " * 65_000)
    assert gzip.decompress(one) == b""
    path, seconds = tmp_path / "a.jsonl.gz", []
    for members in (150, 1200):  # to 78 MB
        path.write_bytes(one * members + member(b"\0") + gzip.compress(b'{"text":"a"}\n'))
        begin = time.process_time()
        assert read_all(path) == b'{"text":"a"}\n'
        seconds.append(time.process_time() - begin)
    assert seconds[1] < 24 * max(seconds[0], 0.05)
    notes = compression.Notes()
    for count in (1000, compression.MAX_NOTE_VALUES):
        content = b"[" + b"[]," * count + b"0]"
        notes.add(compression.NOTE_PREFIX + b'{"kind":"header","content":{"a":' + content + b"}}")
    assert ["too many" in str(content) for _, content in notes.entries] == [False, True]


def test_byte_order_mark_and_crlf(tmp_path: Path) -> None:
    """Behaviour: a BOM at the start and CR before the newline are not part of the document."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text":"a"}\r\n{"text":"b"}\r\n')
    assert read_all(path) == b'{"text":"a"}\n{"text":"b"}\n'


def test_missing_id_is_the_hash_of_the_text() -> None:
    """Parity with xxhash: id is xxh3-128 of the UTF-8 text; numbers become text."""
    import xxhash

    documents, bad = parse(Chunk("f", 1, b'{"text":"caf\xc3\xa9"}\n{"text":"b","id":7}\n'), ReadOptions())
    assert not bad
    assert [d.id for d in documents] == [xxhash.xxh3_128_hexdigest("caf\u00e9".encode()), "7"]


def test_output_with_unknown_suffix_is_a_usage_error() -> None:
    """Behaviour: the suffix decides the format, so an unknown one is refused before any work."""
    with pytest.raises(UsageError, match="unknown document format"):
        DocumentWriter("out.docx", Lineage("test"))


@settings(max_examples=30, deadline=None)
@given(cuts=st.lists(st.integers(0, len(LINES)), max_size=20))
def test_output_bytes_do_not_depend_on_the_writes(tmp_path_factory, cuts: list[int]) -> None:
    """Property: the same content gives the same file, however it was divided into writes."""
    directory = tmp_path_factory.mktemp("cuts")
    write(directory / "whole.jsonl.zst")
    edges = [0, *sorted(cuts), len(LINES)]
    with DocumentWriter(str(directory / "cut.jsonl.zst"), Lineage("test", {"a": 1})) as writer:
        for start, stop in zip(edges, edges[1:], strict=False):
            writer.write(LINES[start:stop])
        writer.finish({"documents": 500}, [])
    assert (directory / "whole.jsonl.zst").read_bytes() == (directory / "cut.jsonl.zst").read_bytes()


def test_digest_is_independent_of_compression(tmp_path: Path) -> None:
    """Property: zst, gz and plain files of equal lines have the same digest, which is the one in the trailer."""
    for suffix in (".jsonl", ".jsonl.zst", ".jsonl.gz"):
        write(tmp_path / f"a{suffix}")
    digests = {digest_path(tmp_path / f"a{suffix}") for suffix in (".jsonl", ".jsonl.zst", ".jsonl.gz")}
    record = read_lineage(tmp_path / "a.jsonl.zst")
    assert record is not None and digests == {record["digest"]}


@pytest.mark.parametrize("size", [0, 1, (1 << 17) - 1, 1 << 17, (1 << 17) + 1, BLOCK, 2 * BLOCK + 7])
def test_stored_frames_are_read_by_others(size: int) -> None:
    """Parity: python-zstandard and pyarrow read the frame of a pipe and verify its checksum; the sizes of writes do not matter."""
    import pyarrow as pa

    data = LINES * (size // len(LINES)) + LINES[: size % len(LINES)]
    sink, cut = io.BytesIO(), io.BytesIO()
    for target, pieces in ((sink, [data]), (cut, [data[: size // 3], data[size // 3 : size // 2], data[size // 2 :]])):
        output = ZstdOutput(target, STORED)
        for piece in pieces:
            output.write(piece)
        output.finish()
    stored = sink.getvalue()
    assert stored == cut.getvalue() and len(stored) <= size + 6 + 3 * (size // StoredFrame.MAX_BLOCK + 2) + 4
    assert zstandard.get_frame_parameters(stored).has_checksum
    assert zstandard.ZstdDecompressor().stream_reader(stored).read() == data
    with pa.CompressedInputStream(io.BytesIO(stored), "zstd") as stream:
        assert stream.read() == data
    if size:
        damaged = bytearray(stored)
        damaged[9] ^= 1
        with pytest.raises(zstandard.ZstdError):
            zstandard.ZstdDecompressor().stream_reader(bytes(damaged)).read()


class Trickle(io.RawIOBase):
    """Bytes that are returned in reads of the given sizes, in turn."""

    def __init__(self, data: bytes, sizes: list[int]) -> None:
        self._data, self._sizes = data, sizes

    def read(self, size: int = -1) -> bytes:
        self._sizes = self._sizes[1:] + self._sizes[:1]
        count = min(size, self._sizes[0])
        block, self._data = self._data[:count], self._data[count:]
        return block


ROW = st.integers(1, 60).map(lambda n: b'{"text":"' + b"x" * n + b'"}')
LINE = st.one_of(ROW, ROW, st.sampled_from([b"", b" ", b"{", b"[1]", b'{"text":"\xff"}', b'{"x":1}', b'{"text":"']))


@settings(max_examples=300, deadline=None)
@given(
    lines=st.lists(st.tuples(LINE, st.booleans()), max_size=30),
    ended=st.booleans(),
    mark=st.booleans(),
    sizes=st.lists(st.integers(1, 90), min_size=1, max_size=4),
    chunk=st.integers(1, 300),
)
def test_lines_do_not_depend_on_the_reads(lines, ended: bool, mark: bool, sizes: list[int], chunk: int) -> None:
    """Property: whatever the sizes of reads, documents and bad lines are those of the content split at its newlines."""
    data = b"\n".join(line + b"\r" * cr for line, cr in lines) + b"\n" * ended
    expected, bad_lines = [], []
    for number, line in enumerate(data.split(b"\n"), 1):
        line = line.removesuffix(b"\r")
        try:
            if len(line) <= 40:
                assert isinstance(json.loads(line)["text"], str)
                expected.append((number, line))
                continue
        except (ValueError, KeyError, TypeError):
            pass
        if line.strip():
            bad_lines.append((number, line if len(line) <= 40 else b""))
    reader = DocumentReader(["-"], ReadOptions(max_line_bytes=40))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llmkit.io.documents.CHUNK_BYTES", chunk)
        patch.setattr("llmkit.io.documents.PIECE_BYTES", 1)
        raw = Trickle(b"\xef\xbb\xbf" * mark + data, sizes)
        parsed = [parse(piece, reader.options) for piece in reader._line_chunks("x", raw, [])]
    assert [(d.line, d.raw) for documents, _ in parsed for d in documents] == expected
    assert b"".join(d.encode() for documents, _ in parsed for d in documents) == b"".join(
        x + b"\n" for _, x in expected
    )
    assert [(item.line, item.raw) for _, bad in parsed for item in bad] == bad_lines


@pytest.mark.parametrize("suffix, compress", [("bz2", bz2.compress), ("xz", lzma.compress)])
def test_damage_after_the_first_stream(tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]) -> None:
    """Behaviour: of concatenated streams, padded or not, each is read; one that is damaged anywhere is not the end."""
    lines = [b"".join(b'{"text": "%d"}\n' % n for n in range(start, start + 50)) for start in (0, 50, 100)]
    first, second, third = map(compress, lines)
    path = tmp_path / f"d.jsonl.{suffix}"
    for padding in (b"", b"\0" * 8):
        path.write_bytes(padding.join((first, second, third)))
        assert [document.text for document in DocumentReader([str(path)]).documents()] == [str(n) for n in range(150)]
    for position in (0, 4, len(second) // 2, len(second) - 1):
        damaged = bytearray(second)
        damaged[position] ^= 16
        path.write_bytes(first + damaged + third)
        with pytest.raises(LlmkitError, match="damaged|corrupt"):
            list(DocumentReader([str(path)]).documents())
    path.write_bytes(first + b'{"text": "plain"}\n')
    with pytest.raises(LlmkitError, match="after the end of a stream"):
        list(DocumentReader([str(path)]).documents())

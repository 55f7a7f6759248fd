"""Views of files whose parts stand behind a compression, a length or a checksum (mutation.View)."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import struct
from collections.abc import Iterator
from io import BytesIO

from mutation import View

from llmkit.io.compression import NOTE_MAGIC, NOTE_PREFIX

NOTE_START = b"\x1f\x8b\x08\x04\0\0\0\0\0\xff"  # of an empty gzip member that holds a note
DUCKDB_HEADERS = 3 * 4096


def whole_json(data: bytes) -> Iterator[View]:
    """The file itself, which is JSON."""
    yield View(data, True, bytes)


def json_lines(data: bytes) -> Iterator[View]:
    """One line each."""
    lines = data.split(b"\n")
    for i, line in enumerate(lines[:50]):
        if line:
            yield View(line, True, lambda new, i=i: b"\n".join([*lines[:i], new, *lines[i + 1 :]]))


def compressed(data: bytes) -> Iterator[View]:
    """The content of a file in one of the four compressions, and the lineage notes of zstd and gzip files."""
    import zstandard

    if data.startswith(b"\xfd7zXZ"):
        yield View(lzma.decompress(data), False, lzma.compress)
    elif data.startswith(b"BZh"):
        yield View(bz2.decompress(data), False, bz2.compress)
    elif data.startswith((b"\x28\xb5\x2f\xfd", NOTE_MAGIC)):
        parts = _zstd_parts(data)
        for i, (kind, content) in enumerate(parts):
            is_note = kind == "note" and content.startswith(NOTE_PREFIX)
            body = content.removeprefix(NOTE_PREFIX) if is_note else content

            def rebuild(new: bytes, i: int = i, is_note: bool = is_note, kind: str = kind) -> bytes:
                changed = [*parts[:i], (kind, NOTE_PREFIX + new if is_note else new), *parts[i + 1 :]]
                return b"".join(
                    NOTE_MAGIC + struct.pack("<I", len(c)) + c if k == "note" else zstandard.compress(c)
                    for k, c in changed
                )

            yield View(body, is_note, rebuild)
    elif data.startswith(b"\x1f\x8b"):
        start = 0
        while data.startswith(NOTE_START, start):
            (size,) = struct.unpack_from("<H", data, start + 10)
            begin, end = start + 12 + 5 + len(NOTE_PREFIX), start + 12 + size

            def rebuild(new: bytes, start: int = start, begin: int = begin, end: int = end) -> bytes:
                extra = b"LK" + struct.pack("<H", len(new) + 1 + len(NOTE_PREFIX)) + b"\0" + NOTE_PREFIX + new
                return data[:start] + NOTE_START + struct.pack("<H", len(extra)) + extra + data[end:]

            yield View(data[begin:end], True, rebuild)
            start = end + 10
        yield View(gzip.decompress(data), False, lambda new: data[:start] + gzip.compress(new, mtime=0))


def _zstd_parts(data: bytes) -> list[tuple[str, bytes]]:
    import zstandard

    parts = []
    while data:
        if data.startswith(NOTE_MAGIC):
            (size,) = struct.unpack_from("<I", data, 4)
            parts.append(("note", data[8 : 8 + size]))
            data = data[8 + size :]
        else:
            frame = zstandard.ZstdDecompressor().decompressobj()
            parts.append(("frame", frame.decompress(data)))
            data = frame.unused_data
    return parts


def safetensors_header(data: bytes) -> Iterator[View]:
    """The JSON header, its length kept right, and the lineage record in it."""
    (size,) = struct.unpack_from("<Q", data)
    header, rest = data[8 : 8 + size], data[8 + size :]

    def with_header(new: bytes) -> bytes:
        return struct.pack("<Q", len(new)) + new + rest

    yield View(header, True, with_header)
    content = json.loads(header)
    if "llmkit" in content.get("__metadata__", {}):
        record = content["__metadata__"]["llmkit"].encode()

        def with_record(new: bytes) -> bytes:
            content["__metadata__"]["llmkit"] = new.decode("utf-8", "replace")
            return with_header(json.dumps(content).encode())

        yield View(record, True, with_record)


def inner_record(data: bytes) -> Iterator[View]:
    """The lineage record in a tokenizer_config.json, and the record in a plan."""
    if data.lstrip().startswith(b"{"):
        content = json.loads(data)
        text = json.dumps(content["llmkit"]).encode()
        yield View(text, True, lambda new: json.dumps(content | {"llmkit": json.loads(new)}).encode())
        return
    start = data.index(b"llmkit = ") + 9
    end = data.index(b"\n", start)
    text = json.loads(data[start:end]).encode()
    yield View(text, True, lambda new: data[:start] + json.dumps(new.decode("utf-8", "replace")).encode() + data[end:])


def arrow_metadata(data: bytes) -> Iterator[View]:
    """The values in the schema metadata and in the last batch of an Arrow stream, each of them JSON."""
    import pyarrow as pa

    if data[:4] != b"\xff" * 4:
        return
    stream = pa.ipc.open_stream(data)
    schema, batches = stream.schema, []
    while True:
        try:
            batches.append(stream.read_next_batch_with_custom_metadata())
        except StopIteration:
            break

    def written(metadata: dict[bytes, bytes], last: dict[bytes, bytes]) -> bytes:
        sink = BytesIO()
        with pa.ipc.new_stream(sink, schema.with_metadata(metadata)) as writer:
            for i, (batch, custom) in enumerate(batches):
                writer.write_batch(batch, custom_metadata=last if i + 1 == len(batches) else custom)
        return sink.getvalue()

    first, last = dict(schema.metadata or {}), dict(batches[-1][1] or {})
    for key, value in first.items():
        yield View(value, True, lambda new, key=key: written(first | {key: new}, last))
    for key, value in last.items():
        yield View(value, True, lambda new, key=key: written(first, last | {key: new}))


def parquet_record(data: bytes) -> Iterator[View]:
    """The lineage record in a Parquet file, and each column's values as JSON, written again without checksums."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if data[:4] != b"PAR1":
        return
    table = pq.ParquetFile(BytesIO(data)).read()

    def written(table: pa.Table) -> bytes:
        sink = BytesIO()
        pq.write_table(table, sink)
        return sink.getvalue()

    metadata = dict(table.schema.metadata or {})
    if b"llmkit" in metadata:
        yield View(
            metadata[b"llmkit"], True, lambda new: written(table.replace_schema_metadata(metadata | {b"llmkit": new}))
        )
    rows = json.dumps(table.to_pylist()[:20], default=str).encode()
    yield View(rows, True, lambda new: written(pa.Table.from_pylist(json.loads(new)).replace_schema_metadata(metadata)))


def duckdb_block(data: bytes) -> Iterator[View]:
    """Each header and block of a DuckDB file behind its checksum, which is made right again."""
    import numpy as np

    from llmkit.corpus.dedup.index import FACTOR, START

    header = struct.unpack_from("<Q", data, 4096 + 8 * 7)[0] if len(data) > DUCKDB_HEADERS else 0
    size = header if header in (16384, 1 << 18) else 16384
    bounds = [(i * 4096, (i + 1) * 4096) for i in range(3)]
    bounds += [(start, start + size) for start in range(DUCKDB_HEADERS, len(data) - size + 1, size)]
    for start, stop in bounds:

        def rebuild(new: bytes, start: int = start, stop: int = stop) -> bytes:
            body = new[: stop - start - 8].ljust(stop - start - 8, b"\0")
            words = np.frombuffer(body, "<u8") * FACTOR
            checksum = int(np.bitwise_xor.reduce(words) ^ START)
            return data[:start] + struct.pack("<Q", checksum) + body + data[stop:]

        content = data[start + 8 : stop]
        yield View(content.rstrip(b"\0") or content, False, rebuild)


def warc_members(data: bytes) -> Iterator[View]:
    """The members of a compressed archive, one each, compressed again."""
    members, rest = [], data
    while rest.startswith(b"\x1f\x8b"):
        import zlib

        member = zlib.decompressobj(wbits=31)
        members.append(member.decompress(rest))
        rest = member.unused_data
    for i, content in enumerate(members):
        yield View(
            content,
            False,
            lambda new, i=i: b"".join(gzip.compress(new if j == i else m, mtime=0) for j, m in enumerate(members)),
        )

"""Parquet rows as JSON lines.

Reading holds one record batch in memory. The forms of values that JSON lacks (dates, bytes, NaN, ...) are those of
io/arrow_values.py. What is needed to write rows with the types of the file again is returned as `Columns`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from llmkit.errors import LlmkitError
from llmkit.io.arrow_values import to_json
from llmkit.io.compression import BLOCK
from llmkit.io.digest import digest_stored, digest_text
from llmkit.io.inputs import display_name, open_raw
from llmkit.io.record import Input, base_name, parse_record

BATCH_ROWS = 1024


@dataclass(frozen=True, slots=True)
class Columns:
    """Names, types and metadata of the columns of a file, and the number of rows of its largest row group."""

    schema: pa.Schema
    group_rows: int


def read_lines(raw: BinaryIO, name: str) -> Iterator[tuple[bytes, int]]:
    """(JSON lines, number of rows) of each batch."""
    with _readable(name):
        file = pq.ParquetFile(raw)
        names = file.schema_arrow.names
        if repeated := sorted({field for field in names if names.count(field) > 1}):
            raise LlmkitError(f"{name}: two columns are called {repeated[0]!r}", "rename one of them")
        for batch in file.iter_batches(batch_size=BATCH_ROWS):
            columns = [_json_values(name, batch, i) for i in range(batch.num_columns)]
            rows = zip(*columns, strict=True) if columns else iter([()] * batch.num_rows)
            lines = [orjson.dumps(dict(zip(names, row, strict=True))) + b"\n" for row in rows]
            yield b"".join(lines), len(lines)


def _json_values(name: str, batch: pa.RecordBatch, i: int) -> list[Any]:
    try:
        return to_json(batch.column(i))
    except pa.ArrowNotImplementedError as error:
        field = batch.schema.field(i)
        raise LlmkitError(
            f"{name}: column {field.name!r}: values of type {field.type} have no form in JSON", "omit the column"
        ) from error


def read_record(path: str) -> bytes | None:
    """The lineage record in the metadata of a file, as text."""
    with open_raw(path) as raw, _readable(display_name(path)):
        return (pq.read_metadata(raw).metadata or {}).get(b"llmkit")


def describe(path: str, raw: BinaryIO | None = None, digest: str = "") -> Input:
    """Name, digest, own record and columns of a Parquet file; `raw` and `digest`: those of stdin."""
    with open_raw(path) if raw is None else nullcontext(raw) as source, _readable(display_name(path)):
        file = pq.ParquetFile(source)
        groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        columns = Columns(file.schema_arrow, max(groups, default=0))
        record = parse_record((file.metadata.metadata or {}).get(b"llmkit"))
    return Input("input", base_name(path), digest or digest_stored(path), record, columns=columns)


def files_digest(path: Path) -> str:
    """Digest of the rows as they are stored, which is everything before the file's metadata, and of the schema."""
    with open(path, "rb") as raw, _readable(str(path)):
        file = pq.ParquetFile(raw)
        for _ in file.iter_batches(BATCH_ROWS):  # damaged metadata may lead to other bytes
            pass
        raw.seek(-8, os.SEEK_END)
        end = raw.tell() - int.from_bytes(raw.read(4), "little")
        raw.seek(0)
        stored = xxhash.xxh3_128()
        while block := raw.read(min(BLOCK, end - raw.tell())):
            stored.update(block)
        return with_schema(stored, file.schema_arrow, file.metadata.num_rows)


def with_schema(stored: xxhash.xxh3_128, schema: pa.Schema, rows: int) -> str:
    """Digest of the stored rows, their columns and their number."""
    columns = [(field.name, str(field.type), field.nullable) for field in schema]
    stored.update(f"{columns} {rows}".encode())
    return digest_text(stored)


class DigestedSink:
    """A sink that digests what is written."""

    def __init__(self, sink: BinaryIO) -> None:
        self.state, self._sink, self.closed = xxhash.xxh3_128(), sink, False

    def write(self, data: bytes) -> int:
        self.state.update(data)
        return self._sink.write(data)

    def tell(self) -> int:
        return self._sink.tell()

    def flush(self) -> None:
        self._sink.flush()

    def close(self) -> None:
        """Leave the sink open: its owner completes it."""


@contextmanager
def _readable(name: str) -> Iterator[None]:
    """Turns errors of pyarrow into LlmkitErrors that name the file."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise LlmkitError(
            f"{name}: not a readable Parquet file ({lines[0]})", "the file is damaged or incomplete"
        ) from error

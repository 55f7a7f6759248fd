"""Parquet rows as JSON lines.

Reading holds one record batch in memory. The forms of values that JSON lacks (dates, bytes, NaN, ...) are those of
io/arrow_values.py. What is needed to write rows with the types of the file again is returned as `Columns`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, BinaryIO

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from llmkit.errors import LlmkitError
from llmkit.io.arrow_values import to_json
from llmkit.io.digest import digest_stored
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
        for batch in pq.ParquetFile(raw).iter_batches(batch_size=BATCH_ROWS):
            columns = [_json_values(name, batch, i) for i in range(batch.num_columns)]
            names = batch.schema.names
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
        return (pq.read_schema(raw).metadata or {}).get(b"llmkit")


def describe(path: str, raw: BinaryIO | None = None, digest: str = "") -> Input:
    """Name, digest, own record and columns of a Parquet file; `raw` and `digest`: those of stdin."""
    with open_raw(path) if raw is None else nullcontext(raw) as source, _readable(display_name(path)):
        file = pq.ParquetFile(source)
        groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        columns = Columns(file.schema_arrow, max(groups, default=0))
        record = parse_record((columns.schema.metadata or {}).get(b"llmkit"))
    return Input("input", base_name(path), digest or digest_stored(path), record, columns)


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

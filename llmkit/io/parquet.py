"""Parquet rows as JSON lines.

Reading holds one record batch in memory, of at most 1,024 rows and fewer where these need more than the budget for
memory (memory.py), and verifies the checksums of pages where the writer stored them. The forms of
values that JSON lacks (dates, bytes, NaN, ...) are those of io/arrow_values.py. What is needed to write rows with the
types of the file again is returned as `Columns`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from llmkit.errors import LlmkitError
from llmkit.io.arrow_values import as_strings, is_bytes, to_json
from llmkit.io.compression import BLOCK
from llmkit.io.digest import digest_stored, digest_text
from llmkit.io.inputs import display_name, open_raw
from llmkit.io.record import Input, base_name, parse_record, record_or_warning
from llmkit.memory import MemoryLimitError, limited

# Other allocators reserve a gigabyte, within which no limit holds.
pa.set_memory_pool(pa.system_memory_pool())

PART_BYTES = 16 << 20
BATCH_ROWS = (1024, 32, 1)  # the next where a batch needs too much memory
STRING_FIELDS = ("source", "url", "language")  # of documents, besides id and text


@dataclass(frozen=True, slots=True)
class Columns:
    """Names, types and metadata of the columns of a file, and the number of rows of its largest row group.

    `texts`: the BINARY columns that are read as text.
    """

    schema: pa.Schema
    group_rows: int
    texts: frozenset[str] = frozenset()


class BadRow(NamedTuple):
    """A row with a string that is not UTF-8: number in the batch, reason, and the row as JSON with these bytes."""

    number: int
    reason: str
    raw: bytes


class ParquetRows:
    """The rows of a file. `texts` is complete once the first have been read."""

    def __init__(self, raw: BinaryIO, name: str, text_key: str, id_key: str) -> None:
        self.texts: frozenset[str] = frozenset()
        self._raw, self._name, self._text_key, self._id_key = raw, name, text_key, id_key

    def lines(self) -> Iterator[tuple[bytes, int, list[BadRow]]]:
        """(JSON lines, number of lines, bad rows) of each batch; a bad row is an empty line."""
        with _readable(self._name):
            with limited(self._name):
                file = pq.ParquetFile(self._raw, page_checksum_verification=True)
            names = file.schema_arrow.names
            if repeated := sorted({field for field in names if names.count(field) > 1}):
                raise LlmkitError(f"{self._name}: two columns are called {repeated[0]!r}", "rename one of them")
            self.texts = self._text_columns(file)
            for batch in _batches(file, self._name):
                for name in self.texts:
                    batch = batch.set_column(names.index(name), name, as_strings(batch.column(name)))
                for part in _parts(batch):
                    yield from self._convert(part)

    def _convert(self, batch: pa.RecordBatch) -> Iterator[tuple[bytes, int, list[BadRow]]]:
        """The lines of a batch, in parts where the whole needs too much memory."""
        rows = batch.num_rows
        try:
            with limited(self._name):
                whole = [self._lines_and_bad(batch)]
        except MemoryLimitError:
            if rows < 2:
                raise
            whole = []
        yield from whole
        if not whole:  # outside of the except block, which would keep what was made until the limit
            yield from self._convert(batch.slice(0, rows // 2))
            yield from self._convert(batch.slice(rows // 2))

    def _lines_and_bad(self, batch: pa.RecordBatch) -> tuple[bytes, int, list[BadRow]]:
        bad: list[BadRow] = []
        try:
            lines = self._lines(batch)
        except UnicodeDecodeError:
            lines = []
            for number in range(batch.num_rows):
                row = batch.slice(number, 1)
                try:
                    lines += self._lines(row)
                except UnicodeDecodeError:
                    lines.append(b"\n")
                    bad.append(_bad_row(number, row))
        return b"".join(lines), len(lines), bad

    def _text_columns(self, file: pq.ParquetFile) -> frozenset[str]:
        """The BINARY columns that hold text, which many writers do not declare: that of the text in any case, those of
        the other strings of a document, and all those of other rows, if all of their values are UTF-8.
        """
        schema = file.schema_arrow
        names = {name for name in schema.names if is_bytes(schema.field(name).type)}
        others = (names & {self._id_key, *STRING_FIELDS} if self._text_key else names) - {self._text_key}
        return frozenset(names & {self._text_key} | {name for name in others if _is_text(file, self._name, name)})

    def _lines(self, batch: pa.RecordBatch) -> list[bytes]:
        columns = [self._json_values(batch, i) for i in range(batch.num_columns)]
        rows = zip(*columns, strict=True) if columns else iter([()] * batch.num_rows)
        names = batch.schema.names
        return [orjson.dumps(dict(zip(names, row, strict=True))) + b"\n" for row in rows]

    def _json_values(self, batch: pa.RecordBatch, i: int) -> list[Any]:
        try:
            return to_json(batch.column(i))
        except pa.ArrowNotImplementedError as error:
            field = batch.schema.field(i)
            raise LlmkitError(
                f"{self._name}: column {field.name!r}: values of type {field.type} have no form in JSON",
                "omit the column",
            ) from error


def _batches(file: pq.ParquetFile, name: str, columns: list[str] | None = None) -> Iterator[pa.RecordBatch]:
    """The rows of a file; MemoryLimitError where a single one needs more than the budget."""
    done = 0
    for rows in BATCH_ROWS:
        batches, position = file.iter_batches(rows, columns=columns), 0
        try:
            while True:
                with limited(name):
                    batch = next(batches, None)
                if batch is None:
                    return
                position += batch.num_rows
                if position > done:
                    yield batch.slice(max(0, batch.num_rows - position + done))
                    done = position
        except MemoryLimitError:
            if rows == BATCH_ROWS[-1]:
                raise


def _parts(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """The rows of a batch in parts of about PART_BYTES, or of one row: all rows may have a text that is stored once."""
    size = sum(map(_size, batch.columns))
    rows = max(1, batch.num_rows // (1 + size // PART_BYTES))
    for start in range(0, batch.num_rows, rows):
        yield batch.slice(start, rows)


def _size(column: pa.Array) -> int:
    """The size of the values of a column in bytes, about."""
    texts = (pa.string(), pa.large_string(), pa.binary(), pa.large_binary())
    if not isinstance(column, pa.DictionaryArray) or column.dictionary.type not in texts:
        return int(column.nbytes)
    return int(pc.sum(pc.binary_length(column.dictionary).take(column.indices)).as_py() or 0)


def _is_text(file: pq.ParquetFile, name: str, column_name: str) -> bool:
    try:
        for batch in _batches(file, name, [column_name]):
            for column in batch.columns:
                as_strings(column).validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


def _bad_row(number: int, row: pa.RecordBatch) -> BadRow:
    """A row with at least one string that is not UTF-8."""
    reason, fields = "", dict[str, Any]()
    for name, column in zip(row.schema.names, row.columns, strict=True):
        fields[name] = to_json(column, escape=True)[0]
        try:
            to_json(column)
        except UnicodeDecodeError as error:
            reason = reason or f"field {name!r}: invalid UTF-8 (byte {error.start})"
    text = json.dumps(fields, ensure_ascii=False, separators=(",", ":"))
    return BadRow(number, reason, text.encode("utf-8", "surrogateescape"))


def read_record(path: str) -> bytes | None:
    """The lineage record in the metadata of a file, as text."""
    with open_raw(path) as raw, _readable(display_name(path)):
        return (pq.read_metadata(raw).metadata or {}).get(b"llmkit")


def describe(path: str, raw: BinaryIO | None = None, digest: str = "", texts: frozenset[str] = frozenset()) -> Input:
    """Name, digest, own record and columns of a Parquet file; `raw` and `digest`: those of stdin."""
    with open_raw(path) if raw is None else nullcontext(raw) as source, _readable(display_name(path)):
        file = pq.ParquetFile(source)
        groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        columns = Columns(file.schema_arrow, max(groups, default=0), texts)
        value = (file.metadata.metadata or {}).get(b"llmkit")
    record = record_or_warning(parse_record, value, display_name(path))
    return Input("input", base_name(path), digest or digest_stored(path), record, columns=columns)


def files_digest(path: Path) -> str:
    """Digest of the rows as they are stored, which is everything before the file's metadata, and of the schema."""
    with open(path, "rb") as raw, _readable(str(path)):
        file = pq.ParquetFile(raw)
        for _ in _batches(file, str(path)):  # damaged metadata may lead to other bytes
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

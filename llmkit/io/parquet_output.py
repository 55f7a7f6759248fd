"""JSON lines as a Parquet file.

A column of the Parquet inputs keeps its type, its metadata and its place, and the file keeps the metadata of the first
input and the size of its row groups. A column that a stage adds, that comes from JSON, or in which a value no longer
has its type, has the type of its JSON values; one in which they have incompatible types is an error that names row
and field. Strings such as "NaN" among numbers are the numbers that JSON lacks (io/arrow_values.py).

The schema of all rows must be known before the first is stored, so rows are spooled to a compressed temporary file
while their types are unified, and then written in row groups: memory is one row group, and disk space temporarily twice
the output.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import count
from types import TracebackType
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from llmkit.errors import LlmkitError
from llmkit.io.arrow_values import NON_FINITE, from_json
from llmkit.io.atomic import atomic_file
from llmkit.io.compression import Notes, ZstdOutput, decompress
from llmkit.io.inputs import is_remote
from llmkit.io.parquet import Columns, DigestedSink, with_schema
from llmkit.io.record import sealed
from llmkit.io.splice import exact_fields, may_hold_big_integer

GROUP_BYTES = 32 << 20  # of JSON in a row group, without a Parquet input
MAX_GROUP_BYTES = 16 * GROUP_BYTES  # of JSON in any row group
MISFITS = (pa.ArrowException, ValueError, TypeError, OverflowError, ArithmeticError)  # of values and a type


class _Misfit(Exception):
    """A value that does not have the type of its column."""

    def __init__(self, column: int, row: int, reason: str) -> None:
        super().__init__(reason)
        self.column, self.row = column, row


class ParquetOutput:
    """A Parquet file with one column per field of any row, compressed with zstd, lineage in the file metadata.

    With `json_only`, incompatible types are an error at once; otherwise only once it is known that no input names the
    type of the column.
    """

    def __init__(self, path: str, force: bool, json_only: bool = False) -> None:
        self._path = path
        self._force = force
        self._json_only = json_only
        self._stack = ExitStack()
        self._types: dict[str, pa.DataType] = {}  # of JSON values, by field
        self._conflicts: dict[str, str] = {}  # by field
        self._pending = bytearray()
        self._rows = 0  # before the pending ones
        self._record: dict[str, Any] = {}
        self._inputs: list[Columns] = []

    def __enter__(self) -> ParquetOutput:
        self._sink = self._stack.enter_context(atomic_file(self._path, self._force))
        directory = None if is_remote(self._path) else os.path.dirname(os.path.realpath(self._path))
        self._spool_file = self._stack.enter_context(tempfile.TemporaryFile(dir=directory))
        self._spool = ZstdOutput(self._spool_file, 1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def note(self, kind: str, content: dict[str, Any]) -> None:
        self._record |= content
        if kind == "trailer":  # the record is complete
            self._write_file()

    def write(self, data: bytes) -> None:
        self._spool.write(data)
        self._pending += data
        if len(self._pending) >= GROUP_BYTES // 8:
            self._widen_types()

    def keep_types(self, inputs: Iterable[Columns]) -> None:
        """Take the types of the columns of Parquet inputs. Call it before `finish`."""
        self._inputs += inputs

    def finish(self) -> None:
        self._widen_types()
        self._spool.finish()
        self._spool_file.flush()

    # The types.
    def _widen_types(self) -> None:
        """Add the fields and types of the pending rows."""
        rows = [_parse(line) for line in bytes(self._pending).split(b"\n") if line]
        self._pending.clear()
        for name in {key: None for row in rows for key in row}:
            values = [row.get(name) for row in rows]
            try:
                self._types[name] = self._type_with(name, values)
            except MISFITS as error:
                self._conflicts.setdefault(name, self._conflict(name, values, error))
                if self._json_only:
                    self._refuse(name)
        self._rows += len(rows)

    def _type_with(self, name: str, values: list[Any]) -> pa.DataType:
        """The type of a field with more values."""
        try:
            new = pa.array(values).type
        except MISFITS:
            if not any(isinstance(value, (int, float)) for value in values):
                raise
            new = pa.array([NON_FINITE.get(v, v) if isinstance(v, str) else v for v in values]).type
        return _unified(self._types[name], new) if name in self._types else new

    def _conflict(self, name: str, values: list[Any], error: Exception) -> str:
        """Name the first of `values` that has another type than those before it."""
        low, high = 0, len(values)  # the first `low` values fit, the first `high` do not
        while high - low > 1:
            middle = (low + high) // 2
            try:
                self._type_with(name, values[:middle])
                low = middle
            except MISFITS:
                high = middle
        location = f"field {name!r}, row {self._rows + high:,}: {_shown(values[high - 1])}"
        if low or name in self._types:
            return f"{location} follows values of type {self._type_with(name, values[:low])}"
        return f"{location}: {str(error).splitlines()[0]}"

    def _refuse(self, name: str) -> None:
        raise LlmkitError(f"{self._path}: {self._conflicts[name]}", "write .jsonl.zst instead")

    def _schema(self) -> pa.Schema:
        """The columns of the inputs, then other fields."""
        fields: dict[str, pa.Field] = {}
        metadata: dict[bytes, bytes] = {}
        for columns in self._inputs:
            metadata = (columns.schema.metadata or {}) | metadata
            for field in columns.schema:
                known = fields.setdefault(field.name, field)
                if known.type != field.type:
                    try:
                        fields[field.name] = known.with_type(_unified(known.type, field.type)).with_nullable(True)
                    except MISFITS as error:
                        problem = f"field {field.name!r} is {known.type} in one input, {field.type} in another"
                        raise LlmkitError(f"{self._path}: {problem}", "write .jsonl.zst instead") from error
        present = [{*columns.schema.names} for columns in self._inputs]
        fields = {
            name: field if all(name in names for names in present) else field.with_nullable(True)
            for name, field in fields.items()
        }
        for name in self._conflicts:
            if name not in fields:
                self._refuse(name)
        for name, type in self._types.items():
            fields.setdefault(name, pa.field(name, type))
        if not fields:
            fields = {name: pa.field(name, pa.string()) for name in ("id", "text")}
        metadata.pop(b"llmkit", None)  # the record of an input
        return pa.schema([*fields.values()], metadata)

    # The file.
    def _write_file(self) -> None:
        schema = self._schema()
        while True:
            try:
                self._write_rows(schema)
                return
            except _Misfit as misfit:
                field = schema.field(misfit.column)
                if self._types.get(field.name, field.type) == field.type or is_remote(self._path):
                    problem = f"field {field.name!r}, row {misfit.row:,}: {misfit}"
                    raise LlmkitError(f"{self._path}: {problem}", "write .jsonl.zst instead") from misfit
                if field.name in self._conflicts:
                    self._refuse(field.name)
                schema = schema.set(misfit.column, pa.field(field.name, self._types[field.name]))
                self._sink.seek(0)
                self._sink.truncate()

    def _write_rows(self, schema: pa.Schema) -> None:
        first, sink = 1, DigestedSink(self._sink)
        try:
            with pq.ParquetWriter(sink, schema, compression="zstd") as writer:
                for group in self._groups():
                    rows = [_parse(line) for line in group]
                    arrays = [_column(rows, schema, i, first) for i in range(len(schema))]
                    writer.write_table(pa.Table.from_arrays(arrays, schema=schema), row_group_size=len(rows))
                    first += len(rows)
                record = sealed(self._record, with_schema(sink.state, schema, first - 1))
                writer.add_key_value_metadata({"llmkit": json.dumps(record, sort_keys=True, ensure_ascii=False)})
        except pa.ArrowException as error:
            raise LlmkitError(
                f"{self._path}: cannot be written as Parquet ({str(error).splitlines()[0]})", "write .jsonl.zst instead"
            ) from error

    def _groups(self) -> Iterator[list[bytes]]:
        """The lines of each row group."""
        limit = max((columns.group_rows for columns in self._inputs), default=0)
        group: list[bytes] = []
        size, incomplete = 0, b""
        self._spool_file.seek(0)
        for block in decompress(self._spool_file, "spool", Notes()):
            *lines, incomplete = (incomplete + block).split(b"\n")
            for line in lines:
                group.append(line)
                size += len(line)
                if len(group) == limit or size >= (MAX_GROUP_BYTES if limit else GROUP_BYTES):
                    yield group
                    group, size = [], 0
        if group:
            yield group


def _parse(line: bytes) -> dict[str, Any]:
    row: dict[str, Any] = exact_fields(line) if may_hold_big_integer(line) else orjson.loads(line)
    return row


def _unified(one: pa.DataType, other: pa.DataType) -> pa.DataType:
    schemas = [pa.schema([("value", type)]) for type in (one, other)]
    return pa.unify_schemas(schemas, promote_options="permissive").field(0).type


def _column(rows: list[dict[str, Any]], schema: pa.Schema, i: int, first: int) -> pa.Array:
    """A column of a row group. Raises _Misfit; `first`: number of the first row."""
    field = schema.field(i)
    values = [row.get(field.name) for row in rows]
    try:
        return from_json(values, field.type)
    except MISFITS as error:
        for row, value in zip(count(first), values, strict=False):
            try:
                from_json([value], field.type)
            except MISFITS as reason:
                raise _Misfit(i, row, f"{_shown(value)} is not of type {field.type}") from reason
        raise _Misfit(i, first, str(error)) from error


def _shown(value: Any) -> str:
    return repr(value) if len(repr(value)) <= 40 else repr(value)[:40] + "..."

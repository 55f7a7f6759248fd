"""JSON lines as a Parquet file.

A column of the Parquet inputs keeps its type, its metadata and its place, and the file keeps the metadata of the first
input and the size of its row groups. A column that a stage adds, that comes from JSON, or in which a value no longer
has its type, has the type of its JSON values; one in which they have incompatible types is an error that names row
and field. Strings such as "NaN" among numbers are the numbers that JSON lacks (io/arrow_values.py). What a row lacks is
null; an object inside a row that lacks keys of its column gets them as nulls too, with a warning. So do numbers that no
float holds, which are rounded.

The schema of all rows must be known before the first is stored, so rows are spooled to a compressed temporary file
while their types are unified, and then written in row groups: memory is one row group, and disk space temporarily twice
the output.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from itertools import count, islice
from types import TracebackType
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from llmkit.errors import LlmkitError
from llmkit.io.arrow_values import NON_FINITE, from_json, is_bytes
from llmkit.io.atomic import atomic_file, full_disk_names
from llmkit.io.compression import Notes, ZstdOutput, decompress
from llmkit.io.inputs import is_remote
from llmkit.io.parquet import Columns, with_schema
from llmkit.io.record import sealed
from llmkit.io.sealed_file import BYTES, PENDING, SealedSink
from llmkit.io.splice import exact_fields, may_hold_big_integer, raw_values, rounded_field

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
    type of the column. `warn` is called with each warning.
    """

    def __init__(
        self, path: str, force: bool, json_only: bool = False, warn: Callable[[str], object] | None = None
    ) -> None:
        self._path = path
        self._force = force
        self._json_only = json_only
        self._warn = warn or (lambda warning: None)
        self._lacking: dict[str, int] = {}  # field -> first row with an object that lacks keys
        self._rounded: dict[str, int] = {}  # field -> first row with a number that is rounded
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
        with full_disk_names(self._path):
            self._spool.write(data)
        self._pending += data
        if len(self._pending) >= GROUP_BYTES // 8:
            self._widen_types()

    def keep_types(self, inputs: Iterable[Columns]) -> None:
        """Take the types of the columns of Parquet inputs. Call it before `finish`."""
        self._inputs += inputs

    def finish(self) -> None:
        self._widen_types()
        with full_disk_names(self._path):
            self._spool.finish()
            self._spool_file.flush()

    # The types.
    def _widen_types(self) -> None:
        """Add the fields and types of the pending rows."""
        lines = (line for line in bytes(self._pending).split(b"\n") if line)
        rows = [self._parse(line, number) for number, line in enumerate(lines, self._rows + 1)]
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

    def _parse(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            row = _parse(line)
            if name := rounded_field(line):
                self._rounded.setdefault(name, number)
            return row
        except orjson.JSONDecodeError:
            field = next(name for name, raw in raw_values(line).items() if _is_beyond_floats(raw))
            problem = f"field {field!r}, row {number:,}: a number beyond the range of floats"
            raise LlmkitError(f"{self._path}: {problem}", "write .jsonl.zst instead") from None

    def _type_with(self, name: str, values: list[Any]) -> pa.DataType:
        """The type of a field with more values."""
        try:
            new = _type_of(values)
        except MISFITS:
            if not any(isinstance(value, (int, float)) for value in values):
                raise
            new = _type_of([NON_FINITE.get(v, v) if isinstance(v, str) else v for v in values])
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
        try:
            _type_of(values[high - 1 : high])
        except MISFITS as alone:
            error = alone
        else:
            if low or name in self._types:
                return f"{location} follows values of type {self._type_with(name, values[:low])}"
        return f"{location}: {str(error).splitlines()[0]}"

    def _refuse(self, name: str) -> None:
        raise LlmkitError(f"{self._path}: {self._conflicts[name]}", "write .jsonl.zst instead")

    def _schema(self) -> pa.Schema:
        """The columns of the inputs, then other fields."""
        fields: dict[str, pa.Field] = {}
        metadata: dict[bytes, bytes] = {}
        self._texts = self._text_columns()
        for columns in self._inputs:
            metadata = (columns.schema.metadata or {}) | metadata
            for field in columns.schema:
                if field.name in columns.texts - self._texts:
                    field = field.with_type(pa.string())
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

    def _text_columns(self) -> set[str]:
        """The BINARY columns that hold text in each of the inputs that has them."""
        texts = {name for columns in self._inputs for name in columns.texts}
        others = {name for columns in self._inputs for name in {*columns.schema.names} - columns.texts}
        return texts - others

    # The file.
    def _write_file(self) -> None:
        schema = self._schema()
        while True:
            try:
                self._write_rows(schema)
                break
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
        for name, row in self._rounded.items():
            self._warn(f"{self._path}: field {name!r}: numbers are rounded to floats (first in row {row:,})")
        for name, row in self._lacking.items():
            self._warn(f"{self._path}: field {name!r}: keys that an object lacks are null (first in row {row:,})")

    def _write_rows(self, schema: pa.Schema) -> None:
        first, sink = 1, SealedSink(self._sink)
        try:
            with pq.ParquetWriter(sink, schema, compression="zstd") as writer:
                for group in self._groups():
                    rows = [_parse(line) for line in group]
                    arrays = [self._column(rows, schema, i, first) for i in range(len(schema))]
                    writer.write_table(pa.Table.from_arrays(arrays, schema=schema), row_group_size=len(rows))
                    first += len(rows)
                files = with_schema(sink.state.copy(), _as_read(schema), first - 1)
                record = sealed(self._record, files) | {BYTES: PENDING}
                sink.hold()
                writer.add_key_value_metadata({"llmkit": json.dumps(record, sort_keys=True, ensure_ascii=False)})
            sink.complete()
        except pa.ArrowException as error:
            raise LlmkitError(
                f"{self._path}: cannot be written as Parquet ({str(error).splitlines()[0]})", "write .jsonl.zst instead"
            ) from error

    def _column(self, rows: list[dict[str, Any]], schema: pa.Schema, i: int, first: int) -> pa.Array:
        """A column of a row group. Raises _Misfit; `first`: number of the first row."""
        field = schema.field(i)
        values = [row.get(field.name) for row in rows]
        convert = pa.array if field.name in self._texts and is_bytes(field.type) else from_json
        try:
            array = convert(values, field.type)
        except MISFITS as error:
            for row, value in zip(count(first), values, strict=False):
                try:
                    convert([value], field.type)
                except MISFITS as reason:
                    raise _Misfit(i, row, f"{_shown(value)} is not of type {field.type}") from reason
            raise _Misfit(i, first, str(error)) from error
        if field.name not in self._lacking and (lacks := _test_of_keys(field.type)):
            numbers = (row for row, value in zip(count(first), values, strict=False) if lacks(value))
            self._lacking.update((field.name, row) for row in islice(numbers, 1))
        return array

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


def _as_read(schema: pa.Schema) -> pa.Schema:
    """The schema that a reader of the file gets: Parquet names the items of a list `element`, Arrow `item`."""
    sink = pa.BufferOutputStream()
    pq.write_table(schema.empty_table(), sink)
    return pq.read_schema(pa.BufferReader(sink.getvalue()))


def _parse(line: bytes) -> dict[str, Any]:
    """A row with exact integers. JSONDecodeError for a number that is infinite as a float."""
    row: dict[str, Any] = orjson.loads(line)
    return exact_fields(line) if may_hold_big_integer(line) else row


def _is_beyond_floats(raw: bytes) -> bool:
    try:
        orjson.loads(raw)
    except orjson.JSONDecodeError:
        return True
    return False


def _type_of(values: list[Any]) -> pa.DataType:
    """The type of JSON values. Arrow itself knows no integers beyond int64 when it infers a type."""
    try:
        return pa.array(values).type
    except OverflowError:
        present = [value for value in values if value is not None]
        if all(isinstance(value, dict) for value in present):
            names = {name: None for value in present for name in value}
            return pa.struct([(name, _type_of([value.get(name) for value in present])) for name in names])
        if all(isinstance(value, list) for value in present):
            return pa.list_(_type_of([item for value in present for item in value]))
        integers = [value for value in present if type(value) is int]
        if any(not -1 << 63 <= value < 1 << 64 for value in integers):
            raise ValueError("Parquet has no type for integers beyond 64 bits") from None
        if len(integers) == len(present) and min(integers) >= 0:
            return pa.uint64()
        raise


def _unified(one: pa.DataType, other: pa.DataType) -> pa.DataType:
    """The type that holds the values of both. Raises pa.ArrowException where there is none."""
    if is_bytes(one) != is_bytes(other) and not (pa.types.is_null(one) or pa.types.is_null(other)):
        raise pa.ArrowInvalid("text is not bytes")
    schemas = [pa.schema([("value", type)]) for type in (one, other)]
    return _unsigned(pa.unify_schemas(schemas, promote_options="permissive").field(0).type, one, other)


def _unsigned(unified: pa.DataType, *types: pa.DataType) -> pa.DataType:
    """Signed integers as uint64 where one of `types` is: of its values, most are of no signed type."""
    if pa.types.is_int64(unified):
        return pa.uint64() if pa.uint64() in types else unified
    if pa.types.is_list(unified):
        inner = [type.value_type for type in types if pa.types.is_list(type)]
        return pa.list_(unified.value_field.with_type(_unsigned(unified.value_type, *inner)))
    if pa.types.is_struct(unified):
        structs = [type for type in types if pa.types.is_struct(type)]
        inner_types = {f.name: [s.field(f.name).type for s in structs if f.name in s.names] for f in unified}
        return pa.struct([field.with_type(_unsigned(field.type, *inner_types[field.name])) for field in unified])
    return unified


def _test_of_keys(type: pa.DataType) -> Callable[[Any], bool] | None:
    """A test whether an object in a JSON value lacks keys of the type; None if the type has no objects."""
    if pa.types.is_struct(type):
        inner = [(field.name, test) for field in type if (test := _test_of_keys(field.type))]
        return lambda value: (
            value is not None and (len(value) < type.num_fields or any(test(value[name]) for name, test in inner))
        )
    if pa.types.is_map(type):
        of_item = _test_of_keys(type.item_type)
        return of_item and (lambda pairs: any(of_item(item) for _, item in pairs or ()))
    test = _test_of_keys(type.value_type) if hasattr(type, "value_type") else None
    return test and (lambda items: any(map(test, items or ())))


def _shown(value: Any) -> str:
    return repr(value) if len(repr(value)) <= 40 else repr(value)[:40] + "..."

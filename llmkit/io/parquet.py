"""Parquet rows as JSON lines, and back.

Reading holds one record batch in memory. Writing needs the schema of all rows before the first is stored, so
rows are spooled to a compressed temporary file while their types are unified, and then written in row groups:
memory is one batch, and disk space temporarily twice the output.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from llmkit.errors import LlmkitError
from llmkit.io.atomic import atomic_file
from llmkit.io.compression import BLOCK, Notes, ZstdOutput, decompress
from llmkit.io.digest import digest_stored, digest_text
from llmkit.io.inputs import display_name, is_remote, open_raw
from llmkit.io.record import Input, base_name, parse_record, sealed

BATCH_ROWS = 1024
GROUP_BYTES = 32 << 20


def read_lines(raw: BinaryIO, name: str) -> Iterator[tuple[bytes, int]]:
    """(JSON lines, number of rows) of each batch; columns of types that JSON lacks (dates, bytes) become text."""
    with _readable(name):
        for batch in pq.ParquetFile(raw).iter_batches(batch_size=BATCH_ROWS):
            rows = batch.to_pylist()
            yield (
                b"".join(
                    orjson.dumps(row, default=str, option=orjson.OPT_PASSTHROUGH_DATETIME) + b"\n" for row in rows
                ),
                len(rows),
            )


def read_record(path: str) -> bytes | None:
    """The lineage record in the metadata of a file, as text."""
    with open_raw(path) as raw, _readable(display_name(path)):
        return (pq.read_metadata(raw).metadata or {}).get(b"llmkit")


def describe(path: str) -> Input:
    """Name, digest and own record of a Parquet file."""
    return Input("input", base_name(path), digest_stored(path), parse_record(read_record(path)))


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
        return _with_schema(stored, file.schema_arrow, file.metadata.num_rows)


def _with_schema(stored: xxhash.xxh3_128, schema: pa.Schema, rows: int) -> str:
    stored.update(f"{schema.remove_metadata()} {rows}".encode())
    return digest_text(stored)


class _Digested:
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


class ParquetOutput:
    """A Parquet file with one column per field of any row, compressed with zstd, lineage in the file metadata."""

    def __init__(self, path: str, force: bool) -> None:
        self._path = path
        self._force = force
        self._stack = ExitStack()
        self._schema: pa.Schema | None = None
        self._pending = bytearray()
        self._record: dict[str, Any] = {}

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
            self._widen_schema()

    def finish(self) -> None:
        self._widen_schema()
        self._spool.finish()
        self._spool_file.flush()

    def _widen_schema(self) -> None:
        """Add the fields and types of the pending rows to the schema."""
        rows = [orjson.loads(line) for line in bytes(self._pending).splitlines()]
        self._pending.clear()
        if not rows:
            return
        try:
            fields = {
                name: pa.array([row.get(name) for row in rows]).type
                for name in {key: None for row in rows for key in row}
            }
            schema = pa.schema(list(fields.items()))
            self._schema = (
                pa.unify_schemas([self._schema, schema], promote_options="permissive") if self._schema else schema
            )
        except (pa.ArrowException, OverflowError) as error:
            raise LlmkitError(
                f"{self._path}: the values of a field have incompatible types ({error})", "write .jsonl.zst instead"
            ) from error

    def _write_file(self) -> None:
        schema = self._schema or pa.schema([("id", pa.string()), ("text", pa.string())])
        self._spool_file.seek(0)
        sink, rows = _Digested(self._sink), 0
        with pq.ParquetWriter(sink, schema, compression="zstd") as writer:
            incomplete = b""
            group: list[bytes] = []
            for block in decompress(self._spool_file, "spool", Notes()):
                lines = (incomplete + block).split(b"\n")
                incomplete = lines.pop()
                group += lines
                rows += len(lines)
                if sum(map(len, group)) >= GROUP_BYTES:
                    writer.write_table(pa.Table.from_pylist([orjson.loads(line) for line in group], schema=schema))
                    group = []
            if group:
                writer.write_table(pa.Table.from_pylist([orjson.loads(line) for line in group], schema=schema))
            record = sealed(self._record, _with_schema(sink.state, schema, rows))
            writer.add_key_value_metadata({"llmkit": json.dumps(record, sort_keys=True, ensure_ascii=False)})

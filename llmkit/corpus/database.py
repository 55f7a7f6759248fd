"""A DuckDB file that may be somebody else's, opened so that nothing in it runs.

    database = Database("seen.duckdb")
    database.tables()                    # {"runs": "run INTEGER, inputs VARCHAR"}; ValueError where it holds more
    database.execute("SELECT inputs FROM runs").fetchall()

A view or a macro of a database is a program: it may read any file, or never end, and one with the name of a table or
of a function of DuckDB's own takes its place. A file is therefore accepted only if it holds plain tables in the schema
`main` and nothing else. Queries about that name `system.main`, which no file can redefine. DuckDB itself may open no
other file, load no extension, and takes no more memory than the budget (llmkit/memory.py), or 1 GiB. Cost: about 0.1 s
per file.
"""

from __future__ import annotations

from itertools import chain, repeat
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from llmkit.memory import budget, limited

SAFE = {
    "threads": "1",
    "preserve_insertion_order": "true",
    "enable_external_access": "false",
    "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false",
    "lock_configuration": "true",
}
LEAST = 1 << 30  # bytes of memory; with less, a join over a large index may fail
OTHER_KINDS = {  # the table functions that list what else a database may hold, and the name of one of it
    "schemas": "schema",
    "views": "view",
    "functions": "function",
    "types": "type",
    "sequences": "sequence",
    "indexes": "index",
    "triggers": "trigger",
}
HEADERS, HEADER_BYTES, BLOCK_BYTES = 3, 1 << 12, 1 << 18  # of a DuckDB file
FACTOR, START = np.uint64(0xBF58476D1CE4E5B9), np.uint64(5381)  # of their checksums


class Database:
    """A connection to a DuckDB file. Raises duckdb.Error, MemoryLimitError, and KeyboardInterrupt on a signal."""

    def __init__(self, path: str, temporary: str | None = None, read_only: bool = False) -> None:
        config: dict[str, Any] = SAFE | {"memory_limit": f"{max(budget(), LEAST) >> 20}MiB"}
        config |= {"temp_directory": temporary} if temporary else {}
        with limited(path):
            self._sql = duckdb.connect(path, read_only=read_only, config=config)

    def execute(self, query: str, values: list[Any] | None = None, **tables: Any) -> duckdb.DuckDBPyConnection:
        """Run a query with Arrow `tables` by name."""
        try:
            if tables:  # are registered only once the result before is read to its end, or replaced
                self._sql.execute("SELECT 1").fetchall()
            for name, table in tables.items():
                self._sql.register(name, table)
            return self._sql.execute(query, values)
        except RuntimeError as error:  # what DuckDB makes of an exception in a signal handler
            if "interrupted" in str(error):
                raise KeyboardInterrupt from error
            raise

    def close(self) -> None:
        """Close the file, and write its log into it."""
        self._sql.close()

    def tables(self) -> dict[str, str]:
        """The tables by name, each with its columns as CREATE TABLE has them; ValueError where there is more."""
        (name,) = self._rows("SELECT database_name FROM system.main.duckdb_databases() WHERE NOT internal")[0]
        for kind, column in OTHER_KINDS.items():
            if kind == "triggers" and int(duckdb.__version__.split(".")[0]) < 2:  # has none
                continue
            # Each schema lists the types of DuckDB itself, and there is always the schema `main`.
            but = {"types": "AND NOT internal", "schemas": "AND schema_name <> 'main'"}.get(kind, "")
            condition = f"database_name = ? {but}"
            if rows := self._rows(f"SELECT {column}_name FROM system.main.duckdb_{kind}() WHERE {condition}", [name]):
                raise ValueError(f"it holds the {column} {rows[0][0]!s:.40}")
        tables = self._rows(
            "SELECT schema_name, table_name, sql FROM system.main.duckdb_tables() WHERE database_name = ?", [name]
        )
        return {table: _columns(definition) for schema, table, definition in tables if schema == "main"}

    def _rows(self, query: str, values: list[Any] | None = None) -> list[Any]:
        return self.execute(query, values).fetchall()


def _columns(definition: str) -> str:
    """The columns of a CREATE TABLE statement with all that belongs to them, such as defaults and checks."""
    return definition[definition.find("(") + 1 : definition.rfind(")")].replace('"', "")


def is_intact(path: str) -> bool:
    """Whether the checksums of all headers and blocks of a DuckDB file are right.

    Each is in the first 8 bytes: the exclusive or of the other words, multiplied by an odd constant
    (src/common/checksum.cpp). DuckDB verifies the blocks that it reads; here a changed byte is found wherever it is.
    """
    with open(path, "rb") as file:
        for size in chain(repeat(HEADER_BYTES, HEADERS), repeat(BLOCK_BYTES)):
            data = file.read(size)
            if not data and size == BLOCK_BYTES:
                return True
            words = np.frombuffer(data[: len(data) & ~7], "<u8")
            if len(data) != size or words[0] != np.bitwise_xor.reduce(words[1:] * FACTOR) ^ START:
                return False
    raise AssertionError("blocks end with the file")


def arrow_column(values: NDArray[Any]) -> pa.Array:
    """Numbers, booleans or rows of bytes as an Arrow array. Arrow's own conversion imports pandas if installed."""
    if values.ndim == 2:
        dtype, rows = pa.binary(values.shape[1] * values.itemsize), len(values)
    else:
        dtype, rows = pa.from_numpy_dtype(values.dtype), len(values)
    packed = np.packbits(values, bitorder="little") if values.dtype == bool else np.ascontiguousarray(values)
    return pa.Array.from_buffers(dtype, rows, [None, pa.py_buffer(packed)])


def arrow_strings(strings: list[str]) -> pa.Array:
    """Strings as an Arrow array."""
    encoded = [string.encode() for string in strings]
    ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
    return pa.Array.from_buffers(
        pa.large_string(), len(encoded), [None, pa.py_buffer(ends), pa.py_buffer(b"".join(encoded))]
    )

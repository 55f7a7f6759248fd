"""Documents as output: JSON lines or Parquet with lineage, and the file of what could not be read.

with DocumentWriter("out.jsonl.zst", lineage) as writer:
    writer.write(lines)
    writer.finish({"documents": n}, reader.inputs)
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import orjson
import xxhash

from llmkit.errors import UsageError
from llmkit.io.atomic import atomic_file
from llmkit.io.compression import FILE_LEVEL, STORED, GzipOutput, OutputFormat, PlainOutput, ZstdOutput
from llmkit.io.inputs import STDIN, has_suffix
from llmkit.io.record import Input, Lineage

if TYPE_CHECKING:
    from llmkit.io.parquet_output import ParquetOutput

OUTPUT_SUFFIXES = (".jsonl", ".jsonl.zst", ".jsonl.gz", ".json.gz", ".json.zst", ".ndjson", ".parquet")


class DocumentWriter:
    """JSON lines to a file (format by suffix) or stdout, with lineage; a file appears only when it is complete.

    stdout is one zstd stream: stored in a pipe, level 1 in a regular file; plain on a terminal or with `plain`.
    A block that ends without `finish`, or by an exception, leaves no file. `json_only`: no input is Parquet, so that
    none has types for a Parquet output. `warn` is called with what a Parquet output cannot hold as it is.
    """

    def __init__(
        self,
        output: str | None,
        lineage: Lineage,
        *,
        force: bool = False,
        plain: bool = False,
        json_only: bool = False,
        warn: Callable[[str], object] | None = None,
    ) -> None:
        self.output = None if output in (None, STDIN) else output
        self.lineage = lineage
        self.force = force
        self.plain = plain
        self._json_only = json_only
        self._warn = warn
        self._digest = xxhash.xxh3_128()
        self._stack = ExitStack()
        self._finished = False
        if self.output:
            check_suffix(self.output)

    def __enter__(self) -> DocumentWriter:
        self._target: OutputFormat
        if self.output and has_suffix(self.output, ".parquet"):
            from llmkit.io.parquet_output import ParquetOutput

            self._target = self._stack.enter_context(
                ParquetOutput(self.output, self.force, self._json_only, self._warn)
            )
        elif self.output:
            self._target = _by_suffix(self.output, self._stack.enter_context(atomic_file(self.output, self.force)))
        else:
            self._target = _for_stdout(self.plain)
        self._target.note("header", self.lineage.header())
        return self

    def write(self, lines: bytes) -> None:
        """Append complete lines, each with its newline."""
        self._digest.update(lines)
        self._target.write(lines)

    def finish(self, counts: dict[str, Any], inputs: list[Input]) -> None:
        """Complete the content and its lineage; call it once, last."""
        self.lineage.inputs += inputs
        self.lineage.counts = counts
        self.lineage.digest = "xxh3:" + self._digest.hexdigest()
        if self.output and has_suffix(self.output, ".parquet"):
            cast("ParquetOutput", self._target).keep_types(item.columns for item in inputs if item.columns)
        self._target.finish()
        self._target.note("trailer", self.lineage.trailer())
        if self.output is None:
            sys.stdout.buffer.flush()
        self._finished = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            assert self._finished, "DocumentWriter left without finish()"
        self._stack.__exit__(kind, error, trace)


def check_suffix(output: str) -> None:
    """UsageError where the suffix of an output is not that of a format that is written.

    Devices and pipes may have any name.
    """
    from llmkit.io.atomic import is_special

    if not has_suffix(output, OUTPUT_SUFFIXES) and not is_special(Path(output)):
        raise UsageError(
            f"{output}: unknown document format", "use a name that ends in .jsonl.zst, .jsonl.gz, .jsonl or .parquet"
        )


def _by_suffix(path: str, sink: BinaryIO) -> OutputFormat:
    if has_suffix(path, ".zst"):
        return ZstdOutput(sink, FILE_LEVEL)
    return GzipOutput(sink) if has_suffix(path, ".gz") else PlainOutput(sink)


def _for_stdout(plain: bool) -> OutputFormat:
    sink = sys.stdout.buffer
    if plain or sys.stdout.isatty():
        return PlainOutput(sink)
    regular = stat.S_ISREG(os.fstat(sink.fileno()).st_mode)
    return ZstdOutput(sink, FILE_LEVEL if regular else STORED)


class Quarantine:
    """A file of bad lines, shared by all readers of one call.

    A context manager: on exit the file is completed, if there are any.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.inputs: list[Input] = []
        self._lines = 0
        self._writer: DocumentWriter | None = None

    def __enter__(self) -> Quarantine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer:
            if kind is None:
                self._writer.finish({"lines": self._lines}, self.inputs)
            self._writer.__exit__(kind, error, trace)

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Append rows: what could not be read, with its location and the reason (io.documents.BadLine.row)."""
        if self._writer is None:
            self._writer = DocumentWriter(self.path, Lineage("quarantine"), force=True)
            self._writer.__enter__()
        self._lines += len(rows)
        for row in rows:
            self._writer.write(orjson.dumps(row) + b"\n")

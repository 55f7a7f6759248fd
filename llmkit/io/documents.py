"""Documents, one JSON object per line: reader and writer.

A document has `id` (xxh3-128 of the text where missing), `text`, and any other fields, which pass through
unchanged; a document that a stage does not change keeps its bytes. Files are read in chunks of complete lines
(about 1 MiB), the unit of work that `engine` sends to worker processes. Memory does not grow with the input:
one chunk, and at most one line of `max_line_bytes`.

    reader = DocumentReader(["docs.jsonl.zst"], ReadOptions())
    with DocumentWriter("out.jsonl.zst", lineage) as writer:
        for document in reader.documents():
            writer.write(document.encode())
        writer.finish({"documents": n}, reader.inputs)
"""

from __future__ import annotations

import io
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import orjson
import xxhash

from llmkit.errors import LlmkitError, UsageError
from llmkit.io.atomic import atomic_file
from llmkit.io.compression import (
    FILE_LEVEL,
    STORED,
    GzipOutput,
    Notes,
    OutputFormat,
    PlainOutput,
    ZstdOutput,
    decompress,
)
from llmkit.io.inputs import STDIN, display_name, open_raw, refuse_archive
from llmkit.io.record import Input, Lineage, base_name, join_notes

CHUNK_BYTES = 1 << 20
PIECE_BYTES = 8 << 10  # a chunk is joined from pieces of this size
MAX_LINE_BYTES = 16 << 20
UTF8_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """How lines are read. `text_key=None`: any JSON object is a row. `on_bad_line`: stop, skip, or quarantine=FILE."""

    text_key: str | None = "text"
    id_key: str = "id"
    on_bad_line: str = "stop"
    max_line_bytes: int = MAX_LINE_BYTES

    @property
    def quarantine(self) -> str:
        """FILE of quarantine=FILE, otherwise empty; UsageError where `on_bad_line` is none of the three."""
        mode, _, file = self.on_bad_line.partition("=")
        if mode not in ("stop", "skip", "quarantine") or (mode == "quarantine") != bool(file):
            raise UsageError(f"--on-bad-line {self.on_bad_line!r}", "one of: stop, skip, quarantine=FILE")
        return file


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line that is not a document: file and line number, the reason, and its bytes (empty where it was too long)."""

    file: str
    line: int
    reason: str
    raw: bytes = b""


@dataclass(slots=True)
class Chunk:
    """Complete lines of one file; `first_line` counts from 1. Picklable."""

    file: str
    first_line: int
    data: bytes
    bad: list[BadLine] = field(default_factory=list)


class Document:
    """One document: its `fields` as parsed from `stored`, the line with its newline."""

    __slots__ = ("_changed", "_options", "_stored", "fields", "file", "line")

    def __init__(self, stored: bytes, fields: dict[str, Any], file: str, line: int, options: ReadOptions) -> None:
        self._stored = stored
        self.fields = fields
        self.file = file
        self.line = line
        self._options = options
        self._changed = False

    @property
    def raw(self) -> bytes:
        """The line as it was read."""
        return self._stored[:-1]

    @property
    def text(self) -> str:
        return str(self.fields[self._options.text_key or "text"])

    @property
    def id(self) -> str:
        """The id field as text, or else the xxh3-128 of the document's text (of its line, for rows without text)."""
        value = self.fields.get(self._options.id_key)
        if value is not None:
            return str(value)
        return xxhash.xxh3_128_hexdigest(self.raw if self._options.text_key is None else self.text.encode())

    def count(self, field: str) -> int:
        """The positive integer in a field, as dedup writes it; 1 where it is missing. LlmkitError for anything else."""
        value = self.fields.get(field, 1)
        if type(value) is not int or not 0 < value < 1 << 62:
            raise LlmkitError(
                f"{self}: field {field!r} is not a count", "expected a positive integer, as dedup writes it"
            )
        return value

    @property
    def where(self) -> str:
        """`file:line`, for messages."""
        return f"{self.file}:{self.line}"

    def __str__(self) -> str:
        return f"{self.where} (id {self.id})"

    def change(self, **fields: Any) -> None:
        """Set fields; `encode` then serialises the document again."""
        self.fields.update(fields)
        self._changed = True

    def change_text(self, text: str) -> None:
        """Replace the text, under the key of the read options."""
        self.change(**{self._options.text_key or "text": text})

    def encode(self) -> bytes:
        """The line with its newline: the original bytes, unless a field was changed."""
        return orjson.dumps(self.fields) + b"\n" if self._changed else self._stored


def parse(chunk: Chunk, options: ReadOptions) -> tuple[list[Document], list[BadLine]]:
    """Documents and bad lines of a chunk, each in order. Blank lines are skipped. Pure: safe in a worker."""
    bad: list[BadLine] = []
    return list(iter_documents(chunk, options, bad)), bad


def iter_documents(chunk: Chunk, options: ReadOptions, bad: list[BadLine]) -> Iterator[Document]:
    """`parse` as a generator, so that each document can be freed before the next. Bad lines are added to `bad`."""
    bad += chunk.bad
    data = chunk.data.removeprefix(UTF8_BOM) if chunk.first_line == 1 else chunk.data
    for number, line in enumerate(io.BytesIO(data), chunk.first_line):
        if line.isspace():
            continue
        if line.endswith(b"\r\n") or not line.endswith(b"\n"):
            line = line.removesuffix(b"\n").removesuffix(b"\r") + b"\n"
        reason = ""
        if len(line) - 1 > options.max_line_bytes:
            bad.append(BadLine(chunk.file, number, f"line of over {options.max_line_bytes} bytes"))
            continue
        try:
            fields = orjson.loads(line)
        except orjson.JSONDecodeError:
            reason = _json_error(line[:-1])
        else:
            if not isinstance(fields, dict):
                reason = "not a JSON object"
            elif options.text_key is not None and not isinstance(fields.get(options.text_key), str):
                present = options.text_key in fields
                reason = f"field {options.text_key!r} is not a string" if present else f"no field {options.text_key!r}"
        if reason:
            bad.append(BadLine(chunk.file, number, reason, line[:-1]))
        else:
            yield Document(line, fields, chunk.file, number, options)


def _json_error(line: bytes) -> str:
    try:
        line.decode()
        orjson.loads(line)
    except UnicodeDecodeError as error:
        return f"invalid UTF-8 (byte {error.start})"
    except orjson.JSONDecodeError as error:
        return f"invalid JSON ({error.msg}, column {error.colno})"
    raise AssertionError("a trailing newline does not decide whether a line is JSON")


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

    def add(self, bad: list[BadLine]) -> None:
        """Append lines, with their location and the reason."""
        if self._writer is None:
            self._writer = DocumentWriter(self.path, Lineage("quarantine"), force=True)
            self._writer.__enter__()
        self._lines += len(bad)
        for item in bad:
            raw = item.raw.decode("utf-8", "backslashreplace")
            row = {"file": item.file, "line": item.line, "reason": item.reason, "raw": raw}
            self._writer.write(orjson.dumps(row) + b"\n")


class DocumentReader:
    """Documents of several inputs in order. A context manager: on exit the quarantined lines are stored.

    `inputs` (lineage) is complete once `chunks` is exhausted; `bad` counts the bad lines that were skipped or
    quarantined. Readers that write their bad lines to one file share its `quarantine`.
    """

    def __init__(
        self, paths: list[str], options: ReadOptions | None = None, quarantine: Quarantine | None = None
    ) -> None:
        self.paths = paths
        self.options = options or ReadOptions()
        self.inputs: list[Input] = []
        self.bad = 0
        target = self.options.quarantine
        self._own_quarantine = Quarantine(target) if target and quarantine is None else None
        self._quarantine = quarantine or self._own_quarantine

    def __enter__(self) -> DocumentReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._quarantine:
            self._quarantine.inputs += self.inputs
        if self._own_quarantine:
            self._own_quarantine.__exit__(kind, error, trace)

    def chunks(self) -> Iterator[Chunk]:
        """Complete lines of every input, about 1 MiB at a time, bad lines included."""
        for path in self.paths:
            with open_raw(path) as raw:
                if path.endswith(".parquet"):
                    yield from self._parquet_chunks(path, raw)
                else:
                    yield from self._line_chunks(path, raw)

    def _line_chunks(self, path: str, raw: BinaryIO) -> Iterator[Chunk]:
        name, notes, digest = display_name(path), Notes(), xxhash.xxh3_128()
        limit = self.options.max_line_bytes + len(UTF8_BOM)  # `parse` checks shorter lines exactly
        line, skipping, empty = 1, False, True
        complete: list[bytes | memoryview] = []  # up to a newline
        partial: list[bytes | memoryview] = []  # after it
        size = partial_size = 0
        for piece in decompress(raw, name, notes, PIECE_BYTES):
            if empty:
                refuse_archive(piece, name)
            digest.update(piece)
            empty = False
            if skipping:  # inside a line that is too long: resume after its end
                start = piece.find(b"\n") + 1
                if not start:
                    continue
                piece, skipping, line = piece[start:], False, line + 1
            end = piece.rfind(b"\n") + 1
            if end:
                complete += [*partial, memoryview(piece)[:end]]
                size += partial_size + end
                partial, partial_size = [], 0
            partial.append(piece[end:])
            partial_size += len(piece) - end
            if complete and (size >= CHUNK_BYTES or partial_size > limit):
                data = b"".join(complete)
                yield Chunk(name, line, data)
                line += sum(1 for _ in io.BytesIO(data))  # faster than bytes.count
                complete, size = [], 0
            if partial_size > limit:
                yield Chunk(name, line, b"", [BadLine(name, line, f"line of over {self.options.max_line_bytes} bytes")])
                partial, partial_size, skipping = [], 0, True
        if size + partial_size:
            yield Chunk(name, line, b"".join(complete + partial))
        if empty and path == STDIN:  # llmkit's own commands write a header even without documents
            raise LlmkitError("stdin is empty", "the command before this one failed, or wrote nothing")
        self.inputs.append(Input("input", base_name(path), "xxh3:" + digest.hexdigest(), join_notes(notes.entries)))

    def _parquet_chunks(self, path: str, raw: BinaryIO) -> Iterator[Chunk]:
        from llmkit.io.parquet import describe, read_lines

        line = 1
        for data, rows in read_lines(raw, path):
            yield Chunk(path, line, data)
            line += rows
        self.inputs.append(describe(path))

    def accept(self, bad: list[BadLine]) -> None:
        """Handle bad lines by `on_bad_line`: raise LlmkitError for the first, count them, or quarantine them."""
        if not bad:
            return
        if self.options.on_bad_line == "stop":
            first = bad[0]
            raise LlmkitError(
                f"{first.file}:{first.line}: {first.reason}",
                "--on-bad-line skip ignores such lines, --on-bad-line quarantine=FILE stores them in a file",
            )
        self.bad += len(bad)
        if self._quarantine:
            self._quarantine.add(bad)

    def documents(self) -> Iterator[Document]:
        """Every document, in this process."""
        for chunk in self.chunks():
            documents, bad = parse(chunk, self.options)
            self.accept(bad)
            yield from documents


class DocumentWriter:
    """JSON lines to a file (format by suffix) or stdout, with lineage; a file appears only when it is complete.

    stdout is one zstd stream: stored in a pipe, level 1 in a regular file; plain on a terminal or with `plain`.
    A block that ends without `finish`, or by an exception, leaves no file.
    """

    def __init__(self, output: str | None, lineage: Lineage, *, force: bool = False, plain: bool = False) -> None:
        self.output = None if output in (None, STDIN) else output
        self.lineage = lineage
        self.force = force
        self.plain = plain
        self._digest = xxhash.xxh3_128()
        self._stack = ExitStack()
        self._finished = False
        if self.output:
            check_suffix(self.output)

    def __enter__(self) -> DocumentWriter:
        self._target: OutputFormat
        if self.output and self.output.endswith(".parquet"):
            from llmkit.io.parquet import ParquetOutput

            self._target = self._stack.enter_context(ParquetOutput(self.output, self.force))
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


def read_record(path: str) -> dict[str, Any] | None:
    """The lineage record in a stream of documents, which is read to its end."""
    notes = Notes()
    with open_raw(path) as raw:
        for _ in decompress(raw, display_name(path), notes):
            pass
    return join_notes(notes.entries)


def check_suffix(output: str) -> None:
    """UsageError where the suffix of an output is not that of a format that is written.

    Devices and pipes may have any name.
    """
    from llmkit.io.atomic import is_special

    if not output.endswith(
        (".jsonl", ".jsonl.zst", ".jsonl.gz", ".json.gz", ".json.zst", ".ndjson", ".parquet")
    ) and not is_special(Path(output)):
        raise UsageError(
            f"{output}: unknown document format", "use a name that ends in .jsonl.zst, .jsonl.gz, .jsonl or .parquet"
        )


def _by_suffix(path: str, sink: BinaryIO) -> OutputFormat:
    if path.endswith(".zst"):
        return ZstdOutput(sink, FILE_LEVEL)
    return GzipOutput(sink) if path.endswith(".gz") else PlainOutput(sink)


def _for_stdout(plain: bool) -> OutputFormat:
    sink = sys.stdout.buffer
    if plain or sys.stdout.isatty():
        return PlainOutput(sink)
    regular = stat.S_ISREG(os.fstat(sink.fileno()).st_mode)
    return ZstdOutput(sink, FILE_LEVEL if regular else STORED)

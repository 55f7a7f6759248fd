"""Documents, one JSON object per line: how they are read.

A document has `id` (xxh3-128 of the text where missing), `text`, and any other fields, which pass through
unchanged: a document that a stage does not change keeps its bytes, and one that it changes keeps those of all other
fields (io/splice.py). Files are read in chunks of complete lines (about 1 MiB), the unit of work that `engine` sends to
worker processes. Memory does not grow with the input: one chunk, and at most one line of `max_line_bytes`.

    with DocumentReader(["docs.jsonl.zst"], ReadOptions()) as reader:
        for document in reader.documents():
            document.change_text(document.text.strip())
            sys.stdout.buffer.write(document.encode())

What cannot be read is bad, and stops the call unless it is to be skipped or quarantined: a *bad line* is not a
document, or one at which a stage failed (engine/isolation.py); a *bad file* cannot be opened or is damaged. Of a
damaged file the complete lines before the damage are read; the incomplete one belongs to the damage.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

import orjson
import xxhash

from llmkit.errors import LlmkitError, UsageError
from llmkit.io.compression import BLOCK, Notes, decompress
from llmkit.io.digest import digest_bytes, digest_damaged
from llmkit.io.inputs import STDIN, UTF8_BOM, display_name, is_remote, line_hint, open_raw, peek_stdin, refuse_archive
from llmkit.io.names import escape_name
from llmkit.io.record import Input, base_name, join_notes, record_or_warning
from llmkit.io.splice import (
    beyond_floats,
    dotted,
    exact_fields,
    has_big_number,
    may_hold_big_integer,
    raw_values,
    splice,
)

if TYPE_CHECKING:
    from llmkit.io.document_writer import Quarantine

Item = TypeVar("Item")

CHUNK_BYTES = 1 << 20
PIECE_BYTES = 8 << 10  # a chunk is joined from pieces of this size
MAX_LINE_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """How files are read. `text_key=None`: any JSON object is a row.

    `on_bad_line`, `on_bad_file`: stop, skip, or quarantine=FILE.
    """

    text_key: str | None = "text"
    id_key: str = "id"
    on_bad_line: str = "stop"
    max_line_bytes: int = MAX_LINE_BYTES
    on_bad_file: str = "stop"

    def quarantine_files(self) -> tuple[str, str]:
        """FILE of quarantine=FILE for lines and for files, otherwise empty; UsageError for any other value."""
        lines, files = (
            _quarantine_file(option, how)
            for option, how in (("--on-bad-line", self.on_bad_line), ("--on-bad-file", self.on_bad_file))
        )
        return lines, files


def _quarantine_file(option: str, how: str) -> str:
    mode, _, file = how.partition("=")
    if mode not in ("stop", "skip", "quarantine") or (mode == "quarantine") != bool(file):
        raise UsageError(f"{option} {how!r}", "one of: stop, skip, quarantine=FILE")
    return file


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line that is not a document: file and line number, the reason, and its bytes (empty where it was too long).

    For a bad file: the first line that was not read, and the bytes of it that were. `trace` is the traceback of the
    error in a stage.
    """

    file: str
    line: int
    reason: str
    raw: bytes = b""
    trace: str = ""

    def row(self) -> dict[str, Any]:
        """The row of a quarantine."""
        raw = self.raw.decode("utf-8", "backslashreplace")
        return {"file": escape_name(self.file), "line": self.line, "reason": self.reason, "raw": raw}


class WorkerError(Exception):
    """The traceback of an error in another process, as text."""


class UnreadableFile(LlmkitError):
    """An input cannot be opened, or is damaged; `bad` says the same as a row of a quarantine."""

    bad: BadLine


def unreadable_file(path: str, error: Exception) -> UnreadableFile:
    """An error of reading a file."""
    name = display_name(path)
    reason = error.message if isinstance(error, LlmkitError) else str(error) or type(error).__name__
    message = reason if reason.startswith(name) else f"{name}: {reason}"
    result = UnreadableFile(message, getattr(error, "hint", "check the file and its permissions"))
    result.bad = BadLine(name, 1, message.removeprefix(f"{name}: "))
    return result


@dataclass(slots=True)
class Chunk:
    """Complete lines of one file; `first_line` counts from 1. Picklable."""

    file: str
    first_line: int
    data: bytes
    bad: list[BadLine] = field(default_factory=list)


class Document:
    """One document: its `fields` as parsed from `stored`, the line with its newline."""

    __slots__ = ("_changes", "_options", "_original", "_stored", "fields", "file", "line")

    def __init__(self, stored: bytes, fields: dict[str, Any], file: str, line: int, options: ReadOptions) -> None:
        self._stored = stored
        self.fields = self._original = fields
        self.file = file
        self.line = line
        self._options = options
        self._changes: dict[str, Any] = {}

    @property
    def raw(self) -> bytes:
        """The line as it was read."""
        return self._stored[:-1]

    @property
    def text(self) -> str:
        return str(self.fields[self._options.text_key or "text"])

    @property
    def id(self) -> str:
        """The id field, as its JSON text unless it is a string, or else the xxh3-128 of the document's text (of its
        line, for rows without text)."""
        value = self.fields.get(self._options.id_key)
        if value is not None:
            exact = isinstance(value, str) or type(value) is int or (type(value) is float and abs(value) < 1 << 63)
            return str(value) if exact else raw_values(self._stored)[self._options.id_key].decode()
        return xxhash.xxh3_128_hexdigest(self.raw if self._options.text_key is None else self.text.encode())

    def value(self, path: str) -> Any:
        """The value of a field, with dots for nested fields; integers are exact, also those beyond 64 bits."""
        value = dotted(self.fields, path)
        if isinstance(value, (float, dict, list)) and may_hold_big_integer(self._stored):
            return dotted(exact_fields(self._stored), path)
        return value

    @property
    def exact_fields(self) -> dict[str, Any]:
        """The fields with exact integers, those inside lists excepted."""
        return exact_fields(self._stored) if has_big_number(self.fields) else self.fields

    def raw_fields(self) -> dict[str, bytes]:
        """The bytes of each field in the original line; orjson.Fragment writes them elsewhere unchanged."""
        return raw_values(self._stored, self._original)

    def with_fields(self, fields: dict[str, Any]) -> bytes:
        """The original line with fields set, whatever was changed."""
        return splice(self._stored, fields, self._original)

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
        """Set fields."""
        self._changes.update(fields)
        self.fields = self.fields | fields

    def change_text(self, text: str) -> None:
        """Replace the text, under the key of the read options."""
        self.change(**{self._options.text_key or "text": text})

    def encode(self) -> bytes:
        """The line with its newline: the original bytes, apart from the fields that were changed."""
        return splice(self._stored, self._changes, self._original) if self._changes else self._stored


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
        except orjson.JSONDecodeError as error:
            fields = beyond_floats(line) if "infinity" in error.msg else None
            reason = _json_error(line[:-1]) if fields is None else ""
        if not reason:
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


class DocumentReader:
    """Documents of several inputs in order. A context manager: on exit what was quarantined is stored.

    `inputs` (lineage) is complete once `chunks` is exhausted. `bad` counts the bad lines that were skipped or
    quarantined, `bad_files` holds such files; `report` is called with each. Readers that write to one quarantine share
    it: `open_quarantine` returns the one with a name.
    """

    def __init__(
        self,
        paths: list[str],
        options: ReadOptions | None = None,
        open_quarantine: Callable[[str], Quarantine] | None = None,
        report: Callable[[BadLine], object] | None = None,
    ) -> None:
        self.paths = paths
        self.options = options or ReadOptions()
        self.inputs: list[Input] = []
        self.bad = 0
        self.bad_files: list[BadLine] = []
        self._report = report
        self._own = ExitStack()
        files = self.options.quarantine_files()
        quarantines = {file: (open_quarantine or self._open_quarantine)(file) for file in {*files} - {""}}
        self._line_quarantine, self._file_quarantine = (quarantines.get(file) for file in files)

    def _open_quarantine(self, path: str) -> Quarantine:
        from llmkit.io.document_writer import Quarantine

        return self._own.enter_context(Quarantine(path))

    def __enter__(self) -> DocumentReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for quarantine in {self._line_quarantine, self._file_quarantine} - {None}:
            assert quarantine
            quarantine.inputs += self.inputs
        self._own.__exit__(kind, error, trace)

    def counts(self) -> dict[str, int]:
        """The numbers of bad lines and bad files, for summary and lineage; only those above 0."""
        return {name: n for name, n in (("bad_lines", self.bad), ("bad_files", len(self.bad_files))) if n}

    def chunks(self) -> Iterator[Chunk]:
        """Complete lines of every input, about 1 MiB at a time, bad lines included."""
        for path in self.paths:
            damage: list[BadLine] = []
            yield from self._until_damage(path, self._file_chunks(path, damage), damage)
            for bad in damage:
                self.inputs.append(Input("input", base_name(path), digest_damaged(path)))
                self.accept_file(bad)

    def _file_chunks(self, path: str, damage: list[BadLine]) -> Iterator[Chunk]:
        # No JSON and no compressed stream begins with the P of Parquet's PAR1.
        is_parquet = peek_stdin() == b"P" if path == STDIN else path.lower().endswith(".parquet")
        with open_raw(path) as raw:
            yield from (self._parquet_chunks if is_parquet else self._line_chunks)(path, raw, damage)

    def _until_damage(self, path: str, items: Iterator[Item], damage: list[BadLine]) -> Iterator[Item]:
        """The items that are read from a file. An error of reading ends them, and is added to `damage` or raised."""
        try:
            yield from items
        except Exception as error:
            if not isinstance(error, (LlmkitError, OSError)) and not is_remote(path):
                raise
            unreadable = unreadable_file(path, error)
            if self.options.on_bad_file == "stop" or path == STDIN:
                raise unreadable from error
            damage.append(unreadable.bad)

    def _line_chunks(self, path: str, raw: BinaryIO, damage: list[BadLine]) -> Iterator[Chunk]:
        name, notes, digest = display_name(path), Notes(), xxhash.xxh3_128()
        limit = self.options.max_line_bytes + len(UTF8_BOM)  # `parse` checks shorter lines exactly
        line, skipping, empty = 1, False, True
        complete: list[bytes | memoryview] = []  # up to a newline
        partial: list[bytes | memoryview] = []  # after it
        size = partial_size = 0
        for piece in self._until_damage(path, decompress(raw, name, notes, PIECE_BYTES), damage):
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
        if damage:
            data = b"".join(complete)
            yield Chunk(name, line, data)
            line += sum(1 for _ in io.BytesIO(data))
            damage[:] = [replace(bad, line=line, raw=b"".join(partial)) for bad in damage]
            return
        if size + partial_size:
            yield Chunk(name, line, b"".join(complete + partial))
        if empty and path == STDIN:  # llmkit's own commands write a header even without documents
            raise LlmkitError("stdin is empty", "the command before this one failed, or wrote nothing")
        record = record_or_warning(join_notes, notes.entries, name)
        self.inputs.append(Input("input", base_name(path), "xxh3:" + digest.hexdigest(), record))

    def _parquet_chunks(self, path: str, raw: BinaryIO, damage: list[BadLine]) -> Iterator[Chunk]:
        from llmkit.io.parquet import ParquetRows, describe

        line = 1
        name, spool, digest = display_name(path), None, ""
        with ExitStack() as stack:
            if path == STDIN:  # the schema is at the end of the file
                spool = stack.enter_context(tempfile.TemporaryFile())
                digest = digest_bytes(_copied(raw, spool))
                spool.seek(0)
            rows = ParquetRows(spool or raw, name, self.options.text_key or "", self.options.id_key)
            for data, lines, bad_rows in self._until_damage(path, rows.lines(), damage):
                yield Chunk(
                    name, line, data, [BadLine(name, line + bad.number, bad.reason, bad.raw) for bad in bad_rows]
                )
                line += lines
            if damage:
                damage[:] = [replace(problem, line=line) for problem in damage]
            else:
                self.inputs.append(describe(path, spool, digest, rows.texts))

    def accept(self, bad: list[BadLine]) -> None:
        """Handle bad lines by `on_bad_line`: raise LlmkitError for the first, count them, or quarantine them."""
        if not bad:
            return
        bad = sorted(bad, key=lambda item: item.line)
        if self.options.on_bad_line == "stop":
            first = bad[0]
            raise LlmkitError(
                f"{first.file}:{first.line}: {first.reason}",
                line_hint(first.file, first.line, first.raw),
            ) from (WorkerError(first.trace) if first.trace else None)
        self.bad += len(bad)
        if self._line_quarantine:
            self._line_quarantine.add([item.row() for item in bad])

    def accept_file(self, bad: BadLine) -> None:
        """Count a bad file, report it, and quarantine what was read of its incomplete line."""
        self.bad_files.append(bad)
        if self._file_quarantine:
            self._file_quarantine.add([bad.row()])
        if self._report:
            self._report(bad)

    def documents(self) -> Iterator[Document]:
        """Every document, in this process."""
        for chunk in self.chunks():
            documents, bad = parse(chunk, self.options)
            self.accept(bad)
            yield from documents


def _copied(raw: BinaryIO, target: BinaryIO) -> Iterator[bytes]:
    """The blocks of `raw`, which are also written to `target`."""
    while block := raw.read(BLOCK):
        target.write(block)
        yield block

"""One token shard: an Arrow stream mapped into memory and validated. shards/writer.py describes the format."""

from __future__ import annotations

import base64
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llmkit.errors import LlmkitError, UnreadableRecordError
from llmkit.io.inputs import HINT_IDS, holds_ids
from llmkit.io.record import parse_record
from llmkit.io.run_layout import regular
from llmkit.io.sealed_file import BYTES, is_sealed
from llmkit.memory import limited
from llmkit.shards.arrow import JSON_ID, JSON_SOURCE, Tokens, as_numpy
from llmkit.shards.digest import LINEAGE, ColumnDigest
from llmkit.shards.tokenizer_info import TOKENIZER_FILES, TokenizerInfo, read_tokenizer

if TYPE_CHECKING:
    import pyarrow as pa

PADDING_SOURCE = "<padding>"  # source of the rows that fill up a packed sequence
STREAM_START = b"\xff\xff\xff\xff"
# Keys of the schema metadata and of the last batch.
TOKENIZER = b"llmkit.tokenizer"
TOKENIZER_TEXTS = b"llmkit.tokenizer_files"
SEQUENCE_LENGTH = b"llmkit.sequence_length"
STAGES = b"llmkit.stages"
TRAILER = b"llmkit.trailer"
# In the custom metadata of a batch, a bit per row: its id or its source is not text.
JSON_MARKS = {JSON_ID: b"llmkit.numeric_ids", JSON_SOURCE: b"llmkit.json_sources"}
COLUMN_TYPES = {
    "tokens": ("large_list<uint16>", "large_list<uint32>"),
    "id": ("string",),
    "source": ("dictionary<values=string, indices=int32, ordered=0>",),
    "epoch": ("int32",),
    "duplicates": ("int64",),
}
OPTIONAL_COLUMNS = ("epoch", "duplicates")
MEMORY_BASE, MEMORY_PER_BYTE = 256 << 20, 16  # to read what describes a shard
HINT_REMAKE = "the command that wrote it did not finish, or the copy is incomplete; make it again"
HINT_TOKENIZE = "documents become token shards by: llmkit tokenize -t TOKENIZER"
HINT_FOREIGN = "the file was not written by llmkit"


class Shard:
    """One mapped Arrow stream: its batches, its trailer, its tokenizer.

    LlmkitError where it is damaged or not a token shard.
    """

    def __init__(self, path: Path, name: str) -> None:
        import pyarrow as pa

        self.name = name
        self.path = path
        self.batches: list[pa.RecordBatch] = []
        self.json_marks: list[NDArray[np.uint8] | None] = []  # of each batch; None where all is text
        trailer: Any = None
        try:
            with open(regular(path), "rb") as file:
                start = file.read(8)
            if not start:
                raise LlmkitError(f"{name}: empty file", "token shards come from: llmkit tokenize")
            if not start.startswith(STREAM_START):
                reason = "an Arrow file, not an Arrow stream" if start.startswith(b"ARROW1") else "not a token shard"
                raise LlmkitError(f"{name}: {reason}", HINT_IDS if holds_ids(name) else HINT_TOKENIZE)
            # Shards are mapped: only descriptions are copied, unless somebody else has compressed the columns.
            with limited(name, MEMORY_BASE + MEMORY_PER_BYTE * os.path.getsize(path), HINT_FOREIGN):
                source = pa.memory_map(os.fsencode(path))
                stream = pa.ipc.open_stream(source)
                self._schema = stream.schema
                self.metadata = stream.schema.metadata or {}
                self._check_schema(stream.schema)
                while True:
                    try:
                        batch, custom = stream.read_next_batch_with_custom_metadata()
                    except StopIteration:
                        break
                    if trailer is not None:
                        raise LlmkitError(f"{name}: rows after the trailer", "the file is damaged")
                    if custom is not None and TRAILER in custom:
                        trailer = self._json(custom[TRAILER], "trailer")
                    else:
                        self.batches.append(batch)
                        self.json_marks.append(self._marks(custom or {}, batch.num_rows))
            remaining = source.size() - source.tell()
            source.seek(0)
            self._content = source.read_buffer()
            source.close()  # buffers keep the map, which needs no open file
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            if isinstance(error, OSError) and error.errno:
                raise LlmkitError(f"{name}: {error.strerror}", "check the path and its permissions") from error
            reason = str(error).splitlines()[0] if str(error) else "no message"
            raise LlmkitError(f"{name}: truncated or damaged ({reason})", HINT_REMAKE) from error
        if trailer is None:
            raise LlmkitError(f"{name}: truncated: the stream ends before its trailer", HINT_REMAKE)
        if remaining:
            raise LlmkitError(f"{name}: {remaining} bytes follow the end of the stream", "join shards with: llmkit mix")
        if not isinstance(trailer, dict) or type(trailer.get("part")) is not int:
            raise LlmkitError(f"{name}: malformed trailer", HINT_FOREIGN)
        self.trailer: dict[str, Any] = trailer

    def _check_schema(self, schema: pa.Schema) -> None:
        import pyarrow as pa

        if TOKENIZER not in self.metadata or "tokens" not in schema.names:
            raise LlmkitError(
                f"{self.name}: an Arrow stream, but not a token shard (no llmkit.tokenizer in its metadata)",
                HINT_TOKENIZE,
            )
        for name, types in COLUMN_TYPES.items():
            if name not in schema.names:
                if name in OPTIONAL_COLUMNS:
                    continue
                raise LlmkitError(f"{self.name}: no column {name!r}", HINT_FOREIGN)
            column_type = schema.field(name).type
            type_name = (
                f"large_list<{column_type.value_type}>" if pa.types.is_large_list(column_type) else str(column_type)
            )
            if type_name not in types:
                raise LlmkitError(
                    f"{self.name}: column {name!r} has type {type_name}", "token shards hold " + " or ".join(types)
                )

    def _marks(self, custom: Any, rows: int) -> NDArray[np.uint8] | None:
        marks = None
        for bit, key in JSON_MARKS.items():
            if key in custom:
                try:
                    flags = np.unpackbits(np.frombuffer(base64.b64decode(custom[key]), np.uint8))[:rows]
                except ValueError:
                    flags = np.zeros(0, np.uint8)
                if len(flags) < rows:
                    raise LlmkitError(f"{self.name}: damaged (which ids and sources are text)", HINT_REMAKE)
                marks = flags * np.uint8(bit) if marks is None else marks | flags * np.uint8(bit)
        return marks

    def _json(self, text: bytes, what: str) -> Any:
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            raise LlmkitError(f"{self.name}: malformed {what}", HINT_FOREIGN) from None

    def is_sealed(self) -> bool:
        """Whether every byte is as it was written; False for shards of earlier versions, which do not tell.

        Reads the file: 0.2 s per GB in memory.
        """
        digest = self.trailer.get(BYTES)
        return isinstance(digest, str) and is_sealed(memoryview(self._content), digest)

    def tokenizer(self) -> TokenizerInfo:
        """The tokenizer, with its files from the schema or else from the shard's directory, where they exist."""
        files: Any = (
            self._json(self.metadata[TOKENIZER_TEXTS], "tokenizer files") if TOKENIZER_TEXTS in self.metadata else {}
        )
        if not isinstance(files, dict) or not all(isinstance(text, str) for text in files.values()):
            raise LlmkitError(f"{self.name}: malformed tokenizer files", HINT_FOREIGN)
        files = {name: text for name, text in files.items() if name in TOKENIZER_FILES}
        info = TokenizerInfo.from_header(self._json(self.metadata[TOKENIZER], "tokenizer"), files, self.name)
        directory = self.path.parent
        if files or not (directory / "tokenizer.json").is_file():
            return info
        stored = read_tokenizer(directory)
        if stored.digest != info.digest:
            raise LlmkitError(
                f"{directory}: the tokenizer beside the shards is not the one that made them",
                "put back the tokenizer.json that they were made with",
            )
        return replace(info, files=stored.files)

    def tokenizer_identity(self) -> tuple[Any, Any]:
        """Tokenizer digest and end-of-text id, which shards that are read together must share."""
        header = self._json(self.metadata[TOKENIZER], "tokenizer")
        return (header.get("digest"), header.get("eos_id")) if isinstance(header, dict) else (None, None)

    def token_type(self) -> str:
        """`uint16` or `uint32`."""
        return str(self._schema.field("tokens").type.value_type)

    def sequence_length(self) -> int | None:
        """The sequence length that the documents were packed for; None where they were not packed."""
        length = self._json(self.metadata.get(SEQUENCE_LENGTH, b"null"), "sequence length")
        if length is not None and (type(length) is not int or length < 1):
            raise LlmkitError(f"{self.name}: malformed sequence length", HINT_FOREIGN)
        return length

    def stages(self) -> list[int]:
        """Tokens after which each stage of the mix ends; empty for a mix of a single stage."""
        ends = self._json(self.metadata.get(STAGES, b"[]"), "stages")
        valid = isinstance(ends, list) and all(type(end) is int for end in ends)
        if not valid or any(a >= b for a, b in zip([0, *ends], ends, strict=False)):
            raise LlmkitError(f"{self.name}: malformed stages", HINT_FOREIGN)
        return list(ends)

    def lineage(self) -> dict[str, Any] | None:
        """The lineage record; complete in the last shard of a directory."""
        record, trailer = parse_record(self.metadata.get(LINEAGE), self.name), self.trailer.get("lineage", {})
        if not isinstance(trailer, dict):
            raise UnreadableRecordError(self.name, "its trailer is not an object")
        return record and parse_record(record | trailer, self.name)


def batch_tokens(batch: pa.RecordBatch, name: str) -> tuple[NDArray[np.int64], Tokens]:
    """Offsets [rows + 1] and token ids of one batch, views; LlmkitError where they are inconsistent."""
    import pyarrow as pa

    try:
        for field, values in zip(batch.schema, batch.columns, strict=True):
            # Arrow trusts the sizes in a file: without this check a damaged one crashes the process. Token ids have no
            # inner structure to check.
            values.validate(full=field.name != "tokens")
            if pa.types.is_dictionary(field.type):
                values.dictionary.validate(full=True)
    except pa.ArrowException as error:
        raise LlmkitError(f"{name}: damaged ({str(error).splitlines()[0]})", HINT_REMAKE) from error
    column = batch.column("tokens")
    if column.values.null_count or any(column.null_count for column in batch.columns):
        raise LlmkitError(f"{name}: null values", HINT_FOREIGN)
    offsets, values = as_numpy(column.offsets), as_numpy(column.values)
    if not len(offsets):
        return np.zeros(1, np.int64), values[:0]
    if offsets[0] < 0 or offsets[-1] > len(values) or (np.diff(offsets) < 0).any():
        raise LlmkitError(f"{name}: damaged (document boundaries out of range)", HINT_REMAKE)
    return offsets, values[offsets[0] : offsets[-1]]


def scan_shard(shard: Shard) -> tuple[str, int]:
    """Digest of a shard's content, computed from its documents, and its largest token id."""
    digest, largest = ColumnDigest(), 0
    for batch, json_marks in zip(shard.batches, shard.json_marks, strict=True):
        offsets, values = batch_tokens(batch, shard.name)
        source = batch.column("source")
        sources = as_numpy(source.indices), source.dictionary.to_pylist()
        optional = [as_numpy(batch.column(name)) if name in batch.schema.names else None for name in OPTIONAL_COLUMNS]
        digest.add(values, np.diff(offsets), batch.column("id"), sources, optional[0], optional[1], json_marks)
        largest = max(largest, int(values.max(initial=0)))
    return digest.result(), largest

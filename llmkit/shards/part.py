"""One part of token shards: an Arrow stream mapped into memory, checked, with its digest (see shards.py for the format)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from llmkit.errors import LlmkitError
from llmkit.shards.tokenizer_info import TOKENIZER_FILES, TokenizerInfo, read_tokenizer

if TYPE_CHECKING:
    import pyarrow as pa

Tokens = NDArray[Any]  # uint16 or uint32
Names = tuple[NDArray[np.int32], list[str]]  # of each document the index of its source; the sources
PADDING_SOURCE = "<padding>"  # source of the rows that fill up a packed sequence
STREAM_START = b"\xff\xff\xff\xff"
FILES = b"llmkit.tokenizer_files"
LENGTH = b"llmkit.sequence_length"
STAGES = b"llmkit.stages"
HINT_REMAKE = "the command that wrote it did not finish, or the copy is incomplete; make it again"


class ColumnDigest:
    """Digest of documents, independent of how they are cut into batches."""

    def __init__(self) -> None:
        self._states = [xxhash.xxh3_128() for _ in range(5)]

    def add(
        self,
        tokens: Tokens,
        lengths: NDArray[np.int64],
        ids: pa.StringArray,
        sources: Names,
        epochs: Any,
        duplicates: Any,
    ) -> None:
        """Documents in order; `epochs` int32 or None, `duplicates` int64 or None."""
        codes, names = sources
        ended = [name.encode() + b"\0" for name in names]
        columns: tuple[Any, ...] = (
            np.ascontiguousarray(tokens).data,
            lengths.astype("<i8").data,
            _ended(ids).data,
            b"".join([ended[code] for code in codes.tolist()]),
        )
        for state, column in zip(self._states, columns, strict=False):
            state.update(column)
        if epochs is not None:
            self._states[4].update(np.ascontiguousarray(epochs, "<i4").data)
        if duplicates is not None:
            if len(self._states) == 5:
                self._states.append(xxhash.xxh3_128())
            self._states[5].update(np.ascontiguousarray(duplicates, "<i8").data)

    def result(self) -> str:
        """`xxh3:` and 32 hex digits."""
        return "xxh3:" + xxhash.xxh3_128_hexdigest(b"".join(state.digest() for state in self._states))


def combined_digest(parts: list[str]) -> str:
    """The digest of several parts from theirs."""
    return parts[0] if len(parts) == 1 else "xxh3:" + xxhash.xxh3_128_hexdigest("".join(parts).encode())


class Part:
    """One mapped Arrow stream: its batches, its trailer, its tokenizer."""

    def __init__(self, path: Path, name: str) -> None:
        import pyarrow as pa

        self.name = name
        self.path = path
        self.batches: list[pa.RecordBatch] = []
        trailer: Any = None
        try:
            with open(path, "rb") as file:
                start = file.read(8)
            if not start:
                raise LlmkitError(f"{name}: empty file", "token shards come from: llmkit tokenize")
            if not start.startswith(STREAM_START):
                kind = "an Arrow file, not an Arrow stream" if start.startswith(b"ARROW1") else "no token shard"
                raise LlmkitError(f"{name}: {kind}", "documents become token shards by: llmkit tokenize -t TOKENIZER")
            source = pa.memory_map(str(path))
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
                    raise LlmkitError(f"{name}: rows behind the trailer", "the file is damaged")
                if custom is not None and b"llmkit.trailer" in custom:
                    trailer = self._json(custom[b"llmkit.trailer"], "trailer")
                else:
                    self.batches.append(batch)
            left = source.size() - source.tell()
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            if isinstance(error, OSError) and error.errno:
                raise LlmkitError(f"{name}: {error.strerror}", "check the path and its permissions") from error
            reason = str(error).splitlines()[0] if str(error) else "no message"
            raise LlmkitError(f"{name}: truncated or damaged ({reason})", HINT_REMAKE) from error
        if trailer is None:
            raise LlmkitError(f"{name}: truncated: the stream ends before its trailer", HINT_REMAKE)
        if left:
            raise LlmkitError(f"{name}: {left} bytes follow the end of the stream", "join shards with: llmkit mix")
        if not isinstance(trailer, dict) or type(trailer.get("part")) is not int:
            raise LlmkitError(f"{name}: malformed trailer", "the file was not written by llmkit")
        self.trailer: dict[str, Any] = trailer

    def _check_schema(self, schema: pa.Schema) -> None:
        import pyarrow as pa

        if b"llmkit.tokenizer" not in self.metadata or "tokens" not in schema.names:
            raise LlmkitError(
                f"{self.name}: an Arrow stream, but no token shard (no llmkit.tokenizer in its metadata)",
                "documents become token shards by: llmkit tokenize -t TOKENIZER",
            )
        wanted = {
            "tokens": ("large_list<uint16>", "large_list<uint32>"),
            "id": ("string",),
            "source": ("dictionary<values=string, indices=int32, ordered=0>",),
            "epoch": ("int32",),
            "duplicates": ("int64",),
        }
        for name, types in wanted.items():
            if name not in schema.names:
                if name in ("epoch", "duplicates"):
                    continue
                raise LlmkitError(f"{self.name}: no column {name!r}", "the file was not written by llmkit")
            kind = schema.field(name).type
            shown = f"large_list<{kind.value_type}>" if pa.types.is_large_list(kind) else str(kind)
            if shown not in types:
                raise LlmkitError(
                    f"{self.name}: column {name!r} has type {shown}", "token shards hold " + " or ".join(types)
                )

    def _json(self, text: bytes, what: str) -> Any:
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            raise LlmkitError(f"{self.name}: malformed {what}", "the file was not written by llmkit") from None

    def tokenizer(self) -> TokenizerInfo:
        """The tokenizer's record; its files where the schema holds them, else those beside the part, if there are any."""
        files: Any = self._json(self.metadata[FILES], "tokenizer files") if FILES in self.metadata else {}
        if not isinstance(files, dict) or not all(isinstance(text, str) for text in files.values()):
            raise LlmkitError(f"{self.name}: malformed tokenizer files", "the file was not written by llmkit")
        files = {name: text for name, text in files.items() if name in TOKENIZER_FILES}
        info = TokenizerInfo.from_header(self._json(self.metadata[b"llmkit.tokenizer"], "tokenizer"), files, self.name)
        directory = self.path.parent
        if files or not (directory / "tokenizer.json").is_file():
            return info
        beside = read_tokenizer(directory)
        if beside.digest != info.digest:
            raise LlmkitError(
                f"{directory}: the tokenizer beside the shards is not theirs",
                "put back the tokenizer.json that they were made with",
            )
        return replace(info, files=beside.files)

    def tokenizer_identity(self) -> tuple[Any, Any]:
        """What parts that are read together must share: the tokenizer's digest and the id that ends a document."""
        header = self._json(self.metadata[b"llmkit.tokenizer"], "tokenizer")
        return (header.get("digest"), header.get("eos_id")) if isinstance(header, dict) else (None, None)

    def token_type(self) -> str:
        return str(self._schema.field("tokens").type.value_type)

    def sequence_length(self) -> int | None:
        """What the documents were packed for by best fit, if they were."""
        length = self._json(self.metadata.get(LENGTH, b"null"), "sequence length")
        if length is not None and (type(length) is not int or length < 1):
            raise LlmkitError(f"{self.name}: malformed sequence length", "the file was not written by llmkit")
        return length

    def stages(self) -> list[int]:
        """Tokens after which each stage of the mix ends; nothing where it has one."""
        ends = self._json(self.metadata.get(STAGES, b"[]"), "stages")
        whole = isinstance(ends, list) and all(type(end) is int for end in ends)
        if not whole or any(a >= b for a, b in zip([0, *ends], ends, strict=False)):
            raise LlmkitError(f"{self.name}: malformed stages", "the file was not written by llmkit")
        return list(ends)

    def lineage(self) -> dict[str, Any] | None:
        header = self._json(self.metadata.get(b"llmkit.lineage", b"null"), "lineage")
        trailer = self.trailer.get("lineage")
        if not isinstance(header, dict):
            return None
        return header | (trailer if isinstance(trailer, dict) else {})


def numbers(array: pa.Array) -> NDArray[Any]:
    """View of an array of numbers without nulls. Not `Array.to_numpy`, which imports pandas where that is installed (0.4 s)."""
    dtype = np.dtype(str(array.type))
    buffer = array.buffers()[1]
    if buffer is None or not len(array):
        return np.zeros(0, dtype)
    return np.frombuffer(buffer, dtype, len(array), array.offset * dtype.itemsize)


def text_bytes(texts: pa.StringArray) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
    """Where each text starts and the last ends, int32 [n + 1], in all of their bytes; views."""
    _, starts, content = texts.buffers()
    found = np.frombuffer(starts, np.int32, len(texts) + 1, texts.offset * 4) if len(texts) else np.zeros(1, np.int32)
    return found, np.frombuffer(content or b"", np.uint8)


def _ended(texts: pa.StringArray) -> NDArray[np.uint8]:
    """The bytes of all texts, each followed by a zero byte."""
    starts, content = text_bytes(texts)
    size = int(starts[-1] - starts[0])
    ended, ends = np.zeros(size + len(texts), np.uint8), np.zeros(size + len(texts), np.bool_)
    ends[starts[1:] - starts[0] + np.arange(len(texts))] = True
    ended[~ends] = content[starts[0] : starts[-1]]
    return ended


def coded(names: Sequence[str]) -> Names:
    """Names as indices into those that there are, in order of appearance."""
    table: dict[str, int] = {}
    codes = [table.setdefault(name, len(table)) for name in names]
    return np.array(codes, np.int32), list(table)


def as_arrow(values: NDArray[Any] | Sequence[str]) -> pa.Array:
    """Numbers, without a copy, or texts as an Arrow array. Not `pa.array`, which imports pandas too."""
    import pyarrow as pa

    if not isinstance(values, np.ndarray):
        texts = [value.encode() for value in values]
        return text_array(np.fromiter(map(len, texts), np.int64, len(texts)), b"".join(texts))
    buffers = [None, pa.py_buffer(np.ascontiguousarray(values))]
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), buffers)


def text_array(lengths: NDArray[Any], content: bytes) -> pa.StringArray:
    """Texts of `lengths` [n] bytes that follow one another in `content`."""
    import pyarrow as pa

    if len(content) >= 1 << 31:
        raise LlmkitError("over 2 GiB of ids in one batch", "give the documents shorter ids")
    ends = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=ends[1:])
    return pa.StringArray.from_buffers(len(lengths), pa.py_buffer(ends), pa.py_buffer(content))


def batch_tokens(batch: pa.RecordBatch, name: str) -> tuple[NDArray[np.int64], Tokens]:
    """Offsets [rows + 1] and token ids of one batch, views; LlmkitError where they do not fit together."""
    import pyarrow as pa

    try:
        for field, values in zip(batch.schema, batch.columns, strict=True):
            # Arrow trusts a file's own sizes: without this a damaged one crashes the process. The token ids have no inner structure to check.
            values.validate(full=field.name != "tokens")
            if pa.types.is_dictionary(field.type):
                values.dictionary.validate(full=True)
    except pa.ArrowException as error:
        raise LlmkitError(f"{name}: damaged ({str(error).splitlines()[0]})", HINT_REMAKE) from error
    column = batch.column("tokens")
    if column.values.null_count or any(column.null_count for column in batch.columns):
        raise LlmkitError(f"{name}: null values", "the file was not written by llmkit")
    offsets, values = numbers(column.offsets), numbers(column.values)
    if not len(offsets):
        return np.zeros(1, np.int64), values[:0]
    if offsets[0] < 0 or offsets[-1] > len(values) or (np.diff(offsets) < 0).any():
        raise LlmkitError(f"{name}: damaged (document boundaries out of range)", HINT_REMAKE)
    return offsets, values[offsets[0] : offsets[-1]]


def part_digest(part: Part) -> tuple[str, int]:
    """Digest of a part computed anew, and its largest token id."""
    digest, largest = ColumnDigest(), 0
    for batch in part.batches:
        offsets, values = batch_tokens(batch, part.name)
        source = batch.column("source")
        sources = numbers(source.indices), source.dictionary.to_pylist()
        more = [numbers(batch.column(name)) if name in batch.schema.names else None for name in ("epoch", "duplicates")]
        digest.add(values, np.diff(offsets), batch.column("id"), sources, *more)
        largest = max(largest, int(values.max(initial=0)))
    return digest.result(), largest

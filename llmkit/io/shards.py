"""Token shards: Arrow IPC streams of token ids, one row a document, readable by any Arrow library.

| column | type | |
|---|---|---|
| tokens | large_list<uint16>, uint32 where the vocabulary is over 65,536 | ids, the end-of-text id included |
| id | string | the document's id |
| source | dictionary<int32, string> | where it came from |
| epoch | int32, after `mix` only | how often the document was seen before |
| duplicates | int64, by `tokenize --keep-duplicates` only | how often the document was found by `dedup` |

Schema metadata: `llmkit.tokenizer` (digest, vocab_size, eos_id, bos_id, pad_id), `llmkit.lineage` (header), and in single files and
streams `llmkit.tokenizer_files` (name to text), after packing by `mix` `llmkit.sequence_length`, of a mix with several stages `llmkit.stages` (tokens after which each ends); in a directory of part-00000.arrow, ... these files lie beside the parts. The last batch
is empty and its custom metadata `llmkit.trailer` holds {part, last, documents, tokens, digest} and in the last part the lineage's trailer:
a stream without it was cut off and is refused, as is a directory that lacks a part.

The digest of a part is xxh3-128 of five xxh3-128 digests of 16 bytes, in this order: token ids as stored (little-endian), document
lengths (int64), ids, sources (UTF-8, each followed by a zero byte), epochs (int32; of nothing where there is no such column), and of a sixth
where there are duplicates (int64). That of several parts is xxh3-128 of theirs. Cutting documents into batches does not change it.

Batches close at 2^20 tokens or 2^16 documents; a longer document is one row all the same. Reading maps the file into memory and copies
nothing: opening reads what each batch says of itself, `span` within one batch is a view.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from llmkit.errors import LlmkitError, UsageError
from llmkit.io.atomic import atomic_directory, atomic_file, is_special
from llmkit.io.inputs import STDIN
from llmkit.io.lineage import Input, Lineage
from llmkit.io.shard_part import FILES, LENGTH, STAGES, ColumnDigest, Names, Tokens, as_arrow, coded, combined_digest
from llmkit.io.store import TokenStore, read_shard_lineage, read_tokenizer, shard_digest
from llmkit.io.tokenizer import TokenizerInfo, load_tokenizer_info

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = [
    "ShardWriter",
    "TokenStore",
    "TokenizerInfo",
    "load_tokenizer_info",
    "read_shard_lineage",
    "read_tokenizer",
    "shard_digest",
]

BATCH_TOKENS = 1 << 20
BATCH_DOCUMENTS = 1 << 16
SHARD_TOKENS = 1 << 27


class ShardWriter:
    """Documents to token shards: a directory of parts, one file (output ending in .arrow), or stdout (None or "-").

    Nothing appears under the final name unless `finish` was called. Raises UsageError where stdout is a terminal. With `epochs` the
    column `epoch` is written, with `duplicates` that column. `sequence_length` is what the documents are packed for; their padding is of source
    io.packing.PADDING. `stages` holds the tokens after which each stage of a mix ends.
    """

    def __init__(
        self,
        output: str | None,
        tokenizer: TokenizerInfo,
        lineage: Lineage,
        *,
        force: bool = False,
        max_tokens_per_shard: int = SHARD_TOKENS,
        epochs: bool = False,
        duplicates: bool = False,
        sequence_length: int | None = None,
        stages: Sequence[int] = (),
    ) -> None:
        self.output = None if output in (None, STDIN) else output
        self.tokenizer = tokenizer
        self.lineage = lineage
        self.dtype: type[np.unsignedinteger[Any]] = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
        self.documents = 0
        self.tokens = 0
        self._force = force
        self._limit = max_tokens_per_shard
        self._epochs = epochs
        self._duplicates = duplicates
        self._notes: dict[bytes, Any] = {LENGTH: sequence_length} if sequence_length else {}
        self._notes |= {STAGES: list(stages)} if len(stages) > 1 else {}
        self._stack = ExitStack()
        self._finished = False
        self._part = 0
        self._part_digests: list[str] = []
        if self.output is None and sys.stdout.isatty():
            raise UsageError("token shards are binary: not written to a terminal", "redirect stdout, or name -o PATH")

    def __enter__(self) -> ShardWriter:
        with self._stack:  # what is opened is removed again where an error or a signal comes in between
            self._open()
            self._stack = self._stack.pop_all()
        return self

    def _open(self) -> None:
        import pyarrow as pa

        self._directory: Path | None = None
        if self.output is None:
            self._sink: BinaryIO = sys.stdout.buffer
        elif self.output.endswith(".arrow") or is_special(Path(self.output)):
            self._sink = self._stack.enter_context(atomic_file(self.output, self._force))
        else:
            self._directory = self._stack.enter_context(atomic_directory(self.output, self._force))
            for name, text in self.tokenizer.files.items():
                (self._directory / name).write_bytes(text.encode())
        self._schema = _schema(self.tokenizer, self.dtype, self.lineage, embed=self._directory is None)
        for name, kind in (("epoch", pa.int32()),) * self._epochs + (("duplicates", pa.int64()),) * self._duplicates:
            self._schema = self._schema.append(pa.field(name, kind, nullable=False))
        if self._notes:
            notes = {key: json.dumps(value).encode() for key, value in self._notes.items()}
            self._schema = self._schema.with_metadata(self._schema.metadata | notes)
        self._open_part()

    @property
    def directory(self) -> Path | None:
        """What is being filled, under its temporary name, where the output is a directory."""
        return self._directory

    def write(self, tokens: Tokens | Sequence[int], id: str, source: str, epoch: int = 0) -> None:
        """Append one document."""
        self.extend(
            np.asarray(tokens), np.array([len(tokens)]), as_arrow([id]), coded([source]), np.array([epoch], np.int32)
        )

    def extend(
        self,
        tokens: Tokens,
        lengths: NDArray[np.int64],
        ids: pa.StringArray,
        sources: Names,
        epochs: NDArray[np.int32] | None = None,
        duplicates: NDArray[np.int64] | None = None,
    ) -> None:
        """Append n documents: `tokens` flat [sum of lengths], `lengths` [n], `ids` [n], `sources` [n], how often each was seen before [n], and
        how often `dedup` found it [n].

        Gives the bytes of n calls of `write`. Nothing is copied before its batch is full: arrays must not change until `finish`.
        """
        ends, (codes, names) = np.cumsum(lengths), sources
        epochs = np.zeros(len(ends), np.int32) if epochs is None else epochs
        duplicates = np.ones(len(ends), np.int64) if duplicates is None else duplicates
        first = start = 0  # document and token that come next
        while first < len(ends):
            full = int(np.searchsorted(ends, start + self.room)) + 1
            behind = min(full, first + BATCH_DOCUMENTS - self._held_documents, len(ends))
            if self._directory:
                fit = int(np.searchsorted(ends, start + self._limit - self._part_tokens, side="right"))
                if fit <= first and self._part_tokens:
                    self._next_part()
                    continue
                behind = min(behind, max(fit, first + 1))
            stop = int(ends[behind - 1])
            self._held.append(tokens[start:stop])
            self._lengths.append(lengths[first:behind])
            self._ids.append(ids[first:behind])
            self._codes.append(self._coded(codes[first:behind], names))
            self._epoch_numbers.append(epochs[first:behind])
            self._duplicate_numbers.append(duplicates[first:behind])
            self._held_documents += behind - first
            self._held_tokens += stop - start
            self._part_tokens += stop - start
            first, start = behind, stop
            if self._held_tokens >= BATCH_TOKENS or self._held_documents >= BATCH_DOCUMENTS:
                self._flush()

    @property
    def room(self) -> int:
        """Tokens until the present batch is full: who hands over as many at a time spares a copy of them."""
        return BATCH_TOKENS - self._held_tokens

    def finish(self, counts: dict[str, Any], inputs: list[Input]) -> None:
        """Complete the content and its lineage; call it once, last."""
        self._flush()
        digest = self._digest.result()
        self.lineage.inputs += inputs
        self.lineage.counts = counts
        self.lineage.digest = combined_digest([*self._part_digests, digest])
        self._close_part(digest, {"lineage": self.lineage.trailer()})
        if self.output is None:
            self._sink.flush()
        self._finished = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            assert self._finished, "ShardWriter left without finish()"
        if isinstance(error, OSError) and self.output and not error.filename:
            error.filename = self.output  # which disk is full
        self._stack.__exit__(kind, error, trace)

    def _open_part(self) -> None:
        import pyarrow as pa

        if self._directory:
            path = self._directory / f"part-{self._part:05d}.arrow"
            self._sink = self._stack.enter_context(open(path, "wb"))
        self._stream = pa.ipc.new_stream(pa.PythonFile(self._sink, "w"), self._schema)
        self._digest = ColumnDigest()
        self._part_documents = self._part_tokens = 0
        self._names: dict[str, int] = {}  # sources of this part so far, in order of appearance
        self._clear()

    def _clear(self) -> None:
        self._held: list[Tokens] = []
        self._lengths: list[NDArray[np.int64]] = []
        self._ids: list[pa.StringArray] = []
        self._codes: list[NDArray[np.int32]] = []
        self._epoch_numbers: list[NDArray[np.int32]] = []
        self._duplicate_numbers: list[NDArray[np.int64]] = []
        self._held_documents = self._held_tokens = 0

    def _coded(self, codes: NDArray[np.int32], names: list[str]) -> NDArray[np.int32]:
        """Codes of this part; names that are new to it are numbered in order of appearance."""
        found = np.array([self._names.get(name, -1) for name in names], np.int32)
        for code in dict.fromkeys(codes[found[codes] < 0].tolist()):
            found[code] = self._names.setdefault(names[code], len(self._names))
        return found[codes]

    def _flush(self) -> None:
        """Write what is held as one batch."""
        if not self._held_documents:
            return
        import pyarrow as pa

        lengths = np.concatenate(self._lengths)
        flat = self._held[0] if len(self._held) == 1 else np.concatenate(self._held)
        negative = flat.dtype.kind != "u" and len(flat) and flat.min() < 0
        if len(flat) and (negative or flat.max() >= self.tokenizer.vocab_size):
            raise LlmkitError(
                f"token id {int(flat.max())} is over the vocabulary of {self.tokenizer.vocab_size}",
                "the tokens come from another tokenizer",
            )
        flat = flat.astype(self.dtype, copy=False)
        offsets = np.zeros(len(lengths) + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        try:
            ids = pa.concat_arrays(self._ids)
        except pa.ArrowInvalid:
            raise LlmkitError("over 2 GiB of ids in one batch", "give the documents shorter ids") from None
        codes = np.concatenate(self._codes)
        epochs = np.concatenate(self._epoch_numbers) if self._epochs else None
        duplicates = np.concatenate(self._duplicate_numbers) if self._duplicates else None
        columns = [
            pa.LargeListArray.from_arrays(as_arrow(offsets), as_arrow(flat), type=self._schema.field("tokens").type),
            ids,
            pa.DictionaryArray.from_arrays(as_arrow(codes), as_arrow(list(self._names))),
            *(as_arrow(numbers) for numbers in (epochs, duplicates) if numbers is not None),
        ]
        self._stream.write_batch(pa.record_batch(columns, schema=self._schema))
        self._digest.add(flat, lengths, ids, (codes, list(self._names)), epochs, duplicates)
        self._part_documents += len(lengths)
        self.documents += len(lengths)
        self.tokens += len(flat)
        self._clear()

    def _close_part(self, digest: str, more: dict[str, Any]) -> None:
        import pyarrow as pa

        trailer = {
            "part": self._part,
            "last": bool(more),
            "documents": self._part_documents,
            "tokens": self._part_tokens,
            "digest": digest,
        } | more
        empty = pa.RecordBatch.from_arrays([pa.nulls(0, field.type) for field in self._schema], schema=self._schema)
        text = json.dumps(trailer, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        self._stream.write_batch(empty, custom_metadata={"llmkit.trailer": text})
        self._stream.close()
        if self._directory:
            self._sink.close()

    def _next_part(self) -> None:
        self._flush()
        self._part_digests.append(self._digest.result())
        self._close_part(self._part_digests[-1], {})
        self._part += 1
        self._open_part()


def _schema(info: TokenizerInfo, dtype: Any, lineage: Lineage, *, embed: bool) -> pa.Schema:
    import pyarrow as pa

    def text(value: Any) -> str:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)

    fields = [
        pa.field("tokens", pa.large_list(pa.field("item", pa.from_numpy_dtype(dtype), nullable=False)), nullable=False),
        pa.field("id", pa.string(), nullable=False),
        pa.field("source", pa.dictionary(pa.int32(), pa.string()), nullable=False),
    ]
    metadata = {"llmkit.tokenizer": text(info.header()), "llmkit.lineage": text(lineage.header())}
    return pa.schema(fields, metadata | ({FILES.decode(): text(info.files)} if embed else {}))

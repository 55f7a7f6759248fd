"""Token shards: Arrow IPC streams of token ids, one row per document, readable by any Arrow library.

| column | type | |
|---|---|---|
| tokens | large_list<uint16>, uint32 where the vocabulary is over 65,536 | ids, the end-of-text id included |
| id | string | the document's id |
| source | dictionary<int32, string> | name of its source |
| epoch | int32, after `mix` only | how often the document was seen before |
| duplicates | int64, by `tokenize --keep-duplicates` only | how often `dedup` found the document |

Schema metadata:

| key | value |
|---|---|
| llmkit.tokenizer | digest, vocab_size, eos_id, bos_id, pad_id |
| llmkit.lineage | the header of the lineage record |
| llmkit.tokenizer_files | in single files and streams: name -> text |
| llmkit.sequence_length | after packing by `mix` |
| llmkit.stages | of a mix with several stages: tokens after which each ends |

In a directory of part-00000.arrow, ... the tokenizer's files are stored beside the shards. The last batch is
empty, and its custom metadata `llmkit.trailer` holds {part, last, documents, tokens, digest, bytes} (shards/digest.py
defines the digest, io/sealed_file.py that of all bytes) and in the last shard the trailer of the lineage record: a
stream without it was cut off and is refused, as is a directory that lacks a shard.

Ids and sources that are not text in the documents are stored as JSON text; the custom metadata `llmkit.numeric_ids` and
`llmkit.json_sources` of a batch that has some mark them, in base64 a bit for each row.

Batches close at 2^20 tokens or 2^16 documents; a longer document is one row all the same. Reading maps the file
into memory and copies nothing: opening reads the metadata of each batch, `span` within one batch is a view.
"""

from __future__ import annotations

import base64
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
from llmkit.io.atomic import atomic_file, is_special
from llmkit.io.inputs import STDIN
from llmkit.io.record import Input, Lineage
from llmkit.io.sealed_file import BYTES, PENDING, SealedSink
from llmkit.lineage.outputs import artefact_directory
from llmkit.shards.arrow import SourceCodes, Tokens, as_arrow, encode_sources
from llmkit.shards.digest import LINEAGE, ColumnDigest, combined_digest, metadata_digest
from llmkit.shards.shard import JSON_MARKS, SEQUENCE_LENGTH, STAGES, TOKENIZER, TOKENIZER_TEXTS, TRAILER
from llmkit.shards.tokenizer_info import TokenizerInfo

if TYPE_CHECKING:
    import pyarrow as pa

BATCH_TOKENS = 1 << 20
BATCH_DOCUMENTS = 1 << 16
SHARD_TOKENS = 1 << 27


class ShardWriter:
    """Documents to token shards: a directory of shards, one file (output ending in .arrow), or stdout (None or "-").

    Nothing appears under the final name unless `finish` was called. Raises UsageError where stdout is a
    terminal. `epochs` and `duplicates` write the columns of those names. `sequence_length` is the length that
    the documents are packed for; their padding has the source PADDING_SOURCE. `stages` holds the tokens after
    which each stage of a mix ends.
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
        self._metadata: dict[bytes, Any] = {SEQUENCE_LENGTH: sequence_length} if sequence_length else {}
        self._metadata |= {STAGES: list(stages)} if len(stages) > 1 else {}
        self._stack = ExitStack()
        self._finished = False
        self._number = 0  # of the present shard
        self._shard_digests: list[str] = []
        if self.output is None and sys.stdout.isatty():
            raise UsageError("token shards are binary: not written to a terminal", "redirect stdout, or give -o PATH")

    def __enter__(self) -> ShardWriter:
        with self._stack:  # on an error or a signal, whatever is open by then is removed
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
            self._directory = self._stack.enter_context(artefact_directory(self.output, self._force))
            for name, text in self.tokenizer.files.items():
                (self._directory / name).write_bytes(text.encode())
        self._schema = _schema(self.tokenizer, self.dtype, self.lineage, embed=self._directory is None)
        for name, dtype in (("epoch", pa.int32()),) * self._epochs + (("duplicates", pa.int64()),) * self._duplicates:
            self._schema = self._schema.append(pa.field(name, dtype, nullable=False))
        if self._metadata:
            metadata = {key: json.dumps(value).encode() for key, value in self._metadata.items()}
            self._schema = self._schema.with_metadata(self._schema.metadata | metadata)
        self._open_shard()

    @property
    def directory(self) -> Path | None:
        """The directory that is being filled, under its temporary name; None for other outputs."""
        return self._directory

    def write(
        self, tokens: Tokens | Sequence[int], id: str, source: str, epoch: int = 0, *, json_mark: int = 0
    ) -> None:
        """Append one document."""
        self.extend(
            np.asarray(tokens),
            np.array([len(tokens)]),
            as_arrow([id]),
            encode_sources([source]),
            np.array([epoch], np.int32),
            json_marks=np.array([json_mark], np.uint8),
        )

    def extend(
        self,
        tokens: Tokens,
        lengths: NDArray[np.int64],
        ids: pa.StringArray,
        sources: SourceCodes,
        epochs: NDArray[np.int32] | None = None,
        duplicates: NDArray[np.int64] | None = None,
        json_marks: NDArray[np.uint8] | None = None,
    ) -> None:
        """Append n documents: `tokens` flat [sum of lengths], and for each document [n] its length, id, source,
        how often it was seen before (`epochs`), how often `dedup` found it, and what of it is not text (`json_marks`).

        Writes the same bytes as n calls of `write`. Nothing is copied before its batch is full: arrays must not
        change until `finish`.
        """
        ends, (codes, names) = np.cumsum(lengths), sources
        epochs = np.zeros(len(ends), np.int32) if epochs is None else epochs
        duplicates = np.ones(len(ends), np.int64) if duplicates is None else duplicates
        json_marks = np.zeros(len(ends), np.uint8) if json_marks is None else json_marks
        first = start = 0  # next document and token
        while first < len(ends):
            full = int(np.searchsorted(ends, start + self.batch_room)) + 1
            end = min(full, first + BATCH_DOCUMENTS - self._pending_documents, len(ends))
            if self._directory:
                fit = int(np.searchsorted(ends, start + self._limit - self._shard_tokens, side="right"))
                if fit <= first and self._shard_tokens:
                    self._next_shard()
                    continue
                end = min(end, max(fit, first + 1))
            stop = int(ends[end - 1])
            self._tokens.append(tokens[start:stop])
            self._lengths.append(lengths[first:end])
            self._ids.append(ids[first:end])
            self._codes.append(self._shard_codes(codes[first:end], names))
            self._epoch_numbers.append(epochs[first:end])
            self._duplicate_numbers.append(duplicates[first:end])
            self._json_marks.append(json_marks[first:end])
            self._pending_documents += end - first
            self._pending_tokens += stop - start
            self._shard_tokens += stop - start
            first, start = end, stop
            if self._pending_tokens >= BATCH_TOKENS or self._pending_documents >= BATCH_DOCUMENTS:
                self._flush()

    @property
    def batch_room(self) -> int:
        """Tokens until the present batch is full: handing over this many at a time avoids a copy of them."""
        return BATCH_TOKENS - self._pending_tokens

    def finish(self, counts: dict[str, Any], inputs: list[Input]) -> None:
        """Complete the content and its lineage; call it once, last."""
        self._flush()
        digest = self._digest.result()
        self.lineage.inputs += inputs
        self.lineage.counts = counts
        self.lineage.digest = combined_digest([*self._shard_digests, digest])
        beside = self.tokenizer.files if self._directory else {}
        self.lineage.files = metadata_digest(self._schema.metadata, beside, self.lineage.digest)
        self._close_shard(digest, {"lineage": self.lineage.trailer()})
        if self.output is None:
            self._sink.flush()
        self._finished = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            assert self._finished, "ShardWriter left without finish()"
        self._stack.__exit__(kind, error, trace)

    def _open_shard(self) -> None:
        import pyarrow as pa

        if self._directory:
            path = self._directory / f"part-{self._number:05d}.arrow"
            self._sink = self._stack.enter_context(open(path, "wb"))
        self._sealed = SealedSink(self._sink)
        self._stream = pa.ipc.new_stream(pa.PythonFile(self._sealed, "w"), self._schema)
        self._digest = ColumnDigest()
        self._shard_documents = self._shard_tokens = 0
        self._source_codes: dict[str, int] = {}  # of this shard so far, in order of appearance
        self._clear()

    def _clear(self) -> None:
        self._tokens: list[Tokens] = []
        self._lengths: list[NDArray[np.int64]] = []
        self._ids: list[pa.StringArray] = []
        self._codes: list[NDArray[np.int32]] = []
        self._epoch_numbers: list[NDArray[np.int32]] = []
        self._duplicate_numbers: list[NDArray[np.int64]] = []
        self._json_marks: list[NDArray[np.uint8]] = []
        self._pending_documents = self._pending_tokens = 0

    def _shard_codes(self, codes: NDArray[np.int32], names: list[str]) -> NDArray[np.int32]:
        """`codes` into `names` as codes of this shard, which numbers sources in order of appearance."""
        table = np.array([self._source_codes.get(name, -1) for name in names], np.int32)
        for code in dict.fromkeys(codes[table[codes] < 0].tolist()):
            table[code] = self._source_codes.setdefault(names[code], len(self._source_codes))
        return table[codes]

    def _flush(self) -> None:
        """Write the pending documents as one batch."""
        if not self._pending_documents:
            return
        import pyarrow as pa

        lengths = np.concatenate(self._lengths)
        flat = self._tokens[0] if len(self._tokens) == 1 else np.concatenate(self._tokens)
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
            pa.DictionaryArray.from_arrays(as_arrow(codes), as_arrow(list(self._source_codes))),
            *(as_arrow(numbers) for numbers in (epochs, duplicates) if numbers is not None),
        ]
        json_marks = np.concatenate(self._json_marks)
        flags = {key: json_marks & bit for bit, key in JSON_MARKS.items() if (json_marks & bit).any()}
        custom = {key: base64.b64encode(np.packbits(bits).tobytes()) for key, bits in flags.items()}
        self._stream.write_batch(pa.record_batch(columns, schema=self._schema), custom_metadata=custom or None)
        self._digest.add(flat, lengths, ids, (codes, list(self._source_codes)), epochs, duplicates, json_marks)
        self._shard_documents += len(lengths)
        self.documents += len(lengths)
        self.tokens += len(flat)
        self._clear()

    def _close_shard(self, digest: str, last: dict[str, Any]) -> None:
        import pyarrow as pa

        trailer = {
            "part": self._number,
            "last": bool(last),
            "documents": self._shard_documents,
            "tokens": self._shard_tokens,
            "digest": digest,
            BYTES: PENDING,
        } | last
        empty = pa.RecordBatch.from_arrays([pa.nulls(0, field.type) for field in self._schema], schema=self._schema)
        text = json.dumps(trailer, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        self._sealed.hold()
        self._stream.write_batch(empty, custom_metadata={TRAILER: text})
        self._stream.close()
        self._sealed.complete()
        if self._directory:
            self._sink.close()

    def _next_shard(self) -> None:
        self._flush()
        self._shard_digests.append(self._digest.result())
        self._close_shard(self._shard_digests[-1], {})
        self._number += 1
        self._open_shard()


def _schema(info: TokenizerInfo, dtype: Any, lineage: Lineage, *, embed: bool) -> pa.Schema:
    """The columns that every shard has, and its metadata; `embed` stores the tokenizer's files too."""
    import pyarrow as pa

    def text(value: Any) -> str:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)

    fields = [
        pa.field("tokens", pa.large_list(pa.field("item", pa.from_numpy_dtype(dtype), nullable=False)), nullable=False),
        pa.field("id", pa.string(), nullable=False),
        pa.field("source", pa.dictionary(pa.int32(), pa.string()), nullable=False),
    ]
    metadata = {TOKENIZER: text(info.header()), LINEAGE: text(lineage.header())}
    return pa.schema(fields, metadata | ({TOKENIZER_TEXTS: text(info.files)} if embed else {}))

"""Token shards: Arrow IPC streams of token ids, one row a document, readable by any Arrow library.

| column | type | |
|---|---|---|
| tokens | large_list<uint16>, uint32 where the vocabulary is over 65,536 | ids, the end-of-text id included |
| id | string | the document's id |
| source | dictionary<int32, string> | where it came from |
| epoch | int32, after `mix` only | how often the document was seen before |

Schema metadata: `llmkit.tokenizer` (digest, vocab_size, eos_id, bos_id, pad_id), `llmkit.lineage` (header), and in single files and
streams `llmkit.tokenizer_files` (name to text); in a directory of part-00000.arrow, ... these files lie beside the parts. The last batch
is empty and its custom metadata `llmkit.trailer` holds {part, last, documents, tokens, digest} and in the last part the lineage's trailer:
a stream without it was cut off and is refused, as is a directory that lacks a part.

The digest of a part is xxh3-128 of five xxh3-128 digests of 16 bytes, in this order: token ids as stored (little-endian), document
lengths (int64), ids, sources (UTF-8, each followed by a zero byte), epochs (int32; of nothing where there is no such column). That of
several parts is xxh3-128 of theirs. Cutting documents into batches does not change it.

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

from llmkit.errors import LlmkitError, UsageError
from llmkit.io.atomic import atomic_directory, atomic_file, is_special
from llmkit.io.inputs import STDIN
from llmkit.io.lineage import Input, Lineage
from llmkit.io.shard_part import FILES, ColumnDigest, Tokens, as_arrow, combined_digest
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
    column `epoch` is written.
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
        self._stack = ExitStack()
        self._finished = False
        self._part = 0
        self._part_digests: list[str] = []
        if self.output is None and sys.stdout.isatty():
            raise UsageError("token shards are binary: not written to a terminal", "redirect stdout, or name -o PATH")

    def __enter__(self) -> ShardWriter:
        self._directory: Path | None = None
        if self.output is None:
            self._sink: BinaryIO = sys.stdout.buffer
        elif self.output.endswith(".arrow") or is_special(Path(self.output)):
            self._sink = self._stack.enter_context(atomic_file(self.output, self._force))
        else:
            self._directory = self._stack.enter_context(atomic_directory(self.output, self._force))
            for name, text in self.tokenizer.files.items():
                (self._directory / name).write_bytes(text.encode())
        self._schema = _schema(self.tokenizer, self.dtype, self._epochs, self.lineage, embed=self._directory is None)
        self._open_part()
        return self

    def write(self, tokens: Tokens | Sequence[int], id: str, source: str, epoch: int = 0) -> None:
        """Append one document."""
        tokens = np.asarray(tokens)
        if self._directory and self._part_tokens and self._part_tokens + len(tokens) > self._limit:
            self._next_part()
        self._held.append(tokens)
        self._ids.append(id)
        self._sources.append(source)
        self._epoch_numbers.append(epoch)
        self._held_tokens += len(tokens)
        self._part_tokens += len(tokens)
        if self._held_tokens >= BATCH_TOKENS or len(self._ids) >= BATCH_DOCUMENTS:
            self._flush()

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
        self._ids: list[str] = []
        self._sources: list[str] = []
        self._epoch_numbers: list[int] = []
        self._held_tokens = 0

    def _flush(self) -> None:
        """Write what is held as one batch."""
        if not self._ids:
            return
        import pyarrow as pa

        lengths = np.fromiter(map(len, self._held), np.int64, len(self._held))
        flat = np.concatenate(self._held)
        if len(flat) and not 0 <= int(flat.min()) <= int(flat.max()) < self.tokenizer.vocab_size:
            raise LlmkitError(
                f"token id {int(flat.max())} is over the vocabulary of {self.tokenizer.vocab_size}",
                "the tokens come from another tokenizer",
            )
        flat = flat.astype(self.dtype, copy=False)
        offsets = np.zeros(len(lengths) + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        for name in self._sources:
            self._names.setdefault(name, len(self._names))
        codes = np.array([self._names[name] for name in self._sources], np.int32)
        epochs = np.array(self._epoch_numbers, np.int32) if self._epochs else None
        columns = [
            pa.LargeListArray.from_arrays(as_arrow(offsets), as_arrow(flat), type=self._schema.field("tokens").type),
            as_arrow(self._ids),
            pa.DictionaryArray.from_arrays(as_arrow(codes), as_arrow(list(self._names))),
        ] + ([] if epochs is None else [as_arrow(epochs)])
        self._stream.write_batch(pa.record_batch(columns, schema=self._schema))
        self._digest.add(flat, lengths, self._ids, self._sources, epochs)
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


def _schema(info: TokenizerInfo, dtype: Any, epochs: bool, lineage: Lineage, *, embed: bool) -> pa.Schema:
    import pyarrow as pa

    def text(value: Any) -> str:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)

    fields = [
        pa.field("tokens", pa.large_list(pa.field("item", pa.from_numpy_dtype(dtype), nullable=False)), nullable=False),
        pa.field("id", pa.string(), nullable=False),
        pa.field("source", pa.dictionary(pa.int32(), pa.string()), nullable=False),
    ] + ([pa.field("epoch", pa.int32(), nullable=False)] if epochs else [])
    metadata = {"llmkit.tokenizer": text(info.header()), "llmkit.lineage": text(lineage.header())}
    return pa.schema(fields, metadata | ({FILES.decode(): text(info.files)} if embed else {}))

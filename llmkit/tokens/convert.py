"""Token ids from what holds them to what is to: blocks of documents in, shards, other trainers' files, JSON lines or texts out.

Every writer takes blocks by `extend(tokens, lengths, ids, sources)` (flat ids, int64 lengths [n], names [n]) and ends with `finish(counts,
inputs)`: io.shards.ShardWriter, io.token_files.TokenFileWriter, and `LineWriter` here. Memory: one block, about 2^20 tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from llmkit.errors import LlmkitError
from llmkit.io.documents import DocumentWriter
from llmkit.io.lineage import Input, base_name, digest_path
from llmkit.io.store import TokenStore
from llmkit.io.token_files import (
    BLOCK_TOKENS,
    Block,
    check_file,
    check_ids,
    dataset_prefix,
    read_megatron,
    read_nanogpt,
)
from llmkit.io.tokenizer import TokenizerInfo
from llmkit.tokens.encode import decode, load

BLOCK_DOCUMENTS = 1 << 12
Lines = Callable[[Block], bytes]


@dataclass(slots=True)
class Tally:
    """What blocks held: `documents` with those left out, UTF-8 bytes where they are known, [documents, tokens, bytes] of each source."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    empty: int = 0
    ended: int = 0
    bad_lines: int = 0
    sources: dict[str, list[int]] = field(default_factory=dict)

    def add(self, block: Block) -> int:
        """Count a block; its documents."""
        sizes = block.sizes or [0] * len(block.ids)
        for source, length, size in zip(block.sources, block.lengths.tolist(), sizes, strict=True):
            row = self.sources.setdefault(source, [0, 0, 0])
            row[0] += 1
            row[1] += length
            row[2] += size
        self.documents += len(block.ids) + block.empty
        self.tokens += len(block.tokens)
        self.bytes += sum(sizes)
        self.empty += block.empty
        self.ended += block.ended
        self.bad_lines += len(block.bad)
        return len(block.ids) + block.empty

    def counts(self) -> dict[str, int]:
        """For summary and lineage: documents, tokens, empty, and what else there was."""
        found = {name: getattr(self, name) for name in ("documents", "tokens", "bytes", "empty", "ended", "bad_lines")}
        return {name: count for name, count in found.items() if count or name in ("documents", "tokens", "empty")}


def stored(
    kind: str, paths: list[str], info: TokenizerInfo | None, source: str | None = None
) -> tuple[TokenizerInfo, Iterable[Block], list[Input]]:
    """Documents of "shards" or of "nanogpt" or "megatron" files (of these both, .bin and .idx): their tokenizer, blocks, and inputs for the lineage.

    `source` names the source of all. LlmkitError where `info` is not the tokenizer of the shards; other files need it.
    """
    if kind == "shards":
        store = TokenStore.open(paths)
        if info is not None and info.digest != store.tokenizer.digest:
            raise LlmkitError(f"{paths[0]}: made with another tokenizer", "leave -t out where shards carry theirs")
        return info or store.tokenizer, _shard_blocks(store, source), store.inputs
    assert info is not None
    for path in paths:
        check_file(path)
    inputs = [Input("input", base_name(path), digest_path(path)) for path in paths]
    read, names = (read_nanogpt, paths) if kind == "nanogpt" else (read_megatron, [*map(dataset_prefix, paths[::2])])
    return info, (block for name in names for block in read(name, info, source)), inputs


def _shard_blocks(store: TokenStore, source: str | None) -> Iterator[Block]:
    first, names = 0, store.sources
    while first < store.documents:
        room = int(store.offsets[first]) + BLOCK_TOKENS
        behind = int(np.searchsorted(store.offsets, room, side="right")) - 1
        behind = max(min(behind, first + BLOCK_DOCUMENTS), first + 1)
        yield Block(
            store.span(int(store.offsets[first]), int(store.offsets[behind])),
            np.diff(store.offsets[first : behind + 1]),
            [store.id(i) for i in range(first, behind)],
            [source or names[code] for code in store.codes[first:behind]],
        )
        first = behind


class LineWriter:
    """Documents to JSON lines, by a function of a block."""

    def __init__(self, writer: DocumentWriter, lines: Lines) -> None:
        self._writer = writer
        self._lines = lines

    def __enter__(self) -> LineWriter:
        self._writer.__enter__()
        return self

    def extend(self, tokens: NDArray[Any], lengths: NDArray[np.int64], ids: list[str], sources: list[str]) -> None:
        """Append n documents."""
        self._writer.write(self._lines(Block(tokens, lengths, ids, sources)))

    def finish(self, counts: dict[str, Any], inputs: list[Input]) -> None:
        """Complete the content and its lineage; call it once, last."""
        self._writer.finish(counts, inputs)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.__exit__(kind, error, trace)


def token_lines(block: Block) -> bytes:
    """A line {"id", "source", "tokens"} for each document."""
    options = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE
    rows = ({"id": id, "source": source, "tokens": tokens} for tokens, id, source in block.documents())
    return b"".join(orjson.dumps(row, option=options) for row in rows)


def text_lines(info: TokenizerInfo) -> Lines:
    """A line {"id", "text", "source"} for each document. LlmkitError where an id is not in the vocabulary: the library would pass over it."""
    library = load(info)

    def lines(block: Block) -> bytes:
        check_ids(block.tokens, info, "the input")
        texts = decode(library, (tokens for tokens, _, _ in block.documents()), info.eos_id)
        rows = zip(block.ids, texts, block.sources, strict=True)
        return b"".join(orjson.dumps({"id": id, "text": text, "source": name}) + b"\n" for id, text, name in rows)

    return lines

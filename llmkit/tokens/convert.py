"""Stored token ids as blocks of documents, counts of blocks, and blocks as JSON lines: of ids, or of texts.

In: token shards, the files of other trainers (shards/formats.py). Memory: one block, about 2^20 tokens.

    llmkit tokenize corpus.idx --from megatron -t tok/ --decode -o texts.jsonl.zst
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import orjson

from llmkit.errors import LlmkitError
from llmkit.io.record import Input, base_name
from llmkit.lineage.formats import digest_path
from llmkit.shards.formats import FOREIGN_FORMATS
from llmkit.shards.reader import TokenStore
from llmkit.shards.token_block import BLOCK_TOKENS, TokenBlock, check_file, check_ids
from llmkit.shards.tokenizer_info import TokenizerInfo
from llmkit.tokens.encode import decode
from llmkit.tokens.text_encoder import load

BLOCK_DOCUMENTS = 1 << 12


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

    def add(self, block: TokenBlock) -> int:
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
) -> tuple[TokenizerInfo, Iterable[TokenBlock], list[Input]]:
    """Documents of "shards" or of the files of a foreign format: their tokenizer, blocks, and inputs for the lineage.

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
    form = FOREIGN_FORMATS[kind]
    read = form.load().read
    return info, (block for data_set in form.data_sets(paths) for block in read(data_set, info, source)), inputs


def _shard_blocks(store: TokenStore, source: str | None) -> Iterator[TokenBlock]:
    """Documents as they are stored, without the padding of packed ones."""
    first, names = 0, store.sources
    kept = np.ones(store.documents, np.bool_) if store.padding is None else ~store.padding
    while first < store.documents:
        room = int(store.offsets[first]) + BLOCK_TOKENS
        behind = int(np.searchsorted(store.offsets, room, side="right")) - 1
        behind = max(min(behind, first + BLOCK_DOCUMENTS), first + 1)
        tokens = store.span(int(store.offsets[first]), int(store.offsets[behind]))
        lengths, here = np.diff(store.offsets[first : behind + 1]), kept[first:behind]
        yield TokenBlock(
            tokens if here.all() else tokens[np.repeat(here, lengths)],
            lengths[here],
            [store.id(first + i) for i in np.flatnonzero(here).tolist()],
            [source or names[code] for code in store.codes[first:behind][here]],
        )
        first = behind


def token_lines(block: TokenBlock) -> bytes:
    """A line {"id", "source", "tokens"} for each document."""
    options = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE
    rows = ({"id": id, "source": source, "tokens": tokens} for tokens, id, source in block.documents())
    return b"".join(orjson.dumps(row, option=options) for row in rows)


def text_lines(info: TokenizerInfo) -> Callable[[TokenBlock], bytes]:
    """A line {"id", "text", "source"} for each document. LlmkitError where an id is not in the vocabulary: the library would pass over it."""
    library = load(info)

    def lines(block: TokenBlock) -> bytes:
        check_ids(block.tokens, info, "the input")
        texts = decode(library, (tokens for tokens, _, _ in block.documents()), info.eos_id)
        rows = zip(block.ids, texts, block.sources, strict=True)
        return b"".join(orjson.dumps({"id": id, "text": text, "source": name}) + b"\n" for id, text, name in rows)

    return lines

"""Blocks of documents as token ids, about 2^20 tokens each, and how to cut them from mapped files of ids."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import orjson
import xxhash
from numpy.typing import NDArray

from llmkit.errors import LlmkitError
from llmkit.io.documents import BadLine
from llmkit.shards.arrow import JSON_ID, JSON_SOURCE, Tokens
from llmkit.shards.tokenizer_info import TokenizerInfo

BLOCK_TOKENS = 1 << 20
MAX_DOCUMENT = 1 << 28  # tokens; a file with a longer one was not made with this tokenizer


@dataclass(frozen=True, slots=True)
class Losses:
    """What documents lost: `documents` of them, `pieces` without tokens, in all or, if `blank`, in that many documents
    everything; `example` of the first.
    """

    documents: int = 0
    pieces: int = 0
    blank: int = 0
    example: str = ""

    def __add__(self, other: Losses) -> Losses:
        return Losses(
            self.documents + other.documents,
            self.pieces + other.pieces,
            self.blank + other.blank,
            self.example or other.example,
        )


NO_LOSSES = Losses()


@dataclass(slots=True)
class TokenBlock:
    """Documents in order: `tokens` flat [sum of lengths], `lengths` int64 [n] with end-of-text, ids and sources [n]."""

    tokens: Tokens
    lengths: NDArray[np.int64]
    ids: list[str]
    sources: list[str]
    sizes: list[int] = field(default_factory=list)  # UTF-8 bytes of each text, where it is known
    empty: int = 0  # documents without text, dropped
    ended: int = 0  # documents that lacked the end-of-text id
    duplicates: list[int] = field(default_factory=list)  # how often dedup found each, where that is kept
    bad: list[BadLine] = field(default_factory=list)  # lines that are not documents
    losses: Losses = NO_LOSSES
    replaced: Losses = NO_LOSSES  # characters that become white space
    json_marks: NDArray[np.uint8] | None = None  # [n], which ids and sources are not text (arrow.py); None: all are

    def origins(self) -> Iterator[tuple[str | orjson.Fragment, str | orjson.Fragment]]:
        """The id and the source of each document as JSON values: text, or whatever they were."""
        marks = [0] * len(self.ids) if self.json_marks is None else self.json_marks.tolist()
        for id, source, mark in zip(self.ids, self.sources, marks, strict=True):
            yield (
                orjson.Fragment(id) if mark & JSON_ID else id,
                orjson.Fragment(source) if mark & JSON_SOURCE else source,
            )

    def documents(self) -> Iterator[tuple[Tokens, str, str]]:
        """(tokens, id, source) of each document."""
        ends = np.cumsum(self.lengths).tolist()
        for end, length, id, source in zip(ends, self.lengths.tolist(), self.ids, self.sources, strict=True):
            yield self.tokens[end - length : end], id, source


def check_file(path: str) -> None:
    """LlmkitError where `path` is not a file that can be mapped."""
    if not os.path.isfile(path):
        raise LlmkitError(f"{path}: no such file, or not a regular one", "ids are mapped into memory from files")


def map_file(path: str) -> NDArray[np.uint8]:
    """The bytes of a file, mapped into memory."""
    check_file(path)
    try:
        return np.memmap(path, np.uint8, "r") if os.path.getsize(path) else np.zeros(0, np.uint8)
    except OSError as error:
        raise LlmkitError(f"{path}: {error.strerror}", "check the path and its permissions") from error


def check_ids(tokens: Tokens, info: TokenizerInfo, name: str) -> None:
    """LlmkitError where an id is not in the tokenizer's vocabulary."""
    if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < info.vocab_size:
        invalid = int(tokens.min()) if int(tokens.min()) < 0 else int(tokens.max())
        raise LlmkitError(
            f"{name}: token id {invalid} is not in the vocabulary of {info.vocab_size}",
            "the tokens come from another tokenizer",
        )


def cut_block(
    tokens: Tokens, start: int, lengths: NDArray[np.int64], info: TokenizerInfo, source: str, name: str
) -> TokenBlock:
    """The documents of `lengths` from `start` in the ids of file `name`, each ended by the end-of-text id."""
    if lengths.max() > MAX_DOCUMENT:
        raise LlmkitError(
            f"{name}: {int(lengths.max()):,} tokens without the end-of-text id {info.eos_id}",
            "the tokens come from another tokenizer",
        )
    flat = np.asarray(tokens[start : start + int(lengths.sum())])
    check_ids(flat, info, name)
    flat = flat.astype(np.uint16 if info.vocab_size <= 1 << 16 else np.uint32)
    ends = np.cumsum(lengths)
    ended = np.zeros(len(lengths), bool)
    ended[lengths > 0] = flat[ends[lengths > 0] - 1] == info.eos_id
    kept = lengths > ended  # with an id beside the end-of-text id
    if not (ended & kept).all():
        flat = np.insert(flat[np.repeat(kept, lengths)], np.cumsum(lengths[kept])[~ended[kept]], info.eos_id)
    lengths = (lengths + ~ended)[kept]
    ids = [
        xxhash.xxh3_128_hexdigest(flat[end - length : end].data)
        for end, length in zip(np.cumsum(lengths).tolist(), lengths.tolist(), strict=True)
    ]
    return TokenBlock(flat, lengths, ids, [source] * len(ids), [], int((~kept).sum()), int((kept & ~ended).sum()))

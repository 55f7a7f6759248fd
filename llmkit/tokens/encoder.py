"""Encode documents to token ids and decode them, with any Hugging Face tokenizer.json (text_encoder.py).

Each document becomes its ids followed by the end-of-text id. The names of special tokens inside a text
("<|endoftext|>" in a scraped chat) are encoded as ordinary text, unless `allow_special`: otherwise a document
could end itself or speak as the assistant. No ids are added in front (a tokenizer's post-processor is not
applied), and a tokenizer's truncation and padding are disabled.

Input: a chunk of JSON lines; output: the ids of its documents as one flat array. That is the unit of work of
`engine`'s worker processes. Each uses one core: the library's own threads are disabled, since they do not
survive a fork.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from types import NoneType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmkit.errors import LlmkitError
from llmkit.io.documents import Chunk, Document, ReadOptions, parse
from llmkit.io.inputs import DOCUMENT_SUFFIXES
from llmkit.io.names import escape_name
from llmkit.shards.arrow import JSON_ID, JSON_SOURCE
from llmkit.shards.shard import PADDING_SOURCE
from llmkit.shards.token_block import TokenBlock
from llmkit.shards.tokenizer_info import TokenizerInfo
from llmkit.tokens.fill_in_the_middle import FillInTheMiddle, Segment, assemble_segments
from llmkit.tokens.losses import count_ids, loss_counter
from llmkit.tokens.text_encoder import TextEncoder


@dataclass(frozen=True, slots=True)
class EncodeOptions:
    """How documents are encoded.

    `source` is the source of every document; None: its field `source_key` (as JSON unless it is text), else the name
    of its file without the suffix. `bos` puts the beginning-of-text id in front of each (the tokenizer must have one).
    `keep_duplicates` keeps the counts written by dedup.
    """

    allow_special: bool = False
    source: str | None = None
    source_key: str = "source"
    bos: bool = False
    fim: FillInTheMiddle | None = None
    keep_duplicates: bool = False


class DocumentEncoder:
    """Encodes chunks of documents. Callable, to serve as the `work` of `engine.ordered_map`."""

    def __init__(
        self, tokenizer: TokenizerInfo, read_options: ReadOptions, options: EncodeOptions | None = None
    ) -> None:
        options = options or EncodeOptions()
        self._arguments = tokenizer, read_options, options
        self._encode = TextEncoder(tokenizer, allow_special=options.allow_special)
        self._losses = loss_counter(self._encode)
        self._read_options = read_options
        self._options = options
        self._end = tokenizer.eos_id
        self._start = [tokenizer.bos_id] if options.bos and tokenizer.bos_id is not None else []

    def __reduce__(self) -> Any:  # pickling the library's tokenizer loses what `load_tokenizer` sets
        return _cached_encoder, self._arguments

    def __call__(self, chunk: Chunk) -> TokenBlock:
        documents, bad = parse(chunk, self._read_options)
        kept = [document for document in documents if document.text and not document.text.isspace()]
        texts = [document.text for document in kept]
        names = [document.id for document in kept]
        has_json_id = [not isinstance(d.fields.get(self._read_options.id_key), (str, NoneType)) for d in kept]
        origins = [self._source_of(document) for document in kept]
        sources, has_json_source = [name for name, _ in origins], [is_json for _, is_json in origins]
        if self._options.fim or self._start:
            parts = map(self._segments, texts, names, sources)
            flat, lengths = assemble_segments([[*self._start, *part, self._end] for part in parts], self._encode)
        else:
            flat, lengths = self._encode(texts, self._end)
        if not self._options.allow_special:
            self._check_ends(flat, lengths, kept)
        sizes = [len(text) if text.isascii() else len(text.encode()) for text in texts]
        duplicates = [document.count("duplicates") for document in kept] if self._options.keep_duplicates else []
        block = TokenBlock(
            flat, lengths, names, sources, sizes, len(documents) - len(kept), duplicates=duplicates, bad=bad
        )
        if any(has_json_id) or any(has_json_source):
            block.json_marks = JSON_ID * np.array(has_json_id, np.uint8) | JSON_SOURCE * np.array(
                has_json_source, np.uint8
            )
        if self._losses:
            block.losses, block.replaced = self._losses(texts, names, flat, lengths, 1 + len(self._start))
        return block

    def _check_ends(self, flat: NDArray[Any], lengths: NDArray[np.int64], documents: list[Document]) -> None:
        """LlmkitError for the first document whose text holds the end-of-text id."""
        ends, own = flat == self._end, 1 + self._start.count(self._end)
        if np.count_nonzero(ends) > own * len(lengths):
            first = documents[int(count_ids(ends, lengths, len(self._start), 1).argmax())]
            raise LlmkitError(
                f"{first}: in its text the tokenizer finds the end-of-text token (id {self._end})",
                "name another one with --eos, which texts do not form and which does not stand for unknown characters",
            )

    def _segments(self, text: str, id: str, source: str) -> list[Segment]:
        return self._options.fim.segments(text, id, source) if self._options.fim else [text]

    def _source_of(self, document: Document) -> tuple[str, bool]:
        """The source of a document, and whether it is JSON rather than text."""
        key = self._options.source_key
        value = self._options.source or document.fields.get(key)
        if value == PADDING_SOURCE:
            raise LlmkitError(f"{document}: the source {value!r} is reserved", "rename it, or give --source NAME")
        if isinstance(value, str) or value is None:
            return value or source_name(document.file), False
        return document.raw_fields()[key].decode(), True


_encoders: dict[Any, DocumentEncoder] = {}


def _cached_encoder(info: TokenizerInfo, read_options: ReadOptions, options: EncodeOptions) -> DocumentEncoder:
    """The encoder with these arguments. A process keeps one: loading a large vocabulary takes longer than
    encoding a chunk.
    """
    key = info.digest, info.eos_id, read_options, options
    if key not in _encoders:
        _encoders.clear()
        _encoders[key] = DocumentEncoder(info, read_options, options)
    return _encoders[key]


@lru_cache(1 << 10)
def source_name(file: str) -> str:
    """A file's name without directory and suffix: `web` for `crawl/web.jsonl.zst`, `stdin` for stdin."""
    name = os.path.basename(file.strip("<>"))
    suffix = max((end for end in DOCUMENT_SUFFIXES if name.endswith(end)), key=len, default="")
    return escape_name(name.removesuffix(suffix) or name)


def decode_documents(tokenizer: Any, documents: Iterable[NDArray[Any]], end: int) -> list[str]:
    """Text of each document, without its end-of-text id. Byte-level tokenizers without a normaliser give the
    original text.
    """
    parts = (ids[:-1] if len(ids) and ids[-1] == end else ids for ids in documents)
    texts: list[str] = tokenizer.decode_batch([ids.tolist() for ids in parts], skip_special_tokens=False)
    return texts

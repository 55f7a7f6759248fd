"""Text to token ids and back, with any Hugging Face tokenizer.json, through the `tokenizers` library.

Each document becomes its ids and the end-of-text id. The names of special tokens inside a text ("<|endoftext|>" in a scraped chat) are text
and are encoded letter by letter, unless `allow_special`: else a document could end itself or speak as the assistant. Nothing is added in
front (a tokenizer's post-processor is not applied), and a tokenizer's truncation and padding are off.

A chunk of JSON lines in, its documents' ids as one flat array out: the unit of work that `engine` hands to worker processes. Each is one
core: the library's own threads stay off, since they do not survive a fork.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmkit.io.documents import BadLine, Chunk, ReadOptions, parse
from llmkit.io.inputs import DOCUMENT_SUFFIXES
from llmkit.io.tokenizer import TokenizerInfo
from llmkit.tokens.text_encoder import TextEncoder


@dataclass(slots=True)
class Encoded:
    """The documents of one chunk: `tokens` flat [sum of lengths], `lengths` int64 [n] with the end-of-text id, ids, sources."""

    tokens: NDArray[Any]
    lengths: NDArray[np.int64]
    ids: list[str]
    sources: list[str]
    bad: list[BadLine] = field(default_factory=list)
    empty: int = 0  # documents without text, dropped
    bytes: int = 0  # UTF-8 bytes of the encoded texts

    def documents(self) -> Iterator[tuple[NDArray[Any], str, str]]:
        """(tokens, id, source) of each document."""
        ends = np.cumsum(self.lengths)
        for end, length, id, source in zip(ends, self.lengths, self.ids, self.sources, strict=True):
            yield self.tokens[end - length : end], id, source


class Encoder:
    """Encodes chunks of documents; callable, so that it is the `work` of `engine.ordered_map`.

    `source` names the source of every document; None: its field `source`, else the name of its file without the suffix.
    """

    def __init__(
        self, tokenizer: TokenizerInfo, options: ReadOptions, *, allow_special: bool = False, source: str | None = None
    ) -> None:
        self._made_of = tokenizer, options, allow_special, source
        self._encode = TextEncoder(tokenizer, allow_special=allow_special)
        self._options = options
        self._source = source
        self._end = tokenizer.eos_id

    def __reduce__(self) -> Any:  # the library's pickle forgets what `load` sets
        return _made_again, self._made_of

    def __call__(self, chunk: Chunk) -> Encoded:
        documents, bad = parse(chunk, self._options)
        kept = [document for document in documents if document.text and not document.text.isspace()]
        texts = [document.text for document in kept]
        ids, lengths = self._encode(texts)
        flat, lengths = np.insert(ids, np.cumsum(lengths), self._end), lengths + 1
        sources = [self._source or self._source_of(document.fields, document.file) for document in kept]
        size = sum(map(len, map(str.encode, texts)))
        names = [document.id for document in kept]
        return Encoded(flat, lengths, names, sources, bad, len(documents) - len(kept), size)

    @staticmethod
    def _source_of(fields: dict[str, Any], file: str) -> str:
        value = fields.get("source")
        return value if isinstance(value, str) and value else source_name(file)


_encoders: dict[Any, Encoder] = {}


def _made_again(info: TokenizerInfo, options: ReadOptions, allow_special: bool, source: str | None) -> Encoder:
    """The encoder of that making, one in a process: large vocabularies take longer to load than a chunk to encode."""
    key = info.digest, options, allow_special, source
    if key not in _encoders:
        _encoders.clear()
        _encoders[key] = Encoder(info, options, allow_special=allow_special, source=source)
    return _encoders[key]


def source_name(file: str) -> str:
    """A file's name without directory and format: `crawl/web.jsonl.zst` is `web`, stdin is `stdin`."""
    name = os.path.basename(file.strip("<>"))
    suffix = max((end for end in DOCUMENT_SUFFIXES if name.endswith(end)), key=len, default="")
    return name.removesuffix(suffix) or name


def decode(tokenizer: Any, tokens: NDArray[Any], end: int) -> str:
    """The text of one document, its end-of-text id left out. Equal to what was encoded for byte-level tokenizers without normaliser."""
    ids = tokens[:-1] if len(tokens) and tokens[-1] == end else tokens
    return str(tokenizer.decode(ids.tolist(), skip_special_tokens=False))

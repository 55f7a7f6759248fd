"""Documents to token ids and back, with any Hugging Face tokenizer.json (text_encoder.py).

Each document becomes its ids and the end-of-text id. The names of special tokens inside a text ("<|endoftext|>" in a scraped chat) are text
and are encoded letter by letter, unless `allow_special`: else a document could end itself or speak as the assistant. Nothing is added in
front (a tokenizer's post-processor is not applied), and a tokenizer's truncation and padding are off.

A chunk of JSON lines in, its documents' ids as one flat array out: the unit of work that `engine` hands to worker processes. Each is one
core: the library's own threads stay off, since they do not survive a fork.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from numpy.typing import NDArray

from llmkit.io.documents import Chunk, ReadOptions, parse
from llmkit.io.inputs import DOCUMENT_SUFFIXES
from llmkit.shards.token_block import TokenBlock
from llmkit.shards.tokenizer_info import TokenizerInfo
from llmkit.tokens.fill_in_the_middle import FillInTheMiddle, Segment, assemble
from llmkit.tokens.text_encoder import TextEncoder


@dataclass(frozen=True, slots=True)
class EncodeOptions:
    """How documents become ids.

    `source` names the source of every document; None: its field `source_key`, else the name of its file without the suffix. `bos` puts
    the beginning-of-text id in front of each (the tokenizer must have one). `keep_duplicates` keeps the field that dedup gave them.
    """

    allow_special: bool = False
    source: str | None = None
    source_key: str = "source"
    bos: bool = False
    fim: FillInTheMiddle | None = None
    keep_duplicates: bool = False


class Encoder:
    """Encodes chunks of documents; callable, so that it is the `work` of `engine.ordered_map`."""

    def __init__(self, tokenizer: TokenizerInfo, options: ReadOptions, how: EncodeOptions | None = None) -> None:
        how = how or EncodeOptions()
        self._made_of = tokenizer, options, how
        self._encode = TextEncoder(tokenizer, allow_special=how.allow_special)
        self._options = options
        self._how = how
        self._end = tokenizer.eos_id
        self._start = [tokenizer.bos_id] if how.bos and tokenizer.bos_id is not None else []

    def __reduce__(self) -> Any:  # the library's pickle forgets what `load` sets
        return _made_again, self._made_of

    def __call__(self, chunk: Chunk) -> TokenBlock:
        documents, bad = parse(chunk, self._options)
        kept = [document for document in documents if document.text and not document.text.isspace()]
        texts = [document.text for document in kept]
        names = [document.id for document in kept]
        sources = [self._how.source or self._source_of(document.fields, document.file) for document in kept]
        if self._how.fim or self._start:
            parts = map(self._segments, texts, names, sources)
            flat, lengths = assemble([[*self._start, *part, self._end] for part in parts], self._encode)
        else:
            flat, lengths = self._encode(texts, self._end)
        sizes = [len(text) if text.isascii() else len(text.encode()) for text in texts]
        found = [document.count("duplicates") for document in kept] if self._how.keep_duplicates else []
        return TokenBlock(flat, lengths, names, sources, sizes, len(documents) - len(kept), duplicates=found, bad=bad)

    def _segments(self, text: str, id: str, source: str) -> list[Segment]:
        return self._how.fim.segments(text, id, source) if self._how.fim else [text]

    def _source_of(self, fields: dict[str, Any], file: str) -> str:
        value = fields.get(self._how.source_key)
        return value if isinstance(value, str) and value else source_name(file)


_encoders: dict[Any, Encoder] = {}


def _made_again(info: TokenizerInfo, options: ReadOptions, how: EncodeOptions) -> Encoder:
    """The encoder of that making, one in a process: large vocabularies take longer to load than a chunk to encode."""
    key = info.digest, options, how
    if key not in _encoders:
        _encoders.clear()
        _encoders[key] = Encoder(info, options, how)
    return _encoders[key]


@lru_cache(1 << 10)
def source_name(file: str) -> str:
    """A file's name without directory and format: `crawl/web.jsonl.zst` is `web`, stdin is `stdin`."""
    name = os.path.basename(file.strip("<>"))
    suffix = max((end for end in DOCUMENT_SUFFIXES if name.endswith(end)), key=len, default="")
    return name.removesuffix(suffix) or name


def decode(tokenizer: Any, documents: Iterable[NDArray[Any]], end: int) -> list[str]:
    """The text of each document, its end-of-text id left out. Equal to what was encoded for byte-level tokenizers without normaliser."""
    parts = (ids[:-1] if len(ids) and ids[-1] == end else ids for ids in documents)
    texts: list[str] = tokenizer.decode_batch([ids.tolist() for ids in parts], skip_special_tokens=False)
    return texts

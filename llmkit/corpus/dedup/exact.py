"""Exact duplicates: documents whose text, or another field, is equal after a named normalisation.

The key is the xxh3-128 of the characters: among 10⁹ documents the probability of one false match is about 10⁻²¹. If the
normalisation leaves nothing of a text ("!!!" under `loose`), the text itself is compared. A document without the field
has no key and is kept.

`StreamingDedup` takes one pass: the first of equal documents is kept and written at once. Memory: 130 to 200 bytes per
kept document. Cost: dominated by parsing and compression, not by hashing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import xxhash

from llmkit.corpus.added_fields import DUPLICATE, check_added
from llmkit.corpus.dedup.normalise import name_of, normaliser, parts_of
from llmkit.corpus.dedup.results import ChunkResult, DedupCounts, duplicate_fields
from llmkit.engine.local import Engine, Local
from llmkit.io.documents import BadLine, Chunk, Document, DocumentReader, ReadOptions, iter_documents
from llmkit.io.splice import exact_json, splice


def stored_key(text: str, normalise: str = "none") -> bytes:
    """16-byte key of a normalised text, as stored in an index."""
    normalised = normaliser(normalise)(text) or text
    return xxhash.xxh3_128_digest(normalised.encode("utf-8", "surrogatepass"))


def transient_key(text: str, normalise: str = "none") -> bytes:
    """16-byte key of a normalised text that is never stored, and cheaper to compute.

    It hashes UTF-32, which is the string's memory widened, whereas UTF-8 has to be encoded character by character.
    """
    normalised = normaliser(normalise)(text) or text
    if normalised.isascii():
        return xxhash.xxh3_128_digest(normalised.encode())
    # Another seed, because the bytes of an ASCII text may be the UTF-32 bytes of another one.
    return xxhash.xxh3_128_digest(normalised.encode("utf-32-le", "surrogatepass"), seed=1)


@dataclass(frozen=True)
class Exact:
    """What equal documents agree in.

    `key`: field to compare instead of the text, with dots for nested fields (`metadata.url`). A value that is not a
    string is compared as sorted JSON. Raises UsageError for an unknown normalisation.
    """

    key: str | None = None
    normalise: str = "none"

    def __post_init__(self) -> None:
        name = name_of(parts_of(self.normalise))  # unknown name: UsageError before any work
        object.__setattr__(self, "normalise", name)

    @property
    def rule(self) -> str:
        """The rule by which documents are removed, as options of the command."""
        return f"--method exact --normalise {self.normalise}" + (f" --key {self.key}" if self.key else "")

    def key_of(self, document: Document, hash_text: Callable[[str, str], bytes] = stored_key) -> bytes | None:
        """The document's key of 16 bytes; None if the field is missing or null."""
        if self.key is None:
            return hash_text(document.text, self.normalise)
        value = document.value(self.key)
        if value is None:
            return None
        if not isinstance(value, str):
            value = exact_json(value, sort_keys=True).decode()
        return hash_text(value, self.normalise)


@dataclass(slots=True)
class _KeyedChunk:
    """The lines of a chunk, their keys, and their ids if requested."""

    lines: list[bytes]
    keys: list[bytes | None]
    ids: list[str]
    bad: list[BadLine]


def _key_chunk(exact: Exact, rejects: bool, options: ReadOptions, chunk: Chunk) -> _KeyedChunk:
    """Compute the keys of a chunk, and with `rejects` the ids. Pure: runs in a worker."""
    result = _KeyedChunk([], [], [], [])
    for document in iter_documents(chunk, options, result.bad):
        result.lines.append(document.encode())
        result.keys.append(exact.key_of(document, transient_key))
        if rejects:
            check_added(document, (*DUPLICATE, "rule"), "--rejects")
            result.ids.append(document.id)
    return result


@dataclass
class StreamingDedup(DedupCounts):
    """Exact deduplication in one pass. With `rejects`, ids of kept documents take about 80 bytes more each."""

    exact: Exact = field(default_factory=Exact)
    rejects: bool = False
    engine: Engine = field(default_factory=Local)

    def warm_up(self) -> None:
        """No kernels to compile."""

    def run(self, reader: DocumentReader) -> Iterator[ChunkResult]:
        """The results of the chunks of a reader, in order."""
        seen: dict[bytes, Any] = {}  # key -> id of the kept document
        work = partial(_key_chunk, self.exact, self.rejects, reader.options)
        for chunk in self.engine.map(work, reader):
            kept: list[bytes] = []
            rejects: list[bytes] = []
            for i, (line, key) in enumerate(zip(chunk.lines, chunk.keys, strict=True)):
                if key is None or key not in seen:
                    kept.append(line)
                    if key is not None:
                        seen[key] = chunk.ids[i] if self.rejects else None
                elif self.rejects:
                    rejects.append(splice(line, duplicate_fields("exact", seen[key], 1.0) | {"rule": self.exact.rule}))
            self.documents += len(chunk.lines)
            self.kept += len(kept)
            self.lacking["--key"] += chunk.keys.count(None)
            if len(kept) < len(chunk.lines):
                self.dropped["exact"] += len(chunk.lines) - len(kept)
            yield ChunkResult(b"".join(kept), b"".join(rejects), chunk.bad, len(chunk.lines))

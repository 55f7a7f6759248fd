"""Exact duplicates: documents whose text, or another field, is the same after a named normalisation.

The key is the xxh3-128 of the characters: among 10⁹ documents the chance of one false match is about 10⁻²¹. Where a normalisation leaves
nothing of a text ("!!!" under `loose`), the text itself is compared. A document without the field has no key and is kept.

`Stream` is one pass: the first of equal documents stays and is written at once. Memory: 130 to 200 bytes a kept document. Cost: parsing
and compression decide, not hashing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import orjson
import xxhash

from llmkit.corpus.dedup.method import METHODS, Decided, Tally, verdict, with_fields
from llmkit.corpus.dedup.normalise import NORMALISERS
from llmkit.engine.local import Engine, Local
from llmkit.io.documents import BadLine, Chunk, Document, DocumentReader, ReadOptions, iter_documents


def text_key(text: str, normalise: str = "none") -> bytes:
    """16-byte key of a text under a normalisation, as an index keeps it."""
    normalised = NORMALISERS.get(normalise)(text) or text
    return xxhash.xxh3_128_digest(normalised.encode("utf-8", "surrogatepass"))


def passing_key(text: str, normalise: str = "none") -> bytes:
    """Another such key, which no file holds: of UTF-32, which is what lies in memory, widened, where UTF-8 has to be made character by character."""
    normalised = NORMALISERS.get(normalise)(text) or text
    if normalised.isascii():
        return xxhash.xxh3_128_digest(normalised.encode())
    # Another seed, since the bytes of an ASCII text may be those of other characters.
    return xxhash.xxh3_128_digest(normalised.encode("utf-32-le", "surrogatepass"), seed=1)


@METHODS.register("exact")
@dataclass(frozen=True)
class Exact:
    """`key`: field to compare instead of the text, `metadata.url` for one inside another; what is no string is compared as sorted JSON."""

    key: str | None = None
    normalise: str = "none"

    def __post_init__(self) -> None:
        NORMALISERS.get(self.normalise)  # unknown name: UsageError before any work

    def of(self, document: Document, key_of: Callable[[str, str], bytes] = text_key) -> bytes | None:
        """The document's key of 16 bytes; None where the field is missing or null."""
        if self.key is None:
            return key_of(document.text, self.normalise)
        from llmkit.corpus.lists import dotted  # and with it numpy

        value = dotted(document.fields, self.key)
        if value is None:
            return None
        if not isinstance(value, str):
            value = orjson.dumps(value, option=orjson.OPT_SORT_KEYS).decode()
        return key_of(value, self.normalise)


@dataclass(slots=True)
class _Keyed:
    """A chunk's lines, keys, and ids if they are wanted."""

    lines: list[bytes]
    keys: list[bytes | None]
    ids: list[str]
    bad: list[BadLine]


def _keyed(exact: Exact, ids: bool, options: ReadOptions, chunk: Chunk) -> _Keyed:
    """Worker side. Pure."""
    found = _Keyed([], [], [], [])
    for document in iter_documents(chunk, options, found.bad):
        found.lines.append(document.encode())
        found.keys.append(exact.of(document, passing_key))
        if ids:
            found.ids.append(document.id)
    return found


@dataclass
class Stream(Tally):
    """The pass. With `rejects` it remembers the ids of kept documents (about 80 bytes more each)."""

    exact: Exact = field(default_factory=Exact)
    rejects: bool = False
    engine: Engine = field(default_factory=Local)

    def run(self, reader: DocumentReader) -> Iterator[Decided]:
        """Decide every document, a chunk at a time, in order."""
        seen: dict[bytes, Any] = {}  # key: the kept document's id
        work = partial(_keyed, self.exact, self.rejects, reader.options)
        for chunk in self.engine.map(work, reader):
            keep: list[bytes] = []
            rejects: list[bytes] = []
            for i, (line, key) in enumerate(zip(chunk.lines, chunk.keys, strict=True)):
                if key is None or key not in seen:
                    keep.append(line)
                    if key is not None:
                        seen[key] = chunk.ids[i] if self.rejects else None
                elif self.rejects:
                    rejects.append(with_fields(line, verdict("exact", seen[key], 1.0)))
            self.documents += len(chunk.lines)
            self.kept += len(keep)
            self.lacking["--key"] += chunk.keys.count(None)
            if len(keep) < len(chunk.lines):
                self.dropped["exact"] += len(chunk.lines) - len(keep)
            yield Decided(b"".join(keep), b"".join(rejects), chunk.bad, len(chunk.lines))

"""Exact duplicates: documents whose text, or another field, is the same after a named normalisation.

The key is the xxh3-128 of the UTF-8 bytes: among 10⁹ documents the chance of one false match is about 10⁻²¹. Where a normalisation leaves
nothing of a text ("!!!" under `loose`), the text itself is compared. A document without the field has no key and is kept.

Memory: 130 to 200 bytes a kept document. Cost: hashing runs at memory speed; parsing and compression decide.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import orjson
import xxhash

from llmkit.corpus.dedup.method import METHODS, Match
from llmkit.corpus.dedup.normalise import NORMALISERS
from llmkit.io.documents import Document


def text_key(text: str, normalise: str = "none") -> bytes:
    """16-byte key of a text under a normalisation."""
    normalised = NORMALISERS.get(normalise)(text) or text
    return xxhash.xxh3_128_digest(normalised.encode("utf-8", "surrogatepass"))


@METHODS.register("exact")
@dataclass(frozen=True)
class Exact:
    """`key`: field to compare instead of the text, `metadata.url` for one inside another; what is no string is compared as sorted JSON."""

    key: str | None = None
    normalise: str = "none"

    def __post_init__(self) -> None:
        NORMALISERS.get(self.normalise)  # unknown name: UsageError before any work

    def measure(self, documents: list[Document]) -> list[bytes | None]:
        """Keys of documents; None where the field is missing or null."""
        return [self._key(document) for document in documents]

    def _key(self, document: Document) -> bytes | None:
        if self.key is None:
            return text_key(document.text, self.normalise)
        value = _field(document.fields, self.key)
        if value is None:
            return None
        if not isinstance(value, str):
            value = orjson.dumps(value, option=orjson.OPT_SORT_KEYS).decode()
        return text_key(value, self.normalise)

    def memory(self) -> ExactMemory:
        return ExactMemory()


def _field(fields: Any, path: str) -> Any:
    """The field of that very name, else the one that the dotted path leads to; None where there is none."""
    if path in fields:
        return fields[path]
    name, dot, rest = path.partition(".")
    inner = fields.get(name)
    return _field(inner, rest) if dot and isinstance(inner, dict) else None


class ExactMemory:
    """Keys of the kept documents."""

    def __init__(self) -> None:
        self._seen: dict[bytes, int] = {}

    def find(self, measure: bytes | None) -> Match | None:
        if measure is None or (kept := self._seen.get(measure)) is None:
            return None
        return Match("exact", kept, 1.0)

    def keep(self, measure: bytes | None, index: int) -> None:
        if measure is not None:
            self._seen[measure] = index

    def close(self) -> None:
        self._seen.clear()

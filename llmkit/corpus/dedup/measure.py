"""What deduplication asks of each document, a chunk at a time, in worker processes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
import xxhash
from numpy.typing import NDArray

from llmkit.corpus.dedup.exact import Exact
from llmkit.corpus.dedup.minhash import MinHash
from llmkit.corpus.dedup.temp_columns import pack
from llmkit.corpus.lists import dotted
from llmkit.errors import LlmkitError
from llmkit.io.documents import BadLine, Chunk, Document, ReadOptions, parse


@dataclass(slots=True)
class Part:
    """A measured chunk of n documents: compressed lines, ids, and columns by name, [n] where nothing else is said.

    `sizes` of the lines in bytes; `weights`, for how many documents each stands already; `worth`, how much it is preferred; `exact`, hash of the key, and
    `keyed`, whether there is one; `same`, hash of the words; `shingled`, number of shingles; `shingles` of all [sum of shingled]; `bands`, keys
    [n, bands]; `signature` [n * functions]. Hashes differ between groups.
    """

    lines: bytes
    ids: list[bytes]
    columns: dict[str, NDArray[Any]]
    bad: list[BadLine]
    lacking: Counter[str]  # documents without the field that an option names


@dataclass(frozen=True, slots=True)
class Measure:
    """Which columns there are. `keep`: "first", "longest" or "best:FIELD"; `group`: a field; `bits` of each number of a signature, 0 for none."""

    exact: Exact | None = None
    near: MinHash | None = None
    keep: str = "first"
    group: str | None = None
    bits: int = 0

    def __call__(self, options: ReadOptions, chunk: Chunk) -> Part:
        """Measure the documents of a chunk. Pure."""
        documents, bad = parse(chunk, options)
        lines = [document.encode() for document in documents]
        columns: dict[str, NDArray[Any]] = {"sizes": np.fromiter(map(len, lines), np.int64, len(lines))}
        divided, lacking = np.zeros(len(lines), np.uint64), Counter[str]()
        if self.group is not None:
            values = [dotted(document.fields, self.group) for document in documents]
            divided = np.fromiter(map(_division, values), np.uint64, len(lines))
            lacking["--group"] = values.count(None)
        if self.keep != "first":
            columns["worth"] = np.fromiter((_worth(document, self.keep) for document in documents), float, len(lines))
        if self.exact:
            found = [self.exact.of(document) for document in documents]
            lacking["--key"] = found.count(None)
            columns["keyed"] = np.fromiter((key is not None for key in found), bool, len(found))
            columns["exact"] = np.frombuffer(b"".join(key or bytes(16) for key in found), np.uint64)[::2] ^ divided
        if self.near:
            near = self.near.sketches(documents)
            columns |= {"same": near.same ^ divided, "shingles": near.shingles, "shingled": near.sizes}
            columns["bands"] = near.keys ^ divided[:, None]
            if self.bits:
                columns["signature"] = near.signatures.astype(f"u{self.bits // 8}").ravel()
        weights = (document.fields.get("duplicates", 1) for document in documents)
        columns["weights"] = np.fromiter(
            (n if type(n) is int and 0 < n < 2**31 else 1 for n in weights), np.int64, len(lines)
        )
        ids = [document.id.encode("utf-8", "surrogatepass") for document in documents]
        return Part(pack(lines), ids, columns, bad, lacking)


def _division(value: Any) -> int:
    """A number for the value of a field: documents of different ones are never duplicates."""
    return xxhash.xxh3_64_intdigest(orjson.dumps(value, option=orjson.OPT_SORT_KEYS))


def _worth(document: Document, keep: str) -> float:
    """How much a document is preferred."""
    if keep == "longest":
        return len(document.text)
    value = dotted(document.fields, keep.removeprefix("best:"))
    if isinstance(value, bool) or not isinstance(value, int | float):
        said = "no such field" if value is None else f"{str(value)[:40]!r} is no number"
        raise LlmkitError(f"{document}: --keep {keep}: {said}", "every document needs a number there")
    return float(value)

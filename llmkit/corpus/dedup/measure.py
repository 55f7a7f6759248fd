"""What deduplication computes for each document, a chunk at a time, in worker processes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from llmkit.corpus.added_fields import check_added
from llmkit.corpus.dedup.exact import Exact
from llmkit.corpus.dedup.minhash import MinHash
from llmkit.corpus.dedup.temp_columns import pack
from llmkit.errors import LlmkitError
from llmkit.io.documents import BadLine, Chunk, Document, ReadOptions, parse
from llmkit.io.splice import dotted, exact_json


@dataclass(slots=True)
class MeasuredChunk:
    """A measured chunk of n documents: compressed lines, ids, and columns by name, each of shape [n] unless noted.

    | column | content |
    |---|---|
    | sizes | length of the line, bytes |
    | weights | number of documents that the document already represents |
    | preference | how much the document is preferred as a survivor |
    | exact | hash of the key |
    | keyed | whether there is a key |
    | same | hash of the words |
    | shingle_counts | number of shingles |
    | shingles | shingles of all documents [sum of shingle_counts] |
    | bands | band keys [n, bands] |
    | signature | [n * functions] |

    With a group field, hashes of documents of different groups differ.
    """

    lines: bytes
    ids: list[bytes]
    columns: dict[str, NDArray[Any]]
    bad: list[BadLine]
    lacking: Counter[str]  # option -> documents without its field


@dataclass(frozen=True, slots=True)
class ChunkMeasurer:
    """Computes the columns of a chunk.

    `keep`: "first", "longest" or "best:FIELD". `group`: a field. `bits`: width of each number of a signature (0: none).
    `added`: the fields that may be added to documents; LlmkitError for a document that has one of its own.
    """

    exact: Exact | None = None
    near: MinHash | None = None
    keep: str = "first"
    group: str | None = None
    bits: int = 0
    added: tuple[str, ...] = ()

    def __call__(self, options: ReadOptions, chunk: Chunk) -> MeasuredChunk:
        """Measure the documents of a chunk. Pure."""
        documents, bad = parse(chunk, options)
        for document in documents:
            check_added(document, self.added, "dedup")
        lines = [document.encode() for document in documents]
        columns: dict[str, NDArray[Any]] = {"sizes": np.fromiter(map(len, lines), np.int64, len(lines))}
        group_hashes, lacking = np.zeros(len(lines), np.uint64), Counter[str]()
        if self.group is not None:
            values = [document.value(self.group) for document in documents]
            group_hashes = np.fromiter(map(_group_hash, values), np.uint64, len(lines))
            lacking["--group"] = values.count(None)
        if self.keep != "first":
            preferences = (_preference(document, self.keep) for document in documents)
            columns["preference"] = np.fromiter(preferences, float, len(lines))
        if self.exact:
            keys = [self.exact.key_of(document) for document in documents]
            lacking["--key"] = keys.count(None)
            columns["keyed"] = np.fromiter((key is not None for key in keys), bool, len(keys))
            hashes = np.frombuffer(b"".join(key or bytes(16) for key in keys), np.uint64)[::2]
            columns["exact"] = hashes ^ group_hashes
        if self.near:
            near = self.near.sketches(documents)
            columns |= {"same": near.same ^ group_hashes, "shingles": near.shingles, "shingle_counts": near.sizes}
            columns["bands"] = near.keys ^ group_hashes[:, None]
            if self.bits:
                columns["signature"] = near.signatures.astype(f"u{self.bits // 8}").ravel()
        weights = (document.fields.get("duplicates", 1) for document in documents)
        columns["weights"] = np.fromiter(
            (n if type(n) is int and 0 < n < 2**31 else 1 for n in weights), np.int64, len(lines)
        )
        ids = [document.id.encode("utf-8", "surrogatepass") for document in documents]
        return MeasuredChunk(pack(lines), ids, columns, bad, lacking)


def _group_hash(value: Any) -> int:
    """Hash of the value of a group field; combined with the other hashes, it separates the groups."""
    return xxhash.xxh3_64_intdigest(exact_json(value, sort_keys=True))


def _preference(document: Document, keep: str) -> float:
    """How much a document is preferred. LlmkitError if the field of best:FIELD is not a number."""
    if keep == "longest":
        return len(document.text)
    value = dotted(document.fields, keep.removeprefix("best:"))
    if isinstance(value, bool) or not isinstance(value, int | float):
        problem = "no such field" if value is None else f"{str(value)[:40]!r} is not a number"
        raise LlmkitError(f"{document}: --keep {keep}: {problem}", "every document needs a number in this field")
    return float(value)

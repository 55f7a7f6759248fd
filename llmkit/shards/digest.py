"""The digest of token shards.

That of one shard is xxh3-128 of five xxh3-128 digests of 16 bytes, in this order: token ids as stored
(little-endian), document lengths (int64), ids, sources (UTF-8, each followed by a zero byte), epochs (int32; of
nothing where there is no such column), and of further ones where there are duplicates (int64) and where ids or sources
are not text (positions of their documents, int64, after the byte `n` or `s`). That of several shards is xxh3-128 of
theirs.
Cutting documents into batches does not change it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from llmkit.shards.arrow import JSON_ID, JSON_SOURCE, SourceCodes, Tokens, zero_terminated

if TYPE_CHECKING:
    import pyarrow as pa

LINEAGE = b"llmkit.lineage"  # key of the schema metadata


class ColumnDigest:
    """Digest of documents, independent of how they are cut into batches."""

    def __init__(self) -> None:
        self._states = [xxhash.xxh3_128() for _ in range(5)]
        self._json: dict[int, Any] = {}
        self._documents = 0

    def add(
        self,
        tokens: Tokens,
        lengths: NDArray[np.int64],
        ids: pa.StringArray,
        sources: SourceCodes,
        epochs: Any,
        duplicates: Any,
        json_marks: NDArray[np.uint8] | None = None,
    ) -> None:
        """Documents in order; `epochs` int32 or None, `duplicates` int64 or None, `json_marks` as in arrow.py."""
        codes, names = sources
        terminated = [name.encode() + b"\0" for name in names]
        columns: tuple[Any, ...] = (
            np.ascontiguousarray(tokens).data,
            lengths.astype("<i8").data,
            zero_terminated(ids).data,
            b"".join([terminated[code] for code in codes.tolist()]),
        )
        for state, column in zip(self._states, columns, strict=False):
            state.update(column)
        if epochs is not None:
            self._states[4].update(np.ascontiguousarray(epochs, "<i4").data)
        if duplicates is not None:
            if len(self._states) == 5:
                self._states.append(xxhash.xxh3_128())
            self._states[5].update(np.ascontiguousarray(duplicates, "<i8").data)
        for bit, name in ((JSON_ID, b"n"), (JSON_SOURCE, b"s")):
            if json_marks is not None and (json_marks & bit).any():
                state = self._json.setdefault(bit, xxhash.xxh3_128(name))
                state.update((np.flatnonzero(json_marks & bit) + self._documents).astype("<i8").data)
        self._documents += len(lengths)

    def result(self) -> str:
        """`xxh3:` and 32 hex digits."""
        states = [*self._states, *(self._json[bit] for bit in sorted(self._json))]
        return "xxh3:" + xxhash.xxh3_128_hexdigest(b"".join(state.digest() for state in states))


def metadata_digest(metadata: Mapping[bytes, bytes], texts: Mapping[str, str], digest: str) -> str:
    """Digest of what that of the documents does not cover: metadata (without the lineage), the tokenizer's files beside
    the shards, and the digest of the documents itself.
    """
    rows = [
        "\0".join(part.decode(errors="backslashreplace") for part in pair)  # damaged ones may be anything
        for pair in sorted(metadata.items())
        if pair[0] != LINEAGE
    ]
    rows += [f"{name}\0{text}" for name, text in sorted(texts.items())]
    return "xxh3:" + xxhash.xxh3_128_hexdigest(json.dumps([*rows, digest]).encode())


def combined_digest(digests: list[str]) -> str:
    """The digest of several shards from theirs."""
    return digests[0] if len(digests) == 1 else "xxh3:" + xxhash.xxh3_128_hexdigest("".join(digests).encode())

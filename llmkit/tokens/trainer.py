"""Train byte-level BPE: count the pieces of texts, then learn merges from the counts.

    counts = PieceCounts()
    for chunk in map(PieceCounter("llama-bpe", options, into=counts), reader.chunks()): ...
    merges, frequencies = counts.merges(32_000, least=2)    # int64[merges, 2], int64[merges]

Memory grows with the distinct pieces, not with the text. The merges equal those of the `tokenizers` trainer for
the same text, pattern and minimum frequency, whatever the order of texts and the number of processes: the most
frequent pair first, ties by lower ids, bytes ordered by the characters that represent them. (That library
counts pairs in 32 bits, so its result is wrong, and differs, from 2^31 occurrences of a pair on.)

Cost: tests/bench/vocab_speed.md. Kernels: tokens/kernels/counts.py, tokens/kernels/merges.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmkit.errors import LlmkitError
from llmkit.io.documents import BadLine, Chunk, Document, ReadOptions, parse
from llmkit.kernels import cold
from llmkit.seeds import derive
from llmkit.tokens.kernels import counts as kernels
from llmkit.tokens.kernels.merges import ID_BITS, learn
from llmkit.tokens.kernels.pretokenize import KINDS, classes
from llmkit.tokens.pretokenize import byte_alphabet

FIRST_ROWS = 1 << 16
UNCOMPILED = 1 << 22  # bytes of text for which nothing is compiled
MAX_BYTES = 1 << 32  # positions of bytes are 32-bit numbers

# (concatenated bytes of all pieces, end of each, frequency of each)
CountedPieces = tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64]]

ALPHABET = sorted(byte_alphabet())  # by code point: the order of the 256 ids after the special ones
RANKS = np.array([ALPHABET.index(character) for character in byte_alphabet()], np.int64)


class PieceCounts:
    """Distinct pieces and their frequencies."""

    def __init__(self) -> None:
        self._state: Any = np.zeros((FIRST_ROWS, 4), np.int64), np.empty(8 * FIRST_ROWS, np.uint8), 0, 0
        self._pending: list[bytes] | None = [] if cold("counts.count_texts") else None
        self._size = 0  # bytes in self._pending

    def uncounted(self) -> list[bytes]:
        """All texts, where they are too few to compile anything for: the library learns from them faster. Else none."""
        return self._pending or []

    def pieces(self) -> CountedPieces:
        """All pieces, in order of first occurrence."""
        pending, self._pending = self._pending, None
        if pending:
            self.add_texts(pending, self._pattern)
        table, pool, _, used = self._state
        rows = table[table[:, kernels.COUNT] > 0]
        rows = rows[np.argsort(rows[:, kernels.START])]
        return pool[:used], rows[:, kernels.START] + rows[:, kernels.LENGTH], rows[:, kernels.COUNT].copy()

    def add_texts(self, texts: list[bytes], pattern: str) -> None:
        """Split texts (valid UTF-8) by `pattern`, the same one in every call, and count the pieces."""
        if self._pending is not None:
            self._pending += texts
            self._pattern = pattern
            self._size += sum(map(len, texts))
            if self._size < UNCOMPILED:
                return
            texts, self._pending = self._pending, None
        data = np.frombuffer(b"".join(texts), np.uint8)
        stops = np.cumsum([len(text) for text in texts], dtype=np.int64)
        kind = KINDS[pattern]
        self._state = kernels.count_texts(data, stops, kind, classes(kind), *self._state)

    def add(self, pieces: CountedPieces) -> None:
        """Add the counts of another table."""
        pool, ends, times = pieces
        pool = pool.view()
        pool.flags.writeable = False  # like texts, which saves a second signature
        self._state = kernels.count_words(pool, 0, ends, len(ends), times, *self._state)

    def merges(self, wanted: int, least: int = 2) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Up to `wanted` merges of pairs that occur at least `least` times.

        Returns the ids of both parts, int64[merges, 2] (a byte's rank, or 256 + the number of a merge), and
        each pair's frequency.
        """
        pool, ends, times = self.pieces()
        if len(pool) + len(ends) >= MAX_BYTES or times.max(initial=0) >= 1 << 62 - ID_BITS:
            raise LlmkitError(
                f"{len(ends):,} distinct words are too many to learn from", "take a --sample of the documents"
            )
        merges, counts, made = learn(pool, ends, times, RANKS, wanted, max(1, least))
        return merges[:made], counts[:made]


@dataclass(slots=True)
class CountedChunk:
    """A chunk's pieces (None where they were added to a table already), its documents, those sampled, and their
    characters.
    """

    pieces: CountedPieces | None
    documents: int
    taken: int
    characters: int
    bad: list[BadLine]


@dataclass(slots=True)
class PieceCounter:
    """Counts the pieces of a chunk of documents, into `into` or to be returned. The `work` of `engine.ordered_map`.

    `sample` is the share of documents to use: those whose id, hashed with the seed, falls below it. The choice
    depends neither on the order of documents nor on other documents.
    """

    pattern: str
    options: ReadOptions
    sample: float = 1.0
    seed: int = 0
    into: PieceCounts | None = None

    def __call__(self, chunk: Chunk) -> CountedChunk:
        documents, bad = parse(chunk, self.options)
        texts = [document.text for document in documents if self.samples(document)]
        counts = PieceCounts() if self.into is None else self.into
        counts.add_texts([text.encode() for text in texts], self.pattern)
        pieces = counts.pieces() if self.into is None else None
        return CountedChunk(pieces, len(documents), len(texts), sum(map(len, texts)), bad)

    @property
    def trial(self) -> PieceCounter:
        """The same without effect on `into`."""
        return replace(self, into=None)

    def samples(self, document: Document) -> bool:
        """Whether a document is in the sample."""
        return self.sample >= 1 or derive(self.seed, "vocab", document.id) < self.sample * 2.0**64

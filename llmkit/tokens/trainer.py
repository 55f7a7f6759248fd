"""Count the pieces of texts and learn merges from the counts: our own trainer of byte-level BPE.

    counts = Counts()
    for part in map(Counter("llama-bpe", options, into=counts), reader.chunks()): ...
    merges, times = counts.merges(32_000, least=2)          # int64[merges, 2], int64[merges]

Memory grows with the distinct pieces, not with the text. The merges are those of the `tokenizers` trainer for the same text, pattern and least count,
whatever the order of texts and the number of processes: the most frequent pair first, ties by lower ids, bytes in the order of the characters that stand
for them. (That library counts pairs in 32 bits; from 2^31 occurrences of one pair on, it no longer is right, and differs.)

Cost: tests/bench/vocab_speed.md. Kernels: tokens/kernels/counts.py, tokens/kernels/merges.py.
"""

from __future__ import annotations

from dataclasses import dataclass
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
UNCOMPILED = 1 << 22  # bytes for which nothing is compiled
MOST_BYTES = 1 << 32  # places of bytes are 32-bit numbers

Words = tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64]]


ALPHABET = sorted(byte_alphabet())  # by code point: the order of the 256 ids behind the special ones
RANKS = np.array([ALPHABET.index(character) for character in byte_alphabet()], np.int64)


class Counts:
    """Distinct pieces and how often each occurs."""

    def __init__(self) -> None:
        self._state: Any = np.zeros((FIRST_ROWS, 4), np.int64), np.empty(8 * FIRST_ROWS, np.uint8), 0, 0
        self._waiting: list[bytes] | None = [] if cold("counts.count_texts") else None
        self._size = 0  # bytes that wait

    def uncounted(self) -> list[bytes]:
        """All texts, where they are so few that nothing was compiled to count them: the library learns from them sooner. Else none."""
        return self._waiting or []

    def words(self) -> Words:
        """(bytes of all pieces, the end of each, how often it occurs), in the order in which they came."""
        waiting, self._waiting = self._waiting, None
        if waiting:
            self.add_texts(waiting, self._pattern)
        table, pool, _, used = self._state
        rows = table[table[:, kernels.COUNT] > 0]
        rows = rows[np.argsort(rows[:, kernels.START])]
        return pool[:used], rows[:, kernels.START] + rows[:, kernels.LENGTH], rows[:, kernels.COUNT].copy()

    def add_texts(self, texts: list[bytes], pattern: str) -> None:
        """Cut texts (valid UTF-8) as `pattern` does, always the same one, and count the pieces."""
        if self._waiting is not None:
            self._waiting += texts
            self._pattern = pattern
            self._size += sum(map(len, texts))
            if self._size < UNCOMPILED:
                return
            texts, self._waiting = self._waiting, None
        data = np.frombuffer(b"".join(texts), np.uint8)
        stops = np.cumsum([len(text) for text in texts], dtype=np.int64)
        how = KINDS[pattern]
        self._state = kernels.count_texts(data, stops, how, classes(how), *self._state)

    def add(self, words: Words) -> None:
        """Add the words of another table."""
        pool, ends, times = words
        pool = pool.view()
        pool.flags.writeable = False  # as texts are: one signature
        self._state = kernels.count_words(pool, 0, ends, len(ends), times, *self._state)

    def merges(self, wanted: int, least: int = 2) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Up to `wanted` merges of pairs that occur `least` times or more: ids of both parts int64[merges, 2] (a byte's rank, or 256 + number of a
        merge), and how often each pair occurred."""
        pool, ends, times = self.words()
        if len(pool) + len(ends) >= MOST_BYTES or times.max(initial=0) >= 1 << 62 - ID_BITS:
            raise LlmkitError(
                f"{len(ends):,} distinct words are too many to learn from", "take a --sample of the documents"
            )
        merges, counts, made = learn(pool, ends, times, RANKS, wanted, max(1, least))
        return merges[:made], counts[:made]


@dataclass(slots=True)
class Part:
    """What a chunk held: its words, where they were not counted at once; documents, those taken, their characters, and the bad lines."""

    words: Words | None
    documents: int
    taken: int
    characters: int
    bad: list[BadLine]


@dataclass(slots=True)
class Counter:
    """Counts the pieces of a chunk of documents, the `work` of `engine.ordered_map`: into `into`, or to be added to it elsewhere.

    `sample` is the share of documents that is taken: those whose id, hashed with the seed, falls below it, so that neither their order nor the other
    documents decide.
    """

    pattern: str
    options: ReadOptions
    sample: float = 1.0
    seed: int = 0
    into: Counts | None = None

    def __call__(self, chunk: Chunk) -> Part:
        documents, bad = parse(chunk, self.options)
        texts = [document.text for document in documents if self.takes(document)]
        counts = Counts() if self.into is None else self.into
        counts.add_texts([text.encode() for text in texts], self.pattern)
        words = counts.words() if self.into is None else None
        return Part(words, len(documents), len(texts), sum(map(len, texts)), bad)

    def takes(self, document: Document) -> bool:
        """Whether a document is in the sample."""
        return self.sample >= 1 or derive(self.seed, "vocab", document.id) < self.sample * 2.0**64

"""The fast path of encoding: byte-level BPE with one of the four patterns, compiled.

    fast = ByteLevel.of(tokenizer_json)                 # None: this tokenizer is something else, which the library has to encode
    ids, lengths = fast.encode([b"Hello", b"world"])    # uint32[tokens], int64[texts]

Ids are those of the `tokenizers` library, always: what is not known to be the same here is not taken (`of`), and what of a text may be more than text
(added tokens, where they are matched) is for the library to encode (text_encoder.py).

Cost: tests/bench/tokenize_speed.md. Memory: 16 to 32 bytes a merge and 256 kB, and up to 45 MB of pieces met, which start anew when they are more.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmkit.tokens.kernels import encode as kernels
from llmkit.tokens.kernels.pretokenize import KINDS, classes
from llmkit.tokens.pretokenize import byte_alphabet, pattern_of

SLOTS = 1 << 16, 1 << 20  # of the table, at first and at most
WORK = 1 << 10  # bytes of a piece that is merged without more memory
NEITHER = (None, "", False, 0)  # of a model's options: what leaves BPE as it is
OPTIONS = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")


class ByteLevel:
    """A tokenizer of that kind, and the pieces that it met."""

    def __init__(self, how: str, vocabulary: dict[str, int], merges: list[tuple[str, str]], *, whole: bool) -> None:
        """`merges` by rank. `whole`: a piece that is in the vocabulary is its id, whatever the merges make of it. KeyError where a name has no id."""
        self._how = KINDS[how]
        self._classes = classes(self._how)
        alphabet = byte_alphabet()
        self._byte_ids = np.array([vocabulary[character] for character in alphabet], np.int64)
        byte_of = np.full(max(vocabulary.values()) + 1, -1, np.int64)
        byte_of[self._byte_ids] = np.arange(256)
        lefts, rights, self._results = (
            np.array([vocabulary[name] for name in names], np.int64)
            for names in ([a for a, _ in merges], [b for _, b in merges], [a + b for a, b in merges])
        )
        self._pairs = np.full(1 << max(4, (2 * len(merges)).bit_length()), -1, np.int64)
        self._byte_ranks = np.full((256, 256), kernels.NONE, np.int32)
        kernels.enter_merges(lefts, rights, self._pairs, byte_of, self._byte_ranks)
        foreign = re.compile(f"[^{re.escape(''.join(alphabet))}]").search
        words = {word: id for word, id in vocabulary.items() if word and not foreign(word)} if whole else {}
        content = (
            "".join(words)
            .translate({ord(character): byte for byte, character in enumerate(alphabet)})
            .encode("latin-1")
        )
        self._words = (
            np.frombuffer(content, np.uint8),
            np.cumsum(np.fromiter(map(len, words), np.int64, len(words))),
            np.fromiter(words.values(), np.int64, len(words)),
        )
        self._work = np.empty((5, 2 * WORK), np.int64)  # a longer piece gets its own for as long as its text is encoded
        self._near = np.empty((2, kernels.BLOCK), np.uint64), np.empty(kernels.BLOCK, np.uint64)
        self._renew(max(SLOTS[0], 1 << (4 * len(words)).bit_length()))

    @classmethod
    def of(cls, content: dict[str, Any]) -> ByteLevel | None:
        """The tokenizer of a tokenizer.json, apart from its normaliser and added tokens; None where this is not the way to encode with it."""
        model = content.get("model")
        how = pattern_of(content.get("pre_tokenizer"))
        if how is None or not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
            return None
        vocabulary, merges = model.get("vocab"), model.get("merges")
        if (
            any(model.get(option) not in NEITHER for option in OPTIONS)
            or not isinstance(vocabulary, dict)
            or not isinstance(merges, list)
        ):
            return None
        try:
            pairs = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in merges]
            if (
                any(len(pair) != 2 for pair in pairs)
                or not 0 <= min(vocabulary.values()) <= max(vocabulary.values()) < kernels.MAX_IDS
                or len(set(vocabulary.values())) < len(vocabulary)  # names that share an id share merges
                or len(pairs) > kernels.MAX_IDS
            ):
                return None
            return cls(how, vocabulary, pairs, whole=bool(model.get("ignore_merges")))
        except (KeyError, TypeError, ValueError):  # damaged: the library says how
            return None

    def encode(self, texts: Sequence[bytes], end: int = -1) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """Ids of all texts (UTF-8), flat, the id `end` behind each (-1: nothing), and how many each has."""
        data = np.frombuffer(b"".join(texts), np.uint8)
        bounds = np.zeros(len(texts) + 1, np.int64)
        np.cumsum(np.fromiter(map(len, texts), np.int64, len(texts)), out=bounds[1:])
        ends, pieces = np.empty(len(data), np.int64), np.zeros(len(texts) + 1, np.int64)
        kernels.cut_all(data, bounds, self._how, self._classes, ends, pieces)
        out = np.empty(len(data) + len(texts) + kernels.INLINE, np.uint32)
        begins, state, work = np.zeros(len(texts) + 1, np.int64), np.zeros(3, np.int64), self._work
        while True:
            answer = kernels.encode(
                data, bounds, ends, pieces, self._byte_ids, self._byte_ranks, self._results, self._pairs, self._table, self._texts, self._ids, self._counts, work, *self._near, begins, out, end, state
            )  # fmt: skip
            if answer == kernels.DONE:
                return out[: begins[-1]], np.diff(begins)
            if answer == kernels.FULL:
                self._grow()
            else:
                work = np.empty((5, 4 * answer), np.int64)

    def _renew(self, slots: int) -> None:
        """An empty table of that size."""
        self._table = np.zeros(4 * slots, np.uint64)
        self._texts = np.zeros(8 * slots + 2 * self._words[0].size, np.uint8)
        self._ids = np.zeros(2 * slots, np.int32)
        self._counts = np.zeros(3, np.int64)
        kernels.enter_words(*self._words, self._table, self._texts, self._ids, self._counts)

    def _grow(self) -> None:
        """Room for more pieces: four times the table, or an empty one where it is as large as it may be."""
        slots = len(self._table) // 4
        if 4 * slots > SLOTS[1]:
            self._renew(slots)
            return
        table = np.zeros(16 * slots, np.uint64)
        kernels.move(self._table, table)
        self._table = table
        self._texts, self._ids = (
            np.concatenate((old, np.zeros(3 * len(old), old.dtype))) for old in (self._texts, self._ids)
        )

"""The fast path of encoding: byte-level BPE with one of the four patterns, compiled.

    fast = ByteLevelEncoder.from_json(content)          # content of tokenizer.json; None: unsupported
    ids, lengths = fast.encode([b"Hello", b"world"])    # uint32[tokens], int64[texts]

The ids always equal those of the `tokenizers` library: `from_json` refuses a tokenizer for which that is not
certain, and texts with added tokens to be matched are left to the library (text_encoder.py).

Cost: tests/bench/tokenize_speed.md. Memory: 16 to 32 bytes per merge and 256 kB, and up to 45 MB of cached
pieces; a full cache is cleared.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmkit.tokens.kernels import encode as kernels
from llmkit.tokens.kernels.pretokenize import KINDS, classes
from llmkit.tokens.pretokenize import byte_alphabet, pattern_name

SLOTS = 1 << 16, 1 << 20  # initial and maximal size of the table
WORK = 1 << 10  # longest piece merged without extra memory, in bytes
UNSET = (None, "", False, 0)  # values of a model's options that leave BPE unchanged
OPTIONS = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")


class ByteLevelEncoder:
    """A byte-level BPE tokenizer, with a cache of the pieces it has seen."""

    def __init__(
        self, pattern: str, vocabulary: dict[str, int], merges: list[tuple[str, str]], *, ignore_merges: bool
    ) -> None:
        """`merges` are by rank. With `ignore_merges`, a piece in the vocabulary becomes its id, whatever the
        merges would give.

        Raises KeyError where a merge names a token that is not in the vocabulary.
        """
        self._kind = KINDS[pattern]
        self._classes = classes(self._kind)
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
        words = {word: id for word, id in vocabulary.items() if word and not foreign(word)} if ignore_merges else {}
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
        self._work = np.empty((5, 2 * WORK), np.int64)  # a longer piece gets a temporary array
        self._prefetched = np.empty((2, kernels.BLOCK), np.uint64), np.empty(kernels.BLOCK, np.uint64)
        self._reset(max(SLOTS[0], 1 << (4 * len(words)).bit_length()))

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> ByteLevelEncoder | None:
        """The encoder for the content of a tokenizer.json, without its normaliser and added tokens; None where
        not supported.
        """
        model = content.get("model")
        pattern = pattern_name(content.get("pre_tokenizer"))
        if pattern is None or not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
            return None
        vocabulary, merges = model.get("vocab"), model.get("merges")
        if (
            any(model.get(option) not in UNSET for option in OPTIONS)
            or not isinstance(vocabulary, dict)
            or not isinstance(merges, list)
        ):
            return None
        try:
            pairs = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in merges]
            if (
                len(set(map(type, merges))) > 1  # the library takes either form, but not both
                or any(len(pair) != 2 for pair in pairs)
                or not 0 <= min(vocabulary.values()) <= max(vocabulary.values()) < kernels.MAX_IDS
                or len(set(vocabulary.values())) < len(vocabulary)  # names that share an id share merges
                or len(pairs) > kernels.MAX_IDS
            ):
                return None
            return cls(pattern, vocabulary, pairs, ignore_merges=bool(model.get("ignore_merges")))
        except (KeyError, TypeError, ValueError):  # damaged: the library reports how
            return None

    def encode(self, texts: Sequence[bytes], end: int = -1) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """Ids of all UTF-8 texts, flat, each followed by the id `end` (-1: none); and the number of ids of each."""
        data = np.frombuffer(b"".join(texts), np.uint8)
        bounds = np.zeros(len(texts) + 1, np.int64)
        np.cumsum(np.fromiter(map(len, texts), np.int64, len(texts)), out=bounds[1:])
        ends, pieces = np.empty(len(data), np.int64), np.zeros(len(texts) + 1, np.int64)
        kernels.cut_all(data, bounds, self._kind, self._classes, ends, pieces)
        out = np.empty(len(data) + len(texts) + kernels.INLINE, np.uint32)
        begins, state, work = np.zeros(len(texts) + 1, np.int64), np.zeros(3, np.int64), self._work
        while True:
            status = kernels.encode(
                data, bounds, ends, pieces, self._byte_ids, self._byte_ranks, self._results, self._pairs,
                self._table, self._texts, self._ids, self._counts, work, *self._prefetched, begins, out, end, state
            )  # fmt: skip
            if status == kernels.DONE:
                return out[: begins[-1]], np.diff(begins)
            if status == kernels.FULL:
                self._grow()
            else:
                work = np.empty((5, 4 * status), np.int64)

    def _reset(self, slots: int) -> None:
        """Start with an empty cache of this size."""
        self._table = np.zeros(4 * slots, np.uint64)
        self._texts = np.zeros(8 * slots + 2 * self._words[0].size, np.uint8)
        self._ids = np.zeros(2 * slots, np.int32)
        self._counts = np.zeros(3, np.int64)
        kernels.enter_words(*self._words, self._table, self._texts, self._ids, self._counts)

    def _grow(self) -> None:
        """Make room for more pieces: enlarge the table four times, or clear it where it has its maximal size."""
        slots = len(self._table) // 4
        if 4 * slots > SLOTS[1]:
            self._reset(slots)
            return
        table = np.zeros(16 * slots, np.uint64)
        kernels.move(self._table, table)
        self._table = table
        self._texts, self._ids = (
            np.concatenate((old, np.zeros(3 * len(old), old.dtype))) for old in (self._texts, self._ids)
        )

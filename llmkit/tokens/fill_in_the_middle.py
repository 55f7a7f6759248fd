"""Fill-in-the-middle: store some documents out of order, so that a model learns to write the text between two others.

    text = prefix + middle + suffix, split at two positions drawn uniformly from the len(text) + 1 possible ones
    PSM    <prefix> prefix <suffix> suffix <middle> middle
    SPM    <prefix> <suffix> suffix <middle> prefix middle

Each piece is encoded separately, as it would be with a cursor in the text. SPM is variant 2 of Bavarian et al.
2022 (arXiv:2207.14255), which begins like PSM with an empty prefix, so that one model learns both; StarCoder
and Megatron-LM's GPTFIMDataset use it too. Documents are transformed as a whole, before packing (the paper's
document level): a sequence with part of one may lack its end.

Whether, how and where a document is split depends only on the seed and its id: the same for any order, file and
number of jobs. The documents transformed at a low rate are also transformed at any higher rate. Cost: one hash
per document, three more for those split.

    llmkit tokenize code.jsonl.zst -t tok/ --fim-rate 0.5 --fim-spm-rate 0.5 -o code/
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from llmkit.errors import UsageError
from llmkit.seeds import derive
from llmkit.shards.tokenizer_info import TokenizerInfo, added_ids

Segment = str | int  # a text to encode, or a token id
# Prefix, suffix, middle in Qwen2.5-Coder, StarCoder 2, SantaCoder, DeepSeek-Coder and Code Llama.
NAMES = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),
)


@dataclass(frozen=True, slots=True)
class FillInTheMiddle:
    """The transformation: share of documents split, share of those in SPM form, sentinel ids, sources (empty: all)."""

    rate: float
    spm_rate: float
    seed: int
    sentinels: tuple[int, int, int]  # prefix, suffix, middle
    sources: tuple[str, ...] = ()

    def segments(self, text: str, id: str, source: str) -> list[Segment]:
        """The segments of a document in stored order; [text] where it is not transformed."""
        if (self.sources and source not in self.sources) or self._draw("cut", id) >= self.rate * 2**64:
            return [text]
        first, second = sorted(self._draw(name, id) * (len(text) + 1) >> 64 for name in ("first", "second"))
        prefix, middle, suffix = text[:first], text[first:second], text[second:]
        prefix_id, suffix_id, middle_id = self.sentinels
        if self._draw("form", id) < self.spm_rate * 2**64:
            return [prefix_id, suffix_id, suffix, middle_id, prefix, middle]
        return [prefix_id, prefix, suffix_id, suffix, middle_id, middle]

    def _draw(self, name: str, id: str) -> int:
        """A 64-bit random number."""
        return derive(self.seed, "fim", name, id)


def make_fill_in_the_middle(
    info: TokenizerInfo, rate: float, spm_rate: float, seed: int, sources: Sequence[str] = ()
) -> FillInTheMiddle | None:
    """The transformation for a tokenizer; None where `rate` is 0.

    Raises UsageError where the tokenizer lacks the sentinel tokens, or a rate is not between 0 and 1.
    """
    for option, share in (("--fim-rate", rate), ("--fim-spm-rate", spm_rate)):
        if not 0 <= share <= 1:
            raise UsageError(f"{option} {share}", "a rate is between 0 and 1")
    if not rate:
        if sources:
            raise UsageError("--fim-source without --fim-rate", "give a share of its documents, such as --fim-rate 0.5")
        return None
    ids = added_ids(orjson.loads(info.files["tokenizer.json"]))
    for prefix, suffix, middle in NAMES:
        if prefix in ids and suffix in ids and middle in ids:
            return FillInTheMiddle(rate, spm_rate, seed, (ids[prefix], ids[suffix], ids[middle]), tuple(sources))
    raise UsageError(
        "the tokenizer has no fill-in-the-middle tokens", f"it needs {', '.join(NAMES[0])}, or similar ones"
    )


def assemble_segments(
    documents: Sequence[Sequence[Segment]], encode: Callable[[list[str]], tuple[NDArray[Any], NDArray[np.int64]]]
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Flat ids of all documents, and the number of ids of each [n]; `encode` gives flat ids and lengths of texts."""
    texts: list[str] = []
    texts_before: list[int] = []  # for each single token, the number of texts before it
    single_tokens: list[int] = []
    counts = np.zeros((2, len(documents)), np.int64)  # texts and single tokens up to and including each document
    for i, segments in enumerate(documents):
        for segment in segments:
            if isinstance(segment, str):
                texts.append(segment)
            else:
                texts_before.append(len(texts))
                single_tokens.append(segment)
        counts[:, i] = len(texts), len(single_tokens)
    flat, sizes = encode(texts)
    ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
    lengths = np.diff(ends[counts[0]] + counts[1], prepend=0)
    return np.insert(flat, ends[texts_before], single_tokens), lengths

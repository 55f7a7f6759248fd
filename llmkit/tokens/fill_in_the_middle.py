"""Fill-in-the-middle: some documents are stored out of order, so that a model learns to write what stands between two texts.

    text = prefix + middle + suffix, cut at two places drawn uniformly from all between, before and behind its characters
    PSM    <prefix> prefix <suffix> suffix <middle> middle
    SPM    <prefix> <suffix> suffix <middle> prefix middle

Each piece is encoded by itself, as it is when a cursor stands in the text. SPM is variant 2 of Bavarian et al. 2022 (arXiv 2207.14255),
which begins as PSM with nothing before the cursor, so that one model learns both; StarCoder and Megatron-LM's GPTFIMDataset use it too.
Documents are transformed whole, before they are packed (the paper's document level): a sequence that holds part of one may lack its end.

Whether, how and where a document is cut depends on the seed and its id alone: the same for any order, file and number of jobs, and what a
low rate transforms, a higher one does too. Cost: a hash a document, three more for those that are cut.

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

Segment = str | int  # a text to encode, or the id of one token
# Prefix, suffix, middle as Qwen2.5-Coder, StarCoder 2, SantaCoder, DeepSeek-Coder and Code Llama call them.
NAMES = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),
)


@dataclass(frozen=True, slots=True)
class FillInTheMiddle:
    """Which documents are cut and how: shares of all and, of those, in SPM form; sentinel ids; only of these sources (none: of all)."""

    rate: float
    spm_rate: float
    seed: int
    sentinels: tuple[int, int, int]  # prefix, suffix, middle
    sources: tuple[str, ...] = ()

    def segments(self, text: str, id: str, source: str) -> list[Segment]:
        """The document in the order in which it is stored; [text] where it stays as it is."""
        if (self.sources and source not in self.sources) or self._draw("cut", id) >= self.rate * 2**64:
            return [text]
        first, second = sorted(self._draw(which, id) * (len(text) + 1) >> 64 for which in ("first", "second"))
        prefix, middle, suffix = text[:first], text[first:second], text[second:]
        before, behind, between = self.sentinels
        if self._draw("form", id) < self.spm_rate * 2**64:
            return [before, behind, suffix, between, prefix, middle]
        return [before, prefix, behind, suffix, between, middle]

    def _draw(self, what: str, id: str) -> int:
        """A number of 64 bits."""
        return derive(self.seed, "fim", what, id)


def fill_in_the_middle(
    info: TokenizerInfo, rate: float, spm_rate: float, seed: int, sources: Sequence[str] = ()
) -> FillInTheMiddle | None:
    """The transformation for a tokenizer; None where `rate` is 0. UsageError where it has no tokens for it, or a share is none."""
    for option, share in (("--fim-rate", rate), ("--fim-spm-rate", spm_rate)):
        if not 0 <= share <= 1:
            raise UsageError(f"{option} {share}", "a share is between 0 and 1")
    if not rate:
        if sources:
            raise UsageError("--fim-source without --fim-rate", "say how many of its documents, such as --fim-rate 0.5")
        return None
    ids = added_ids(orjson.loads(info.files["tokenizer.json"]))
    for prefix, suffix, middle in NAMES:
        if prefix in ids and suffix in ids and middle in ids:
            return FillInTheMiddle(rate, spm_rate, seed, (ids[prefix], ids[suffix], ids[middle]), tuple(sources))
    raise UsageError("the tokenizer has no fill-in-the-middle tokens", f"it needs {', '.join(NAMES[0])}, or the like")


def assemble(
    documents: Sequence[Sequence[Segment]], encode: Callable[[list[str]], tuple[NDArray[Any], NDArray[np.int64]]]
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Flat ids and their number [n] for each document, from its segments; `encode` gives flat ids and lengths of texts."""
    texts: list[str] = []
    behind: list[int] = []  # for each single token, how many texts stand before it
    marks: list[int] = []
    counts = np.zeros((2, len(documents)), np.int64)  # of texts and of single tokens so far
    for i, segments in enumerate(documents):
        for segment in segments:
            if isinstance(segment, str):
                texts.append(segment)
            else:
                behind.append(len(texts))
                marks.append(segment)
        counts[:, i] = len(texts), len(marks)
    flat, sizes = encode(texts)
    ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
    lengths = np.diff(ends[counts[0]] + counts[1], prepend=0)
    return np.insert(flat, ends[behind], marks), lengths

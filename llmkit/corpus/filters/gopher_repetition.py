"""Gopher repetition rules: drop documents that repeat themselves.

Rae et al. 2021 (arXiv:2112.11446), table A1, as FineWeb measures it. Repeats count, but the first copy does
not. Shares of characters are of the whole text, whitespace included. The most common n-gram counts even if it
occurs only once, so that very short texts fail. Duplicate n-grams are counted from left to right without
overlap. Reasons, in order: `empty`, then the names of the thresholds.

Datatrove compares duplicate n-grams by their letters alone, so that "ab c" equals "a bc". `separate_words =
false` does the same in plain Python: one pass over the words for each n, every n-gram a string.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from llmkit.corpus.filters import FILTERS, Threshold, ThresholdFilter
from llmkit.corpus.kernels.characters import classes
from llmkit.corpus.kernels.repetition import repetition
from llmkit.corpus.page import Page

SHARES = (
    *("dup_para_frac", "dup_para_char_frac", "dup_line_frac", "dup_line_char_frac"),
    *(f"top_{n}_gram" for n in (2, 3, 4)),
    *(f"duplicated_{n}_n_grams" for n in range(5, 11)),
)


@FILTERS.register("gopher_repetition")
@dataclass(frozen=True)
class GopherRepetition(ThresholdFilter):
    """Each threshold is the largest share that is kept."""

    THRESHOLDS = tuple(Threshold(name, name) for name in SHARES)

    dup_para_frac: float | None = 0.30  # of paragraphs that repeat an earlier one
    dup_para_char_frac: float | None = 0.20  # of characters in such paragraphs
    dup_line_frac: float | None = 0.30
    dup_line_char_frac: float | None = 0.20
    top_2_gram: float | None = 0.20  # of characters in the most common 2-gram
    top_3_gram: float | None = 0.18
    top_4_gram: float | None = 0.16
    duplicated_5_n_grams: float | None = 0.15  # of characters in 5-grams that occurred before
    duplicated_6_n_grams: float | None = 0.14
    duplicated_7_n_grams: float | None = 0.13
    duplicated_8_n_grams: float | None = 0.12
    duplicated_9_n_grams: float | None = 0.11
    duplicated_10_n_grams: float | None = 0.10
    separate_words: bool = True  # whether the 2-grams "ab c" and "a bc" are different

    def measure(self, page: Page) -> Sequence[float] | None:
        text = page.text
        if not text:
            return None
        size = len(text)
        hashes, characters, flags, *_ = page.split_lines
        words = page.tokens
        ends = (text[0] == "\n") + (text[-1] == "\n")  # an empty line before the first newline and after the last
        shares: list[float] = repetition(
            page.data, classes(), hashes, characters, flags, ends, words.hashes, words.lengths, size
        ).tolist()
        if not self.separate_words:
            shares[7:] = [joined_duplicates(page.words, n) / size for n in range(5, 11)]
        return shares


def joined_duplicates(words: list[str], n: int) -> int:
    """Characters in n-grams that occurred before, compared as their letters without separators.

    The words are scanned from left to right, and the scan continues after each repeated n-gram.
    """
    joined = "".join(words)
    ends = [0, *accumulate(map(len, words))]
    seen: set[str] = set()
    characters = i = 0
    while i <= len(words) - n:
        ngram = joined[ends[i] : ends[i + n]]
        if ngram in seen:
            characters += len(ngram)
            i += n
        else:
            seen.add(ngram)
            i += 1
    return characters

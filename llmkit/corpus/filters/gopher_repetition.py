"""Gopher repetition rules: documents that say the same thing again and again.

Rae et al. 2021 (arXiv:2112.11446), table A1, as FineWeb measures it: the repeats count, not the first copy; the shares of characters are of the
whole text, whitespace included; the most common n-gram counts even if it occurs once, so that very short texts fail; duplicate n-grams are
looked for left to right without overlap, and compared by their letters alone ("ab c" is "a bc"). Reasons, in order: `empty`, then the names
of the thresholds.

Cost: linear in the text, one pass over the words for each n from 2 to 10; about 2 MB/s, a 10 MB document in some 10 s and 1 GB.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from itertools import accumulate

from llmkit.corpus.filters import FILTERS, Drop, above, repeated
from llmkit.corpus.page import Page

PARAGRAPH_BREAK = re.compile(r"\n{2,}")
LINE_BREAK = re.compile(r"\n+")


@FILTERS.register("gopher_repetition")
@dataclass(frozen=True, slots=True)
class GopherRepetition:
    """Each threshold is the largest share that passes."""

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

    def __call__(self, page: Page) -> Drop | None:
        text = page.text
        if not text:
            return Drop("empty")
        for unit, items in (
            ("para", PARAGRAPH_BREAK.split(text.strip())),
            ("line", LINE_BREAK.split(text)),
        ):
            count, characters = repeated(items)
            if above(share := count / len(items), getattr(self, f"dup_{unit}_frac")):
                return Drop(f"dup_{unit}_frac", share)
            if above(share := characters / len(text), getattr(self, f"dup_{unit}_char_frac")):
                return Drop(f"dup_{unit}_char_frac", share)
        words = page.words
        for n in (2, 3, 4):
            limit = getattr(self, reason := f"top_{n}_gram")
            if limit is not None and above(share := top_ngram_characters(words, n) / len(text), limit):
                return Drop(reason, share)
        joined = "".join(words)
        ends = [0, *accumulate(map(len, words))]
        for n in range(5, 11):
            limit = getattr(self, reason := f"duplicated_{n}_n_grams")
            if limit is not None and above(share := duplicate_ngram_characters(joined, ends, n) / len(text), limit):
                return Drop(reason, share)
        return None


def top_ngram_characters(words: list[str], n: int) -> int:
    """Characters in all copies of the most common n-gram (words joined by a space; of equally common ones the first); 0 without n words."""
    counts = Counter(map(" ".join, zip(*(words[i:] for i in range(n)), strict=False)))
    if not counts:
        return 0
    ngram, count = counts.most_common(1)[0]
    return len(ngram) * count


def duplicate_ngram_characters(joined: str, ends: list[int], n: int) -> int:
    """Characters in n-grams that occurred before, left to right, going on behind each one found.

    `joined` holds the words without separators, `ends[i]` is where word i starts (and word i-1 ends), one more than there are words.
    """
    seen: set[str] = set()
    characters = i = 0
    last = len(ends) - 1 - n
    while i <= last:
        ngram = joined[ends[i] : ends[i + n]]
        if ngram in seen:
            characters += len(ngram)
            i += n
        else:
            seen.add(ngram)
            i += 1
    return characters

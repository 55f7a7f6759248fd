"""Gopher quality rules: does this look like running text at all?

Rae et al. 2021 (arXiv:2112.11446), section A.1, as FineWeb applies them. Two choices of that chain decide much and are kept: the share of words with
a letter is taken over all words, so with `--words unicode` punctuation counts against a document; and stop words are looked for as
written, so "The" at the start of a sentence is none. Statistics are for English; `stop_words`, the word lengths and the share of letters are
what another language sets otherwise.

Reasons, in order: gopher_short_doc, gopher_long_doc, gopher_below_avg_threshold, gopher_above_avg_threshold, gopher_too_many_hashes,
gopher_too_many_ellipsis, gopher_too_many_bullets, gopher_too_many_end_ellipsis, gopher_below_alpha_threshold, gopher_enough_stop_words.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from llmkit.corpus.filters import FILTERS, Check, above, below
from llmkit.corpus.kernels.tokens import summary, tokens_of
from llmkit.corpus.page import Page

ELLIPSES = ("...", "…")


@FILTERS.register("gopher_quality")
@dataclass(frozen=True, slots=True)
class GopherQuality:
    """Words that are punctuation alone do not count for the number and mean length of words."""

    min_doc_words: int | None = 50
    max_doc_words: int | None = 100_000
    min_avg_word_length: float | None = 3.0  # characters
    max_avg_word_length: float | None = 10.0
    max_symbol_word_ratio: float | None = 0.1  # '#' a word; ellipses a word
    max_bullet_lines_ratio: float | None = 0.9  # lines that start with a bullet or a dash
    max_ellipsis_lines_ratio: float | None = 0.3  # lines that end with an ellipsis
    min_alpha_words_ratio: float | None = 0.8  # words with at least one letter
    min_stop_words: int | None = 2  # distinct ones
    stop_words: tuple[str, ...] = ("the", "be", "to", "of", "and", "that", "have", "with")

    def __call__(self, page: Page) -> Iterator[Check]:
        text, words = page.text, page.tokens
        total = max(1, len(words.flags))
        count, characters, lettered, found = summary(*words, _hashes(self.stop_words))
        yield Check("gopher_short_doc", count, below(count, self.min_doc_words), "words")
        yield Check("gopher_long_doc", count, above(count, self.max_doc_words), "words")
        mean = characters / max(1, count)
        yield Check(
            "gopher_below_avg_threshold", mean, count > 0 and below(mean, self.min_avg_word_length), "mean_word_length"
        )
        yield Check(
            "gopher_above_avg_threshold", mean, count > 0 and above(mean, self.max_avg_word_length), "mean_word_length"
        )
        share = text.count("#") / total
        yield Check("gopher_too_many_hashes", share, above(share, self.max_symbol_word_ratio), "hash_word_ratio")
        share = sum(map(text.count, ELLIPSES)) / total
        yield Check("gopher_too_many_ellipsis", share, above(share, self.max_symbol_word_ratio), "ellipsis_word_ratio")
        lines, bullets, ellipses = page.line_counts
        share = bullets / max(1, lines)
        yield Check("gopher_too_many_bullets", share, above(share, self.max_bullet_lines_ratio), "bullet_lines_ratio")
        share = ellipses / max(1, lines)
        yield Check(
            "gopher_too_many_end_ellipsis", share, above(share, self.max_ellipsis_lines_ratio), "ellipsis_lines_ratio"
        )
        share = lettered / total
        yield Check(
            "gopher_below_alpha_threshold", share, below(share, self.min_alpha_words_ratio), "alpha_words_ratio"
        )
        yield Check("gopher_enough_stop_words", found, below(found, self.min_stop_words), "stop_words")


@cache
def _hashes(words: tuple[str, ...]) -> NDArray[np.uint64]:
    """Hashes of words, each once."""
    return tokens_of(sorted(set(words))).hashes

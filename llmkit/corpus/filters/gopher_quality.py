"""Gopher quality rules: does this look like running text at all?

Rae et al. 2021 (arXiv:2112.11446), section A.1, as FineWeb applies them. Two choices of FineWeb matter a lot
and are kept. The share of words with a letter is taken over all words, so that with `--words unicode`
punctuation counts against a document. Stop words are matched with their case, so that "The" at the start of a
sentence does not count. The thresholds are for English; for another language set `stop_words`, the word lengths
and the share of words with a letter.

Reasons, in order: gopher_short_doc, gopher_long_doc, gopher_below_avg_threshold, gopher_above_avg_threshold,
gopher_too_many_hashes, gopher_too_many_ellipsis, gopher_too_many_bullets, gopher_too_many_end_ellipsis,
gopher_below_alpha_threshold, gopher_enough_stop_words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from llmkit.corpus.filters import FILTERS, Threshold, ThresholdFilter
from llmkit.corpus.kernels.tokens import summary, symbols, tokens_of
from llmkit.corpus.page import Page


@FILTERS.register("gopher_quality")
@dataclass(frozen=True)
class GopherQuality(ThresholdFilter):
    """Words that consist of punctuation alone count neither towards the number of words nor their mean length."""

    THRESHOLDS = (
        Threshold("gopher_short_doc", "min_doc_words", False, "words"),
        Threshold("gopher_long_doc", "max_doc_words", True, "words"),
        Threshold("gopher_below_avg_threshold", "min_avg_word_length", False, "mean_word_length"),
        Threshold("gopher_above_avg_threshold", "max_avg_word_length", True, "mean_word_length"),
        Threshold("gopher_too_many_hashes", "max_symbol_word_ratio", True, "hash_word_ratio"),
        Threshold("gopher_too_many_ellipsis", "max_symbol_word_ratio", True, "ellipsis_word_ratio"),
        Threshold("gopher_too_many_bullets", "max_bullet_lines_ratio", True, "bullet_lines_ratio"),
        Threshold("gopher_too_many_end_ellipsis", "max_ellipsis_lines_ratio", True, "ellipsis_lines_ratio"),
        Threshold("gopher_below_alpha_threshold", "min_alpha_words_ratio", False, "alpha_words_ratio"),
        Threshold("gopher_enough_stop_words", "min_stop_words", False, "stop_words"),
    )

    min_doc_words: int | None = 50
    max_doc_words: int | None = 100_000
    min_avg_word_length: float | None = 3.0  # characters
    max_avg_word_length: float | None = 10.0
    max_symbol_word_ratio: float | None = 0.1  # '#' per word, and ellipses per word
    max_bullet_lines_ratio: float | None = 0.9  # lines that start with a bullet or a dash
    max_ellipsis_lines_ratio: float | None = 0.3  # lines that end with an ellipsis
    min_alpha_words_ratio: float | None = 0.8  # words with at least one letter
    min_stop_words: int | None = 2  # distinct stop words
    stop_words: tuple[str, ...] = ("the", "be", "to", "of", "and", "that", "have", "with")

    def measure(self, page: Page) -> Sequence[float]:
        words = page.tokens
        total = max(1, len(words.flags))
        count, characters, words_with_letter, stop_words = summary(*words, _hashes(self.stop_words))
        # Without words there is no mean: use a value that passes.
        mean = characters / count if count else self.min_avg_word_length or 0.0
        hashes, ellipses = symbols(page.data)
        lines, bullet_lines, ellipsis_lines = page.line_counts
        lines = max(1, lines)
        return (
            count,
            count,
            mean,
            mean,
            hashes / total,
            ellipses / total,
            bullet_lines / lines,
            ellipsis_lines / lines,
            words_with_letter / total,
            stop_words,
        )


@cache
def _hashes(words: tuple[str, ...]) -> NDArray[np.uint64]:
    """Hashes of the distinct words."""
    return tokens_of(sorted(set(words))).hashes

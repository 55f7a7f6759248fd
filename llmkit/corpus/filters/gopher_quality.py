"""Gopher quality rules: does this look like running text at all?

Rae et al. 2021 (arXiv:2112.11446), section A.1, as FineWeb applies them. Two choices of that chain decide much and are kept: the share of words with
a letter is taken over all words, so with `--words unicode` punctuation counts against a document; and stop words are looked for as
written, so "The" at the start of a sentence is none. Statistics are for English; `stop_words`, the word lengths and the share of letters are
what another language sets otherwise.

Reasons, in order: gopher_short_doc, gopher_long_doc, gopher_below_avg_threshold, gopher_above_avg_threshold, gopher_too_many_hashes,
gopher_too_many_ellipsis, gopher_too_many_bullets, gopher_too_many_end_ellipsis, gopher_below_alpha_threshold, gopher_enough_stop_words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from llmkit.corpus.filters import FILTERS, ByTable, Rule
from llmkit.corpus.kernels.tokens import summary, symbols, tokens_of
from llmkit.corpus.page import Page


@FILTERS.register("gopher_quality")
@dataclass(frozen=True)
class GopherQuality(ByTable):
    """Words that are punctuation alone do not count for the number and mean length of words."""

    RULES = (
        Rule("gopher_short_doc", "min_doc_words", False, "words"),
        Rule("gopher_long_doc", "max_doc_words", True, "words"),
        Rule("gopher_below_avg_threshold", "min_avg_word_length", False, "mean_word_length"),
        Rule("gopher_above_avg_threshold", "max_avg_word_length", True, "mean_word_length"),
        Rule("gopher_too_many_hashes", "max_symbol_word_ratio", True, "hash_word_ratio"),
        Rule("gopher_too_many_ellipsis", "max_symbol_word_ratio", True, "ellipsis_word_ratio"),
        Rule("gopher_too_many_bullets", "max_bullet_lines_ratio", True, "bullet_lines_ratio"),
        Rule("gopher_too_many_end_ellipsis", "max_ellipsis_lines_ratio", True, "ellipsis_lines_ratio"),
        Rule("gopher_below_alpha_threshold", "min_alpha_words_ratio", False, "alpha_words_ratio"),
        Rule("gopher_enough_stop_words", "min_stop_words", False, "stop_words"),
    )

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

    def measure(self, page: Page) -> Sequence[float]:
        words = page.tokens
        total = max(1, len(words.flags))
        count, characters, lettered, found = summary(*words, _hashes(self.stop_words))
        # Without a word there is no mean: a value that passes.
        mean = characters / count if count else self.min_avg_word_length or 0.0
        signs, dots = symbols(page.data)
        number, bullets, ellipses = page.line_counts
        number = max(1, number)
        return (
            count,
            count,
            mean,
            mean,
            signs / total,
            dots / total,
            bullets / number,
            ellipses / number,
            lettered / total,
            found,
        )


@cache
def _hashes(words: tuple[str, ...]) -> NDArray[np.uint64]:
    """Hashes of words, each once."""
    return tokens_of(sorted(set(words))).hashes

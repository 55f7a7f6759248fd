"""Gopher quality rules: does this look like running text at all?

Rae et al. 2021 (arXiv:2112.11446), section A.1, as FineWeb applies them. Two choices of that chain decide much and are kept: the share of words with
a letter is taken over all words, so with `--words unicode` punctuation counts against a document; and stop words are looked for as
written, so "The" at the start of a sentence is none. Statistics are for English.

Reasons, in order: gopher_short_doc, gopher_long_doc, gopher_below_avg_threshold, gopher_above_avg_threshold, gopher_too_many_hashes,
gopher_too_many_ellipsis, gopher_too_many_bullets, gopher_too_many_end_ellipsis, gopher_below_alpha_threshold, gopher_enough_stop_words.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmkit.corpus.filters import FILTERS, Drop, above, below
from llmkit.corpus.page import Page
from llmkit.corpus.words import MARKS

BULLETS = ("•", "-")
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

    def __call__(self, page: Page) -> Drop | None:
        text, words = page.text, page.words
        total = max(1, len(words))
        lengths = [len(word) for word in words if not MARKS.issuperset(word)]
        if below(len(lengths), self.min_doc_words):
            return Drop("gopher_short_doc", len(lengths))
        if above(len(lengths), self.max_doc_words):
            return Drop("gopher_long_doc", len(lengths))
        mean = sum(lengths) / max(1, len(lengths))
        if lengths and below(mean, self.min_avg_word_length):
            return Drop("gopher_below_avg_threshold", mean)
        if lengths and above(mean, self.max_avg_word_length):
            return Drop("gopher_above_avg_threshold", mean)
        if above(share := text.count("#") / total, self.max_symbol_word_ratio):
            return Drop("gopher_too_many_hashes", share)
        if above(share := sum(map(text.count, ELLIPSES)) / total, self.max_symbol_word_ratio):
            return Drop("gopher_too_many_ellipsis", share)
        lines = page.lines
        if above(
            share := sum(s.lstrip().startswith(BULLETS) for s in lines) / max(1, len(lines)),
            self.max_bullet_lines_ratio,
        ):
            return Drop("gopher_too_many_bullets", share)
        if above(
            share := sum(s.rstrip().endswith(ELLIPSES) for s in lines) / max(1, len(lines)),
            self.max_ellipsis_lines_ratio,
        ):
            return Drop("gopher_too_many_end_ellipsis", share)
        if below(share := sum(map(_has_letter, words)) / total, self.min_alpha_words_ratio):
            return Drop("gopher_below_alpha_threshold", share)
        if below(found := len({*self.stop_words}.intersection(words)), self.min_stop_words):
            return Drop("gopher_enough_stop_words", found)
        return None


def _has_letter(word: str) -> bool:
    return word.isalpha() or any(map(str.isalpha, word))

"""Dolma's version of Gopher's and C4's rules, where its measurements differ from FineWeb's.

Soldaini et al. 2024 (arXiv:2402.00159). The measurements are those of the taggers gopher_v1, gopher_v2 and
c4_v2 of dolma 1.2.1; thresholds and order of the rules are those of its published mixers for Common Crawl
(configs/dolma-v1_5/mixing/cc-*.yaml, the same in v1_6; v1.7 publishes none).

Differences from `gopher_quality` and `gopher_repetition`: words are separated by whitespace, regardless of
--words; the median word length is used, not the mean; there is one ratio of words that contain "#" or "…"
("..." does not count); every occurrence of a stop word counts; all copies of lines and n-grams count, including
the first, and n-grams overlap; bullet lines start with * or - without leading whitespace; shares are of the
characters in words. Differences from `c4`: see `dolma_c4`.

The published mixers ask for `..._in_most_common_2gram` where the tagger writes `..._2grams`, so that their
three top n-gram rules never drop anything. Here these rules work, with the published thresholds; `top_2_gram =
off` and so on reproduces the mixers. gopher_v1 counts empty lines, which are then copies of each other
(`empty_lines = true`); gopher_v2, the default here, leaves them out. Parity: tests/bench/dolma_parity.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from llmkit.corpus.filters import FILTERS, Check, above, below
from llmkit.corpus.filters.kernels.dolma import all_copies, line_copies, summary
from llmkit.corpus.kernels.characters import classes
from llmkit.corpus.kernels.tokens import Tokens, scan, tokens_of
from llmkit.corpus.page import Page

SYMBOL = re.compile(r"[#…]\S*")  # from a word's first symbol to its end: one match per word
END_MARKS = (".", "?", "!", '"')


@FILTERS.register("dolma")
@dataclass(frozen=True, slots=True)
class Dolma:
    """Reasons are the names of the thresholds."""

    min_words: int | None = 50
    max_words: int | None = 100_000
    min_median_word_length: float | None = 3.0
    max_median_word_length: float | None = 10.0
    max_symbol_words: float | None = 0.1  # share of words with a symbol
    min_alpha_words: float | None = 0.8  # share of words with at least one letter
    min_stop_words: int | None = 2  # every occurrence counts
    max_bullet_lines: float | None = 0.9
    max_ellipsis_lines: float | None = 0.3
    dup_line_frac: float | None = 0.30  # share of lines that occur more than once
    dup_line_char_frac: float | None = 0.30
    top_2_gram: float | None = 0.20
    top_3_gram: float | None = 0.18
    top_4_gram: float | None = 0.16
    duplicated_5_n_grams: float | None = 0.15
    duplicated_6_n_grams: float | None = 0.14
    duplicated_7_n_grams: float | None = 0.13
    duplicated_8_n_grams: float | None = 0.12
    duplicated_9_n_grams: float | None = 0.11
    duplicated_10_n_grams: float | None = 0.10
    stop_words: tuple[str, ...] = ("the", "be", "to", "of", "and", "that", "have", "with")
    empty_lines: bool = False  # whether empty lines count as lines

    def __call__(self, page: Page) -> Iterator[Check]:
        text, words = page.text, _words(page)
        count = len(words.lengths)
        characters, doubled_median, words_with_letter, stop_words = summary(*words, _hashes(self.stop_words))
        yield Check("min_words", count, below(count, self.min_words), "words")
        yield Check("max_words", count, above(count, self.max_words), "words")
        median = doubled_median / 2 if doubled_median >= 0 else float(np.median(words.lengths))
        yield Check("min_median_word_length", median, below(median, self.min_median_word_length), "median_word_length")
        yield Check("max_median_word_length", median, above(median, self.max_median_word_length), "median_word_length")
        share = len(SYMBOL.findall(text)) / max(1, count) if "#" in text or "…" in text else 0.0
        yield Check("max_symbol_words", share, above(share, self.max_symbol_words), "symbol_words")
        share = words_with_letter / max(1, count)
        yield Check("min_alpha_words", share, below(share, self.min_alpha_words), "alpha_words")
        yield Check("min_stop_words", stop_words, below(stop_words, self.min_stop_words), "stop_words")
        lines, repeated_lines, repeated_characters = self._lines(page)
        share = (text.startswith(("*", "-")) + text.count("\n*") + text.count("\n-")) / lines
        yield Check("max_bullet_lines", share, above(share, self.max_bullet_lines), "bullet_lines")
        share = (text.endswith("…") + text.count("…\n")) / lines
        yield Check("max_ellipsis_lines", share, above(share, self.max_ellipsis_lines), "ellipsis_lines")
        share = repeated_lines / lines
        yield Check("dup_line_frac", share, above(share, self.dup_line_frac))
        share = repeated_characters / max(1, characters)
        yield Check("dup_line_char_frac", share, above(share, self.dup_line_char_frac))
        repeated_counts, denominators = all_copies(words.hashes, words.lengths).tolist()
        for n, repeated, denominator in zip(range(2, 11), repeated_counts, denominators, strict=True):
            share = repeated / max(1, denominator)
            reason = f"top_{n}_gram" if n <= 4 else f"duplicated_{n}_n_grams"
            yield Check(reason, share, above(share, getattr(self, reason)))

    def _lines(self, page: Page) -> tuple[int, int, int]:
        """(lines, lines that occur more than once, characters in those).

        An empty line before the first or after the last newline always counts.
        """
        hashes, characters, flags, *_ = page.split_lines
        lines, copies, repeated = line_copies(hashes, characters, flags, self.empty_lines)
        ends = 0 if self.empty_lines else page.text.startswith("\n") + page.text.endswith("\n")
        return max(1, lines + ends), copies + (2 if ends == 2 else 0), repeated


def _words(page: Page) -> Tokens:
    if page.splitter.compiled == "whitespace":
        return page.tokens
    return Tokens(*scan(page.data, classes(), True))


@cache
def _hashes(words: tuple[str, ...]) -> NDArray[np.uint64]:
    """Hashes of the distinct words."""
    return tokens_of(sorted(set(words))).hashes


@FILTERS.register("dolma_c4")
@dataclass(frozen=True, slots=True)
class DolmaC4:
    """All of C4's rules by the tagger c4_v2, as in configs/c4-replication/mixer.yaml; its word list is the
    filter `bad_words`.

    Unlike `c4`, "javascript" drops the document; an apostrophe is not an end mark, but "..." is; there are no
    rules on long words, citations, notices and number of sentences. The Dolma corpus uses the rule on end marks
    alone: the preset `dolma`. Reasons: curly_bracket, lorem_ipsum, javascript.
    """

    drop_curly_bracket: bool = True
    drop_lorem_ipsum: bool = True
    drop_javascript: bool = True
    require_end_mark: bool = True  # remove lines without one
    min_words_per_line: int | None = 3

    def __call__(self, page: Page) -> Iterator[Check]:
        lowered = page.text.lower()
        for reason, sign, enabled in (
            ("curly_bracket", "{", self.drop_curly_bracket),
            ("lorem_ipsum", "lorem ipsum", self.drop_lorem_ipsum),
            ("javascript", "javascript", self.drop_javascript),
        ):
            count = lowered.count(sign)
            yield Check(reason, count, enabled and count > 0)
        *lines, last = page.text.split("\n")
        kept = [line + "\n" for line in lines if self._keeps(line)]  # a line is removed with its newline
        page.edit("".join(kept) + (last if self._keeps(last) else ""))

    def _keeps(self, line: str) -> bool:
        if self.require_end_mark and not line.rstrip().endswith(END_MARKS):
            return False
        return self.min_words_per_line is None or len(line.split()) >= self.min_words_per_line

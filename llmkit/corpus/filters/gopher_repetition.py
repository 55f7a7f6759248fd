"""Gopher repetition rules: documents that say the same thing again and again.

Rae et al. 2021 (arXiv:2112.11446), table A1, as FineWeb measures it: the repeats count, not the first copy; the shares of characters are of the
whole text, whitespace included; the most common n-gram counts even if it occurs once, so that very short texts fail; duplicate n-grams are
looked for left to right without overlap. Reasons, in order: `empty`, then the names of the thresholds.

Datatrove compares duplicate n-grams by their letters alone, so that "ab c" is "a bc"; `separate_words = false` does so too, at a tenth of the speed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

from llmkit.corpus.filters import FILTERS, Check, above
from llmkit.corpus.kernels.characters import classes
from llmkit.corpus.kernels.lines import EMPTY
from llmkit.corpus.kernels.repetition import DUPLICATED, TOP, line_repeats, paragraph_repeats, repetition
from llmkit.corpus.page import Page


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
    separate_words: bool = True  # whether "ab c" is another 2-gram than "a bc"

    def __call__(self, page: Page) -> Iterator[Check]:
        size = len(page.text)
        if size == 0:
            yield Check("empty")
            return
        for unit, (items, copies, characters) in (
            ("para", paragraph_repeats(page.data, classes())),
            ("line", _lines(page)),
        ):
            for reason, share in (
                (f"dup_{unit}_frac", copies / max(1, items)),
                (f"dup_{unit}_char_frac", characters / size),
            ):
                yield Check(reason, share, above(share, getattr(self, reason)))
        words = page.tokens
        found = repetition(words.hashes, words.lengths).tolist()
        for n in TOP:
            share = found[n - 2] / size
            yield Check(reason := f"top_{n}_gram", share, above(share, getattr(self, reason)))
        for n in DUPLICATED:
            characters = found[n - 2] if self.separate_words else joined_duplicates(page.words, n)
            share = characters / size
            yield Check(reason := f"duplicated_{n}_n_grams", share, above(share, getattr(self, reason)))


def _lines(page: Page) -> tuple[int, int, int]:
    """Parts between runs of newlines, an empty one before a first or behind a last newline included: (items, repeats, their characters)."""
    hashes, characters, flags, *_ = page.split_lines
    items, copies, repeated = line_repeats(hashes, characters, flags, EMPTY)
    ends = (page.text[0] == "\n") + (page.text[-1] == "\n")
    return items + ends, copies + (ends == 2), repeated


def joined_duplicates(words: list[str], n: int) -> int:
    """Characters in n-grams that occurred before, left to right, going on behind each one found, where an n-gram is its letters without separators."""
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

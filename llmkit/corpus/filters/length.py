"""Length limits in characters, words and lines; all are off by default.

    llmkit filter docs.jsonl --filter length --rule length.min_words=50 --rule length.max_characters=1000000

Words are those of --words, not counting marks; lines are those of `str.splitlines`. Reasons, in order:
too_short, too_long (characters), too_few_words, too_many_words, too_few_lines, too_many_lines. Cost: splitting
words and lines, which is shared with other filters.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from llmkit.corpus.filters import FILTERS, Check, above, below
from llmkit.corpus.kernels.characters import MARK
from llmkit.corpus.page import Page


@FILTERS.register("length")
@dataclass(frozen=True, slots=True)
class Length:
    """A document exactly at a limit is kept."""

    min_characters: int | None = None
    max_characters: int | None = None
    min_words: int | None = None
    max_words: int | None = None
    min_lines: int | None = None
    max_lines: int | None = None

    def __call__(self, page: Page) -> Iterator[Check]:
        size = len(page.text)
        yield Check("too_short", size, below(size, self.min_characters), "characters")
        yield Check("too_long", size, above(size, self.max_characters), "characters")
        words = int(np.count_nonzero(page.tokens.flags & MARK == 0))
        yield Check("too_few_words", words, below(words, self.min_words), "words")
        yield Check("too_many_words", words, above(words, self.max_words), "words")
        lines = page.line_counts[0]
        yield Check("too_few_lines", lines, below(lines, self.min_lines), "lines")
        yield Check("too_many_lines", lines, above(lines, self.max_lines), "lines")

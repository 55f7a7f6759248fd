"""FineWeb's own rules: pages of lists, menus and repeated lines.

Penedo et al. 2024 (arXiv:2406.17557), section 3.6. Reasons, in order: `empty`, then the names of the thresholds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from llmkit.corpus.filters import FILTERS, Check, Threshold, ThresholdFilter
from llmkit.corpus.kernels.lines import fineweb
from llmkit.corpus.kernels.tokens import has_words
from llmkit.corpus.page import Page


@FILTERS.register("fineweb")
@dataclass(frozen=True)
class FineWeb(ThresholdFilter):
    """Shares are of the non-blank lines."""

    THRESHOLDS = (
        Threshold("line_punct_ratio", "line_punct_ratio", upper=False),
        Threshold("short_line_ratio", "short_line_ratio"),
        Threshold("char_dup_ratio", "char_dup_ratio"),
        Threshold("list_ratio", "list_ratio"),
    )

    line_punct_ratio: float | None = 0.12  # smallest share of lines that end in a terminal mark
    short_line_ratio: float | None = 0.67  # largest share of lines of at most `short_line_length` characters
    short_line_length: int = 30
    char_dup_ratio: float | None = 0.01  # share of characters in lines that repeat an earlier one
    list_ratio: float | None = 0.3  # newlines per word

    def measure(self, page: Page) -> Sequence[float] | None:
        return self._measure(page, estimate=False)

    def first_failure(self, page: Page) -> Check | None:
        return self.failure_of(self._measure(page, estimate=True))

    def _measure(self, page: Page, estimate: bool) -> Sequence[float] | None:
        """The measured values.

        With `estimate`, list_ratio may be an upper bound that passes: counting all words is expensive, and nearly every
        document clearly has enough of them.
        """
        hashes, characters, flags, *_ = page.split_lines
        lines, terminated, short, repeated = fineweb(hashes, characters, flags, self.short_line_length)
        if lines == 0:
            return None
        newlines = len(flags) - 1
        words = ceil(newlines / self.list_ratio) if estimate and self.list_ratio else 0
        if not (words and page.splitter.compiled and has_words(page.data, words)):
            words = len(page.tokens.lengths)
        return terminated / lines, short / lines, repeated / (len(page.text) - newlines), newlines / max(1, words)

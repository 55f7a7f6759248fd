"""FineWeb's own rules: pages of lists, menus and repeated lines.

Penedo et al. 2024 (arXiv:2406.17557), section 3.6. Reasons, in order: `empty`, then the names of the thresholds.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmkit.corpus.filters import FILTERS, Drop, above, below, repeated
from llmkit.corpus.page import Page
from llmkit.corpus.words import TERMINALS


@FILTERS.register("fineweb")
@dataclass(frozen=True, slots=True)
class FineWeb:
    """Shares are of the lines that are not blank."""

    line_punct_ratio: float | None = 0.12  # fewer lines that end in a terminal mark are dropped
    short_line_ratio: float | None = 0.67  # more lines of at most `short_line_length` characters are dropped
    short_line_length: int = 30
    char_dup_ratio: float | None = 0.01  # of characters in lines that repeat an earlier one
    list_ratio: float | None = 0.3  # newlines a word

    def __call__(self, page: Page) -> Drop | None:
        text = page.text
        lines = [line for line in text.split("\n") if line.strip()]
        if not lines:
            return Drop("empty")
        if below(share := sum(line[-1] in TERMINALS for line in lines) / len(lines), self.line_punct_ratio):
            return Drop("line_punct_ratio", share)
        short = sum(len(line) <= self.short_line_length for line in lines)
        if above(share := short / len(lines), self.short_line_ratio):
            return Drop("short_line_ratio", share)
        newlines = text.count("\n")
        if above(share := repeated(lines)[1] / (len(text) - newlines), self.char_dup_ratio):
            return Drop("char_dup_ratio", share)
        if above(share := newlines / max(1, len(page.words)), self.list_ratio):
            return Drop("list_ratio", share)
        return None

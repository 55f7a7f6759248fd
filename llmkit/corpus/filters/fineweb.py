"""FineWeb's own rules: pages of lists, menus and repeated lines.

Penedo et al. 2024 (arXiv:2406.17557), section 3.6. Reasons, in order: `empty`, then the names of the thresholds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from llmkit.corpus.filters import FILTERS, Check, above, below
from llmkit.corpus.kernels.lines import fineweb
from llmkit.corpus.page import Page


@FILTERS.register("fineweb")
@dataclass(frozen=True, slots=True)
class FineWeb:
    """Shares are of the lines that are not blank."""

    line_punct_ratio: float | None = 0.12  # fewer lines that end in a terminal mark are dropped
    short_line_ratio: float | None = 0.67  # more lines of at most `short_line_length` characters are dropped
    short_line_length: int = 30
    char_dup_ratio: float | None = 0.01  # of characters in lines that repeat an earlier one
    list_ratio: float | None = 0.3  # newlines a word

    def __call__(self, page: Page) -> Iterator[Check]:
        hashes, characters, flags, *_ = page.split_lines
        total, terminated, short, repeated = fineweb(hashes, characters, flags, self.short_line_length)
        if total == 0:
            yield Check("empty")
            return
        share = terminated / total
        yield Check("line_punct_ratio", share, below(share, self.line_punct_ratio))
        share = short / total
        yield Check("short_line_ratio", share, above(share, self.short_line_ratio))
        newlines = len(flags) - 1
        share = repeated / (len(page.text) - newlines)
        yield Check("char_dup_ratio", share, above(share, self.char_dup_ratio))
        share = newlines / max(1, len(page.tokens.lengths))
        yield Check("list_ratio", share, above(share, self.list_ratio))

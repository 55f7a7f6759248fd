"""RefinedWeb's line-wise corrections: remove buttons, counters and headings in capitals.

Penedo et al. 2023 (arXiv:2306.01116), section 3.2 and appendix G.2. A line is removed if it is mainly capitals,
only numbers, a counter ("3 likes") or a single word. From a line of at most ten words, a phrase is cut at its
start (sign-in), at its end (read more...) or anywhere (items in cart), and the line is removed if nothing is
left. The document is dropped if the removed words are over 5 % of its words: `too_many_removed_words`, the only
reason. Otherwise its text is edited.

The paper gives one example of each phrase and no code. Choices made here: "mainly" means over half of the
non-space characters; numbers may have points, commas and signs between their digits; words are separated by
whitespace; case is ignored; the phrases and the counted units are those below, more than the paper's examples.
Blank lines are kept, and a text without whitespace between words (Chinese, Thai) needs `max_single_words =
off`. The phrases and units are English: set others for another language.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from llmkit.corpus.filters import FILTERS, Check, above
from llmkit.corpus.filters.regex import compiled, engine
from llmkit.corpus.kernels.characters import classes
from llmkit.corpus.kernels.line_shapes import DIGITS, REMOVED, SHORT, line_shapes
from llmkit.corpus.page import Page

UNITS = (
    "like likes share shares comment comments view views vote votes point points follower followers reply replies"
    " retweet retweets"
)


@FILTERS.register("refinedweb")
@dataclass(frozen=True, slots=True)
class RefinedWeb:
    """`counted`, `starts`, `ends` and `anywhere` are words and phrases; an empty list switches the rule off."""

    max_uppercase: float | None = 0.5  # share of capitals in the characters of a line
    drop_numbers: bool = True
    counted: tuple[str, ...] = tuple(UNITS.split())  # units of counters: "3 likes"
    max_single_words: int | None = 1  # lines of at most this many words are removed
    max_words_of_short_line: int = 10  # phrases are cut from lines of at most this many words
    starts: tuple[str, ...] = ("sign in", "sign-in", "sign up", "sign-up", "log in", "login")
    ends: tuple[str, ...] = ("read more", "read more...", "read more…", "continue reading", "show more", "see more")
    anywhere: tuple[str, ...] = ("items in cart", "item in cart", "items in your cart", "add to cart", "add to basket")
    max_removed_words: float | None = 0.05

    def __call__(self, page: Page) -> Iterator[Check]:
        uppercase, max_single = self.max_uppercase, self.max_single_words
        bits, words, union, total = line_shapes(
            page.data,
            classes(),
            -1.0 if uppercase is None else float(uppercase),
            -1 if max_single is None else int(max_single),
            self.max_words_of_short_line,
        )
        lines = page.text.split("\n")
        removed_lines: set[int] = set(np.flatnonzero(bits & REMOVED).tolist()) if union & REMOVED else set()
        if union & DIGITS:
            removed_lines.update(i for i in np.flatnonzero(bits & DIGITS).tolist() if self._is_counter(lines[i]))
        edited: dict[int, str] = {}
        phrases = (self.starts, self.ends, self.anywhere)
        if union & SHORT and _any_phrase(sum(phrases, ())).search(page.data.tobytes()):
            for i in set(np.flatnonzero(bits & SHORT).tolist()) - removed_lines:
                remaining, cuts = _cutter(*phrases).subn("", lines[i])
                if cuts:
                    edited[i] = remaining.strip()
        removed_words = sum(int(words[i]) for i in removed_lines) + sum(
            int(words[i]) - len(edited[i].split()) for i in edited
        )
        share = removed_words / max(1, total)
        yield Check("too_many_removed_words", share, above(share, self.max_removed_words), "removed_words")
        if removed_lines or edited:
            removed_lines.update(i for i, remaining in edited.items() if not remaining)
            page.edit("\n".join(edited.get(i, line) for i, line in enumerate(lines) if i not in removed_lines).strip())

    def _is_counter(self, line: str) -> bool:
        """Whether a line is only numbers, or a counter."""
        if self.drop_numbers and _NUMBERS.fullmatch(line.strip()):
            return True
        return bool(self.counted) and _counter(self.counted).fullmatch(" ".join(line.split())) is not None


_NUMBERS = re.compile(r"[#$€£+(\s-]*\d[\d\s.,:/%()+-]*")


@cache
def _counter(units: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(rf"\d[\d.,]* ?[km]? (?:{'|'.join(map(re.escape, units))})", re.IGNORECASE)


@cache
def _any_phrase(phrases: tuple[str, ...]) -> Any:
    """A pattern that finds in one pass whether any of the phrases is in a text."""
    escape = engine("refinedweb").escape
    return compiled("(?i)" + ("|".join(map(escape, filter(None, phrases))) or "[^\\s\\S]"), "refinedweb")


@cache
def _cutter(starts: tuple[str, ...], ends: tuple[str, ...], anywhere: tuple[str, ...]) -> re.Pattern[str]:
    """The pattern of what is cut from a short line: whole phrases, longest first, possibly preceded by a number."""

    def either(phrases: tuple[str, ...]) -> str:
        return "|".join(map(re.escape, sorted(filter(None, phrases), key=len, reverse=True))) or r"(?!)"

    parts = (
        rf"^\s*(?:{either(starts)})(?!\w)",
        rf"(?<!\w)(?:{either(ends)})[\s.…»›>]*$",
        rf"(?<!\w)(?:\d+ )?(?:{either(anywhere)})(?!\w)",
    )
    return re.compile("|".join(parts), re.IGNORECASE)

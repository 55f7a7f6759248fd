"""Evaluation items in training text: drop the documents that contain one, cut it out, or annotate it.

The method is described in corpus/decontaminate.py. The rule is `contaminated`; its value is the item as
`set:id` (the id, or the line in its file). The statistic `contaminated_share` is the share of the closest item
that the document contains, whether or not it reaches the threshold. Dropping is the default because the text
around an item is often its answer.

    llmkit filter docs.jsonl.zst --filter decontaminate \\
        --rule decontaminate.files=gsm8k.jsonl.zst --rule decontaminate.files=mmlu.jsonl.zst
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llmkit.corpus.filters import FILTERS, Check, below
from llmkit.corpus.page import Page
from llmkit.errors import UsageError

if TYPE_CHECKING:
    from llmkit.corpus.decontaminate import Match

ACTIONS = ("drop", "cut", "annotate")


@FILTERS.register("decontaminate")
@dataclass(frozen=True, slots=True)
class Decontaminate:
    """`files`: JSONL of evaluation items; `fields`: the fields of an item to look for (none: every string in it).

    The action `cut` removes the items from the text, and drops the document if fewer than `min_words_left`
    words remain; `annotate` keeps documents and adds `contamination`: [{"set", "item", "share"}]. Raises
    UsageError for invalid settings.
    """

    files: tuple[str, ...] = field(default=(), metadata={"file": True})
    fields: tuple[str, ...] = ()
    n: int = 5  # words per n-gram
    min_words: int = 8  # shorter texts of items are not searched for
    min_share: float | None = 0.4  # of an item's text, by weight
    action: str = "drop"
    min_words_left: int | None = 50

    def __post_init__(self) -> None:
        if self.action not in ACTIONS:
            raise UsageError(f"decontaminate.action: {self.action!r}", "one of: " + ", ".join(ACTIONS))
        if self.min_share is not None and not 0 < self.min_share <= 1:
            raise UsageError(f"decontaminate.min_share: {self.min_share} is not a share", "above 0, at most 1")
        if not 1 <= self.n <= self.min_words:
            raise UsageError(
                f"decontaminate.n: {self.n} and min_words: {self.min_words}", "n is at least 1 and at most min_words"
            )

    def __call__(self, page: Page) -> Iterator[Check]:
        from llmkit.corpus.decontaminate import load_index
        from llmkit.corpus.kernels.item_ngrams import as_bytes, words_of

        if not self.files:
            raise UsageError(
                "decontaminate.files names no evaluation items", "name each JSONL file with a --rule of its own"
            )
        result = load_index(self.files, self.fields, self.n, self.min_words).find(page.text, self.min_share)
        yield Check("contaminated", round(result.share, 4), False, "contaminated_share")
        items = closest_first(result.matches)
        broken = bool(items) and self.action == "drop"
        if items and self.action == "annotate":
            page.note(contamination=[{"set": m.set, "item": m.item, "share": round(m.share, 4)} for m in items])
        elif items and self.action == "cut":
            remaining = without(page.text, result.matches)
            broken = below(len(words_of(as_bytes(remaining))[0]), self.min_words_left)
            if not broken:
                page.edit(remaining)
        yield Check("contaminated", f"{items[0].set}:{items[0].item}" if items else None, broken)


def closest_first(matches: Iterable[Match]) -> list[Match]:
    """One match per item, the one with the highest share; of equal ones the first in the text."""
    best: dict[tuple[str, str], Match] = {}
    for match in sorted(matches, key=lambda match: -match.share):
        best.setdefault((match.set, match.item), match)
    return list(best.values())


def without(text: str, matches: Iterable[Match]) -> str:
    """The text without the matches (in order of their start), each removed with the marks that directly follow it."""
    kept = []
    end = 0
    for match in matches:
        if match.start > end:
            kept.append(text[end : match.start])
        end = max(end, match.end)
        while end < len(text) and not (text[end].isalnum() or text[end].isspace()):
            end += 1
    return "".join([*kept, text[end:]])

"""Evaluation items in training text: drop the documents that hold one, cut it out, or name it. The method is in corpus/decontaminate.py.

Rule `contaminated`; its value is the item, `set:id` (the id, else the line in its file), the statistic `contaminated_share` how much of the
nearest item the document holds, whether that is enough or not. Dropping is the default: what stands around an item is often its answer.

    llmkit filter --filter decontaminate --rule decontaminate.files=gsm8k.jsonl.zst --rule decontaminate.files=mmlu.jsonl.zst docs.jsonl.zst
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
    """`files`: JSONL of evaluation items; `fields`: those to look for (none: every string). UsageError where a setting makes no sense.

    cut: the items go from the text, and the document if fewer than `min_words_left` words are left. annotate: documents stay, with
    `contamination`: [{"set", "item", "share"}].
    """

    files: tuple[str, ...] = field(default=(), metadata={"file": True})
    fields: tuple[str, ...] = ()
    n: int = 5  # words of an n-gram
    min_words: int = 8  # shorter texts of items are not looked for
    min_share: float | None = 0.4  # of an item's text, by weight
    action: str = "drop"
    min_words_left: int | None = 50

    def __post_init__(self) -> None:
        if self.action not in ACTIONS:
            raise UsageError(f"decontaminate.action: {self.action!r}", "one of: " + ", ".join(ACTIONS))
        if self.min_share is not None and not 0 < self.min_share <= 1:
            raise UsageError(f"decontaminate.min_share: {self.min_share} is no share", "above 0, at most 1")
        if not 1 <= self.n <= self.min_words:
            raise UsageError(
                f"decontaminate.n: {self.n} and min_words: {self.min_words}", "n is at least 1, and at most min_words"
            )

    def __call__(self, page: Page) -> Iterator[Check]:
        from llmkit.corpus.decontaminate import as_bytes, load_index, words_of

        if not self.files:
            raise UsageError(
                "decontaminate.files names no evaluation items", "give each JSONL file with a rule of its own"
            )
        found = load_index(self.files, self.fields, self.n, self.min_words).find(page.text, self.min_share)
        yield Check("contaminated", round(found.share, 4), False, "contaminated_share")
        items = nearest_first(found.matches)
        broken = bool(items) and self.action == "drop"
        if items and self.action == "annotate":
            page.note(contamination=[{"set": m.set, "item": m.item, "share": round(m.share, 4)} for m in items])
        elif items and self.action == "cut":
            rest = without(page.text, found.matches)
            broken = below(len(words_of(as_bytes(rest))[0]), self.min_words_left)
            if not broken:
                page.edit(rest)
        yield Check("contaminated", f"{items[0].set}:{items[0].item}" if items else None, broken)


def nearest_first(matches: Iterable[Match]) -> list[Match]:
    """One match an item, that of the highest share; of equal ones the first in the text."""
    best: dict[tuple[str, str], Match] = {}
    for match in sorted(matches, key=lambda match: -match.share):
        best.setdefault((match.set, match.item), match)
    return list(best.values())


def without(text: str, matches: Iterable[Match]) -> str:
    """The text without the matches (in order of their start), each with the marks right behind it."""
    kept = []
    end = 0
    for match in matches:
        if match.start > end:
            kept.append(text[end : match.start])
        end = max(end, match.end)
        while end < len(text) and not (text[end].isalnum() or text[end].isspace()):
            end += 1
    return "".join([*kept, text[end:]])

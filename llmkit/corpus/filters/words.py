"""Bad words: drop documents that use words or phrases from the user's lists too often. No list is shipped.

    llmkit filter docs.jsonl --filter bad_words --rule bad_words.words=en.txt --rule bad_words.max_count=2

A list has one word or phrase per line; case is ignored. Entries match whole words only ("ass" is not in
"class", but it is in "ass's" and "ass-like"); punctuation must match exactly, and any whitespace matches any
other. Entries in scripts without spaces between words (Chinese, Japanese, Thai, Lao, Khmer, Burmese, Tibetan)
match anywhere. For other languages supply another file. A word is a run of letters and digits, regardless of
--words.

C4 drops a document with a single such word (`max_count = 0`, Raffel et al. 2020), which also removes much
medical text and writing by minorities (Dodge et al. 2021, arXiv:2104.08758). The count is therefore a
statistic, from which another limit can be chosen.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmkit.corpus.filters import FILTERS, Check, above
from llmkit.corpus.filters.kernels.phrases import MASK, count_phrases, letter_runs
from llmkit.corpus.kernels.characters import classes
from llmkit.corpus.lists import entries
from llmkit.corpus.page import Page
from llmkit.errors import UsageError

UNSPACED = re.compile(
    "[\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)


@FILTERS.register("bad_words")
@dataclass(frozen=True, slots=True)
class BadWords:
    """Reason `bad_words`; its value is the number of occurrences of entries of the lists."""

    words: tuple[str, ...] = field(default=(), metadata={"file": True})
    max_count: int | None = 0

    def __call__(self, page: Page) -> Iterator[Check]:
        if not self.words:
            raise UsageError("bad_words.words names no list", "name a file with one word or phrase per line")
        phrases, anywhere = _load(self.words)
        lowered = page.text.lower()
        count = 0
        if len(phrases.starts):
            count += count_phrases(_hashes(lowered), *phrases)
        if anywhere and not lowered.isascii():
            count += sum(1 for _ in anywhere.finditer(lowered))
        yield Check("bad_words", count, above(count, self.max_count))


class Phrases(NamedTuple):
    """Phrases as hashes of their words, sorted by the first word. Phrase i is flat[starts[i] : ends[i]];
    `likely` marks the low bits of the first words."""

    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    flat: NDArray[np.uint64]
    likely: NDArray[np.bool_]


@cache
def _load(files: tuple[str, ...]) -> tuple[Phrases, re.Pattern[str] | None]:
    """The entries in scripts with spaces between words, and one pattern for all others."""
    items = sorted({entry.lower() for _, entry in entries(files)})
    unspaced = sorted((item for item in items if UNSPACED.search(item)), key=len, reverse=True)
    hashed = sorted((_hashes(item) for item in items if not UNSPACED.search(item)), key=lambda hashes: hashes.tolist())
    ends = np.cumsum([len(hashes) for hashes in hashed], dtype=np.int64)
    starts = np.concatenate([np.zeros(1, np.int64), ends])[: len(hashed)]
    flat = np.concatenate([*hashed, np.zeros(0, np.uint64)]).astype(np.uint64)
    likely = np.zeros(int(MASK) + 1, np.bool_)
    likely[flat[starts] & MASK] = True
    return Phrases(starts, ends, flat, likely), re.compile("|".join(map(re.escape, unspaced))) if unspaced else None


def _hashes(text: str) -> NDArray[np.uint64]:
    hashes: NDArray[np.uint64] = letter_runs(np.frombuffer(text.encode(), np.uint8), classes())
    return hashes

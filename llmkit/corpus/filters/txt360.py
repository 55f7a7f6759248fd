"""TxT360's rules for lines and documents, as far as no other filter has them: the preset `txt360` adds Gopher's.

TxT360 (LLM360 2024, https://huggingface.co/spaces/LLM360/TxT360, "Web Data Processing"). A line goes if it names JavaScript together with one of five words
that make it a notice ("enable", ...), is all capitals, all digits, matches "<number> likes" or is a single word. Lines without an end mark stay: that rule of
C4 took whole documents along. Then, in order: the words of those lines, notices apart, are over 5 % of the document (`too_many_removed_words`), fewer than 3
sentences are left (`too_few_sentences`), "lorem ipsum" stands in it (`lorem_ipsum`). The text is edited.

TxT360 looked at curly brackets and left them alone; `max_curly_brackets` sets a limit to their share of the characters, as RedPajama-V2 measures it
(`curly_brackets`). Its rule for toxic words needs a list: that is the filter `bad_words`.

Chosen here where the page is silent: words are what whitespace separates, sentences those of --words (TxT360: NLTK's), blank lines stay. The words and the
unit are English: give others for another language; for one without spaces between words set `max_single_words = off`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from llmkit.corpus.filters import FILTERS, Check, above, below
from llmkit.corpus.filters.kernels.c4 import SHORT_FORMS, sentences
from llmkit.corpus.kernels.characters import classes
from llmkit.corpus.page import Page

COUNTER = re.compile(r"\d+\s+(\w+)")


@FILTERS.register("txt360")
@dataclass(frozen=True, slots=True)
class TxT360:
    """An empty list of words switches its rule off."""

    javascript_words: tuple[str, ...] = ("enable", "disable", "require", "activate", "browser")  # with "javascript"
    drop_uppercase: bool = True
    drop_numbers: bool = True
    counted: tuple[str, ...] = ("likes",)
    max_single_words: int | None = 1  # lines of so many words go
    max_removed_words: float | None = 0.05
    min_sentences: int | None = 3
    drop_lorem_ipsum: bool = True
    max_curly_brackets: float | None = None  # in the characters

    def __call__(self, page: Page) -> Iterator[Check]:
        lowered = page.text.lower()
        notices = bool(self.javascript_words) and "javascript" in lowered
        kept: list[str] = []
        total = removed = 0
        lines = page.text.split("\n")
        for line in lines:
            words = len(line.split())
            total += words
            if notices and self._notice(line.lower()):
                continue
            if words and self._goes(line.strip(), words):
                removed += words
            else:
                kept.append(line)
        text = "\n".join(kept).strip()
        share = removed / max(1, total)
        yield Check("too_many_removed_words", share, above(share, self.max_removed_words), "removed_words")
        number = _sentences(page, text)
        yield Check("too_few_sentences", number, below(number, self.min_sentences), "sentences")
        found = lowered.count("lorem ipsum")
        yield Check("lorem_ipsum", found, self.drop_lorem_ipsum and found > 0)
        share = (text.count("{") + text.count("}")) / max(1, len(text))
        yield Check("curly_brackets", share, above(share, self.max_curly_brackets))
        if len(kept) < len(lines):
            page.edit(text)

    def _notice(self, line: str) -> bool:
        return "javascript" in line and any(word.lower() in line for word in self.javascript_words)

    def _goes(self, line: str, words: int) -> bool:
        if self.max_single_words is not None and words <= self.max_single_words:
            return True
        if self.drop_uppercase and line.isupper():
            return True
        if self.drop_numbers and line[0].isdigit() and "".join(line.split()).isdigit():
            return True
        return (
            words == 2
            and line[0].isdigit()
            and (found := COUNTER.fullmatch(line.lower())) is not None
            and found[1] in self.counted
        )


def _sentences(page: Page, text: str) -> int:
    """Sentences of the lines that are not blank."""
    lines = [line for line in map(str.strip, text.split("\n")) if line]
    if page.splitter.compiled:
        data = np.frombuffer(("\n".join(lines) + "\n").encode(), np.uint8) if lines else np.zeros(0, np.uint8)
        return int(sentences(data, classes(), SHORT_FORMS))
    return sum(map(page.splitter.sentences, lines))

"""TxT360's rules for lines and documents that no other filter has; the preset `txt360` adds Gopher's.

TxT360 (LLM360 2024, https://huggingface.co/spaces/LLM360/TxT360, "Web Data Processing"). A line is removed if
it mentions JavaScript together with one of five words that make it a notice ("enable", ...), is all capitals,
is all digits, matches "<number> likes", or is a single word. Lines without an end mark are kept, because that
rule of C4 removed whole documents. The document is then dropped, in this order, if the words of the removed
lines, not counting notices, are over 5 % of its words (`too_many_removed_words`), if fewer than 3 sentences are
left (`too_few_sentences`), or if it contains "lorem ipsum" (`lorem_ipsum`). Otherwise its text is edited.

TxT360 examined curly brackets and decided against a rule; `max_curly_brackets` limits their share of the characters, as
RedPajama-V2 measures it (`curly_brackets`). TxT360's rule for toxic words needs a list: use the filter `bad_words`.

Choices made here where the page is silent: words are separated by whitespace, sentences are those of --words
(TxT360 uses NLTK's), and blank lines are kept. The words and the unit are English: set others for another
language. For a language without spaces between words set `max_single_words = off`.
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
    """An empty list of words switches the rule off."""

    javascript_words: tuple[str, ...] = ("enable", "disable", "require", "activate", "browser")  # with "javascript"
    drop_uppercase: bool = True
    drop_numbers: bool = True
    counted: tuple[str, ...] = ("likes",)
    max_single_words: int | None = 1  # lines of at most this many words are removed
    max_removed_words: float | None = 0.05
    min_sentences: int | None = 3
    drop_lorem_ipsum: bool = True
    max_curly_brackets: float | None = None  # share of the characters

    def __call__(self, page: Page) -> Iterator[Check]:
        lowered = page.text.lower()
        notices = bool(self.javascript_words) and "javascript" in lowered
        kept: list[str] = []
        total_words = removed_words = 0
        lines = page.text.split("\n")
        for line in lines:
            words = len(line.split())
            total_words += words
            if notices and self._is_notice(line.lower()):
                continue
            if words and self._is_boilerplate(line.strip(), words):
                removed_words += words
            else:
                kept.append(line)
        text = "\n".join(kept).strip()
        share = removed_words / max(1, total_words)
        yield Check("too_many_removed_words", share, above(share, self.max_removed_words), "removed_words")
        sentence_count = _sentences(page, text)
        yield Check("too_few_sentences", sentence_count, below(sentence_count, self.min_sentences), "sentences")
        count = lowered.count("lorem ipsum")
        yield Check("lorem_ipsum", count, self.drop_lorem_ipsum and count > 0)
        share = (text.count("{") + text.count("}")) / max(1, len(text))
        yield Check("curly_brackets", share, above(share, self.max_curly_brackets))
        if len(kept) < len(lines):
            page.edit(text)

    def _is_notice(self, line: str) -> bool:
        return "javascript" in line and any(word.lower() in line for word in self.javascript_words)

    def _is_boilerplate(self, line: str, words: int) -> bool:
        if self.max_single_words is not None and words <= self.max_single_words:
            return True
        if self.drop_uppercase and line.isupper():
            return True
        if self.drop_numbers and line[0].isdigit() and "".join(line.split()).isdigit():
            return True
        return (
            words == 2
            and line[0].isdigit()
            and (match := COUNTER.fullmatch(line.lower())) is not None
            and match[1] in self.counted
        )


def _sentences(page: Page, text: str) -> int:
    """Number of sentences in the non-blank lines."""
    lines = [line for line in map(str.strip, text.split("\n")) if line]
    if page.splitter.compiled:
        data = np.frombuffer(("\n".join(lines) + "\n").encode(), np.uint8) if lines else np.zeros(0, np.uint8)
        return int(sentences(data, classes(), SHORT_FORMS))
    return sum(map(page.splitter.sentences, lines))

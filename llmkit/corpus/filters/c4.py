"""C4 rules: keep the lines that read as sentences, drop documents that are code, filler or too little. The one family that edits the text.

Raffel et al. 2020 (JMLR 21/140) and its published code, in the reading that FineWeb uses. Each line is stripped; in order: a word over
`max_word_length` drops the line; citation marks (`[12]`, `[edit]`, `[citation needed]`) are deleted; then end punctuation, number of words,
"lorem ipsum" (drops the document), "javascript", "{" (drops the document), cookie and policy notices. Fewer than `min_num_sentences` in
the kept lines drop the document: `too_few_sentences`. Other reasons: `lorem_ipsum`, `curly_bracket`.

Two points of that reading may surprise and are kept so that results can be compared: "{" and "lorem ipsum" are looked for only in lines
that passed the rules before (a line that is just "{" is dropped as too short and its document lives on), and ' is an end mark.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from llmkit.corpus.filters import FILTERS, Drop, above, below
from llmkit.corpus.page import Page

CITATION = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]")
END_MARKS = (".", "?", "!", '"', "'")
POLICY = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")


@FILTERS.register("c4")
@dataclass(frozen=True, slots=True)
class C4:
    """Switches and limits for lines; `min_num_sentences` and the two content switches decide about the document."""

    max_word_length: int | None = 1000  # characters; words here are always what whitespace separates
    remove_citations: bool = True
    require_end_mark: bool = True  # off in FineWeb
    min_words_per_line: int | None = 3
    drop_lorem_ipsum: bool = True
    drop_javascript_lines: bool = True
    drop_curly_bracket: bool = True
    drop_policy_lines: bool = True
    min_num_sentences: int | None = 5

    def __call__(self, page: Page) -> Drop | None:
        sentences = 0
        kept: list[str] = []
        for number, line in enumerate(page.lines, 1):
            line = line.strip()
            words = line.split()
            if above(max(map(len, words), default=0), self.max_word_length):
                continue
            if self.remove_citations and "[" in line:
                line = CITATION.sub("", line)
            if self.require_end_mark and (not line.endswith(END_MARKS) or line.endswith("...")):
                continue
            if below(len(words), self.min_words_per_line):
                continue
            lowered = line.lower()
            if self.drop_lorem_ipsum and "lorem ipsum" in lowered:
                return Drop("lorem_ipsum", number)
            if self.drop_javascript_lines and "javascript" in lowered:
                continue
            if self.drop_curly_bracket and "{" in line:
                return Drop("curly_bracket", number)
            if self.drop_policy_lines and any(notice in lowered for notice in POLICY):
                continue
            if self.min_num_sentences is not None:
                sentences += page.sentences(line)
            kept.append(line)
        if below(sentences, self.min_num_sentences):
            return Drop("too_few_sentences", sentences)
        page.edit("\n".join(kept).strip())
        return None

"""C4 rules: keep the lines that read as sentences; drop documents that are code, filler or too short. Edits the text.

Raffel et al. 2020 (JMLR 21/140) and its published code, as FineWeb interprets it. A document with "{" or "lorem
ipsum" is dropped (`curly_bracket`, `lorem_ipsum`). Each line is stripped and then checked, in this order: a
word longer than `max_word_length` drops the line; citation marks (`[12]`, `[edit]`, `[citation needed]`) are
deleted; then end punctuation (an apostrophe counts as an end mark), number of words, "javascript", cookie and
policy notices. A document with fewer than `min_num_sentences` sentences in the kept lines is dropped:
`too_few_sentences`.

Datatrove looks for "{" and "lorem ipsum" only in lines that passed the earlier rules, so that a document with a
line that is just "{" is kept; `whole_page = false` does the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from llmkit.corpus.filters import FILTERS, Check, below
from llmkit.corpus.filters.kernels.c4 import (
    CITATIONS,
    CURLY,
    JAVASCRIPT,
    LOREM,
    POLICY,
    SHORT_FORMS,
    SIGN_PATTERNS,
    SIGN_PLACES,
    SIGNS,
    count_signs,
    edit,
    packed,
    sentences,
)
from llmkit.corpus.kernels.characters import classes
from llmkit.corpus.page import Page
from llmkit.kernels.utf8 import Bytes

NOTICES = {  # notice: (the rule that it breaks, the sign without which it cannot occur)
    "lorem ipsum": (LOREM, "lorem ipsum"),
    "javascript": (JAVASCRIPT, "javascript"),
    "terms of use": (POLICY, "terms of use"),
    "privacy policy": (POLICY, "privacy policy"),
} | dict.fromkeys(("cookie policy", "uses cookies", "use of cookies", "use cookies"), (POLICY, "cookie"))


@cache
def _patterns(rules: int, present: tuple[bool, ...]) -> Bytes:
    """The notices of these rules whose sign occurs in the text."""
    signs = dict(zip(SIGNS, present, strict=True))
    return packed({notice: rule for notice, (rule, sign) in NOTICES.items() if rule & rules and signs[sign]})


@FILTERS.register("c4")
@dataclass(frozen=True, slots=True)
class C4:
    """Switches and limits for lines; `min_num_sentences`, "lorem ipsum" and "{" apply to the whole document."""

    max_word_length: int | None = 1000  # characters; words are always separated by whitespace here
    remove_citations: bool = True
    require_end_mark: bool = True  # off in FineWeb
    min_words_per_line: int | None = 3
    drop_lorem_ipsum: bool = True
    drop_javascript_lines: bool = True
    drop_curly_bracket: bool = True
    drop_policy_lines: bool = True
    min_num_sentences: int | None = 5
    whole_page: bool = True  # "{" and "lorem ipsum" count anywhere in the document

    def __call__(self, page: Page) -> Iterator[Check]:
        signs = count_signs(page.data, SIGN_PATTERNS, SIGN_PLACES).tolist()
        lorem_in_lines = self.drop_lorem_ipsum and not self.whole_page
        if self.whole_page:
            for reason, count, enabled in (
                ("lorem_ipsum", signs[0], self.drop_lorem_ipsum),
                ("curly_bracket", page.encoded.count(b"{"), self.drop_curly_bracket),
            ):
                yield Check(reason, count, enabled and count > 0)
        rules = lorem_in_lines * LOREM | self.drop_javascript_lines * JAVASCRIPT | self.drop_policy_lines * POLICY
        kept, drop_reason, line = edit(
            page.data,
            classes(),
            -1 if self.max_word_length is None else self.max_word_length,
            self.remove_citations,
            self.require_end_mark,
            -1 if self.min_words_per_line is None else self.min_words_per_line,
            self.drop_curly_bracket and not self.whole_page,
            _patterns(rules, tuple(map(bool, signs))),
            CITATIONS,
        )
        if drop_reason:
            yield Check("curly_bracket" if drop_reason == CURLY else "lorem_ipsum", line)
            return
        if page.splitter.compiled:
            number = sentences(kept, classes(), SHORT_FORMS)
        else:
            number = sum(map(page.splitter.sentences, kept.tobytes().decode().split("\n")[:-1]))
        yield Check("too_few_sentences", number, below(number, self.min_num_sentences), "sentences")
        encoded = kept.tobytes()[:-1]
        text = page.text if encoded == page.encoded else encoded.decode()
        stripped = text.strip()
        page.edit(stripped, encoded if len(stripped) == len(text) else None)

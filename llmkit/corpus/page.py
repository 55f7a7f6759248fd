"""One document's text as rules see it: split into words and lines once, shared by all of them."""

from __future__ import annotations

from functools import cached_property

from llmkit.corpus.words import Splitter


class Page:
    """A text with what rules measure, computed on first use. A rule that rewrites the text calls `edit`, and the rest is measured anew."""

    def __init__(self, text: str, splitter: Splitter) -> None:
        self.text = text
        self.splitter = splitter

    @cached_property
    def words(self) -> list[str]:
        """Words in order, never empty ones."""
        return self.splitter.words(self.text)

    @cached_property
    def lines(self) -> list[str]:
        """Lines as `str.splitlines` sees them, blank ones included."""
        return self.text.splitlines()

    def sentences(self, line: str) -> int:
        """Number of sentences in one stripped line of the text."""
        return self.splitter.sentences(line)

    def edit(self, text: str) -> None:
        """Replace the text; later rules see the new one."""
        if text != self.text:
            self.text = text
            for name in ("words", "lines"):
                self.__dict__.pop(name, None)

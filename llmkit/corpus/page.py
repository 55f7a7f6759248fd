"""One document as filters see it: its text is split into words and lines once, and all rules share the result."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np

from llmkit.corpus.kernels.characters import classes
from llmkit.corpus.kernels.lines import Lines, lines
from llmkit.corpus.kernels.tokens import Tokens, scan, tokens_of
from llmkit.corpus.words import Splitter
from llmkit.kernels.utf8 import Bytes


class Page:
    """A text with the properties that rules measure, computed on first use.

    `fields` are the JSON fields of the document and must not be changed. `edit` and `note` change the document
    that is written; `notes` are the fields set by `note`.
    """

    def __init__(self, text: str, splitter: Splitter, fields: Mapping[str, Any] | None = None) -> None:
        self.text = text
        self.splitter = splitter
        self.fields = fields or {}
        self.notes: dict[str, Any] = {}

    def edit(self, text: str, encoded: bytes | None = None) -> None:
        """Replace the text, which later rules then measure. `encoded`: the same text in UTF-8, if already available."""
        if text != self.text:
            for name in TEXT_PROPERTIES:
                self.__dict__.pop(name, None)
            self.text = text
            if encoded is not None:
                self.__dict__["encoded"] = encoded

    def note(self, **fields: Any) -> None:
        """Set fields of the document, if it is kept."""
        self.notes.update(fields)

    @cached_property
    def words(self) -> list[str]:
        """Words in order, none of them empty."""
        return self.splitter.words(self.text)

    @cached_property
    def lines(self) -> list[str]:
        """Lines as returned by `str.splitlines`, blank lines included."""
        return self.text.splitlines()

    @cached_property
    def encoded(self) -> bytes:
        """The text in UTF-8."""
        return self.text.encode()

    @cached_property
    def data(self) -> Bytes:
        """The text in UTF-8 as uint8[bytes], for kernels."""
        return np.frombuffer(self.encoded, np.uint8)

    @cached_property
    def tokens(self) -> Tokens:
        """The words as hashes, lengths and flags."""
        if self.splitter.compiled:
            return Tokens(*scan(self.data, classes(), self.splitter.compiled == "whitespace"))
        return tokens_of(self.words)

    @cached_property
    def split_lines(self) -> Lines:
        """The parts between newlines, text.split("\\n"), as hashes, lengths and flags."""
        return Lines(*lines(self.data, classes(), False))

    @property
    def line_counts(self) -> tuple[int, int, int]:
        """Number of lines in text.splitlines(), of lines that start with a bullet, and that end with an ellipsis."""
        split = self.split_lines
        if split.rare_breaks:  # a carriage return or another of the rarer line breaks
            split = Lines(*lines(self.data, classes(), True))
            return len(split.flags), split.bullets, split.ellipses
        return len(split.flags) - (not self.text or self.text[-1] == "\n"), split.bullets, split.ellipses


TEXT_PROPERTIES = tuple(name for name, value in vars(Page).items() if isinstance(value, cached_property))

"""Texts that count as the same: named normalisations before texts are compared.

| name | what becomes equal |
|---|---|
| none | nothing: byte for byte |
| whitespace | texts that differ in whitespace only |
| loose | also in case, numbers, punctuation and diacritics: what datatrove's MinHash compares, and ours |

`loose`, in this order: lower case; each number (a run of decimal digits of any script, with at most one decimal part) becomes `0`; each of the
129 marks in `words.PUNCTUATION` a space; canonical decomposition without combining marks; runs of whitespace one space, none at the
ends. Cost: linear.
"""

from __future__ import annotations

import re
import unicodedata

from llmkit.corpus.words import PUNCTUATION
from llmkit.registry import Registry

NORMALISERS = Registry("normalisation")

_NUMBER = re.compile(r"\d+(?:[.,\u060c\u066b\u2396\u2397\u2398]\d+)?")
_PUNCTUATION_TO_SPACE = str.maketrans(dict.fromkeys(PUNCTUATION, " "))


class _WithoutMarks(dict[int, int | None]):
    """Table for `str.translate` that drops nonspacing marks, filled as characters are met."""

    def __missing__(self, code: int) -> int | None:
        self[code] = None if unicodedata.category(chr(code)) == "Mn" else code
        return self[code]


_WITHOUT_MARKS = _WithoutMarks()


@NORMALISERS.register("none")
def unchanged(text: str) -> str:
    """The text itself."""
    return text


@NORMALISERS.register("whitespace")
def single_spaces(text: str) -> str:
    """Runs of whitespace as one space, none at the ends."""
    return " ".join(text.split())


@NORMALISERS.register("loose")
def loose(text: str) -> str:
    """Words in lower case between single spaces: no case, numbers, punctuation, diacritics. "" for a text without words."""
    text = _NUMBER.sub("0", text.lower()).translate(_PUNCTUATION_TO_SPACE)
    if not text.isascii():
        text = unicodedata.normalize("NFD", text).translate(_WITHOUT_MARKS)
    return " ".join(text.split())

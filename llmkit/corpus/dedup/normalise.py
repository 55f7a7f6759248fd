"""Named normalisations of texts before they are compared.

| name | makes equal |
|---|---|
| none | nothing: texts are compared byte for byte |
| whitespace | texts that differ only in whitespace |
| loose | also texts that differ in case, numbers, punctuation or diacritics, as in datatrove's MinHash; used by ours |

`loose` applies, in this order: lower case; each number (a run of decimal digits of any script, with at most one decimal
part) becomes `0`; each of the 129 marks in `words.PUNCTUATION` becomes a space; canonical decomposition without
combining marks; runs of whitespace become one space, none at the ends. Cost: linear.
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
    """Table for `str.translate` that drops nonspacing marks; entries are added when a character first occurs."""

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
    """The text with runs of whitespace as one space, and none at the ends."""
    return " ".join(text.split())


@NORMALISERS.register("loose")
def loose(text: str) -> str:
    """Lower-case words between single spaces, without punctuation, diacritics and digits other than 0; may be empty."""
    text = _NUMBER.sub("0", text.lower()).translate(_PUNCTUATION_TO_SPACE)
    if not text.isascii():
        text = unicodedata.normalize("NFD", text).translate(_WITHOUT_MARKS)
    return " ".join(text.split())

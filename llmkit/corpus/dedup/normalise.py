"""What does not count when texts are compared: the parts of a normalisation, as `--normalise` names them.

| part | makes equal | in datatrove's TextNormConfig |
|---|---|---|
| case | upper and lower case | lowercase |
| accents | Latin, Greek and Cyrillic letters with and without diacritics | norm_unicode_diacritics |
| whitespace | any run of whitespace and one space; whitespace at the ends | norm_whitespace |
| punctuation | the marks of prose (`, . ; : ! ? ' "`, brackets, `_ # $ @ \\`) and a space | remove_punctuation |
| operators | the marks of formulas and code (`+ - * / % = < > & | ^ ~`) and a space | remove_punctuation |
| numbers | all numbers | norm_numbers |

A normalisation is a list of parts (`case,whitespace`), `none`, or `loose`, which is all of them and equal to
datatrove's default. The parts are applied in this order: lower case; each number (a run of decimal digits of any
script, with at most one decimal part) becomes `0`; each mark, of the 129 in `words.PUNCTUATION`, becomes a space;
canonical decomposition without accents; whitespace. Two things are not lost:

- A number that counts keeps the marks that decide its value, although other marks of prose do not count: between digits
  (`1,234.567`, `10:30`, `1'000`), before them (`.5`, `$5`, `–5`) and after them (`5'`, `5"`, `5$`). Marks that only
  enclose or end it do not count: `(5)`, `5.`, `5!`.
- Combining marks of other scripts are letters: vowel signs, voicing marks (`が`), tone marks, vowel points; so is a bar
  over a digit, and the stroke of a mathematical symbol (`≠`). `loose` drops them, as datatrove does.

`comparable` is the form from which MinHash takes its shingles: marks that count precede the next word, without spaces,
so that `a+b` and `a + b` are equal, and a text has as many words as without its marks.

Cost: linear; compiled in kernels/normalise.py.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from functools import cache, partial
from itertools import dropwhile

from llmkit.corpus.words import ACCENTED, MAX_LEADING, PUNCTUATION
from llmkit.errors import UsageError, unknown_name

PARTS = ("case", "accents", "whitespace", "punctuation", "operators", "numbers")
NONE, LOOSE = "none", "loose"
DEFAULT = "case,accents,whitespace,punctuation"  # of MinHash: numbers and operators count

OPERATORS = frozenset(c for c in PUNCTUATION if c in "-*/%&^％" or unicodedata.category(c) == "Sm")
PROSE = frozenset(c for c in PUNCTUATION - OPERATORS if not c.isspace() and not c.isdecimal())

# Marks of prose that are part of a number: before digits, after them (one), and between them, with the others.
LEADING, TRAILING = ".,$–—．，", "'’´\"”$"
WITHIN = LEADING + TRAILING + ":：_"
_DIGITS = rf"\d+(?:[{WITHIN}]\d+)*[{TRAILING}]?"
_WHOLE_NUMBER = rf"[{LEADING}]{{0,{MAX_LEADING}}}{_DIGITS}"
_NUMBER = r"\d+(?:[.,\u060c\u066b\u2396\u2397\u2398]\d+)?"
_numbers = re.compile(_NUMBER)
_accented = "".join(f"{chr(start)}-{chr(stop - 1)}" for start, stop in ACCENTED)
_after_letter = re.compile(rf"(?<=[{_accented}])[^\w\s\x00-\u02ff]+")
# Where mathematical symbols are; looking at every character would take 0.2 s.
_WITH_SYMBOLS = ((0, 0x3000), (0xFB29, 0xFB2A), (0xFE62, 0xFFED), (0x1D6C1, 0x1D7C4), (0x1EEF0, 0x1EEF2))


@cache
def parts_of(how: str) -> frozenset[str]:
    """The parts of a normalisation. UsageError for an unknown name."""
    if how in (NONE, LOOSE):
        return frozenset(PARTS if how == LOOSE else ())
    names = [name.strip() for name in how.split(",")]
    for name in names:
        if name in (NONE, LOOSE):
            raise UsageError(
                f"--normalise {how}: {name} stands alone", "use it alone, or list parts: " + ", ".join(PARTS)
            )
        if name not in PARTS:
            raise unknown_name("normalisation", name, [NONE, LOOSE, *PARTS])
    return frozenset(names)


def name_of(parts: frozenset[str]) -> str:
    """The name of a normalisation: one for equal parts, however they were given."""
    return LOOSE if len(parts) == len(PARTS) else ",".join(part for part in PARTS if part in parts) or NONE


class _WithoutMarks(dict[int, int | None]):
    """Table for `str.translate` that drops nonspacing marks; entries are added when a character first occurs."""

    def __missing__(self, code: int) -> int | None:
        self[code] = None if unicodedata.category(chr(code)) == "Mn" else code
        return self[code]


_WITHOUT_MARKS = _WithoutMarks()


@cache
def symbols() -> frozenset[str]:
    """The mathematical symbols of Unicode, category Sm."""
    characters = (chr(code) for start, stop in _WITH_SYMBOLS for code in range(start, stop))
    return frozenset(c for c in characters if unicodedata.category(c) == "Sm")


@cache
def counted_marks(parts: frozenset[str]) -> frozenset[str]:
    """The marks that count; mathematical symbols outside `PUNCTUATION` are letters if operators do not count."""
    return (frozenset() if "operators" in parts else OPERATORS | symbols()) | (
        frozenset() if "punctuation" in parts else PROSE
    )


def _without_accents(text: str, kept: frozenset[str]) -> str:
    """Canonical decomposition without the accents of letters, except for the characters `kept`."""
    pieces = re.split(f"([{re.escape(''.join(sorted(kept)))}])", text) if kept else [text]
    decomposed = (
        p if i % 2 else _after_letter.sub(_after_accents, unicodedata.normalize("NFD", p)) for i, p in enumerate(pieces)
    )
    return "".join(decomposed)


def _after_accents(match: re.Match[str]) -> str:
    return "".join(dropwhile(lambda c: unicodedata.category(c) == "Mn", match[0]))


def _apply(parts: frozenset[str], marks_first: bool, text: str) -> str:
    """The normalised text; with `marks_first`, marks that count precede the next word."""
    if "case" in parts:
        text = text.lower()
    if "numbers" in parts:
        text = _numbers.sub("0", text)
    dropped, marks = _blanked(parts), _mark_patterns(parts)
    if dropped:
        number = _WHOLE_NUMBER if keeps_numbers(parts) else _NUMBER
        pieces = [text] if "numbers" in parts else re.split(f"({number})", text)
        text = "".join(piece if i % 2 else piece.translate(dropped) for i, piece in enumerate(pieces))
    if marks_first and marks:
        text = marks.sub(_before_next_word, text)
    if "accents" in parts and not text.isascii():
        if len(parts) == len(PARTS):
            text = unicodedata.normalize("NFD", text).translate(_WITHOUT_MARKS)
        else:
            text = _without_accents(text, _decomposed_symbols() if "operators" not in parts else frozenset())
    return " ".join(text.split()) if "whitespace" in parts else text


def keeps_numbers(parts: frozenset[str]) -> bool:
    """Whether marks of prose count in numbers only."""
    return "punctuation" in parts and "numbers" not in parts


@cache
def _blanked(parts: frozenset[str]) -> dict[int, str]:
    """Table for `str.translate`: the marks that become spaces."""
    dropped = (PROSE if "punctuation" in parts else frozenset()) | (OPERATORS if "operators" in parts else frozenset())
    return dict.fromkeys(map(ord, dropped), " ")


@cache
def _decomposed_symbols() -> frozenset[str]:
    return frozenset(c for c in symbols() if unicodedata.normalize("NFD", c) != c)


@cache
def _mark_patterns(parts: frozenset[str]) -> re.Pattern[str] | None:
    """A number, or a run of marks that count with the whitespace around them."""
    marks = counted_marks(parts).union(LEADING if keeps_numbers(parts) else "")
    number = _DIGITS if keeps_numbers(parts) else "0" if "numbers" in parts else _NUMBER
    return re.compile(rf"({number})|\s*((?:[{re.escape(''.join(sorted(marks)))}]\s*)+)") if marks else None


def _before_next_word(match: re.Match[str]) -> str:
    return match[1] or " " + "".join(match[2].split())


@cache
def normaliser(how: str) -> Callable[[str], str]:
    """The function that normalises a text as `how` names it. UsageError for an unknown name."""
    return partial(_apply, parts_of(how), False)


@cache
def comparable(how: str) -> Callable[[str], str]:
    """The same with marks that count before the next word, if whitespace does not count."""
    parts = parts_of(how)
    return partial(_apply, parts, "whitespace" in parts)

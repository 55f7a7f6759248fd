"""Words and sentences of a text: the most influential choice in quality rules.

Every rule counts words, so the definition of a word moves documents across thresholds: on web text, the same
rules with whitespace words and with linguistic tokens agree on only about 87 % of documents
(tests/bench/filter_parity.md). `--words` selects the definition:

| name | words of `Don't stop -- (now).` | definition |
|---|---|---|
| unicode | `Don` `'t` `stop` `--` `(` `now` `)` `.` | runs of letters and digits, `'t` and the like, runs of a mark |
| whitespace | `Don't` `stop` `--` `(now).` | as in the Gopher paper |
| spacy | `Do` `n't` `stop` `--` `(` `now` `)` `.` | spaCy's English tokens and sentences, as counted by datatrove |

`spacy` is by far the slowest, since it creates an object for every word. `unicode` approximates a linguistic
tokenizer: like spaCy's rules for English, it keeps `3.5`, `10:30`, `U.S.`, `covid-19`, `a_b`, URLs and
addresses together, and splits `well-known` and `and/or`. Agreement of decisions: tests/bench/filter_parity.md.

The compiled kernels implement the same definitions. `TERMINALS` is Unicode 15's Sentence_Terminal property with
three Khmer signs. `PUNCTUATION` is the table that CCNet and later tools strip (ASCII marks, common quotes and
CJK marks, control characters, and, by an old mistake that all of them share, the full-width digit one).
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import groupby

from llmkit.errors import LlmkitError
from llmkit.registry import Registry

_TERMINALS = """
21 2e 3f 589 61d-61f 6d4 700-702 7f9 837 839 83d-83e 964-965 104a-104b 1362 1367-1368 166e 1735-1736 17d4-17d6 17d9-17da
1803 1809 1944-1945 1aa8-1aab 1b5a-1b5b 1b5e-1b5f 1b7d-1b7e 1c3b-1c3c 1c7e-1c7f 203c-203d 2047-2049 2e2e 2e3c 2e53-2e54
3002 a4ff a60e-a60f a6f3 a6f7 a876-a877 a8ce-a8cf a92f a9c8-a9c9 aa5d-aa5f aaf0-aaf1 abeb fe52 fe56-fe57 ff01 ff0e ff1f
ff61 10a56-10a57 10f55-10f59 10f86-10f89 11047-11048 110be-110c1 11141-11143 111c5-111c6 111cd 111de-111df 11238-11239
1123b-1123c 112a9 1144b-1144c 115c2-115c3 115c9-115d7 11641-11642 1173c-1173e 11944 11946 11a42-11a43 11a9b-11a9c
11c41-11c42 11ef7-11ef8 11f43-11f44 16a6e-16a6f 16af5 16b37-16b38 16b44 16e98 1bc9f 1da88
"""
_PUNCTUATION = """
0-8 b-1f 21-2f 3a-40 5b-60 7b-9f ab b4 bb 2013-2014 2019 201c-201e 2026 2236 2501 25ba 3001-3002 3008-300d 3010-3011
ff01 ff05 ff08-ff09 ff0c ff0e ff11 ff1a-ff1b ff1f ff5e
"""


def _characters(ranges: str) -> frozenset[str]:
    characters: set[str] = set()
    for item in ranges.split():
        first, _, last = item.partition("-")
        characters.update(map(chr, range(int(first, 16), int(last or first, 16) + 1)))
    return frozenset(characters)


TERMINALS = _characters(_TERMINALS)  # 159 marks that end a sentence
PUNCTUATION = _characters(_PUNCTUATION)  # 129 marks that normalisation turns into spaces
_BLOCKS = (
    *((0x41, 0x2B0), (0x370, 0x530), (0x1D00, 0x1DC0), (0x1E00, 0x2000)),
    *((0x2C60, 0x2C80), (0xA640, 0xA6A0), (0xA720, 0xA800), (0xAB30, 0xAB70)),
)
_letters = [code for block in _BLOCKS for code in range(*block) if chr(code).isalpha()]
ACCENTED = tuple(  # the letters that have accents, Latin, Greek and Cyrillic, as ascending ranges of code points
    (run[0][1], run[-1][1] + 1)
    for _, items in groupby(enumerate(_letters), key=lambda item: item[1] - item[0])
    if (run := list(items))
)
MAX_LEADING = 3  # marks before the digits of a number that belong to it, as in –$.5
MARKS = TERMINALS | PUNCTUATION  # 281 marks; a word that consists of these is a symbol


@dataclass(frozen=True, slots=True)
class Splitter:
    """One definition of words: `words` splits a text, `sentences` counts the sentences of a stripped line (1 if
    it is empty).

    `compiled` names the equivalent kernels, `scan` in kernels/tokens.py and `sentences` in
    filters/kernels/c4.py; empty if there are none.
    """

    words: Callable[[str], list[str]]
    sentences: Callable[[str], int]
    compiled: str = ""


SPLITTERS = Registry("kind of words")


# A word may contain a full stop between letters or digits (but not where a sentence ends without a space,
# `end.The`), a comma, colon or slash before a digit, a hyphen between a letter and a digit, and _ @ &. A URL
# extends to the next space. The full stop after a single letter (`J.`, `U.S.`) belongs to the word.
# kernels/tokens.py implements the same rules.
_JOINER = r"(?:(?:(?<![a-z])\.|\.(?![A-Z])|[,:/](?=[0-9])|(?<![0-9])-(?=[0-9])|(?<=[0-9])-(?![0-9])|[_@&])(?=[^\W_]))"
_END = r"""(?:://\S*[^\s.,;:!?)"'\]>}]|(?<=(?<![^\W_])[A-Za-z])\.(?!\.))?"""


@cache
def _unicode_pattern() -> re.Pattern[str]:
    """Matches letters and digits with following combining marks (non-word characters for `re`), 't and the
    like, or a run of one mark."""
    combining = "".join(c for c in map(chr, range(0x300, 0xFE30)) if unicodedata.category(c)[0] == "M")
    marks = "|".join(re.escape(mark) + "+" for mark in string.punctuation + "–—…•·")  # no groups: fast in `findall`
    run = rf"[^\W_]+(?:[{combining}]+[^\W_]*)*"
    word = rf"{run}(?:{_JOINER}{run})*{_END}"
    # With `(?=\S)` no alternative is tried at spaces.
    return re.compile(rf"(?=\S)(?:{word}|(?<=[^\W_])['’]{word}|{marks}|\S)")


def unicode_words(text: str) -> list[str]:
    """Runs of letters and digits including joining marks, endings after an apostrophe (`'t`, `'s`), and runs of
    one mark.

    Every other character is a word of its own.
    """
    return _unicode_pattern().findall(text)


def whitespace_words(text: str) -> list[str]:
    """Words separated by whitespace."""
    return text.split()


# A sentence ends at a terminal mark with its closing quotes if whitespace follows; marks of scripts without
# spaces end it anywhere. An ellipsis, an initial (`J. Austen`) and common English titles or abbreviations do
# not end a sentence. filters/kernels/c4.py implements the same rules.
ABBREVIATIONS = (
    "Mr",
    "Dr",
    "St",
    "vs",
    "No",
    "Jr",
    "Sr",
    "Co",
    "Mrs",
    "etc",
    "Inc",
    "Ltd",
    "Gen",
    "Rev",
    "Gov",
    "Prof",
)
_OTHER_ENDS = "".join(sorted(TERMINALS - set(".!?")))
_SENTENCE_END = re.compile(
    r"(?<![.…])(?:(?<!\b[A-Z])" + "".join(rf"(?<!\b{word})" for word in ABBREVIATIONS) + r"\.(?!\.)|[!?])"
    r"""[.!?]*+[)\]"'”’»]*+(?=\s+\S)|"""
    rf"""[{_OTHER_ENDS}]++[)\]"'”’»]*+(?=\s*\S)"""
)


def count_sentences(line: str) -> int:
    """Number of sentences in one stripped line, at least 1."""
    return 1 + sum(1 for _ in _SENTENCE_END.finditer(line))


SPLITTERS.register("unicode")(Splitter(unicode_words, count_sentences, "unicode"))
SPLITTERS.register("whitespace")(Splitter(whitespace_words, count_sentences, "whitespace"))


def _spacy() -> Splitter:
    """spaCy's blank English pipeline with its rules for sentences. Raises LlmkitError where spaCy is not installed."""
    try:
        import spacy
    except ImportError as error:
        raise LlmkitError("--words spacy: spaCy is not installed", "pip install 'llmkit[spacy]'") from error
    pipeline = spacy.blank("en")
    pipeline.add_pipe("sentencizer")
    pipeline.max_length = 1 << 62  # the limit protects parsers, which this pipeline does not have

    def words(text: str) -> list[str]:
        stripped = (token.text.strip() for token in pipeline.tokenizer(text))
        return [word for word in stripped if word]

    def sentences(line: str) -> int:
        return sum(1 for sentence in pipeline(line).sents if sentence.text.strip())

    return Splitter(words, sentences)


@cache
def splitter(name: str) -> Splitter:
    """The `Splitter` of that name. Raises UsageError for an unknown name."""
    entry = SPLITTERS.get(name)
    return entry if isinstance(entry, Splitter) else entry()


SPLITTERS.register("spacy")(_spacy)

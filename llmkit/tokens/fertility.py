"""What tokenizers make of real text: fertility, bytes a token, words that are one token, tokens that are never used; by language and domain.

Documents in, in chunks; out a `Tally` for each value of each field asked for, and one for all. All of it is sums and bit sets, so chunks may be
measured anywhere and added in any order.

* Fertility: tokens of a text (its punctuation and spaces too) divided by its words (Ács 2019; Rust et al., arXiv:2012.15613, where treebanks say
  what a word is). Here a word is a run of letters, digits, combining marks and apostrophes; in scripts that put no spaces between words (Han, kana,
  Thai, Lao, Khmer, Burmese, Yi, ...) every character with its marks is one, so that Chinese and English come out on one scale. Between such a
  script and others compare bytes a token.
* Single: the share of words, as they stand in the text with the space before them, that the tokenizer encodes alone as one token. Only what the
  vocabulary holds as a token can be one, so that each tokenizer is asked once for each such word.

Cost: one encoding of the text for each tokenizer, and one pass in Python for its words. Memory: a bit for each token of the vocabulary, group and
tokenizer; at most `MAX_GROUPS` groups.

    llmkit vocab report tok/ other/ --text docs.jsonl.zst
"""

from __future__ import annotations

import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmkit.errors import LlmkitError
from llmkit.io.documents import BadLine, Chunk, Document, ReadOptions, parse
from llmkit.shards.tokenizer_info import TokenizerInfo
from llmkit.tokens.encode import source_name
from llmkit.tokens.text_encoder import TextEncoder

MAX_GROUPS = 1000
NONE = "(none)"  # the value of a field that a document lacks
Key = tuple[str, str]  # field and value
ALL: Key = ("", "all")
WARN_OVER = 1.5  # times the fertility of English
ENGLISH = ("en", "eng", "english")

# Letters of scripts without spaces between words: Thai, Lao, Burmese, Khmer, Tai, Balinese, Javanese, kana, bopomofo, Han, Yi.
UNSPACED = (
    (0xE00, 0xEFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x1950, 0x19DF), (0x1A20, 0x1AAF), (0x1B00, 0x1B7F), (0x3005, 0x3007),
    (0x3040, 0x312F), (0x31F0, 0x31FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xA000, 0xA4CF), (0xA980, 0xA9FF), (0xAA60, 0xAADF),
    (0xF900, 0xFAFF), (0xFF66, 0xFF9F), (0x1B000, 0x1B16F), (0x20000, 0x3FFFF),
)  # fmt: skip


@cache
def word_pattern() -> re.Pattern[str]:
    """Matches a word, with a space that stands before it."""
    kinds: dict[str, list[str]] = {"word": [], "alone": [], "mark": ["'", "\u2019", "\u200c", "\u200d"]}
    unspaced = {i for first, last in UNSPACED for i in range(first, last + 1)}
    for i in range(sys.maxunicode + 1):
        kind = unicodedata.category(chr(i))[0]
        if kind in "LNM":
            kinds["mark" if kind == "M" else "alone" if kind == "L" and i in unspaced else "word"].append(chr(i))
    word, alone, mark = (re.sub(r"[\]\\^-]", r"\\\g<0>", "".join(_ranges(kinds[k]))) for k in ("word", "alone", "mark"))
    word, alone, mark = (text.replace("\0", "-") for text in (word, alone, mark))
    return re.compile(f" ?(?:[{alone}][{mark}]*|[{word}][{word}{mark}]*)")


def _ranges(characters: list[str]) -> Iterable[str]:
    """Neighbours as `a\\0z`."""
    start = last = characters[0]
    for c in [*characters[1:], ""]:
        if not c or ord(c) != ord(last) + 1:
            yield start if start == last else f"{start}\0{last}"
            start = c
        last = c


def words(text: str) -> list[str]:
    """The words of a text, each with the space before it, if there is one."""
    return word_pattern().findall(text)


def count_words(text: str) -> Counter[str]:
    """How often each word stands in a text; of a long one no list is made."""
    return Counter(words(text) if len(text) < 1 << 20 else (match[0] for match in word_pattern().finditer(text)))


@dataclass(slots=True)
class Made:
    """What one tokenizer made of a group: tokens, words that are one token, and a bit for each id that occurred."""

    tokens: int = 0
    single: int = 0
    used: NDArray[np.uint8] = field(default_factory=lambda: np.zeros(0, np.uint8))


@dataclass(slots=True)
class Tally:
    """One group: its documents, UTF-8 bytes and words, and what each tokenizer made of them."""

    documents: int = 0
    bytes: int = 0
    words: int = 0
    made: list[Made] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        """Take the counts of `other`, measured with the same tokenizers."""
        self.documents += other.documents
        self.bytes += other.bytes
        self.words += other.words
        if not self.made:
            self.made = [Made(used=np.zeros_like(made.used)) for made in other.made]
        for mine, theirs in zip(self.made, other.made, strict=True):
            mine.tokens += theirs.tokens
            mine.single += theirs.single
            mine.used |= theirs.used

    def figures(self, sizes: Sequence[int]) -> dict[str, Any]:
        """The counts and ratios of the group, for vocabularies of `sizes`; a ratio to nothing is None."""
        return {
            "documents": self.documents,
            "bytes": self.bytes,
            "words": self.words,
            "tokenizers": [
                {
                    "tokens": made.tokens,
                    "fertility": _ratio(made.tokens, self.words),
                    "bytes_per_token": _ratio(self.bytes, made.tokens),
                    "single_token_words": _ratio(made.single, self.words),
                    "unused": size - int(np.unpackbits(made.used).sum()),
                }
                for made, size in zip(self.made, sizes, strict=True)
            ],
        }


def _ratio(a: int, b: int) -> float | None:
    return a / b if b else None


@dataclass(slots=True)
class Measured:
    """The groups of one chunk."""

    groups: dict[Key, Tally]
    documents: int
    bad: list[BadLine]


class Meter:
    """Measures chunks with several tokenizers; callable, so that it is the `work` of `engine.ordered_map`. `by` are fields of the documents."""

    def __init__(self, tokenizers: Sequence[TokenizerInfo], options: ReadOptions, by: Sequence[str]) -> None:
        self._infos, self._options, self._by = tokenizers, options, by
        self._encoders = [TextEncoder(info) for info in tokenizers]
        self._tokenizers = [encoder.reference for encoder in self._encoders]
        self._pieces = [_surfaces(t) for t in self._tokenizers]
        self._known: list[dict[str, bool]] = [{} for _ in tokenizers]
        word_pattern()  # before workers fork

    def __call__(self, chunk: Chunk) -> Measured:
        documents, bad = parse(chunk, self._options)
        texts = [document.text for document in documents]
        sizes = [len(text.encode()) for text in texts]
        counts = [count_words(text) for text in texts]
        made = [self._made(t, texts, counts) for t in range(len(self._infos))]
        members: dict[Key, list[int]] = {ALL: [*range(len(documents))]} if documents else {}
        for i, document in enumerate(documents):
            for name in self._by:
                members.setdefault((name, value_of(document, name)), []).append(i)
        groups = {
            key: Tally(
                len(inside),
                sum(sizes[i] for i in inside),
                sum(counts[i].total() for i in inside),
                [_joined([of[i] for i in inside], info.vocab_size) for of, info in zip(made, self._infos, strict=True)],
            )
            for key, inside in members.items()
        }
        return Measured(groups, len(documents), bad)

    def _made(self, t: int, texts: list[str], counts: list[Counter[str]]) -> list[tuple[NDArray[Any], int]]:
        """Ids of each text under tokenizer `t`, and how many of its words are one token."""
        ids, lengths = self._encoders[t](texts)
        single = [sum(n for word, n in found.items() if self._is_single(t, word)) for found in counts]
        return list(zip(np.split(ids, np.cumsum(lengths)[:-1]), single, strict=True)) if texts else []

    def _is_single(self, t: int, word: str) -> bool:
        tokenizer, known = self._tokenizers[t], self._known[t]
        shown = word
        if tokenizer.normalizer:
            shown = tokenizer.normalizer.normalize_str(word).replace("\u2581", " ")
        if shown.strip() not in self._pieces[t]:
            return False
        if word not in known:  # as many at most as there are tokens, each with a space and without
            known[word] = len(tokenizer.encode(word, add_special_tokens=False).ids) == 1
        return known[word]


def _joined(made: list[tuple[NDArray[Any], int]], size: int) -> Made:
    used = np.zeros(size, bool)
    for ids, _ in made:
        used[ids] = True
    return Made(sum(len(ids) for ids, _ in made), sum(single for _, single in made), np.packbits(used))


def _surfaces(tokenizer: Any) -> frozenset[str]:
    """What each token stands for alone, without spaces around it."""
    ids = tokenizer.get_vocab(with_added_tokens=True).values()
    return frozenset(text.strip() for text in tokenizer.decode_batch([[i] for i in ids], False))


def value_of(document: Document, name: str) -> str:
    """A document's value of a field: for `source` its file where it has none, `NONE` where nothing can stand for a group."""
    value = document.fields.get(name)
    if value in (None, "") and name == "source":
        return source_name(document.file)
    return NONE if value in (None, "") or isinstance(value, (dict, list)) else str(value)


def merge(total: dict[Key, Tally], part: dict[Key, Tally]) -> None:
    """Add the groups of a chunk to `total`; LlmkitError where a field has too many values to be a language or a domain."""
    for key, tally in part.items():
        total.setdefault(key, Tally()).add(tally)
    if len(total) > MAX_GROUPS:
        name, count = Counter(name for name, _ in total).most_common(1)[0]
        raise LlmkitError(f"field {name!r} has {count:,} values and more", "name the right fields with --by")


def baseline(total: dict[Key, Tally], name: str | None) -> Key | None:
    """The group that others are held against: the one whose value is `name`, else English; None where there is none that holds words."""
    wanted = ENGLISH if name is None else (name,)
    for key, tally in total.items():
        if key != ALL and (key[1] if name is not None else key[1].lower()) in wanted and tally.words:
            return key
    return None


def costly(total: dict[Key, Tally], base: Key, t: int) -> list[tuple[Key, float]]:
    """The groups whose fertility under tokenizer `t` is over `WARN_OVER` times that of `base`, with that ratio, the largest first."""
    one = total[base].made[t].tokens / total[base].words
    found = [(key, tally.made[t].tokens / tally.words / one) for key, tally in total.items() if tally.words]
    return sorted([item for item in found if item[1] > WARN_OVER], key=lambda item: -item[1])

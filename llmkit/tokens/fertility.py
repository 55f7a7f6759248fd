"""Measure tokenizers on real text: fertility, bytes per token, single-token words and unused tokens, by
language and domain.

Input: chunks of documents. Output: a `GroupCounts` for each value of each requested field, and one for all
documents. All counts are sums and bit sets, so chunks can be measured in any process and merged in any order.

* Fertility: tokens of a text (punctuation and spaces included) divided by its words (Ács 2019; Rust et al.,
  arXiv:2012.15613, where treebanks define words). Here a word is a run of letters, digits, combining marks and
  apostrophes. In scripts without spaces between words (Han, kana, Thai, Lao, Khmer, Burmese, Yi, ...) every
  character with its marks is a word, which puts Chinese and English on one scale. To compare such a script with
  others, use bytes per token.
* Single: the share of words, each with the space before it, that the tokenizer encodes as one token when
  encoded alone. Only the text of a token in the vocabulary can be such a word, so each tokenizer encodes each
  of them only once.

Cost: one encoding of the text per tokenizer, and one pass in Python over its words. Memory: one bit per token
of the vocabulary, group and tokenizer; at most `MAX_GROUPS` groups.

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
from llmkit.tokens.encoder import source_name
from llmkit.tokens.text_encoder import TextEncoder

MAX_GROUPS = 1000
MISSING = "(none)"  # value of a field that a document lacks
GroupKey = tuple[str, str]  # field and value
ALL: GroupKey = ("", "all")
WARN_OVER = 1.5  # ratio to the fertility of English
ENGLISH = ("en", "eng", "english")

# Letters of scripts without spaces between words: Thai, Lao, Burmese, Khmer, Tai, Balinese, Javanese, kana,
# bopomofo, Han, Yi.
UNSPACED = (
    (0xE00, 0xEFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x1950, 0x19DF), (0x1A20, 0x1AAF), (0x1B00, 0x1B7F),
    (0x3005, 0x3007), (0x3040, 0x312F), (0x31F0, 0x31FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xA000, 0xA4CF),
    (0xA980, 0xA9FF), (0xAA60, 0xAADF), (0xF900, 0xFAFF), (0xFF66, 0xFF9F), (0x1B000, 0x1B16F), (0x20000, 0x3FFFF),
)  # fmt: skip


@cache
def word_pattern() -> re.Pattern[str]:
    """Matches a word, with the space before it if there is one."""
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
    """Character ranges, written `a\\0z`."""
    start = last = characters[0]
    for c in [*characters[1:], ""]:
        if not c or ord(c) != ord(last) + 1:
            yield start if start == last else f"{start}\0{last}"
            start = c
        last = c


def split_words(text: str) -> list[str]:
    """The words of a text, each with the space before it if there is one."""
    return word_pattern().findall(text)


def count_words(text: str) -> Counter[str]:
    """Frequency of each word in a text. For a long text no list of words is built."""
    return Counter(split_words(text) if len(text) < 1 << 20 else (match[0] for match in word_pattern().finditer(text)))


@dataclass(slots=True)
class TokenizerCounts:
    """Counts of one tokenizer on a group: tokens, single-token words, and a bit for each id that occurred."""

    tokens: int = 0
    single: int = 0
    used: NDArray[np.uint8] = field(default_factory=lambda: np.zeros(0, np.uint8))


@dataclass(slots=True)
class GroupCounts:
    """Counts of one group: documents, UTF-8 bytes and words, and the counts of each tokenizer."""

    documents: int = 0
    bytes: int = 0
    words: int = 0
    by_tokenizer: list[TokenizerCounts] = field(default_factory=list)

    def add(self, other: GroupCounts) -> None:
        """Add the counts of `other`, measured with the same tokenizers."""
        self.documents += other.documents
        self.bytes += other.bytes
        self.words += other.words
        if not self.by_tokenizer:
            self.by_tokenizer = [TokenizerCounts(used=np.zeros_like(counts.used)) for counts in other.by_tokenizer]
        for mine, theirs in zip(self.by_tokenizer, other.by_tokenizer, strict=True):
            mine.tokens += theirs.tokens
            mine.single += theirs.single
            mine.used |= theirs.used

    def figures(self, sizes: Sequence[int]) -> dict[str, Any]:
        """The counts and ratios of the group, for vocabularies of `sizes`. A ratio with denominator 0 is None."""
        return {
            "documents": self.documents,
            "bytes": self.bytes,
            "words": self.words,
            "tokenizers": [
                {
                    "tokens": counts.tokens,
                    "fertility": _ratio(counts.tokens, self.words),
                    "bytes_per_token": _ratio(self.bytes, counts.tokens),
                    "single_token_words": _ratio(counts.single, self.words),
                    "unused": size - int(np.unpackbits(counts.used).sum()),
                }
                for counts, size in zip(self.by_tokenizer, sizes, strict=True)
            ],
        }


def _ratio(a: int, b: int) -> float | None:
    return a / b if b else None


@dataclass(slots=True)
class ChunkFertility:
    """The groups of one chunk."""

    groups: dict[GroupKey, GroupCounts]
    documents: int
    bad: list[BadLine]


class FertilityMeter:
    """Measures chunks with several tokenizers, grouped by the fields `by`. Callable, to serve as the `work` of
    `engine.ordered_map`.
    """

    def __init__(self, tokenizers: Sequence[TokenizerInfo], options: ReadOptions, by: Sequence[str]) -> None:
        self._infos, self._options, self._by = tokenizers, options, by
        self._encoders = [TextEncoder(info) for info in tokenizers]
        self._tokenizers = [encoder.reference for encoder in self._encoders]
        self._pieces = [_token_texts(t) for t in self._tokenizers]
        self._single_words: list[dict[str, bool]] = [{} for _ in tokenizers]
        word_pattern()  # before workers fork

    def __call__(self, chunk: Chunk) -> ChunkFertility:
        documents, bad = parse(chunk, self._options)
        texts = [document.text for document in documents]
        sizes = [len(text.encode()) for text in texts]
        counts = [count_words(text) for text in texts]
        encoded = [self._encode(t, texts, counts) for t in range(len(self._infos))]
        members: dict[GroupKey, list[int]] = {ALL: [*range(len(documents))]} if documents else {}
        for i, document in enumerate(documents):
            for name in self._by:
                members.setdefault((name, group_value(document, name)), []).append(i)
        groups = {
            key: GroupCounts(
                len(indices),
                sum(sizes[i] for i in indices),
                sum(counts[i].total() for i in indices),
                [
                    _tokenizer_counts([per_text[i] for i in indices], info.vocab_size)
                    for per_text, info in zip(encoded, self._infos, strict=True)
                ],
            )
            for key, indices in members.items()
        }
        return ChunkFertility(groups, len(documents), bad)

    def _encode(self, t: int, texts: list[str], counts: list[Counter[str]]) -> list[tuple[NDArray[Any], int]]:
        """Ids of each text under tokenizer `t`, and the number of its single-token words."""
        ids, lengths = self._encoders[t](texts)
        single = [sum(n for word, n in frequencies.items() if self._is_single(t, word)) for frequencies in counts]
        return list(zip(np.split(ids, np.cumsum(lengths)[:-1]), single, strict=True)) if texts else []

    def _is_single(self, t: int, word: str) -> bool:
        tokenizer, single_words = self._tokenizers[t], self._single_words[t]
        normalized = word
        if tokenizer.normalizer:
            normalized = tokenizer.normalizer.normalize_str(word).replace("\u2581", " ")
        if normalized.strip() not in self._pieces[t]:
            return False
        if word not in single_words:  # at most two entries per token, with and without a space
            single_words[word] = len(tokenizer.encode(word, add_special_tokens=False).ids) == 1
        return single_words[word]


def _tokenizer_counts(texts: list[tuple[NDArray[Any], int]], size: int) -> TokenizerCounts:
    used = np.zeros(size, bool)
    for ids, _ in texts:
        used[ids] = True
    return TokenizerCounts(sum(len(ids) for ids, _ in texts), sum(single for _, single in texts), np.packbits(used))


def _token_texts(tokenizer: Any) -> frozenset[str]:
    """Text of each token decoded alone, without surrounding spaces."""
    ids = tokenizer.get_vocab(with_added_tokens=True).values()
    return frozenset(text.strip() for text in tokenizer.decode_batch([[i] for i in ids], False))


def group_value(document: Document, name: str) -> str:
    """A document's value of a field: its file for a missing `source`, `MISSING` where it has no value that can
    name a group.
    """
    value = document.exact_fields.get(name)
    if value in (None, "") and name == "source":
        return source_name(document.file)
    return MISSING if value in (None, "") or isinstance(value, (dict, list)) else str(value)


def merge_groups(total: dict[GroupKey, GroupCounts], chunk: dict[GroupKey, GroupCounts]) -> None:
    """Add the groups of a chunk to `total`. Raises LlmkitError where a field has too many values to be a
    language or a domain.
    """
    for key, counts in chunk.items():
        total.setdefault(key, GroupCounts()).add(counts)
    if len(total) > MAX_GROUPS:
        name, count = Counter(name for name, _ in total).most_common(1)[0]
        raise LlmkitError(f"field {name!r} has {count:,} values or more", "name other fields with --by")


def find_baseline(total: dict[GroupKey, GroupCounts], name: str | None) -> GroupKey | None:
    """The group to compare others with: the one whose value is `name`, by default English; None where no such
    group has words.
    """
    names = ENGLISH if name is None else (name,)
    for key, counts in total.items():
        if key != ALL and (key[1] if name is not None else key[1].lower()) in names and counts.words:
            return key
    return None


def high_fertility(total: dict[GroupKey, GroupCounts], base: GroupKey, t: int) -> list[tuple[GroupKey, float]]:
    """Groups whose fertility under tokenizer `t` is over `WARN_OVER` times that of `base`, with the ratio, the
    highest first.
    """
    reference = total[base].by_tokenizer[t].tokens / total[base].words
    ratios = [
        (key, counts.by_tokenizer[t].tokens / counts.words / reference) for key, counts in total.items() if counts.words
    ]
    return sorted([item for item in ratios if item[1] > WARN_OVER], key=lambda item: -item[1])

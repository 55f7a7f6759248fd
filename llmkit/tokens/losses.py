"""What a tokenizer loses of a text: characters without tokens, and what encoding and decoding change.

    changes(info)                                # ["upper case", "accents"]; [] for byte-level tokenizers
    counter = loss_counter(encoder)              # None: every text has tokens
    counter(texts, names, ids, lengths, extra)   # Losses(documents=3, pieces=7, ...), and what becomes white space

Byte-level vocabularies with all 256 bytes, and those with byte fallback, have tokens for every text; that is read once
from tokenizer.json. In others a character without a token becomes the unknown token, which is counted in the ids, or,
in BPE without one, nothing: each character that occurs is looked up once. Only a text with characters whose tokens
depend on their neighbours (that a normaliser composes, or that end a word) is normalised and split again. Texts are
never decoded to compare them. The mark by which a tokenizer stands for white space (U+2581) becomes white space where a
text contains it, and is counted. White space that is dropped by design is named by `changes`.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from llmkit.shards.token_block import Losses, TokenBlock
from llmkit.shards.tokenizer_info import TokenizerInfo
from llmkit.tokens.pretokenize import byte_alphabet, pattern_name
from llmkit.tokens.text_encoder import CANNOT_ENCODE, TextEncoder, library_errors, load_tokenizer

# What a text may lose on the way to tokens and back, and texts that show it; but for the first, white space aside.
WHITE_SPACE = "white space"
PROBES = {
    WHITE_SPACE: ("ab", " a  b\t\nc ", "a , b . c ! n 't"),
    "upper case": ("AaBB",),
    "accents": ("éñ",),
    "combining accents": ("e\u0301",),
    "ligatures, superscripts and full-width characters": ("ﬁ²ａ",),
    "control characters": ("a\0b\ufeffc",),
    "names of bytes such as <0x41>": ("<0x41>",),
}
EXAMPLE = 40  # characters of an example
COMPOSING = ("NFC", "NFKC", "Precompiled")  # normalisers to which neighbours matter


class Coverage:
    """Which characters the model of a tokenizer.json has tokens for. `unknown`: the id of its unknown token, if texts
    can become that; `marks`: the characters that stand for white space in its tokens.
    """

    def __init__(self, content: dict[str, Any]) -> None:
        model, vocabulary = content["model"], content["model"]["vocab"]
        unigram = isinstance(vocabulary, list)
        self._vocabulary = {entry[0] for entry in vocabulary} if unigram else vocabulary
        self._whole_words = bool(model.get("ignore_merges"))
        self._before, self._after = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
        names = {f"<0x{byte:02X}>": byte for byte in range(256)} if model.get("byte_fallback") else {}
        self._fallback = {byte for name, byte in names.items() if name in self._vocabulary}
        is_bpe = not unigram and model.get("type", "BPE") == "BPE"
        self.byte_level = is_bpe and any(step.get("type") == "ByteLevel" for step in _steps(content, "pre_tokenizer"))
        has_bytes = self.byte_level and all(self.has(symbol) for symbol in byte_alphabet())
        self.complete = len(self._fallback) == 256 or has_bytes
        name = model.get("unk_token")
        unknown: int | None = model.get("unk_id") if unigram else vocabulary.get(name)
        self.unknown = None if self.complete else unknown
        self.drops = is_bpe and not self.complete and unknown is None  # without a trace
        self.marks = _marks(content)

    def has(self, symbol: str) -> bool | None:
        """Whether a BPE model has tokens for a symbol; None if that depends on its place in a word."""
        forms = {a + symbol + b for a in {"", self._before} for b in {"", self._after}}
        found = [form in self._vocabulary or self._fallback.issuperset(form.encode()) for form in forms]
        return all(found) or (None if any(found) or self._whole_words else False)

    def lost(self, words: list[str], front: str) -> Iterator[str]:
        """The symbols of words, as its pre-tokenizer makes them, for which a BPE model has no tokens. `front` is not of
        the text: the symbol that is written in front of it.
        """
        for number, word in enumerate(words):
            if self._whole_words and word in self._vocabulary:
                continue
            for i, symbol in enumerate(word):
                if i == number == 0 and symbol == front:
                    continue
                form = self._before * (i > 0) + symbol + self._after * (i == len(word) - 1)
                if form not in self._vocabulary and not self._fallback.issuperset(form.encode()):
                    yield f"byte 0x{byte_alphabet().index(symbol):02X}" if self.byte_level else repr(symbol)


class LossCounter:
    """Counts what texts lose. Use one per process: it keeps the characters that it has looked up."""

    def __init__(self, coverage: Coverage, encoder: TextEncoder) -> None:
        self._coverage, self._encoder = coverage, encoder
        self._has: dict[str, bool | None] = {}  # None: that depends on the characters beside it
        normaliser = _steps(encoder.content, "normalizer")
        self._composes = any(step.get("type") in COMPOSING for step in normaliser)
        patterns = [
            (step.get("pattern") or {}).get("String", "") for step in normaliser if step.get("type") == "Replace"
        ]
        self._replaces = any(len(pattern) != 1 for pattern in patterns)
        self._front = _front(encoder.reference) if coverage.drops else ""
        self._edges = bool(self._front) or any(step.get("type") == "Strip" for step in normaliser)

    def __call__(
        self, texts: Sequence[str], names: Sequence[str], ids: NDArray[Any], lengths: NDArray[np.int64], extra: int
    ) -> tuple[Losses, Losses]:
        """What texts lose that became `ids`, flat, and which of their characters become white space; `extra` ids of
        each do not stand for its text: the last, and those above one at its start.
        """
        lost = np.zeros(len(texts), np.int64)
        if self._coverage.unknown is not None:
            lost += count_ids(ids == self._coverage.unknown, lengths, extra - 1, 1)
        blank = int((lengths - lost <= extra).sum())
        if self._coverage.drops:
            lost += np.array([self._dropped(text) for text in texts], np.int64)
        marks = self._coverage.marks
        replaced = np.array([sum(map(text.count, marks)) for text in texts], np.int64)
        return (
            _losses(lost, blank, lambda i: f"{self._example(texts[i])} in {names[i]!r}"),
            _losses(replaced, 0, lambda i: f"{_named(next(c for c in texts[i] if c in marks))} in {names[i]!r}"),
        )

    def _dropped(self, text: str) -> int:
        characters = set(text)
        for character in characters - self._has.keys():
            self._has[character] = self._look_up(character)
        at_edge = self._edges and (text[0].isspace() or text[-1].isspace())
        if at_edge or any(self._has[character] is None for character in characters):
            return sum(1 for _ in self._lost(text))
        return sum(text.count(character) for character in characters if not self._has[character])

    def _look_up(self, character: str) -> bool | None:
        """Whether the model has tokens for all that a character becomes, wherever it occurs."""
        if self._replaces or (self._composes and may_compose(character)):
            return None
        # Between others: a normaliser may strip white space at the ends, or write a mark in front of a text.
        symbols = Counter("".join(self._words(f"q{character}q"))) - Counter("".join(self._words("qq")))
        found = [self._coverage.has(symbol) for symbol in symbols]
        return False if False in found else None if None in found else True

    def _words(self, text: str) -> list[str]:
        return _words(self._encoder.reference, text)

    def _lost(self, text: str) -> Iterator[str]:
        return self._coverage.lost(self._words(text), self._front)

    def _example(self, text: str) -> str:
        """The first piece of a text that is lost."""
        if self._coverage.drops:
            lacking = next((character for character in text if self._has[character] is False), None)
            return repr(lacking) if lacking else next(self._lost(text))
        encoding = self._encoder.reference.encode(text, add_special_tokens=False)
        spans = zip(encoding.ids, encoding.offsets, strict=True)
        start, stop = next((span for id, span in spans if id == self._coverage.unknown), (0, EXAMPLE))
        return repr(text[start : min(stop, start + EXAMPLE)])


@cache
def _second_characters() -> frozenset[str]:
    """The characters that Unicode composes with the one before them; none is above the limit in Unicode 16."""
    pairs = (unicodedata.decomposition(chr(code)).split() for code in range(0xC0, 0x17000))
    seconds = {chr(int(pair[1], 16)) for pair in pairs if len(pair) == 2 and pair[0][0] != "<"}
    return frozenset(seconds | set(map(chr, [*range(0x1161, 0x1176), *range(0x11A8, 0x11C3)])))  # Hangul


def may_compose(character: str) -> bool:
    """Whether a normaliser may compose a character with the one before it."""
    return not character.isascii() and not _second_characters().isdisjoint(unicodedata.normalize("NFKC", character))


def loss_counter(encoder: TextEncoder) -> LossCounter | None:
    """The counter for a tokenizer; None if it has tokens for every text, and marks nothing by characters of texts."""
    coverage = Coverage(encoder.content)
    return None if coverage.complete and not coverage.marks else LossCounter(coverage, encoder)


def mark_unknown(block: TokenBlock, unknown: int | None) -> TokenBlock:
    """The block with its unknown tokens counted as losses."""
    if unknown is not None:
        counts = count_ids(block.tokens == unknown, block.lengths)
        block.losses = _losses(counts, 0, lambda i: f"in {block.ids[i]!r}")
    return block


def unknown_id(info: TokenizerInfo) -> int | None:
    """The id that stands for text without tokens; None where there is none."""
    try:
        unknown = Coverage(orjson.loads(info.files["tokenizer.json"])).unknown
    except (LookupError, TypeError, AttributeError, ValueError):
        return None  # `load_tokenizer` reports how it is damaged
    return None if unknown == info.eos_id else unknown


def changes(info: TokenizerInfo, *, stored: bool = False) -> list[str]:
    """What encoding and decoding change although the vocabulary has tokens for it, as `PROBES` names it. For `stored`
    ids, which leave nothing to count, also that characters without tokens were dropped, if the tokenizer does that.

    LlmkitError where tokenizer.json does not load.
    """
    try:
        content = orjson.loads(info.files["tokenizer.json"])
        coverage, decoder = Coverage(content), content.get("decoder") or {}
    except (LookupError, TypeError, AttributeError, ValueError):
        load_tokenizer(info)
        raise
    found = _stated_changes(content)
    plain = content.get("normalizer") is None and pattern_name(content.get("pre_tokenizer")) is not None
    if plain and coverage.complete and decoder.get("type") == "ByteLevel":
        return found
    library = load_tokenizer(info)

    def after(text: str) -> str:
        ids = library.encode(text, add_special_tokens=False).ids
        words = _words(library, text)
        if coverage.unknown in ids or (
            coverage.drops and any(coverage.lost(words, _front(library)))
        ):  # counted, and hides the rest
            normal: str = library.normalizer.normalize_str(text) if library.normalizer else text
            shown = text if coverage.byte_level else "".join(words)
            blanks = [sum(c.isspace() or c in coverage.marks for c in part) for part in (shown, normal)]
            return shown if blanks[0] < blanks[1] else normal.replace("▁", " ")
        return str(library.decode(ids, skip_special_tokens=False))

    with library_errors(*CANNOT_ENCODE):
        found += [name for name, texts in PROBES.items() if any(_differs(after(text), text, name) for text in texts)]
    return found + ["characters that it has no tokens for"] * (stored and coverage.drops)


def _stated_changes(content: dict[str, Any]) -> list[str]:
    """Changes that no probe would show, since they concern a text that only tokenizer.json states."""
    added = [token for token in content.get("added_tokens") or [] if not token.get("special")]  # found in all texts
    replacements = [part for part in _steps(content, "normalizer") if part.get("type") == "Replace"]
    removals = [part for part in _steps(content, "pre_tokenizer") if part.get("behavior") == "Removed"]
    removals += [part for part in _steps(content, "pre_tokenizer") if part.get("type") == "CharDelimiterSplit"]
    found = {
        "white space beside added tokens": any(token.get("lstrip") or token.get("rstrip") for token in added),
        "what its normaliser replaces": any("▁" not in str(part.get("content")) for part in replacements),
        "what its pre-tokenizer removes": bool(removals),
    }
    return [name for name, is_changed in found.items() if is_changed]


def _steps(content: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """The parts of a normaliser or pre-tokenizer."""
    steps = [content.get(name) or {}]
    for step in steps:  # which grows
        steps += [*(step.get("normalizers") or []), *(step.get("pretokenizers") or [])]
    return steps


def _marks(content: dict[str, Any]) -> str:
    """The characters that stand for white space in tokens, such as U+2581."""
    steps = _steps(content, "pre_tokenizer") + _steps(content, "normalizer")
    found = [step.get("replacement", "▁") for step in steps if step.get("type") == "Metaspace"]
    replaced = [
        step for step in steps if step.get("type") == "Replace" and (step.get("pattern") or {}).get("String") == " "
    ]
    return "".join(
        sorted({mark for mark in [*found, *(step["content"] for step in replaced)] if len(mark) == 1} - {" "})
    )


def _words(library: Any, text: str) -> list[str]:
    """What the model of a tokenizer is given: the text, normalised and pre-tokenized."""
    normal: str = library.normalizer.normalize_str(text) if library.normalizer else text
    if library.pre_tokenizer is None:
        return [normal]
    return [word for word, _ in library.pre_tokenizer.pre_tokenize_str(normal)]


def _front(library: Any) -> str:
    """The symbol that a tokenizer writes in front of a text; empty if none."""
    return "".join(_words(library, "qq"))[:-2][:1]


def _differs(one: str, other: str, name: str) -> bool:
    return one != other if name == WHITE_SPACE else "".join(one.split()) != "".join(other.split())


def count_ids(
    mask: NDArray[np.bool_], lengths: NDArray[np.int64], before: int = 0, after: int = 0
) -> NDArray[np.int64]:
    """How many of each text's ids are marked, but for `before` ids at its start and `after` at its end."""
    total, stops = np.concatenate(([0], np.cumsum(mask))), np.cumsum(lengths)
    return np.asarray(total[stops - after] - total[stops - lengths + before], np.int64)


def _losses(counts: NDArray[np.int64], blank: int, example: Callable[[int], str]) -> Losses:
    """The sum of what each text loses; `example` shows that of one of them."""
    affected = np.flatnonzero(counts)
    return Losses(len(affected), int(counts.sum()), blank, example(int(affected[0])) if len(affected) else "")


def _named(character: str) -> str:
    return f"{character!r} (U+{ord(character):04X})"

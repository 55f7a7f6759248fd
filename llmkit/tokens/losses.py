"""What a tokenizer loses of a text: characters without tokens, and what encoding and decoding change.

    changes(info)                                # ["upper case", "accents"]; [] for byte-level tokenizers
    counter = loss_counter(encoder)              # None: every text has tokens
    counter(texts, names, ids, lengths, extra)   # Losses(documents=3, pieces=7, ...)

Byte-level vocabularies with all 256 bytes, and those with byte fallback, have tokens for every text; that is read once
from tokenizer.json. In others a character without a token becomes the unknown token, which is counted in the ids, or,
in BPE without one, nothing: each character that occurs is looked up once. Texts are never decoded to compare them.
"""

from __future__ import annotations

from collections.abc import Sequence
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
}
EXAMPLE = 40  # characters of an example


class Coverage:
    """Which characters the model of a tokenizer.json has tokens for. `unknown`: the id of its unknown token."""

    def __init__(self, content: dict[str, Any]) -> None:
        model, vocabulary = content["model"], content["model"]["vocab"]
        unigram = isinstance(vocabulary, list)
        self._vocabulary = {entry[0] for entry in vocabulary} if unigram else vocabulary
        self._is_bpe = not unigram and model.get("type", "BPE") == "BPE"
        self._byte_level = _is_byte_level(content)
        name = model.get("unk_token")
        self.unknown: int | None = model.get("unk_id") if unigram else vocabulary.get(name)
        before, after = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
        self._forms = {(a, b) for a in ("", before) for b in ("", after)}
        names = {f"<0x{byte:02X}>": byte for byte in range(256)} if model.get("byte_fallback") else {}
        self._fallback = {byte for name, byte in names.items() if name in self._vocabulary}
        has_bytes = self._is_bpe and self._byte_level and len(self._forms) == 1
        self.complete = len(self._fallback) == 256 or (has_bytes and all(map(self._holds, byte_alphabet())))
        self.drops = self._is_bpe and not self.complete and self.unknown is None  # without a trace

    def _holds(self, symbol: str) -> bool:
        return any(before + symbol + after in self._vocabulary for before, after in self._forms)

    def lacks(self, text: str) -> bool:
        """Whether a BPE model has no token for some of the characters of a normalised text."""
        symbols = [byte_alphabet()[byte] for byte in text.encode()] if self._byte_level else text
        return any(
            not (self._holds(symbol) or symbol.isspace() or self._fallback.issuperset(symbol.encode()))
            for symbol in symbols
        )


class LossCounter:
    """Counts what texts lose. Use one per process: it keeps the characters that it has looked up."""

    def __init__(self, coverage: Coverage, encoder: TextEncoder) -> None:
        self._coverage, self._encoder = coverage, encoder
        self._lacking: dict[str, bool] = {}

    def __call__(
        self, texts: Sequence[str], names: Sequence[str], ids: NDArray[Any], lengths: NDArray[np.int64], extra: int
    ) -> Losses:
        """The losses of texts that became `ids`, flat, of which `extra` per text do not stand for it."""
        unknown = self._coverage.unknown
        lost = np.zeros(len(texts), np.int64) if unknown is None else _count(ids == unknown, lengths)
        blank = int((lengths - lost <= extra).sum())
        if self._coverage.drops:
            lost += np.array([self._dropped(text) for text in texts], np.int64)
        affected = np.flatnonzero(lost)
        if not len(affected):
            return Losses(blank=blank)
        first = int(affected[0])
        return Losses(len(affected), int(lost.sum()), blank, f"{self._example(texts[first])} in {names[first]!r}")

    def _dropped(self, text: str) -> int:
        characters = set(text)
        for character in characters - self._lacking.keys():
            self._lacking[character] = self._coverage.lacks(self._encoder.normalize(character))
        return sum(text.count(character) for character in characters if self._lacking[character])

    def _example(self, text: str) -> str:
        """The first piece of a text that is lost."""
        if self._coverage.drops:
            return repr(next(character for character in text if self._lacking[character]))
        encoding = self._encoder.reference.encode(text, add_special_tokens=False)
        spans = zip(encoding.ids, encoding.offsets, strict=True)
        start, stop = next((span for id, span in spans if id == self._coverage.unknown), (0, EXAMPLE))
        return repr(text[start : min(stop, start + EXAMPLE)])


def loss_counter(encoder: TextEncoder) -> LossCounter | None:
    """The counter for a tokenizer; None if it has tokens for every text."""
    coverage = Coverage(encoder.content)
    return None if coverage.complete else LossCounter(coverage, encoder)


def mark_unknown(block: TokenBlock, unknown: int | None) -> TokenBlock:
    """The block with its unknown tokens counted as losses."""
    if unknown is not None and (counts := _count(block.tokens == unknown, block.lengths)).any():
        first = block.ids[int(counts.argmax())]
        block.losses = Losses(int(np.count_nonzero(counts)), int(counts.sum()), 0, f"in {first!r}")
    return block


def unknown_id(info: TokenizerInfo) -> int | None:
    """The id that stands for text without tokens; None where there is none."""
    try:
        coverage = Coverage(orjson.loads(info.files["tokenizer.json"]))
    except (LookupError, TypeError, AttributeError, ValueError):
        return None  # `load_tokenizer` reports how it is damaged
    return None if coverage.complete else coverage.unknown


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
        normal: str = library.normalizer.normalize_str(text) if library.normalizer else text
        if coverage.unknown in ids or (coverage.drops and coverage.lacks(normal)):
            return normal.replace("▁", " ")  # what it lacks is counted, and hides the rest
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
    step = content.get(name) or {}
    return [step, *(step.get("normalizers") or []), *(step.get("pretokenizers") or [])]


def _differs(one: str, other: str, name: str) -> bool:
    return one != other if name == WHITE_SPACE else "".join(one.split()) != "".join(other.split())


def _count(mask: NDArray[np.bool_], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many of each text's ids are marked."""
    total = np.concatenate(([0], np.cumsum(mask)))
    stops = np.cumsum(lengths)
    return np.asarray(total[stops] - total[stops - lengths], np.int64)


def _is_byte_level(content: dict[str, Any]) -> bool:
    return any(part.get("type") == "ByteLevel" for part in _steps(content, "pre_tokenizer"))

"""Pre-tokenisation: the four patterns built into llama.cpp for splitting text into words.

A GGUF file names its pattern, and llama.cpp knows only those compiled into it. A vocabulary trained here uses
one of these, so that it can be exported. `name` is the value of `tokenizer.ggml.pre`. The definitions equal
those in the tokenizer.json of Llama 3, Qwen2, GPT-2 and SmolLM, except that Qwen2's NFC normalisation is
omitted: it loses bytes, and llama.cpp does not apply it.

| name | digits | newlines | case of 's, 't, ... | known words skip merging |
|---|---|---|---|---|
| llama-bpe | groups of up to three | end a piece | ignored | yes |
| qwen2 | one by one | end a piece | ignored | no |
| gpt-2 | any number | like other space | lower only | no |
| smollm | one by one, never joined | like other space | lower only | no |

All patterns work on bytes (one printable character per byte), so any text can be encoded and decodes to itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from llmkit.errors import unknown_name

_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"


@dataclass(frozen=True, slots=True)
class Pattern:
    """`regex` splits the text (empty: GPT-2's rule, built into ByteLevel); `single_digits` isolates digits first."""

    regex: str = ""
    single_digits: bool = False
    ignore_merges: bool = False


PATTERNS = {
    "llama-bpe": Pattern(rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_TAIL}", ignore_merges=True),
    "qwen2": Pattern(rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_TAIL}"),
    "gpt-2": Pattern(),
    "smollm": Pattern(single_digits=True),
}


def find_pattern(name: str) -> Pattern:
    """The pattern called `name`. Raises UsageError, listing the known ones, where there is none."""
    if name not in PATTERNS:
        raise unknown_name("pattern", name, PATTERNS)
    return PATTERNS[name]


def pre_tokenizer(pattern: Pattern) -> Any:
    """The `tokenizers` library's pre-tokenizer for a pattern."""
    from tokenizers import Regex, pre_tokenizers

    if pattern.regex:
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern.regex), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if pattern.single_digits:
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])
    return words


def pattern_name(described: Any) -> str | None:
    """Name of the pattern described under `pre_tokenizer` in a tokenizer.json; None where it is none of the four."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False}
    digits = {"type": "Digits", "individual_digits": True}
    parts = (
        described.get("pretokenizers")
        if isinstance(described, dict) and described.get("type") == "Sequence"
        else [described]
    )
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        return None
    # trim_offsets affects offsets only; use_regex selects GPT-2's rule, and is true by default.
    plain = [{"use_regex": True} | part if part.get("type") == "ByteLevel" else part for part in parts]
    plain = [{key: value for key, value in part.items() if key != "trim_offsets"} for part in plain]
    for name, pattern in PATTERNS.items():
        split = {"type": "Split", "pattern": {"Regex": pattern.regex}, "behavior": "Isolated", "invert": False}
        before = [split] if pattern.regex else [digits] if pattern.single_digits else []
        if plain == [*before, byte_level | {"use_regex": not pattern.regex}]:
            return name
    return None


def gguf_warning(name: str, tokenizer: dict[str, Any]) -> str | None:
    """A warning for a byte-level tokenizer.json whose pattern is none of the four; else None."""
    described = tokenizer.get("pre_tokenizer")
    if "ByteLevel" not in str(described) or pattern_name(described):
        return None
    return (
        f"{name}: its pre-tokenizer is none of {', '.join(PATTERNS)}: "
        "a GGUF file cannot name it, and llama.cpp will not load it"
    )


@cache
def byte_alphabet() -> list[str]:
    """The character for each byte, 0 to 255: itself where printable in Latin-1, else the next free one from
    U+0100 (GPT-2).
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    free = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(free)) for byte in range(256)]

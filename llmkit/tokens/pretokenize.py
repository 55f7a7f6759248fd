"""Pre-tokenisation: the four ways of cutting text into words that llama.cpp has built in.

A GGUF file names its pattern and llama.cpp knows only those compiled into it, so a vocabulary trained here uses one of these and can be
exported later. `name` is the value of `tokenizer.ggml.pre`; the definitions equal those in the tokenizer.json of Llama 3, Qwen2, GPT-2 and
SmolLM, except that Qwen2's NFC normalisation is left out: it loses bytes, and llama.cpp does not apply it.

| name | digits | newlines | case of 's, 't, ... | whole words skip merging |
|---|---|---|---|---|
| llama-bpe | groups of up to three | end a piece | ignored | yes |
| qwen2 | one by one | end a piece | ignored | no |
| gpt-2 | any number | as other space | lower only | no |
| smollm | one by one, always alone | as other space | lower only | no |

All work on bytes (each byte stands as one printable character), so any text can be encoded and comes back unchanged.
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
    """`regex` cuts the text (empty: GPT-2's own rule, built into ByteLevel); `single_digits` first puts every digit alone."""

    regex: str = ""
    single_digits: bool = False
    ignore_merges: bool = False


PATTERNS = {
    "llama-bpe": Pattern(rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_TAIL}", ignore_merges=True),
    "qwen2": Pattern(rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_TAIL}"),
    "gpt-2": Pattern(),
    "smollm": Pattern(single_digits=True),
}


def pattern(name: str) -> Pattern:
    """The pattern called `name`; UsageError with the known ones where there is none."""
    if name not in PATTERNS:
        raise unknown_name("pattern", name, PATTERNS)
    return PATTERNS[name]


def pre_tokenizer(chosen: Pattern) -> Any:
    """The pre-tokenizer of the `tokenizers` library for a pattern."""
    from tokenizers import Regex, pre_tokenizers

    if chosen.regex:
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(chosen.regex), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if chosen.single_digits:
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])
    return words


def pattern_of(described: Any) -> str | None:
    """The name of the pattern that a tokenizer.json describes under `pre_tokenizer`; None where it is none of the four."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False}
    digits = {"type": "Digits", "individual_digits": True}
    parts = (
        described.get("pretokenizers")
        if isinstance(described, dict) and described.get("type") == "Sequence"
        else [described]
    )
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        return None
    # trim_offsets is about offsets alone; use_regex stands for GPT-2's rule, and is true where it is not named.
    plain = [{"use_regex": True} | part if part.get("type") == "ByteLevel" else part for part in parts]
    plain = [{key: value for key, value in part.items() if key != "trim_offsets"} for part in plain]
    for name, chosen in PATTERNS.items():
        split = {"type": "Split", "pattern": {"Regex": chosen.regex}, "behavior": "Isolated", "invert": False}
        before = [split] if chosen.regex else [digits] if chosen.single_digits else []
        if plain == [*before, byte_level | {"use_regex": not chosen.regex}]:
            return name
    return None


def gguf_warning(name: str, tokenizer: dict[str, Any]) -> str | None:
    """What to say of a byte-level tokenizer.json whose pattern is none of the four; None where there is nothing to say."""
    cutter = tokenizer.get("pre_tokenizer")
    if "ByteLevel" not in str(cutter) or pattern_of(cutter):
        return None
    return f"{name}: cuts text as none of {', '.join(PATTERNS)} does: a GGUF file cannot name its pattern, and llama.cpp will not load it"


@cache
def byte_alphabet() -> list[str]:
    """The character that stands for each byte, 0 to 255: itself where it is printable in Latin-1, else the next one free from U+0100 on (GPT-2's rule)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    free = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(free)) for byte in range(256)]

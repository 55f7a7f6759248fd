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

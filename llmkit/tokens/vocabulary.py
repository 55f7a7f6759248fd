"""Train a byte-level BPE vocabulary and write it as a Hugging Face tokenizer directory.

Input: counted pieces of texts. Output: tokenizer.json, tokenizer_config.json and chat_template.jinja, which
transformers, vLLM and `tokenizers` load directly. Ids: special tokens first (<|endoftext|> is 0), then the 256
bytes, then merges by rank. The merges equal those of the `tokenizers` trainer (tokens/trainer.py), for any
order of documents and any number of processes.

Everything that is not text is a special token, including the tags of tool calls (plain added tokens in Qwen and
Hermes). Only then does a text that spells such a tag stay text, whether in a scraped page or a user's message.
To parse tool calls from generated ids, decode them with skip_special_tokens=False.

    llmkit vocab docs.jsonl.zst --size 8192 --pattern llama-bpe -o tok/
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmkit.errors import LlmkitError, UsageError
from llmkit.tokens.pretokenize import Pattern, find_pattern, pre_tokenizer

if TYPE_CHECKING:
    from llmkit.tokens.trainer import PieceCounts

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
FIM = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")  # as StarCoder 2 and Qwen name them
TOOLS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")  # as Hermes and Qwen do
SPECIAL = (END_OF_TEXT, "<|im_start|>", "<|im_end|>", PAD, *FIM, *TOOLS)
RESERVED = 5  # tokens without a meaning, to be assigned later without resizing a model
# Every pattern splits such a name after its letter or digit, so that no merge can form it.
SPECIAL_NAME = re.compile(r"<[^\s<>]*[^\W_][^\s<>]*>|\[[^\s\[\]]*[^\W_][^\s\[\]]*\]")
BYTES = 256
MAX_SIZE = 1 << 22
MULTIPLE = 64  # whole tiles of embedding rows for the matrix units

# ChatML with Hermes-style tool calls. The generation tags let transformers and TRL mask the assistant's turns.
CHAT_TEMPLATE = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages and messages[0]['role'] == 'system' %}
        {{- messages[0]['content'] + '\\n\\n' }}
    {%- endif %}
    {{- 'You may call these functions:\\n<tools>' }}
    {%- for tool in tools %}
        {{- '\\n' + (tool | tojson) }}
    {%- endfor %}
    {{- '\\n</tools>\\nAnswer a call as <tool_call>{"name": ..., "arguments": ...}</tool_call><|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message['role'] == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- generation %}
            {{- message['content'] or '' }}
            {%- for call in message.get('tool_calls') or [] %}
                {%- set call = call.get('function') or call %}
                {{- '\\n<tool_call>\\n' + ({'name': call['name'], 'arguments': call['arguments']} \
| tojson) + '\\n</tool_call>' }}
            {%- endfor %}
            {{- '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\\n' }}
    {%- elif message['role'] == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message['content'] + '\\n</tool_response><|im_end|>\\n' }}
    {%- elif not (tools and loop.first and message['role'] == 'system') %}
        {{- '<|im_start|>' + message['role'] + '\\n' + (message['content'] or '') + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A trained tokenizer: files by name, size in tokens, number of merges learned, and number requested."""

    files: dict[str, str]
    size: int
    merges: int
    merges_requested: int


def special_tokens(custom: Sequence[str] = ()) -> list[str]:
    """The special tokens by id: ours, then `custom` ones in place of reserved ones, then the remaining reserved ones.

    Raises UsageError for a name that is not allowed.
    """
    for i, name in enumerate(custom):
        if not SPECIAL_NAME.fullmatch(name):
            raise UsageError(
                f"invalid special token {name!r}", "name it like <name> or [NAME], so that text cannot form it"
            )
        if name in SPECIAL or name in custom[:i] or name.startswith("<|reserved_"):
            raise UsageError(f"duplicate special token {name!r}", "existing ones: " + " ".join(SPECIAL))
    return [*SPECIAL, *custom, *(reserved_token(i) for i in range(max(0, RESERVED - len(custom))))]


def check_size(size: int, multiple: int = MULTIPLE, special: int = len(SPECIAL) + RESERVED) -> int:
    """`size` rounded up to a multiple of `multiple`. Raises UsageError where it is too small for bytes and
    special tokens, or too large.
    """
    least = BYTES + special
    if multiple < 1:
        raise UsageError(f"a multiple of {multiple}", "use 1 for any size")
    if size < least:
        raise UsageError(
            f"a vocabulary of {size} tokens cannot hold {BYTES} bytes and {special} special tokens",
            f"give --size {-(-least // multiple) * multiple} or more",
        )
    if size > MAX_SIZE:
        raise UsageError(f"a vocabulary of {size:,} tokens", f"the largest is {MAX_SIZE:,}")
    return -(-size // multiple) * multiple


def train(
    texts: Iterable[str], size: int, pattern_name: str = "llama-bpe", min_frequency: int = 2, multiple: int = MULTIPLE
) -> Vocabulary:
    """Train a vocabulary of `size` tokens (validated by `check_size`) on texts; see `train_on_counts`."""
    from llmkit.tokens.trainer import PieceCounts

    find_pattern(pattern_name)
    counts = PieceCounts()
    for text in texts:
        counts.add_texts([text.encode()], pattern_name)
    return train_on_counts(counts, size, pattern_name, min_frequency, multiple)


def train_on_counts(
    counts: PieceCounts, size: int, pattern_name: str, min_frequency: int, multiple: int, custom: Sequence[str] = ()
) -> Vocabulary:
    """Train a vocabulary of `size` tokens (validated by `check_size`) on counted pieces, including the special
    tokens `custom`.

    Where too few pairs occur `min_frequency` times, the vocabulary is smaller, padded to a multiple of
    `multiple` with reserved tokens. Raises LlmkitError where there is no text.
    """
    from tokenizers import decoders

    pattern, special = find_pattern(pattern_name), special_tokens(custom)
    base = len(special) + BYTES
    texts = counts.uncounted()
    tokenizer, merges = (
        _train_by_library(texts, size, pattern, min_frequency, special)
        if texts
        else _train_by_kernels(counts, size, pattern, min_frequency, special)
    )
    tokenizer.decoder = decoders.ByteLevel()
    missing = -tokenizer.get_vocab_size() % multiple
    first = max(0, RESERVED - len(custom))
    tokenizer.add_special_tokens([*special, *(reserved_token(first + i) for i in range(missing))])
    files = {"tokenizer.json": tokenizer.to_str(pretty=True) + "\n", "chat_template.jinja": CHAT_TEMPLATE}
    return Vocabulary(files, tokenizer.get_vocab_size(), merges, size - base)


def _train_by_library(
    texts: list[bytes], size: int, pattern: Pattern, min_frequency: int, special: list[str]
) -> tuple[Any, int]:
    """The tokenizer made by the `tokenizers` trainer, which equals ours, and its number of merges."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    if not any(texts):
        raise LlmkitError("no text to train on", "the input is empty")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = Tokenizer(models.BPE(ignore_merges=pattern.ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizer(pattern)
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=min_frequency,
        special_tokens=[*special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text.decode() for text in texts), trainer)
    return tokenizer, len(json.loads(tokenizer.to_str())["model"]["merges"])


def _train_by_kernels(
    counts: PieceCounts, size: int, pattern: Pattern, min_frequency: int, special: list[str]
) -> tuple[Any, int]:
    """The tokenizer with the merges learned from counted pieces, and their number."""
    from tokenizers import Tokenizer, models

    from llmkit.tokens.trainer import ALPHABET

    base = len(special) + BYTES
    pairs, _ = counts.merges(size - base, min_frequency)
    if not len(pairs) and not len(counts.pieces()[1]):
        raise LlmkitError("no text to train on", "the input is empty")
    tokens = list(ALPHABET)
    for a, b in pairs.tolist():
        tokens.append(tokens[a] + tokens[b])
    ids = {token: i for i, token in enumerate([*special, *tokens])}
    merges = [(tokens[a], tokens[b]) for a, b in pairs.tolist()]
    tokenizer = Tokenizer(models.BPE(ids, merges, ignore_merges=pattern.ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizer(pattern)
    return tokenizer, len(merges)


def reserved_token(i: int) -> str:
    """Name of a reserved token."""
    return f"<|reserved_{i}|>"


def tokenizer_config(lineage: dict[str, Any]) -> str:
    """The text of tokenizer_config.json, with the lineage under `llmkit`."""
    config = {
        "add_bos_token": False,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": END_OF_TEXT,
        "llmkit": lineage,
        "model_max_length": 10**30,
        "pad_token": PAD,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    return json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"

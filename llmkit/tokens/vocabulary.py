"""Train a byte-level BPE vocabulary and write it as a Hugging Face tokenizer directory.

Counted pieces of texts in, files out: tokenizer.json, tokenizer_config.json, chat_template.jinja, which transformers, vLLM and `tokenizers` load as they
are. Ids: special tokens first (<|endoftext|> is 0), then the 256 bytes, then merges by rank. The merges are those of the `tokenizers` trainer
(tokens/trainer.py), the same for any order of documents and any number of processes.

Everything that is no text is a special token, the tags of tool calls too (Qwen and Hermes have those as plain added tokens): only so a text that spells
one stays text, in a scraped page as in what a user says. Who parses tool calls from generated ids decodes them with skip_special_tokens=False.

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
from llmkit.tokens.pretokenize import Pattern, pattern, pre_tokenizer

if TYPE_CHECKING:
    from llmkit.tokens.trainer import Counts

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
FILL_IN = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")  # as StarCoder 2 and Qwen name them
TOOLS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")  # as Hermes and Qwen do
SPECIAL = (END_OF_TEXT, "<|im_start|>", "<|im_end|>", PAD, *FILL_IN, *TOOLS)
RESERVED = 5  # tokens without a meaning yet, so that one can be given without resizing a model
# Every pattern cuts behind the letter or digit: no merge makes such a name.
NAME = re.compile(r"<[^\s<>]*[^\W_][^\s<>]*>|\[[^\s\[\]]*[^\W_][^\s\[\]]*\]")
BYTES = 256
MAX_SIZE = 1 << 22
MULTIPLE = 64  # embedding rows in whole tiles of the matrix units

# ChatML with Hermes-style tool calls. The generation marks let transformers and TRL find what the assistant says.
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
                {{- '\\n<tool_call>\\n' + ({'name': call['name'], 'arguments': call['arguments']} | tojson) + '\\n</tool_call>' }}
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
    """A trained tokenizer: files by name, its size, and how many merges were made of those asked for."""

    files: dict[str, str]
    size: int
    merges: int
    merges_asked: int


def special_tokens(own: Sequence[str] = ()) -> list[str]:
    """The special tokens by id: ours, `own` in the place of reserved ones, and what is left of those. UsageError where a name cannot be one."""
    for i, name in enumerate(own):
        if not NAME.fullmatch(name):
            raise UsageError(
                f"a special token {name!r}", "name it like <name> or [NAME], so that it is no piece of text"
            )
        if name in SPECIAL or name in own[:i] or name.startswith("<|reserved_"):
            raise UsageError(f"a special token {name!r} twice", "there already: " + " ".join(SPECIAL))
    return [*SPECIAL, *own, *(reserved(i) for i in range(max(0, RESERVED - len(own))))]


def check_size(size: int, multiple: int = MULTIPLE, special: int = len(SPECIAL) + RESERVED) -> int:
    """`size` rounded up to a multiple of `multiple`; UsageError where it cannot hold the bytes and special tokens, or is absurd."""
    least = BYTES + special
    if multiple < 1:
        raise UsageError(f"a multiple of {multiple}", "give 1 for any size")
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
    """A vocabulary of `size` tokens (already checked by `check_size`) from `texts`; as `made_of`."""
    from llmkit.tokens.trainer import Counts

    pattern(pattern_name)
    counts = Counts()
    for text in texts:
        counts.add_texts([text.encode()], pattern_name)
    return made_of(counts, size, pattern_name, min_frequency, multiple)


def made_of(
    counts: Counts, size: int, pattern_name: str, min_frequency: int, multiple: int, own: Sequence[str] = ()
) -> Vocabulary:
    """A vocabulary of `size` tokens (already checked by `check_size`) from the counted pieces of texts, with the special tokens `own` too.

    Where the texts hold fewer pairs that occur `min_frequency` times, it ends after those, filled up to a multiple of `multiple` with
    reserved tokens. LlmkitError where there is no text at all.
    """
    from tokenizers import decoders

    chosen, special = pattern(pattern_name), special_tokens(own)
    base = len(special) + BYTES
    texts = counts.uncounted()
    tokenizer, merges = (
        _by_library(texts, size, chosen, min_frequency, special)
        if texts
        else _by_kernels(counts, size, chosen, min_frequency, special)
    )
    tokenizer.decoder = decoders.ByteLevel()
    missing = -tokenizer.get_vocab_size() % multiple
    left = max(0, RESERVED - len(own))
    tokenizer.add_special_tokens([*special, *(reserved(left + i) for i in range(missing))])
    files = {"tokenizer.json": tokenizer.to_str(pretty=True) + "\n", "chat_template.jinja": CHAT_TEMPLATE}
    return Vocabulary(files, tokenizer.get_vocab_size(), merges, size - base)


def _by_library(
    texts: list[bytes], size: int, chosen: Pattern, min_frequency: int, special: list[str]
) -> tuple[Any, int]:
    """The tokenizer that the `tokenizers` trainer makes of texts, the same as ours, and how many merges it has."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = Tokenizer(models.BPE(ignore_merges=chosen.ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizer(chosen)
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=min_frequency,
        special_tokens=[*special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text.decode() for text in texts), trainer)
    return tokenizer, len(json.loads(tokenizer.to_str())["model"]["merges"])


def _by_kernels(counts: Counts, size: int, chosen: Pattern, min_frequency: int, special: list[str]) -> tuple[Any, int]:
    """The tokenizer of the merges that counted pieces give, and how many those are."""
    from tokenizers import Tokenizer, models

    from llmkit.tokens.trainer import ALPHABET

    base = len(special) + BYTES
    pairs, _ = counts.merges(size - base, min_frequency)
    if not len(pairs) and not len(counts.words()[1]):
        raise LlmkitError("no text to train on", "the input is empty")
    tokens = list(ALPHABET)
    for a, b in pairs.tolist():
        tokens.append(tokens[a] + tokens[b])
    ids = {token: i for i, token in enumerate([*special, *tokens])}
    merges = [(tokens[a], tokens[b]) for a, b in pairs.tolist()]
    tokenizer = Tokenizer(models.BPE(ids, merges, ignore_merges=chosen.ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizer(chosen)
    return tokenizer, len(merges)


def reserved(i: int) -> str:
    """Name of a reserved token."""
    return f"<|reserved_{i}|>"


def tokenizer_config(lineage: dict[str, Any]) -> str:
    """tokenizer_config.json; the lineage stands under `llmkit`."""
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

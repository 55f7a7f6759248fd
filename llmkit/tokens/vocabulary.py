"""Train a byte-level BPE vocabulary and write it as a Hugging Face tokenizer directory.

Documents in (any iterable of texts), files out: tokenizer.json, tokenizer_config.json, chat_template.jinja, which transformers, vLLM and
`tokenizers` load as they are. Ids: special tokens first (<|endoftext|> is 0), then the 256 bytes, then merges by rank. Texts are counted
as they stream by, so memory grows with the number of distinct words, not with the text. Merges are those of the `tokenizers` trainer: the most
frequent pair first, ties by lower ids, hence the same for any order of documents and any number of threads. Cost: about 2 MB of text a
second and core.

    llmkit vocab docs.jsonl.zst --size 8192 --pattern llama-bpe -o tok/
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from llmkit.errors import LlmkitError, UsageError
from llmkit.tokens.pretokenize import pattern, pre_tokenizer

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
SPECIAL = (END_OF_TEXT, "<|im_start|>", "<|im_end|>", PAD)
RESERVED = 12  # tokens without a meaning yet, so that one can be given without resizing a model
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


def check_size(size: int, multiple: int = MULTIPLE) -> int:
    """`size` rounded up to a multiple of `multiple`; UsageError where it cannot hold the bytes and special tokens, or is absurd."""
    least = BYTES + len(SPECIAL) + RESERVED
    if multiple < 1:
        raise UsageError(f"a multiple of {multiple}", "give 1 for any size")
    if size < least:
        raise UsageError(
            f"a vocabulary of {size} tokens cannot hold {BYTES} bytes and {least - BYTES} special tokens",
            f"give --size {-(-least // multiple) * multiple} or more",
        )
    if size > MAX_SIZE:
        raise UsageError(f"a vocabulary of {size:,} tokens", f"the largest is {MAX_SIZE:,}")
    return -(-size // multiple) * multiple


def limit_threads(jobs: int) -> None:
    """Let the `tokenizers` library use `jobs` threads. It reads this when it first works, so: before anything is encoded or trained."""
    os.environ["RAYON_NUM_THREADS"] = str(jobs)
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if jobs > 1 else "false"


def train(
    texts: Iterable[str], size: int, pattern_name: str = "llama-bpe", min_frequency: int = 2, multiple: int = MULTIPLE
) -> Vocabulary:
    """A vocabulary of `size` tokens (already checked by `check_size`) from `texts`.

    Where the texts hold fewer pairs that occur `min_frequency` times, it ends after those, filled up to a multiple of `multiple` with
    reserved tokens. LlmkitError where there is no text at all.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    chosen = pattern(pattern_name)
    tokenizer = Tokenizer(models.BPE(ignore_merges=chosen.ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizer(chosen)
    tokenizer.decoder = decoders.ByteLevel()
    special = [*SPECIAL, *(reserved(i) for i in range(RESERVED))]
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=min_frequency,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    characters = 0

    def counted() -> Iterable[str]:
        nonlocal characters
        for text in texts:
            characters += len(text)
            yield text

    tokenizer.train_from_iterator(counted(), trainer)
    if not characters:
        raise LlmkitError("no text to train on", "the input is empty")
    base = len(special) + BYTES
    merges = tokenizer.get_vocab_size() - base
    missing = -tokenizer.get_vocab_size() % multiple
    if missing:
        tokenizer.add_special_tokens([reserved(RESERVED + i) for i in range(missing)])
    files = {"tokenizer.json": tokenizer.to_str(pretty=True) + "\n", "chat_template.jinja": CHAT_TEMPLATE}
    return Vocabulary(files, tokenizer.get_vocab_size(), merges, size - base)


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

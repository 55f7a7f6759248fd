"""Fixtures for tests of chat/ and alignment/: a tokenizer with the special tokens of several chat formats, four templates,
and a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmkit.model.config import ModelConfig
from llmkit.model.decoder import Decoder
from llmkit.model.pretrained.checkpoint import save_model

LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
TULU = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ '<|system|>\\n' + message['content'] + '\\n' }}"
    "{% elif message['role'] == 'user' %}{{ '<|user|>\\n' + message['content'] + '\\n' }}"
    "{% elif message['role'] == 'assistant' %}{% if not loop.last %}{{ '<|assistant|>\\n' + message['content'] + eos_token + '\\n' }}"
    "{% else %}{{ '<|assistant|>\\n' + message['content'] + eos_token }}{% endif %}{% endif %}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}{% endfor %}"
)
# The essence of Qwen3: thoughts of earlier turns are left out, and a last answer without one gets an empty thought.
QWEN3 = """\
{%- for message in messages %}
{%- set content = message.content %}
{%- if message.role == 'assistant' %}
{%- set thought = '' %}
{%- if '</think>' in content %}
{%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
{%- if loop.last %}
{{- '<|im_start|>assistant\\n<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
{%- else %}
{{- '<|im_start|>assistant\\n' + content }}
{%- endif %}
{%- for call in message.tool_calls or [] %}
{{- '\\n<tool_call>\\n' + call.function | tojson + '\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- else %}
{{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
SPECIAL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
]  # fmt: skip


@pytest.fixture(scope="session")
def files() -> dict[str, str]:
    """Tokenizer files without a chat template: byte-level BPE, 290 ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["what is the weather like? it is sunny today, assistant said to user"] * 4, trainer)
    config = {
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|endoftext|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    return {"tokenizer.json": tokenizer.to_str(), "tokenizer_config.json": json.dumps(config)}


@pytest.fixture(scope="session")
def templates(files: dict[str, str]) -> dict[str, dict[str, str]]:
    """The tokenizer with each of four chat templates."""
    from llmkit.chat.templates import CHATML, with_template

    sources = {"chatml": CHATML, "llama3": LLAMA3, "tulu": TULU, "qwen3": QWEN3}
    return {name: with_template(files, template) for name, template in sources.items()}


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory, files: dict[str, str]) -> Path:
    """A tiny random model directory with the tokenizer, without a chat template; context 96."""
    path = tmp_path_factory.mktemp("alignment") / "base"
    path.mkdir()
    config = ModelConfig(290, 32, 64, 2, 4, 2, 8, max_position_embeddings=96, eos_token_id=0)
    model = Decoder(config)
    model.initialize(0)
    save_model(path, model.state_dict(), config, files)
    return path

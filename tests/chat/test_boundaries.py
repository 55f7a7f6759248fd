"""Where a prompt ends and its answer begins, no token lies across."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from llmkit.chat.encode import encode_conversation, row_encoder
from llmkit.chat.messages import turn
from llmkit.chat.prompts import encode
from llmkit.chat.rows import Conversation
from llmkit.chat.templates import tokenizer_of, with_template

TEXT = ["say water, say fire", "water and fire: say: help", "the word is water\n\nso say: fire"] * 3
CONFIG = json.dumps({"eos_token": "</s>"})
SPACED = (
    "{% for m in messages %}{% if m.role == 'user' %}User: {{ m.content }}\n{% else %}Assistant: {{ m.content }}</s>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}Assistant: {% endif %}"
)
# The essence of Mistral 0.3: no header, and tools in front of the last question.
TOOLS_LAST = (
    "{% for m in messages %}{% if m.role == 'user' %}"
    "{% if tools and loop.index0 >= messages | length - 2 and (loop.last or messages[loop.index0 + 1].role == 'assistant' and loop.index0 + 2 == messages | length) %}"
    "[AVAILABLE_TOOLS]{{ tools | tojson }}{% endif %}[INST] {{ m.content }}[/INST]"
    "{% else %}{{ ' ' + m.content | trim + '</s>' }}{% endif %}{% endfor %}"
)


def make(kind: str) -> dict[str, str]:
    """Files of a small tokenizer in which words have their space in front."""
    special = ["<unk>", "</s>", "<|end|>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=False))
    letters = [*map(chr, range(32, 127)), "\n", "▁"]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=letters, show_progress=False)
    if kind == "bytes":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer.initial_alphabet = pre_tokenizers.ByteLevel.alphabet()
    elif kind == "prefixed":  # as Llama 2 and Mistral
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
        tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    else:  # as T5 and Gemma
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer.train_from_iterator(TEXT, trainer)
    if kind == "prefixed":
        tokenizer.pre_tokenizer = None
    return {"tokenizer.json": tokenizer.to_str(), "tokenizer_config.json": CONFIG}


@pytest.fixture(scope="module", params=["bytes", "prefixed", "first"])
def files(request: pytest.FixtureRequest) -> dict[str, str]:
    return make(request.param)


def trained_text(tokens: np.ndarray, weights: np.ndarray, files: dict[str, str]) -> str:
    return str(tokenizer_of(files).decode(tokens[weights > 0].tolist(), skip_special_tokens=False)).strip()


@pytest.mark.parametrize("answer", ["water", "water and fire", "help: <|end|> say"])
def test_prompts_that_end_in_a_space(files: dict[str, str], answer: str) -> None:
    """Property: all of the answer is trained, behind the very ids of the prompt that inference sees."""
    fields = {"prompt": "the word is water. say: ", "completion": answer}
    (row,) = row_encoder(files, template=False)(fields)
    prompt = encode(fields["prompt"], files)
    assert row.tokens[: len(prompt)].tolist() == prompt
    assert not row.weights[: len(prompt)].any()
    assert row.weights[len(prompt) :].all()
    assert trained_text(row.tokens, row.weights, files) == answer + "</s>"
    (plain,) = row_encoder(files, template=False)({"text": fields["prompt"] + answer})
    assert tokenizer_of(files).decode(plain.tokens.tolist()) == tokenizer_of(files).decode(row.tokens.tolist())
    assert len(plain.tokens) <= len(row.tokens)  # nothing else is taken apart


def test_generation_prompts_that_end_in_a_space(files: dict[str, str]) -> None:
    """Property: every turn is trained whole."""
    files = with_template(files, SPACED)
    messages = [
        turn(role, text)
        for role, text in zip(["user", "assistant"] * 3, ["say", "water", "and", "fire", "so", "help me"], strict=True)
    ]
    row = encode_conversation(Conversation(messages), files)
    ids, trained, spans = row.tokens.tolist(), row.weights > 0, []
    for i, here in enumerate(trained):
        if here and not (i and trained[i - 1]):
            spans.append([])
        if here:
            spans[-1].append(ids[i])
    texts = [str(tokenizer_of(files).decode(span, skip_special_tokens=False)).strip() for span in spans]
    assert texts == ["water</s>", "fire</s>", "help me</s>"]


def test_tools_in_front_of_the_last_question() -> None:
    """Property: an earlier answer is trained with its space, whether the template shows tools before a later question or not."""
    files = with_template(make("bytes"), TOOLS_LAST)
    messages = [turn("user", "say"), turn("assistant", "water"), turn("user", "and"), turn("assistant", "fire")]
    tools = [{"type": "function", "function": {"name": "help", "parameters": {"type": "object", "properties": {}}}}]
    found = []
    for described in (None, tools):
        row = encode_conversation(Conversation(messages, described), files)
        pieces = [
            tokenizer_of(files).decode([i], skip_special_tokens=False) for i in row.tokens[row.weights > 0].tolist()
        ]
        found.append("".join(pieces))
    assert found == [" water</s> fire</s>"] * 2

"""The patterns, the trainer, and the resulting tokenizer directory."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.errors import LlmkitError, UsageError
from llmkit.shards.tokenizer_info import TokenizerInfo
from llmkit.tokens import vocabulary
from llmkit.tokens.pretokenize import PATTERNS, find_pattern, pre_tokenizer
from llmkit.tokens.trainer import PieceCounts

Trained = Callable[[str], TokenizerInfo]

# As their authors published them: GPT-2's encoder.py, Llama 3's tokenizer.py, Qwen2's tokenization file; SmolLM
# puts each digit alone first.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SNIPPETS = st.lists(
    st.sampled_from(["I'LL", "don't", "'s", " ", "  ", "\n", "\r\n", "\t", "x", "Word", "12", "3", "½", "é", "e\u0301", "日本", "🙂", "=", "...", "\u00a0", "\u2028"])
    | st.text(st.characters(exclude_categories=["Cn", "Cs"]), max_size=4)  # unassigned ones depend on each library's Unicode version
).map("".join)  # fmt: skip


def pieces(name: str, text: str) -> list[str]:
    """Words of `text` by the published expression, under the `regex` package."""
    if name == "smollm":
        return [w for part in regex.split(r"(\p{N})", text) if part for w in regex.findall(GPT2, part)]
    return regex.findall({"gpt-2": GPT2, "llama-bpe": LLAMA3, "qwen2": QWEN2}[name], text)


@pytest.mark.parametrize("name", PATTERNS)
@settings(max_examples=150, deadline=None)
@given(text=SNIPPETS)
def test_patterns_cut_as_published(name: str, text: str) -> None:
    """Parity with the models' own expressions under the `regex` package."""
    found = pre_tokenizer(find_pattern(name)).pre_tokenize_str(text)
    assert [text[start:stop] for _, (start, stop) in found] == [w for w in pieces(name, text) if w]


@pytest.mark.parametrize("name", PATTERNS)
def test_the_file_is_the_librarys(name: str) -> None:
    """Parity: tokenizer.json equals, except for a final newline, the one trained and written by the
    `tokenizers` library.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    chosen = find_pattern(name)
    theirs = Tokenizer(models.BPE(ignore_merges=chosen.ignore_merges))
    theirs.pre_tokenizer = pre_tokenizer(chosen)
    theirs.decoder = decoders.ByteLevel()
    learner = trainers.BpeTrainer(
        vocab_size=320,
        min_frequency=2,
        special_tokens=vocabulary.special_tokens(),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [
        "The quick brown fox didn't jump over 1234 lazy dogs; the 12 dogs did.\n",
        "naïve 東京都, 東京 🙂🙂🙂\r\n\n  the",
    ] * 3
    theirs.train_from_iterator(texts, learner)
    assert vocabulary.train(texts, 320, name, multiple=1).files["tokenizer.json"] == theirs.to_str(pretty=True) + "\n"


@pytest.mark.parametrize("name", PATTERNS)
def test_transformers_loads_the_directory(name: str, trained: Trained, tmp_path: Path) -> None:
    """Parity: ids of transformers' AutoTokenizer and of `tokenizers`; text decodes to itself."""
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    for file, text in trained(name).files.items():
        (tmp_path / file).write_bytes(text.encode())
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    plain = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    text = "It'LL  take\r\n\n 12345 e\u0301 日本語 \u0085 ½ 🙂 <|im_end|>\t."
    assert theirs(text)["input_ids"] == plain.encode(text).ids
    assert theirs.decode(theirs(text)["input_ids"]) == text
    assert (theirs.eos_token_id, theirs.pad_token_id, theirs.bos_token_id, len(theirs)) == (0, 3, None, 384)
    assert type(theirs).__name__ != "PreTrainedTokenizer"


def test_chat_template(trained: Trained, tmp_path: Path) -> None:
    """Behaviour under transformers: ChatML, a mask of assistant turns with their stop token, tools and tool responses."""
    from transformers import AutoTokenizer

    for file, text in trained("llama-bpe").files.items():
        (tmp_path / file).write_bytes(text.encode())
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yo"},
    ]
    head = "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert theirs.apply_chat_template(messages, tokenize=False) == head + "yo<|im_end|>\n"
    assert theirs.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True) == head
    row = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    learned = [i for i, m in zip(row["input_ids"], row["assistant_masks"], strict=True) if m]
    assert theirs.decode(learned) == "yo<|im_end|>"
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2"},
    ]
    text = theirs.apply_chat_template(
        messages, tools=[{"type": "function", "function": {"name": "add"}}], tokenize=False
    )
    assert '<tools>\n{"type": "function", "function": {"name": "add"}}\n</tools>' in text
    assert '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>' in text
    assert "<tool_response>\n2\n</tool_response>" in text


def test_ids_are_laid_out_as_documented(trained: Trained) -> None:
    """Behaviour: ids are special tokens, bytes, merges, in this order; the model and the added tokens agree."""
    content = json.loads(trained("llama-bpe").files["tokenizer.json"])
    by_id = {i: token for token, i in content["model"]["vocab"].items()}
    named = [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<|pad|>",
        "<|fim_prefix|>",
        "<|fim_middle|>",
        "<|fim_suffix|>",
    ]
    named += ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<|reserved_0|>"]
    assert [by_id[i] for i in range(12)] == named
    assert {t["content"] for t in content["added_tokens"]} == {by_id[i] for i in range(16)}
    assert all(t["special"] for t in content["added_tokens"])
    assert all(len(by_id[i]) == 1 for i in range(16, 272)) and all(len(by_id[i]) > 1 for i in range(272, 384))
    assert content["model"]["ignore_merges"] is True
    assert json.loads(trained("qwen2").files["tokenizer.json"])["model"]["ignore_merges"] is False


def test_special_tokens_of_ones_own() -> None:
    """Behaviour: custom special tokens replace reserved ones and may be more; names that text can form, and
    duplicates, are refused.
    """
    reserved = [f"<|reserved_{i}|>" for i in range(5)]
    assert vocabulary.special_tokens()[11:] == reserved
    assert vocabulary.special_tokens(["<think>", "[INST]"])[11:] == ["<think>", "[INST]", *reserved[:3]]
    assert vocabulary.special_tokens([f"<{i}>" for i in range(7)])[11:] == [f"<{i}>" for i in range(7)]
    for own in (
        ["think"],
        ["<|>"],
        ["<>"],
        ["< a>"],
        ["<a><b>"],
        ["<__>"],
        [""],
        ["<|pad|>"],
        ["<a>", "<a>"],
        ["<|reserved_9|>"],
    ):
        with pytest.raises(UsageError, match="special token"):
            vocabulary.special_tokens(own)


@settings(max_examples=300, deadline=None)
@given(name=st.from_regex(vocabulary.SPECIAL_NAME, fullmatch=True), around=st.tuples(SNIPPETS, SNIPPETS))
def test_no_piece_of_text_holds_the_name_of_a_special_token(name: str, around: tuple[str, str]) -> None:
    """Property: every pattern splits every allowed name, so that no merge can form one."""
    text = name.join(around)
    for chosen in PATTERNS.values():
        assert all(name not in text[start:stop] for _, (start, stop) in pre_tokenizer(chosen).pre_tokenize_str(text))


def test_order_of_texts_does_not_matter() -> None:
    """Property: the same bytes for shuffled texts."""
    texts = [f"word{i % 17} and thing{i % 5}\n" for i in range(200)]
    shuffled = random.Random(1).sample(texts, len(texts))
    assert vocabulary.train(texts, 320).files == vocabulary.train(shuffled, 320).files


def test_too_few_texts_make_a_smaller_valid_vocabulary() -> None:
    """Behaviour: the number of merges is reported, and reserved tokens pad the size."""
    made = vocabulary.train(["ab ab ab"], 1024)
    assert (made.merges, made.merges_requested, made.size) == (2, 752, 320)
    content = json.loads(made.files["tokenizer.json"])
    ids = {t["content"]: t["id"] for t in content["added_tokens"]}
    assert sorted(ids.values()) == [*range(16), *range(274, 320)]
    assert vocabulary.train(["ab ab ab"], 1024, multiple=1).size == 274
    assert vocabulary.train(["ab ab xy"], 1024, min_frequency=1, multiple=1).merges > 2


def test_sizes() -> None:
    """Behaviour: sizes are rounded up; those too small for the bytes, or far too large, are refused."""
    assert vocabulary.check_size(8192) == 8192
    assert vocabulary.check_size(8193) == 8256
    assert vocabulary.check_size(8193, 1) == 8193
    for size in (0, -5, 271, 1 << 23):
        with pytest.raises(UsageError):
            vocabulary.check_size(size)
    with pytest.raises(UsageError, match="did you mean|unknown pattern"):
        find_pattern("llama")


@pytest.mark.parametrize("cold", [True, False])
def test_nothing_is_learnt_from_empty_texts(cold: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behaviour: refused, whether the kernels are compiled or the library would learn."""
    monkeypatch.setattr("llmkit.tokens.trainer.cold", lambda _: cold)
    with pytest.raises(LlmkitError, match="no text"):
        vocabulary.train(["", ""], 320)


def test_few_texts_do_not_wait_for_a_compiler(tmp_path: Path) -> None:
    """Parity of the library's training, used for few texts where nothing is compiled, with the compiled one:
    the same files.
    """
    texts = ["The quick brown fox, 123 caf\u00e9s", "the quick red fox " * 3, "\u65e5\u672c\u8a9e \u65e5\u672c"]
    program = (
        "import sys, json; from llmkit.tokens import vocabulary\n"
        "made = vocabulary.train(json.loads(sys.argv[1]), 320, 'qwen2')\n"
        "from llmkit.kernels import cold; print(json.dumps([made.files, made.merges, cold()]))"
    )
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", program, json.dumps(texts)], env=environment, capture_output=True, text=True
    )
    files, merges, nothing_compiled = json.loads(run.stdout)
    counts = PieceCounts()
    counts.add_texts([text.encode() for text in texts], "qwen2")
    counts.pieces()  # counted, however few
    made = vocabulary.train_on_counts(counts, 320, "qwen2", 2, 64)
    assert nothing_compiled and (files, merges) == (made.files, made.merges) and merges > 10

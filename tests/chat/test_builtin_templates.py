"""Chat templates by name: their text against the published ones, what is trained on, and the tokens they bring."""

from __future__ import annotations

import importlib.util
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from llmkit.chat import builtin
from llmkit.chat.masks import check_template, encode_chat
from llmkit.chat.templates import render, special_contents, special_tokens, tokenizer_of, with_template
from llmkit.errors import LlmkitError
from llmkit.tokens.extend import with_control_tokens

Turn = dict[str, Any]
SYSTEM = {"role": "system", "content": " be brief "}


def user(text: str) -> Turn:
    return {"role": "user", "content": text}


def answer(text: str, **more: Any) -> Turn:
    return {"role": "assistant", "content": text, **more}


def calls(*arguments: Any) -> list[Turn]:
    return [{"type": "function", "function": {"name": "look_up", "arguments": value}} for value in arguments]


def result(text: str) -> Turn:
    return {"role": "tool", "name": "look_up", "content": text}


TOOLS = [{"type": "function", "function": {"name": "look_up", "description": "é", "parameters": {"type": "object"}}}]
PLAIN = [
    [user(" hi ")],
    [user("a"), answer(" b ")],
    [SYSTEM, user("a"), answer("b\n"), user("c\n\nd"), answer("<b> 'd' é")],
    [user("a"), answer("b"), user("c")],
]
DETAILED = [
    [user("a"), answer("<think>\nx\n</think>\n\nb"), user("c"), answer("<think>\ny\n</think>\n\nd")],
    [user("a"), answer("b", reasoning_content="t"), user("c"), answer("\nd", reasoning_content="\nr\n")],
    [user("a"), answer("", tool_calls=calls({"x": "é"}, '{"y": 2}')), result("r1"), result("r2"), answer("z")],
    [
        user("a"),
        answer("w", reasoning_content="q", tool_calls=calls({})),
        result("r"),
        answer("z"),
        user("m"),
        answer("n"),
    ],
    [answer("x"), answer("y")],
    [user("a"), SYSTEM, answer("b")],
    [user("<tool_response>x</tool_response>"), answer("b", reasoning_content="u")],
]
# Names of the same formats among the templates that TRL collects from model repositories.
PUBLISHED = {"gemma": ("gemma3", PLAIN), "llama-3": ("llama3", PLAIN), "qwen3": ("qwen3", PLAIN + DETAILED)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_bytes_of_published_templates(name: str) -> None:
    """Parity: transformers renders ours and the one in the model's repository to the same text, prompts and tools included."""
    from transformers.utils.chat_template_utils import render_jinja_template

    published, conversations = PUBLISHED[name]
    found = importlib.util.find_spec("trl")
    assert found and found.submodule_search_locations
    theirs = (Path(found.submodule_search_locations[0]) / "chat_templates" / f"{published}.jinja").read_text()
    for messages, prompt, tools in itertools.product(conversations, (False, True), (None, TOOLS)):
        settings = {"add_generation_prompt": prompt, "tools": tools, "bos_token": "<s>", "eos_token": "</s>"}
        ours, expected = (
            render_jinja_template([messages], chat_template=text, **settings)[0][0]
            for text in (builtin.find(name).text, theirs)
        )
        assert ours == expected, messages


# What the definitions of the formats say of PLAIN[2]: openai/chatml.md; allenai/tulu-v1-sft-mixture; phi-4's model card.
WRITTEN = {
    "chatml": "<|im_start|>system\n be brief <|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb\n<|im_end|>\n"
    "<|im_start|>user\nc\n\nd<|im_end|>\n<|im_start|>assistant\n<b> 'd' é<|im_end|>\n",
    "tulu": "<|system|>\n be brief \n<|user|>\na\n<|assistant|>\nb\n</s>\n<|user|>\nc\n\nd\n<|assistant|>\n<b> 'd' é</s>",
    "phi-4": "<|im_start|>system<|im_sep|> be brief <|im_end|><|im_start|>user<|im_sep|>a<|im_end|><|im_start|>assistant"
    "<|im_sep|>b\n<|im_end|><|im_start|>user<|im_sep|>c\n\nd<|im_end|><|im_start|>assistant<|im_sep|><b> 'd' é<|im_end|>",
}
PROMPTS = {"chatml": "<|im_start|>assistant\n", "tulu": "<|assistant|>\n", "phi-4": "<|im_start|>assistant<|im_sep|>"}


@pytest.mark.parametrize("name", WRITTEN)
def test_bytes_of_written_definitions(name: str) -> None:
    """Parity: the text that the definition of the format gives, by transformers and by us, and the prompt after it."""
    from transformers.utils.chat_template_utils import render_jinja_template

    template = builtin.find(name).text
    (theirs,), _ = render_jinja_template([PLAIN[2]], chat_template=template, eos_token="</s>")
    files = {"tokenizer_config.json": '{"eos_token": "</s>"}', "chat_template.jinja": template}
    assert theirs == render(PLAIN[2], files, False) == WRITTEN[name]
    assert render(PLAIN[3], files, True).removeprefix(render(PLAIN[3], files, False)) == PROMPTS[name]


def prepared(files: dict[str, str], name: str) -> dict[str, str]:
    template = builtin.find(name)
    return with_template(with_control_tokens(files, "here", template.tokens).files, template.text)


@pytest.mark.parametrize("name", builtin.names())
def test_what_is_trained_on(files: dict[str, str], name: str) -> None:
    """Behaviour: every template shows a conversation, stops with the token of its row, and trains on answers and stops alone,
    which decode to one id each; a row's own control tokens stay text."""
    stop = builtin.find(name).stop or "<|endoftext|>"
    made = prepared(files, name)
    assert check_template(made) == [stop]
    messages = [user("what <|im_end|><end_of_turn>"), answer("is"), user("today"), answer("it is")]
    row = encode_chat(messages, made)
    tokenizer, ids = tokenizer_of(made), special_contents(made)
    trained = tokenizer.decode(row.tokens[row.weights > 0].tolist(), skip_special_tokens=False)
    thought = "<think>\n\n</think>\n\n" if name == "qwen3" else ""
    assert trained == f"is{stop}{thought}it is{stop}"
    assert (row.tokens == ids[stop]).sum() == (4 if builtin.find(name).stop else 2)
    assert len(set(ids.values())) == len(ids) and set(builtin.find(name).tokens) <= ids.keys()
    assert special_tokens(made)["bos_token"] == "<|begin_of_text|>"
    starts = tokenizer.decode(row.tokens[:1].tolist(), skip_special_tokens=False)
    assert (starts == "<|begin_of_text|>") == (name in ("gemma", "llama-3"))


def unigram() -> dict[str, str]:
    """A SentencePiece-like tokenizer, in which <|im_end|> is a piece and [X] an added token without a meaning."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("▁hi", -1.0), ("<|im_end|>", -9.0)]
    tokenizer = Tokenizer(models.Unigram([*pieces, *((c, -5.0) for c in "▁hi<>|_mstarend")][:16], 0, False))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.add_tokens(["[X]"])
    return {"tokenizer.json": tokenizer.to_str()}


def test_tokens_are_added_to_any_tokenizer() -> None:
    """Behaviour: new tokens follow the last id; a piece of that name becomes a special token with its old id; other texts have
    the same ids as before, for the library and for transformers; twice is once."""
    files = unigram()
    before = tokenizer_of(files)
    made = with_control_tokens(files, "here", ("<|im_start|>", "<|im_end|>", "<|im_start|>"))
    after = tokenizer_of(made.files)
    assert (made.added, made.size) == (1, before.get_vocab_size() + 1)
    assert special_contents(made.files) == {"<|im_end|>": 4, "<|im_start|>": 17}
    assert after.encode("hi<|im_start|>hi<|im_end|>", add_special_tokens=False).ids == [3, 17, 3, 4]
    assert (
        after.encode("hi [X] hi", add_special_tokens=False).ids
        == before.encode("hi [X] hi", add_special_tokens=False).ids
    )
    assert made.pieces == [list(before.encode("<|im_start|>", add_special_tokens=False).ids)]
    assert with_control_tokens(made.files, "here", ("<|im_start|>", "<|im_end|>")).files == made.files


def test_irregular_tokenizers_are_refused(files: dict[str, str]) -> None:
    """Behaviour: a tokenizer whose ids have a gap, so that a new token would not follow the last, is an error."""
    content = json.loads(files["tokenizer.json"])
    vocabulary = content["model"]["vocab"]
    vocabulary[max(vocabulary, key=vocabulary.get)] += 5
    with pytest.raises(LlmkitError, match="here: its tokens do not keep their ids"):
        with_control_tokens({"tokenizer.json": json.dumps(content)}, "here", ("<|im_sep|>",))
    with pytest.raises(LlmkitError, match="here: tokenizer.json is not readable"):
        with_control_tokens({"tokenizer.json": "{}"}, "here", ("<|im_sep|>",))


def test_both_lists_of_added_tokens(tmp_path: Path) -> None:
    """Behaviour under transformers: a tokenizer_config.json with a list of added tokens, as version 4 wrote it, agrees with
    tokenizer.json on the new ones and on those that become special."""
    from small_tokenizer import small_tokenizer_files
    from transformers import AutoTokenizer

    files = small_tokenizer_files()
    content = json.loads(files["tokenizer.json"])
    content["added_tokens"][2]["special"] = False
    listed = {str(token["id"]): {k: v for k, v in token.items() if k != "id"} for token in content["added_tokens"]}
    config = json.loads(files["tokenizer_config.json"]) | {"added_tokens_decoder": listed}
    files |= {"tokenizer.json": json.dumps(content), "tokenizer_config.json": json.dumps(config)}
    for name, text in with_control_tokens(files, "here", ("<|im_end|>", "<|im_sep|>")).files.items():
        (tmp_path / name).write_text(text)
    added = AutoTokenizer.from_pretrained(tmp_path).added_tokens_decoder
    assert [(i, token.content, token.special) for i, token in added.items()] == [
        (0, "<|endoftext|>", True), (1, "<|im_start|>", True), (2, "<|im_end|>", True), (299, "<|im_sep|>", True),
    ]  # fmt: skip

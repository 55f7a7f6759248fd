"""The 41 chat templates that TRL collects from model repositories: what is trained of each kind of conversation."""

from __future__ import annotations

import pytest
from stock_templates import REASONING, STOCK, SYSTEM, TEXT, TOOL, TOOLS, files_of, learnt, names, training_names

from llmkit.chat.masks import check_template, encode_chat, stop_token_ids
from llmkit.chat.templates import form_of, special_contents


def test_every_stock_template_is_here() -> None:
    """Property: the table below has each template of the installed TRL."""
    assert names() == sorted(STOCK)


@pytest.mark.parametrize("name", STOCK)
def test_what_is_trained(name: str) -> None:
    """Property: the answers as a sampler would emit them, with what ends them; tool calls and reasoning where the template
    shows them, an error that names them where not; never a header, a tool's answer or another role."""
    files, stock = files_of(name), STOCK[name]
    answers = [(stock.first or stock.answer).format("first answer"), stock.answer.format("second answer")]
    assert learnt(TEXT, files) == answers
    system = learnt(SYSTEM, files)
    assert stock.system in system if stock.system else system == answers
    called = learnt(TOOL, files, TOOLS)
    if stock.call.startswith("!"):
        assert isinstance(called, str) and called.startswith(stock.call)
    else:
        assert called == [stock.call, answers[1]]
    thought = learnt(REASONING, files)
    assert thought == stock.reasoning if stock.reasoning.startswith("!") else thought == [stock.reasoning]


@pytest.mark.parametrize("name", STOCK)
def test_what_stops(name: str) -> None:
    """Property: a trained answer or call ends with a token at which generation stops, and none holds one before its end."""
    files, stock = files_of(name), STOCK[name]
    stops, ids = check_template(files), stop_token_ids(files)
    for text in [stock.answer, *([] if stock.call.startswith("!") else [stock.call])]:
        ends = [stop for stop in stops if text.endswith(stop)]
        assert ends and special_contents(files)[ends[0]] in ids
        assert not any(stop in text.removesuffix(ends[0]) for stop in stops)


@pytest.mark.parametrize("name", STOCK)
def test_control_tokens_in_content_are_text(name: str) -> None:
    """Property: the name of a stop token in a question or an answer makes no control token, and ends no turn."""
    files, stock = files_of(name), STOCK[name]
    stop = check_template(files)[0]
    messages = [dict(TEXT[0]), dict(TEXT[1]), dict(TEXT[2]), dict(TEXT[3])]
    messages[2]["content"], messages[3]["content"] = f"what is {stop}?", f"{stop} ends a turn"
    plain, named = (encode_chat(rows, files) for rows in (TEXT, messages))
    controls = list(special_contents(files).values())
    count = [sum(row.tokens.tolist().count(control) for control in controls) for row in (plain, named)]
    assert count[0] == count[1]
    assert learnt(messages, files)[-1] == stock.answer.format(f"{stop} ends a turn")  # type: ignore[index]


# Where TRL trains on something else: headers or the beginning of a thought, which the generation prompt brings; the end of
# text behind the last turn (Phi); another token after earlier answers than after the last (gpt-oss).
BROUGHT = {
    "deepseek": "<｜Assistant｜>",
    "gptoss": "<|start|>assistant",
    "muse": "<|start|>assistant",
    "nemotron": "<think></think>",
    "qwen2_5": "\n",
    "qwen3_5_no": "<think>\n\n</think>\n\n",
    "qwen3_5_th": "<think>\n",
    "qwen3_6": "<think>\n",
    "qwen3_8": "<think>\n",
}


@pytest.mark.parametrize("name", training_names())
def test_masks_of_trl(name: str) -> None:
    """Parity with the templates that TRL has marked for training, in transformers' rendering: the same answers and stop
    tokens, without the newline behind them."""
    from transformers.utils.chat_template_utils import render_jinja_template

    stock = STOCK[name.removesuffix("_training")]
    files = files_of(name)
    messages = form_of(files).adapt(TEXT)
    (text,), (marked,) = render_jinja_template(
        [messages],
        chat_template=files["chat_template.jinja"],
        return_assistant_tokens_mask=True,
        eos_token=stock.eos,
        bos_token="<bos>",
    )
    theirs: list[str] = []
    for number, (start, stop) in enumerate(marked):
        is_continued = number and marked[number - 1][1] == start
        theirs = [*theirs[:-1], theirs[-1] + text[start:stop]] if is_continued else [*theirs, text[start:stop]]
    brought = next((part for key, part in BROUGHT.items() if name.startswith(key)), "")
    expected = [part.removeprefix(brought).rstrip("\n") for part in theirs]
    if name.startswith("phi3"):
        expected[-1] = expected[-1].removesuffix("<|endoftext|>").rstrip("\n")
    if name == "gptoss_training":
        expected[0] = expected[0].removesuffix("<|end|>")
    assert learnt(TEXT, files) == expected

"""The 41 chat templates that TRL collects from model repositories: what is trained of each kind of conversation."""

from __future__ import annotations

import pytest
from stock_templates import REASONING, STOCK, SYSTEM, TEXT, TOOL, TOOLS, files_of, names

from llmkit.chat.masks import check_template, encode_chat, stop_token_ids
from llmkit.chat.templates import special_contents, tokenizer_of
from llmkit.errors import LlmkitError


def learnt(messages: list[dict], files: dict[str, str], tools: list[dict] | None = None) -> list[str] | str:
    """The texts of the tokens with a loss, or "!" and the error."""
    try:
        row = encode_chat(messages, files, tools)
    except LlmkitError as error:
        assert error.hint
        return "!" + error.message
    pieces: list[list[int]] = [[]]
    for token, weight in zip(row.tokens.tolist(), row.weights.tolist(), strict=True):
        if weight:
            pieces[-1].append(token)
        elif pieces[-1]:
            pieces.append([])
    decode = tokenizer_of(files).decode
    return [decode(piece, skip_special_tokens=False) for piece in pieces if piece]


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

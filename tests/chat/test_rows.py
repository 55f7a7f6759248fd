"""Row schemas of fine-tuning and preference data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest

from llmkit.chat.encode import encode_conversations, encode_preferences
from llmkit.chat.messages import RowError
from llmkit.chat.rows import CONVERSATIONS, read_rows, schema_names, to_conversation, to_preference
from llmkit.errors import LlmkitError
from llmkit.io.documents import DocumentReader, ReadOptions

U, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
S = {"role": "system", "content": "s"}
SHAREGPT = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]


@pytest.mark.parametrize(
    ("fields", "messages"),
    [
        ({"messages": [U, A]}, [U, A]),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, A]}, [U, A]),
        ({"conversations": SHAREGPT}, [U, A]),
        ({"conversations": [{"from": "system", "value": "s"}, *SHAREGPT]}, [{"role": "system", "content": "s"}, U, A]),
        ({"instruction": "q", "input": "", "output": "a"}, [U, A]),
        ({"instruction": "q", "output": "a", "system": "s"}, [{"role": "system", "content": "s"}, U, A]),
        ({"instruction": "q", "input": "i", "output": "a"}, [{"role": "user", "content": "q\n\ni"}, A]),
        ({"instruction": "q", "context": "i", "response": "a"}, [{"role": "user", "content": "q\n\ni"}, A]),
        ({"instruction": "q", "input": "", "response": "a", "category": "x"}, [U, A]),
        ({"instruction": "q", "input": None, "output": "a", "history": [["q", "a"]]}, [U, A, U, A]),
        ({"messages": [U, A], "system": "s"}, [S, U, A]),
        ({"messages": [S, U, A], "system": "s"}, [S, U, A]),
        ({"messages": [U, A], "system": None}, [U, A]),
        ({"conversations": SHAREGPT, "system": "s"}, [S, U, A]),
        ({"prompt": "q", "completion": "a", "system": "s"}, [S, U, A]),
        ({"prompt": "q", "completion": "a"}, [U, A]),
        ({"prompt": [U, A, U], "completion": [A]}, [U | {"train": False}, A | {"train": False}, U | {"train": False}, A]),
    ],
)  # fmt: skip
def test_conversations(fields: dict[str, Any], messages: list[dict[str, Any]]) -> None:
    """Behaviour: every schema becomes the same messages."""
    assert to_conversation(fields).messages == messages


def test_one_table_of_schemas() -> None:
    """Behaviour: help and the error for unknown rows list every schema of the table."""
    assert schema_names(CONVERSATIONS) == (
        "messages, ShareGPT conversations, prompts with completions, Alpaca instructions, Dolly instructions "
        "or plain text"
    )
    with pytest.raises(RowError) as error:
        to_conversation({"question": "q"})
    for schema in CONVERSATIONS:
        if schema.name:
            assert " and ".join(map(repr, schema.fields)) in str(error.value)


def test_arguments_in_a_string_are_parsed() -> None:
    """Behaviour: OpenAI's tool calls hold their arguments as JSON in a string; a template would quote them again."""
    for arguments, expected in (('{"x": 1}', {"x": 1}), ("", {}), ({"x": 1}, {"x": 1})):
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        row = to_conversation({"messages": [U, {"role": "assistant", "content": None, "tool_calls": [call]}]})
        assert row.messages[1]["tool_calls"][0]["function"]["arguments"] == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": [S, U, A], "system": "other"}, "field 'system' differs"),
        ({"messages": [U, A], "system": ["s"]}, "field 'system' is not a string"),
        ({"messages": [U, A | {"role": "critic"}]}, r"messages\[1\]: unknown role 'critic'"),
        ({"instruction": "q", "output": "a", "history": [["q"]]}, "field 'history' is not a list of pairs"),
        ({"instruction": "q", "output": "a", "history": [["q", 1]]}, "field 'history' holds a turn that is not"),
        ({"instruction": "q", "context": ["i"], "response": "a"}, "field 'context' is not a string"),
        ({"messages": [U, A | {"tool_calls": [{"function": {"arguments": "{"}}]}]}, "arguments of a tool call are not JSON"),
        ({"messages": [U, A | {"tool_calls": "f"}]}, "tool_calls is not a list of objects"),
    ],
)  # fmt: skip
def test_what_would_be_lost_is_refused(fields: dict[str, Any], message: str) -> None:
    """Behaviour: a part of the row that cannot be used is named."""
    with pytest.raises(RowError, match=message):
        to_conversation(fields)


def test_fields_that_are_not_used_are_named() -> None:
    """Behaviour: what no schema reads is listed; a field that is null is none."""
    assert to_conversation({"messages": [U, A], "id": 1, "text": None, "tools": [], "x": 2}).unused == ["id", "x"]
    assert to_conversation({"messages": None, "text": "a", "prompt": None}).text == "a"
    assert to_preference({"prompt": "q", "chosen": "a", "rejected": "b", "score": 1, "system": "s"}).unused == ["score"]


def test_system_beside_a_preference() -> None:
    """Behaviour: it begins the prompt."""
    for row in (
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"chosen": [U, A], "rejected": [U, A | {"content": "b"}]},
    ):
        assert to_preference(row | {"system": "s"}).prompt == [S, U]


def test_sharegpt_calls_and_observations() -> None:
    """Behaviour: function calls become tool calls, observations the tool's answer."""
    call = {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'}
    row = to_conversation(
        {"conversations": [SHAREGPT[0], call, {"from": "observation", "value": "1"}], "tools": "[{}]"}
    )
    assert row.messages[1]["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]
    assert row.messages[2]["role"] == "tool"
    assert row.tools == [{}]


def test_plain_text() -> None:
    """Behaviour: text rows, and prompt and completion without a template."""
    assert to_conversation({"text": "abc"}).text == "abc"
    row = to_conversation({"prompt": "ab", "completion": "c"}, template=False)
    assert (row.text, row.start) == ("abc", 2)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"question": "q"}, "no schema fits"),
        ({"messages": []}, "field 'messages' is not a list of messages"),
        ({"messages": [{"content": "x"}]}, r"messages\[0\] has no role"),
        ({"messages": [U, {"role": "assistant", "content": 3}]}, r"messages\[1\] has no text content"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "content part that is not text"),
        ({"messages": [U | {"weight": -1}]}, "weight -1"),
        ({"instruction": "q", "output": None}, r"no schema fits.*\(fields: instruction, output \(null\)\)"),
        ({"instruction": "q", "output": 1}, "field 'output' is not a string"),
        ({"prompt": "q", "completion": "a", "label": True}, "unpaired"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "llmkit dpo"),
        ({"messages": [U], "tools": "{"}, "field 'tools' is not JSON"),
    ],
)
def test_bad_conversations(fields: dict[str, Any], reason: str) -> None:
    """Behaviour: a row that fits no schema names the field."""
    with pytest.raises(RowError, match=reason):
        to_conversation(fields)


B = {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": [U], "chosen": [A], "rejected": [B]},
        {"prompt": [U], "chosen": "a", "rejected": "b"},
        {"prompt": "q", "chosen": [A], "rejected": [B]},
        {"prompt": "q", "chosen": [U, A], "rejected": [U, B]},  # prompt told twice
        {"chosen": [U, A], "rejected": [U, B]},
        {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
        {"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": " a", "rejected": " b"},
        {"instruction": "q", "input": "", "output": "x", "chosen": "a", "rejected": "b"},
    ],
)
def test_preferences(fields: dict[str, Any]) -> None:
    """Behaviour: every schema becomes the same prompt and continuations."""
    row = to_preference(fields)
    assert row.prompt == [U]
    assert [m["content"].strip() for m in row.chosen + row.rejected] == ["a", "b"]


def test_implicit_prompt_of_strings_and_turns() -> None:
    """Behaviour: the longest common prefix, cut at a word; of turns for hh-rlhf."""
    row = to_preference({"chosen": "What is two? It is good", "rejected": "What is two? It is grim"})
    assert row.prompt == [{"role": "user", "content": "What is two? It is"}]
    assert row.chosen[0]["content"] == "good"
    talk = "\n\nHuman: q\n\nAssistant: hm\n\nHuman: q2\n\nAssistant: "
    row = to_preference({"chosen": talk + "a\n\nmore", "rejected": talk + "b"})
    assert [m["role"] for m in row.prompt] == ["user", "assistant", "user"]
    assert row.chosen == [{"role": "assistant", "content": "a\n\nmore"}]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"chosen": "a"}, "no field 'rejected'"),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "are equal"),
        ({"prompt": "q", "chosen": "a", "rejected": [B]}, "not both"),
        ({"chosen": "abc", "rejected": "xyz"}, "no common beginning"),
        ({"chosen": [U, A], "rejected": [U]}, "no assistant message after the common prompt"),
        ({"chosen": [U, A], "rejected": [B]}, "no common first message"),
    ],
)
def test_bad_preferences(fields: dict[str, Any], reason: str) -> None:
    """Behaviour: pairs that teach nothing are refused."""
    with pytest.raises(RowError, match=reason):
        to_preference(fields)


def reader_of(path: Path, rows: list[Any], how: str = "stop") -> DocumentReader:
    path.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    return DocumentReader([str(path)], ReadOptions(text_key=None, on_bad_line=how))


def test_bad_row_names_file_and_line(tmp_path: Path, templates: dict[str, dict[str, str]]) -> None:
    """Behaviour: stop with file and line, or skip and count."""
    rows = [{"messages": [U, A]}, {"messages": [U]}, {"messages": [U, A | {"train": False}]}]
    with pytest.raises(LlmkitError, match=r"rows.jsonl:2: nothing to learn"):
        encode_conversations(reader_of(tmp_path / "rows.jsonl", rows), templates["chatml"], 99)
    reader = reader_of(tmp_path / "rows.jsonl", rows, "skip")
    assert encode_conversations(reader, templates["chatml"], 99).counts["rows"] == 1
    assert reader.bad == 2


def test_too_long_rows(tmp_path: Path, templates: dict[str, dict[str, str]]) -> None:
    """Behaviour: dropped, or cut at the end; counted; a run without rows is refused; a pair stays a pair."""
    long = {"prompt": "q", "completion": "word " * 50}
    rows = [{"messages": [U, A]}, long]
    path = tmp_path / "rows.jsonl"
    dropped = encode_conversations(reader_of(path, rows), templates["chatml"], 30)
    assert (dropped.counts["rows"], dropped.counts["too_long"]) == (1, 1)
    cut = encode_conversations(reader_of(path, rows), templates["chatml"], 30, too_long="truncate")
    assert [len(row.tokens) for row in cut.rows][1] == 30
    assert cut.counts["too_long"] == 1
    with pytest.raises(LlmkitError, match="longer than 30 tokens"):
        encode_conversations(reader_of(path, [long]), templates["chatml"], 30)
    behind = {"prompt": "word " * 50, "completion": "a"}
    cut = encode_conversations(reader_of(path, [*rows, behind]), templates["chatml"], 30, too_long="truncate")
    assert (cut.counts["rows"], cut.counts["too_long"], cut.counts["dropped"]) == (2, 2, 1)
    with pytest.raises(LlmkitError, match="the cut leaves nothing to learn"):
        encode_conversations(reader_of(path, [behind]), templates["chatml"], 30, too_long="truncate")
    pairs = [{"prompt": "q", "chosen": "a", "rejected": "word " * 50}, {"prompt": "q", "chosen": "a", "rejected": "b"}]
    encoded = encode_preferences(reader_of(path, pairs), templates["chatml"], 30)
    assert (encoded.counts["rows"], len(encoded.rows)) == (1, 2)


def test_text_rows_end_in_end_of_text(tmp_path: Path, files: dict[str, str]) -> None:
    """Behaviour: plain text is learned whole, with its end."""
    encoded = encode_conversations(reader_of(tmp_path / "rows.jsonl", [{"text": "it is"}]), files, 30)
    assert encoded.rows[0].tokens[-1] == 0
    assert encoded.rows[0].weights.tolist() == [1.0] * len(encoded.rows[0].tokens)


@pytest.mark.parametrize(
    ("file", "good", "bad", "convert"),
    [
        ("pref/hh_rlhf_harmless_base_test.jsonl.zst", 1144, 0, to_preference),
        ("pref/rasbt_preference_1100.jsonl.zst", 929, 6, to_preference),  # six pairs are equal
        ("instruct/rasbt_instruction_1100.jsonl.zst", 935, 0, to_conversation),
    ],
)
def test_real_rows(shared_data: Path, file: str, good: int, bad: int, convert: Any) -> None:
    """Behaviour: published rows are accepted unchanged; refused are only pairs whose sides are equal."""
    reader = DocumentReader([str(shared_data / file)], ReadOptions(text_key=None, on_bad_line="skip"))
    assert len(list(read_rows(reader, convert))) == good
    assert reader.bad == bad

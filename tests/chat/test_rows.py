"""Row schemas of fine-tuning and preference data."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest

from llmkit.chat.encode import encode_conversations, encode_preferences
from llmkit.chat.messages import RowError, turn
from llmkit.chat.rows import (
    CONVERSATIONS,
    field_names,
    read_rows,
    renamed,
    schema_names,
    to_conversation,
    to_conversations,
    to_preferences,
)
from llmkit.errors import LlmkitError, UsageError
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
        "messages, ShareGPT conversations, OASST trees or messages, prompts with completions, "
        "inputs_pretokenized with targets_pretokenized, inputs with targets, question with answer, "
        "prompts with responses, Alpaca instructions, Dolly instructions, OpenOrca questions, instructions with instances or plain text"
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
    assert to_conversations({"messages": [U, A], "id": 1, "text": None, "tools": [], "x": 2}).unused == ["id", "x"]
    assert to_conversation({"messages": None, "text": "a", "prompt": None}).text == "a"
    assert to_preferences({"prompt": "q", "chosen": "a", "rejected": "b", "score": 1, "system": "s"}).unused == [
        "score"
    ]


def test_system_beside_a_preference() -> None:
    """Behaviour: it begins the prompt."""
    for row in (
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"chosen": [U, A], "rejected": [U, A | {"content": "b"}]},
    ):
        assert to_preferences(row | {"system": "s"})[0].prompt == [S, U]


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
        ({"instruction": "q", "output": None}, r"no schema fits.*\(fields: instruction, output \(null\); --map"),
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
    row = to_preferences(fields)[0]
    assert row.prompt == [U]
    assert [m["content"].strip() for m in row.chosen + row.rejected] == ["a", "b"]


def test_implicit_prompt_of_strings_and_turns() -> None:
    """Behaviour: the longest common prefix, cut at a word; of turns for hh-rlhf."""
    row = to_preferences({"chosen": "What is two? It is good", "rejected": "What is two? It is grim"})[0]
    assert row.prompt == [{"role": "user", "content": "What is two? It is"}]
    assert row.chosen[0]["content"] == "good"
    talk = "\n\nHuman: q\n\nAssistant: hm\n\nHuman: q2\n\nAssistant: "
    row = to_preferences({"chosen": talk + "a\n\nmore", "rejected": talk + "b"})[0]
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
        to_preferences(fields)[0]


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
    with pytest.raises(LlmkitError, match=r"rows.jsonl:2: \d+ tokens, but a sequence has 30"):
        encode_conversations(reader_of(path, rows), templates["chatml"], 30, too_long="error")
    reader = reader_of(path, rows, "skip")
    assert encode_conversations(reader, templates["chatml"], 30, too_long="error").counts["rows"] == reader.bad == 1
    with pytest.raises(UsageError, match="--too-long"):
        encode_conversations(reader_of(path, rows), templates["chatml"], 30, too_long="keep")
    pairs = [{"prompt": "q", "chosen": "a", "rejected": "word " * 50}, {"prompt": "q", "chosen": "a", "rejected": "b"}]
    encoded = encode_preferences(reader_of(path, pairs), templates["chatml"], 30)
    assert (encoded.counts["rows"], len(encoded.rows)) == (1, 2)


def test_text_rows_end_in_end_of_text(tmp_path: Path, files: dict[str, str]) -> None:
    """Behaviour: plain text is learned whole, with its end."""
    encoded = encode_conversations(reader_of(tmp_path / "rows.jsonl", [{"text": "it is"}]), files, 30)
    assert encoded.rows[0].tokens[-1] == 0
    assert encoded.rows[0].weights.tolist() == [1.0] * len(encoded.rows[0].tokens)


# By file: rows that are read, conversations or pairs in them, and rows that are refused.
INSTRUCT = {
    "dolly15k_from_docx": (7531, 7531, 0),
    "gpteacher_codegen-instruct": (4535, 4535, 0),
    "gpteacher_roleplay-simple-deduped-roleplay-instruct": (1923, 1923, 0),
    "gpteacher_toolformer-similarity-0.7-dataset": (3487, 3487, 0),
    "oasst_en_100_tree": (100, 109, 0),
    "rasbt_instruction_1100": (935, 935, 0),
    "self_instruct_seed_tasks": (175, 175, 0),
    "self_instruct_user_oriented": (252, 252, 0),
    "t0_p3_sample": (6324, 6324, 0),
}
PREF = {
    "hh_rlhf_harmless_base_test": (1144, 1144, 0),
    "pandalm_testset_human": (993, 888, 6),  # ties are left out; six answers are numbers
    "rasbt_preference_1100": (929, 929, 6),  # six pairs are equal
    "oasst_en_100_tree": (100, 429, 0),
}


@pytest.mark.parametrize("folder", ["instruct", "pref"])
def test_real_rows(shared_data: Path, folder: str) -> None:
    """Behaviour: every published file of rows is accepted unchanged."""
    table, convert = (INSTRUCT, to_conversations) if folder == "instruct" else (PREF, to_preferences)
    assert {path.name.partition(".jsonl")[0] for path in (shared_data / folder).glob("*.jsonl.zst")} <= set(table)
    for name, expected in table.items():
        path = next(shared_data.glob(f"*/{name}.jsonl.zst"))
        reader = DocumentReader([str(path)], ReadOptions(text_key=None, on_bad_line="skip"))
        rows = [made for _, made in read_rows(reader, convert)]
        assert (len(rows), sum(map(len, rows)), reader.bad) == expected, name


def test_instances() -> None:
    """Behaviour: each instance is a conversation; an unused field is counted once."""
    instances = [{"input": "i", "output": "a"}, {"input": "", "output": "b"}]
    rows = to_conversations({"instruction": "q", "instances": instances, "id": 1})
    assert [row.messages for row in rows] == [
        [turn("user", "q\n\ni"), A],
        [turn("user", "q"), turn("assistant", "b")],
    ]
    assert rows.unused == ["id"]
    for bad in ([], [{"input": "i"}], "x", [1]):
        with pytest.raises(RowError, match="instances|output"):
            to_conversations({"instruction": "q", "instances": bad})


def node(role: str, text: str, *replies: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"message_id": text, "role": role, "text": text, "replies": list(replies)} | more


TREE = node(
    "prompter",
    "q",
    node("assistant", "worse", rank=1),
    node("assistant", "best", node("prompter", "q2", node("assistant", "a2")), node("prompter", "q3"), node("prompter", "q4", node("assistant", "a4")), rank=0),
    node("assistant", "gone", rank=2, deleted=True),
    node("assistant", "refused", rank=3, review_result=False),
)  # fmt: skip


def test_trees() -> None:
    """Behaviour: the best-ranked answer to each of the user's messages; what paths share is trained once; for preferences the
    best against the others."""
    paths = [row.messages for row in to_conversations({"prompt": TREE, "message_tree_id": "q"})]
    best = turn("assistant", "best")
    assert paths == [
        [turn("user", "q"), best, turn("user", "q2"), turn("assistant", "a2")],
        [turn("user", "q"), best | {"train": False}, turn("user", "q4"), turn("assistant", "a4")],
    ]
    pairs = [(row.prompt, row.chosen, row.rejected) for row in to_preferences({"prompt": TREE})]
    assert pairs == [([turn("user", "q")], [best], [turn("assistant", "worse")])]
    unanswered = node("prompter", "q", node("assistant", "a", node("prompter", "thanks")))
    assert [row.messages for row in to_conversations({"prompt": unanswered})] == [[U, A]]
    alone = to_conversations({"prompt": node("prompter", "q")})
    assert alone == [] and alone.left_out == {"questions without an answer": 1}
    for bad in (
        node("alien", "q"),
        node("prompter", "q", {"role": "assistant"}),
        {"replies": 1, "role": "user", "text": "q"},
    ):
        with pytest.raises(RowError):
            to_conversations({"prompt": bad})


def flat(tree: dict[str, Any], parent: str | None = None) -> Iterator[dict[str, Any]]:
    yield {key: value for key, value in tree.items() if key != "replies"} | {
        "parent_id": parent,
        "message_tree_id": "t",
    }
    for reply in tree["replies"]:
        yield from flat(reply, tree["message_id"])


def test_trees_of_messages_in_rows_of_their_own(tmp_path: Path) -> None:
    """Property: messages in any order, among other rows, make the same conversations as their tree; those without a parent, in a
    circle or with a known id are named with their lines."""
    messages = list(flat(TREE))
    orphans = [
        {**messages[1], "message_id": "x", "parent_id": "no"},
        {**messages[1], "message_id": "y", "parent_id": "y"},
        messages[2],
    ]
    rows = [{"messages": [U, A]}, *reversed(messages), *orphans]
    reader = reader_of(tmp_path / "rows.jsonl", rows, "skip")
    found = [row.messages for _, made in read_rows(reader, to_conversations) for row in made]
    text = [[message["content"] for message in row.messages] for row in to_conversations({"prompt": TREE})]
    assert found[0] == [U, A] and sorted([message["content"] for message in row] for row in found[1:]) == sorted(text)
    assert reader.bad == 3
    found = [
        row.messages
        for _, made in read_rows(reader_of(tmp_path / "rows.jsonl", messages), to_conversations)
        for row in made
    ]
    assert found == [row.messages for row in to_conversations({"prompt": TREE})]
    with pytest.raises(LlmkitError, match=r"rows.jsonl:11: field 'message_id': 'best' is also on line 3"):
        list(read_rows(reader_of(tmp_path / "rows.jsonl", [*messages, messages[2]]), to_conversations))


COMPARED = {"instruction": "q", "output_1": "a", "output_2": "b"}


@pytest.mark.parametrize(
    ("fields", "better"),
    [
        (COMPARED | {"preference": 1}, "a"),
        (COMPARED | {"label": "2"}, "b"),
        (COMPARED | {"label": 0}, ""),
        ({"prompt": "q", "response1": "a", "response2": "b", "annotator1": 2, "annotator2": 1, "annotator3": 2}, "b"),
        ({"input": "q", "response_1": "a", "response_2": "b", "annotator1": 2, "annotator2": 1}, ""),
        ({"conversations": SHAREGPT[:1], "chosen": {"from": "gpt", "value": "b"}, "rejected": {"from": "gpt", "value": "a"}}, "b"),
        ({"prompt": json.dumps([U]), "chosen": json.dumps([A]), "rejected": json.dumps([A | {"content": "b"}])}, "a"),
    ],
)  # fmt: skip
def test_comparisons(fields: dict[str, Any], better: str) -> None:
    """Behaviour: two answers with the number of the better one, or the majority of annotators; ties are left out; answers to a
    conversation; messages as JSON in a text."""
    rows = to_preferences(fields)
    assert [(row.prompt, row.chosen[0]["content"]) for row in rows] == ([([U], better)] if better else [])


@pytest.mark.parametrize("verdict", [{}, {"label": 3}, {"label": True}, {"preference": "first"}])
def test_comparisons_without_a_verdict(verdict: dict[str, Any]) -> None:
    """Behaviour: a missing or unknown number of the better answer is refused."""
    with pytest.raises(RowError, match="number of the better answer"):
        to_preferences(COMPARED | verdict)
    with pytest.raises(RowError, match="llmkit dpo"):
        to_conversations(COMPARED | verdict)


def test_names_of_fields() -> None:
    """Behaviour: fields under other names, nested ones too; what is missing or unknown is named."""
    names = field_names(CONVERSATIONS, ["messages=data.chat,system=extra"])
    row = {"data": {"chat": [U, A]}, "extra": "s", "text": "t", "system": "other"}
    assert to_conversation(renamed(row, names)).messages == [S, U, A]
    with pytest.raises(RowError, match="no field 'data.chat' for 'messages'"):
        renamed({"data": {}}, names)
    for bad in ("messages", "messages=", "=x", "mesages=x", "messages=a,messages=b"):
        with pytest.raises(UsageError, match="--map"):
            field_names(CONVERSATIONS, [bad])


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"prompt": "q", "response": "a"}, [turn("user", "q"), turn("assistant", "a")]),
        ({"question": "q", "response": "a", "id": "1"}, [turn("user", "q"), turn("assistant", "a")]),
        (
            {"system_prompt": "s", "question": "q", "response": "a"},
            [turn("system", "s"), turn("user", "q"), turn("assistant", "a")],
        ),
        ({"system_prompt": "", "question": "q", "response": "a"}, [turn("user", "q"), turn("assistant", "a")]),
    ],
)
def test_questions_with_responses(fields: dict[str, str], expected: list[dict[str, str]]) -> None:
    """Behaviour: rows as OpenOrca has them, and prompts with responses."""
    assert to_conversation(fields).messages == expected

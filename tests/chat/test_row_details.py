"""Rows as files have them: what is left out and counted, JSON in texts, renamed fields, messages of trees on many lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import orjson
import pytest

from llmkit.alignment.inspection import check_rows
from llmkit.chat.encode import encode_conversations, encode_preferences, row_encoder
from llmkit.chat.messages import RowError, turn
from llmkit.chat.prompts import read_prompts
from llmkit.chat.rows import (
    CONVERSATIONS,
    PREFERENCES,
    field_names,
    read_rows,
    renamed,
    to_conversation,
    to_conversations,
    to_preferences,
)
from llmkit.errors import LlmkitError, UsageError
from llmkit.io.documents import DocumentReader, ReadOptions

U, A = turn("user", "q"), turn("assistant", "a")


def message(name: str, parent: str | None, role: str = "assistant", **more: Any) -> dict[str, Any]:
    """A flat message; the first of a tree has no parent, as in exports without nulls."""
    return {"message_id": name, "role": role, "text": name} | ({"parent_id": parent} if parent else {}) | more


FLAT = [
    message("q", None, "prompter", lang="en"),
    message("good", "q", rank=0.0),
    message("poor", "q", rank=1.0),
    message("gone", "q", deleted=True),
    message("new", "q", review_result=None),
    message("q2", "poor", "prompter"),
    message("x", "q2"),
    message("y", "q2"),
]


def written(path: Path, rows: list[Any]) -> str:
    path.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    return str(path)


def reader_of(paths: list[str], how: str = "stop") -> DocumentReader:
    return DocumentReader(paths, ReadOptions(text_key=None, on_bad_line=how))


def found(reader: DocumentReader, **names: str) -> list[list[str]]:
    """The texts of all conversations."""
    rows = read_rows(reader, to_conversations, names)
    return [[message["content"] for message in row.messages] for _, made in rows for row in made]


def test_trees_of_one_file(tmp_path: Path) -> None:
    """Behaviour: several trees without tree ids, the first message without a parent field; the trees of a file end with it, so
    two files may use the same ids; renamed fields are joined too."""
    tree = [message("q", None, "prompter"), message("a", "q"), message("r", None, "prompter"), message("b", "r")]
    files = [written(tmp_path / name, [*tree, {"messages": [U, A]}]) for name in ("1.jsonl", "2.jsonl")]
    assert found(reader_of(files)) == [["q", "a"], ["q", "a"], ["r", "b"]] * 2
    other = [{"id" if key == "message_id" else key: value for key, value in row.items()} for row in tree]
    path = written(tmp_path / "other.jsonl", other)
    assert found(reader_of([path]), message_id="id") == [["q", "a"], ["r", "b"]]


def test_every_line_of_a_bad_tree_is_bad(tmp_path: Path) -> None:
    """Behaviour: a tree that cannot be used is refused with all of its lines, and the others are used."""
    rows = [
        message("q", None, "prompter"),
        message("r", None, "prompter"),
        message("a", "q"),
        message("b", "r", "critic"),
    ]
    reader = reader_of([written(tmp_path / "rows.jsonl", rows)], f"quarantine={tmp_path / 'bad.jsonl'}")
    with reader:
        assert found(reader) == [["q", "a"]]
    bad = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert [row["line"] for row in bad] == [2, 4]
    assert all("prompt.replies[0]: unknown role 'critic'" in row["reason"] for row in bad)


def test_what_is_left_out_of_a_tree_is_counted(tmp_path: Path) -> None:
    """Behaviour: lower-ranked, deleted and unreviewed messages by number, for fine-tuning and for preferences; ranks may be
    floats; of answers without ranks all are used, but none makes a pair; nested fields that are not used are named."""
    path = written(tmp_path / "rows.jsonl", FLAT)
    (_, rows), (_, pairs) = (
        next(read_rows(reader_of([path]), convert)) for convert in (to_conversations, to_preferences)
    )
    assert [[m["content"] for m in row.messages] for row in rows] == [["q", "good"]] and rows.unused == ["lang"]
    hidden = "deleted or unreviewed messages, with their replies"
    assert rows.left_out == {hidden: 2, "lower-ranked answers, with their replies": 1}
    assert [(pair.chosen, pair.rejected) for pair in pairs] == [
        ([turn("assistant", "good")], [turn("assistant", "poor")])
    ]
    assert pairs.left_out == {hidden: 2, "answers without a rank": 2}
    unranked = [{**row, "rank": None} for row in FLAT]
    assert len(found(reader_of([written(tmp_path / "rows.jsonl", unranked)]))) == 3
    for state in ("aborted_low_grade", "halted_by_moderator"):
        assert to_conversations({"prompt": FLAT[0], "tree_state": state}).left_out == {"aborted trees": 1}
    same = {"prompt": FLAT[0] | {"replies": [message("a", "q", rank=i) | {"text": "a"} for i in (0, 0, 1)]}}
    assert to_preferences(same) == [] and to_preferences(same).left_out == {"ties": 1, "pairs of equal answers": 1}


def test_counts_of_the_dataset(tmp_path: Path, templates: dict[str, dict[str, str]]) -> None:
    """Behaviour: several conversations of a row count as several; what is left out is counted and does not stop; fields that are
    not used are counted, also of rows that are left out; nothing but ties is an error that says so."""
    compared = {"instruction": "q", "output_1": "a", "output_2": "b", "source": "x"}
    path = written(tmp_path / "rows.jsonl", [compared | {"label": n} for n in (0, 1, 2, 0)])
    encoded = encode_preferences(reader_of([path]), templates["chatml"], 99)
    assert (encoded.counts["rows"], encoded.counts["left_out"], encoded.unused) == (2, 2, {"source": 4})
    instances = [{"input": "i", "output": "a"}, {"output": "b", "note": 1}]
    path = written(tmp_path / "rows.jsonl", [{"instruction": "q", "instances": instances}])
    encoded = encode_conversations(reader_of([path]), templates["chatml"], 99)
    assert encoded.counts["rows"] == 2 and encoded.unused == {"instances.note": 1}
    path = written(tmp_path / "rows.jsonl", [compared | {"label": 0}])
    with pytest.raises(LlmkitError, match="no rows to train on; left out: 1 ties"):
        encode_preferences(reader_of([path]), templates["chatml"], 99)


def test_a_row_is_used_as_a_whole(tmp_path: Path, templates: dict[str, dict[str, str]]) -> None:
    """Behaviour: one instance that is malformed refuses the row, with the path to it."""
    rows = [{"instruction": "q", "instances": [{"output": "a"}, {"output": 1}]}, {"messages": [U, A]}]
    path = written(tmp_path / "rows.jsonl", rows)
    with pytest.raises(LlmkitError, match=r"rows.jsonl:1: field 'instances\[1\].output' is not a string"):
        encode_conversations(reader_of([path]), templates["chatml"], 99)
    reader = reader_of([path], "skip")
    assert encode_conversations(reader, templates["chatml"], 99).counts["rows"] == 1 and reader.bad == 1


def test_check_reports_what_training_takes(tmp_path: Path, templates: dict[str, dict[str, str]]) -> None:
    """Property: --check reads rows as training does: messages of trees are joined, names are mapped, and what is left out is
    counted."""
    path = written(tmp_path / "rows.jsonl", [*FLAT, {"chat": [U, A]}, {"x": 1}])
    encode, options = row_encoder(templates["chatml"]), ReadOptions(text_key=None)
    (report,) = check_rows([path], options, encode, {}, 99).values()
    assert (
        report.rows == 1 and sum(count for *_, count in report.refused.values()) == 2 and report.left_out.total() == 3
    )
    (report,) = check_rows(
        [written(tmp_path / "rows.jsonl", [{"chat": [U, A]}])], options, encode, {"messages": "chat"}, 99
    ).values()
    assert report.rows == 1 and not report.refused


@pytest.mark.parametrize(
    "text", ['{"role": "admin", "name": "x"}', '[{"role": "user"}]', "{", "[]", '{"from": "human"}']
)
def test_texts_that_look_like_json_stay_texts(text: str) -> None:
    """Behaviour: an answer, a prompt or a side that is JSON, but not of messages, is text; so is any answer of a row for
    fine-tuning."""
    assert to_conversation({"instruction": "q", "output": text}).messages == [U, turn("assistant", text)]
    assert to_conversation({"prompt": text, "completion": json.dumps([A])}).messages[0] == turn("user", text)
    (pair,) = to_preferences({"prompt": "q", "chosen": text, "rejected": "b"})
    assert pair.chosen == [turn("assistant", text)]


def test_columns_of_json() -> None:
    """Behaviour: messages, conversations, instances and history may be JSON in a text; one that is not is named; nulls of columns
    with one type are none."""
    for name, value in (("messages", [U, A]), ("conversations", [{"from": "human", "value": "q", "role": None}, A])):
        assert to_conversation({name: json.dumps(value)}).messages == [U, A]
        with pytest.raises(RowError, match=f"field '{name}' is a text, but not JSON"):
            to_conversation({name: "[{'role'"})
    assert to_conversation({"instruction": "q", "output": "a", "history": '[["q", "a"]]'}).messages == [U, A, U, A]
    assert to_conversation({"instruction": "q", "instances": '[{"output": "a"}]'}).messages == [U, A]


def test_p3() -> None:
    """Behaviour: rows of P3 hold the texts and their token ids; wrong choices are left out; strings are plain text without the
    template."""
    row = {"inputs": [1, 2], "targets": [3], "inputs_pretokenized": "q", "targets_pretokenized": "a"}
    assert to_conversation(row).messages == [U, A] and to_conversations(row).unused == []
    assert to_conversation(row | {"is_correct": True}).messages == [U, A]
    wrong = to_conversations(row | {"is_correct": False})
    assert wrong == [] and wrong.left_out == {"wrong choices": 1}
    plain = to_conversation({"inputs": "q", "targets": "a"}, template=False)
    assert (plain.text, plain.start) == ("qa", 1)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"instruction": "q", "output": "a", "kto_tag": False}, "kto_tag"),
        ({"messages": [U, A], "kto_tag": True}, "keep only their rows"),
        ({"conversations": [U], "chosen": A, "rejected": A}, "llmkit dpo"),
        ({"prompt": "q", "completions": ["a", "b"], "labels": [True, False]}, "process reward models"),
    ],
)
def test_rows_for_other_methods(fields: dict[str, Any], reason: str) -> None:
    """Behaviour: preferences, single or in pairs, and steps are refused by name, with what to do; never trained on."""
    with pytest.raises(RowError, match=reason):
        to_conversations(fields)
    if "chosen" not in fields:
        with pytest.raises(RowError, match="unpaired|a pair of a step"):
            to_preferences(fields)


def test_rows_for_fine_tuning_are_no_pairs() -> None:
    """Behaviour: dpo names the command that takes them; a prompt alone is not taken for a tree."""
    for row in (
        {"messages": [U, A]},
        {"instruction": "q", "output": "a"},
        {"prompt": "q", "completion": "a"},
        {"text": "a"},
    ):
        with pytest.raises(RowError, match="input for `llmkit sft`"):
            to_preferences(row)
    with pytest.raises(RowError, match=r"'prompt' \(OASST trees or messages\).*\(fields: prompt; --map"):
        to_preferences({"prompt": "q"})


def test_majority_of_annotators() -> None:
    """Behaviour: more than half of them decide; without that it is a tie; a column of floats is read as numbers."""
    row = {"instruction": "q", "response1": "a", "response2": "b"}
    for votes, better in (((1.0, 1, 2), "a"), ((2, "2", 0), "b"), ((1, 2, 0), ""), ((1, 1, 2, 0), "")):
        pairs = to_preferences(row | {f"annotator{i}": vote for i, vote in enumerate(votes, 1)})
        assert [pair.chosen[0]["content"] for pair in pairs] == [better] * bool(better)
        assert pairs.left_out == ({} if better else {"ties": 1})
    with pytest.raises(RowError, match="field 'annotator2': 1.5 is not the number"):
        to_preferences(row | {"annotator1": 1, "annotator2": 1.5})


def test_map_keeps_the_rest() -> None:
    """Behaviour: the rest of an object whose field is taken is still reported as unused; two names may be exchanged; a null is
    none; names with a dot come first; an unknown name lists the known ones."""
    names = field_names(CONVERSATIONS, ["messages=data.chat", "system = about"])
    assert renamed({"data": {"chat": [U, A]}, "about": None}, names) == {"messages": [U, A], "system": None}
    row = renamed({"data": {"chat": [U, A], "score": 1}, "about": "s"}, names)
    assert to_conversations(row).unused == ["data"] and to_conversation(row).messages[0] == turn("system", "s")
    swap = field_names(PREFERENCES, ["chosen=rejected,rejected=chosen"])
    assert renamed({"chosen": 1, "rejected": 2}, swap) == {"chosen": 2, "rejected": 1}
    assert renamed({"a.b": 1, "a": {"b": 2}}, {"text": "a.b"}) == {"text": 1, "a": {"b": 2}}
    with pytest.raises(UsageError, match="no rows have a field 'mesages'") as error:
        field_names(CONVERSATIONS, ["mesages=x"])
    assert "did you mean 'messages'" in error.value.hint and "instruction" in error.value.hint


def test_a_missing_field_is_a_bad_line(tmp_path: Path) -> None:
    """Behaviour: a mapped field that a row lacks is named with file and line; that row can be skipped."""
    path = written(tmp_path / "rows.jsonl", [{"data": {"chat": [U, A]}}, {"data": {"talk": 1}}])
    with pytest.raises(LlmkitError, match=r"rows.jsonl:2: no field 'data.chat' for 'messages' \(fields: talk\)"):
        found(reader_of([path]), messages="data.chat")
    reader = reader_of([path], "skip")
    assert found(reader, messages="data.chat") == [["q", "a"]] and reader.bad == 1


def test_each_row_by_its_own_schema(tmp_path: Path) -> None:
    """Behaviour: a file may mix schemas; a row of none names file, line and fields."""
    mixed = [{"messages": [U, A]}, {"instruction": "q", "output": "a"}, {"prompt": "q", "completion": "a"}, {"odd": 1}]
    reader = reader_of([written(tmp_path / "rows.jsonl", mixed)], "skip")
    assert found(reader) == [["q", "a"]] * 3 and reader.bad == 1
    with pytest.raises(LlmkitError, match=r"rows.jsonl:4: no schema fits.*\(fields: odd; --map"):
        found(reader_of([str(tmp_path / "rows.jsonl")]))


def test_prompts_of_rows_with_several_conversations(templates: dict[str, dict[str, str]]) -> None:
    """Behaviour: each path of a tree and each instance is a prompt, with its answer as the reference; strings of P3 are prompts as
    text. Nothing marks what another path shares."""
    files, follow_ups = templates["chatml"], [message("q2", "a", "prompter"), message("q3", "a", "prompter")]
    for question in follow_ups:
        question["replies"] = [message("to " + question["text"], question["text"])]
    tree = message("q", None, "prompter", replies=[message("a", "q", replies=follow_ups)])
    prompts = read_prompts({"prompt": tree, "message_tree_id": "q", "id": "7"}, files)
    assert [prompt.content for prompt in prompts] == [[U, A, turn("user", text)] for text in ("q2", "q3")]
    assert [prompt.other_fields for prompt in prompts] == [
        {"id": "7", "reference": f"to {text}"} for text in ("q2", "q3")
    ]
    instances = [{"input": "i", "output": "a"}, {"input": "", "output": "b"}]
    prompts = read_prompts({"instruction": "q", "instances": instances}, files)
    assert [(prompt.content, prompt.other_fields) for prompt in prompts] == [
        ([turn("user", "q\n\ni")], {"reference": "a"}),
        ([U], {"reference": "b"}),
    ]
    (prompt,) = read_prompts({"inputs": "it is", "targets": "a"}, files)
    assert (prompt.content, prompt.other_fields) == ("it is", {"reference": "a"})
    with pytest.raises(RowError, match="left out: 1 questions without an answer"):
        read_prompts({"prompt": message("q", None, "prompter")}, files)


def test_archives_and_tables_are_named(tmp_path: Path, shared_data: Path) -> None:
    """Behaviour: an archive is refused as one, with how to unpack it; a table with what it has to become."""
    archive = str(shared_data / "instruct" / "flan_cot_tsv.tar.zst")
    with pytest.raises(LlmkitError, match="this is a tar archive, not documents") as error:
        found(reader_of([archive], "skip"))
    assert "tar -xf" in error.value.hint
    for name, start in (("rows.zip", b"PK\x03\x04"), ("rows.tsv", b"q\ta\n")):
        (tmp_path / name).write_bytes(start)
        with pytest.raises(LlmkitError) as error:
            found(reader_of([str(tmp_path / name)]))
        assert "JSON lines or Parquet" in error.value.hint

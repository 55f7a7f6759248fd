"""Editing a document changes the bytes of the edited fields only."""

from __future__ import annotations

import json
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.corpus.dedup.exact import Exact
from llmkit.io.documents import Chunk, Document, ReadOptions, parse
from llmkit.io.splice import raw_values, splice

names = st.sampled_from(["text", "id", "a", "é", 'q"', "back\\slash", "{", "n,"])
numbers = st.sampled_from(["1.10", "1e400", "-0", "18446744073709551616", "1E5", "0.10000000000000000555"])
strings = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


@st.composite
def spelled(draw: Any, text: str) -> str:
    """A string of JSON with any of its characters escaped."""
    units = [text.encode("utf-16-be")[i : i + 2].hex() for i in range(0, 2 * len(text), 2)] if text.isascii() else []
    if units and draw(st.booleans()):
        return '"' + "".join(f"\\u{unit}" for unit in units) + '"'
    return json.dumps(text, ensure_ascii=draw(st.booleans()))


@st.composite
def values(draw: Any, depth: int = 0) -> str:
    """A JSON value in some spelling."""
    kind = draw(st.integers(0, 2 if depth > 2 else 4))
    if kind == 0:
        return draw(numbers)
    if kind == 1:
        return draw(st.sampled_from(["true", "false", "null", "[ ]", "{}"]))
    if kind == 2:
        return draw(spelled(draw(strings)))
    items = [draw(values(depth + 1)) for _ in range(draw(st.integers(0, 3)))]
    if kind == 3:
        return "[" + draw(space) + ", ".join(items) + "]"
    return "{" + ",".join(f"{draw(spelled(draw(names)))}:{draw(space)}{item}" for item in items) + draw(space) + "}"


space = st.sampled_from(["", " ", "\t ", "  "])
members = st.lists(names.flatmap(lambda name: st.tuples(st.just(name), spelled(name), values(), space)), max_size=5)
as_text = {"parse_int": lambda digits: "#" + digits, "parse_float": lambda digits: "#" + digits}


@settings(max_examples=100, deadline=None)
@given(members, st.dictionaries(names, strings, max_size=3), space)
def test_only_the_edited_fields_change(fields, changes: dict[str, str], gap: str) -> None:
    """Property: parsed with numbers as text, the line is the edited object; other fields keep their bytes and place."""
    line = gap + "{" + ",".join(f"{b}{key}{b}:{b}{value}" for _, key, value, b in fields) + gap + "}\n"
    result = splice(line.encode(), changes).decode()
    assert json.loads(result, **as_text) == json.loads(line, **as_text) | changes
    parts = [
        f"{b}{key}{b}:{b}{orjson.dumps(changes[name]).decode() if name in changes else value}"
        for name, key, value, b in fields
    ]
    untouched = ",".join(parts) if parts else ""
    assert result.startswith(gap + "{" + untouched)
    assert raw_values(line.encode()) == {name: value.encode() for name, _, value, _ in fields}


def document(line: bytes) -> Document:
    [result], bad = parse(Chunk("x.jsonl", 1, line), ReadOptions())
    assert not bad
    return result


def test_fields_nested_deeper_than_orjson_writes() -> None:
    """Behaviour: a document with fields nested 1,000 deep can be edited."""
    line = b'{"text":"a","deep":' + b"[" * 1000 + b"]" * 1000 + b"}\n"
    item = document(line)
    item.change_text("b")
    assert item.encode() == line.replace(b'"a"', b'"b"') and item.text == "b"
    assert item.with_fields({"reason": "r"}) == line.replace(b"}", b',"reason":"r"}')


def test_numbers_that_are_read_are_exact() -> None:
    """Behaviour: integers beyond 64 bits keep their digits as ids and keys; 1e400 does not make a line invalid."""
    one, other = (document(b'{"id":%d,"text":"t","m":{"n":%d}}\n' % (n, n)) for n in (1 << 64, (1 << 64) + 1))
    assert (one.id, other.id) == ("18446744073709551616", "18446744073709551617")
    assert Exact("id").key_of(one) != Exact("id").key_of(other)
    assert one.value("m.n") == 1 << 64 and one.exact_fields["m"] == {"n": 1 << 64}
    huge = document(b'{"text":"t","n":1e400}\n')
    huge.change(a=1)
    assert huge.encode() == b'{"text":"t","n":1e400,"a":1}\n'
    assert parse(Chunk("x", 1, b'{"text":"t","n":1e400,}\n'), ReadOptions())[1][0].reason.startswith("invalid JSON")


@pytest.mark.parametrize("value", ["\ud800", {1, 2}])
def test_values_that_json_lacks(value: object) -> None:
    """Behaviour: a value that cannot be written is an error, never another value."""
    with pytest.raises(TypeError):
        splice(b'{"text":"a"}\n', {"text": value})

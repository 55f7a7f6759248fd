"""No stage replaces a field of the user's own; the form of llmkit's own fields is accepted as input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.chat.messages import RowError
from llmkit.chat.prompts import read_prompts
from llmkit.corpus.added_fields import ADDED, check_added
from llmkit.errors import LlmkitError
from llmkit.io.documents import Chunk, ReadOptions, parse

WORDS = "The quick brown fox jumps over the lazy dog near the old river bank today."
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats(allow_nan=False, width=16) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=4,
)


def check(fields: dict[str, Any], *names: str) -> None:
    (document,), _ = parse(Chunk("f", 1, orjson.dumps({"text": "a"} | fields)), ReadOptions())
    check_added(document, names, "a command")


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(ADDED)), VALUES)
def test_a_field_of_another_form_is_refused(name: str, value: Any) -> None:
    """Property: no value of a field raises anything but the error that names it."""
    try:
        check({name: value}, name)
    except LlmkitError as error:
        assert f"the field {name!r} already exists" in error.message
    else:
        assert value is None or ADDED[name]({name: value})


# Command -> the fields that it may write.
DEDUP_REJECTS = ("reason", "duplicate_of", "similarity", "rule")
WRITES = {
    ("dedup",): ("cluster", "duplicates"),
    ("dedup", "--annotate"): ("cluster", "duplicates", "reason", "duplicate_of", "similarity"),
    ("dedup", "--no-counts", "--rejects", "r.jsonl"): DEDUP_REJECTS,
    ("dedup", "--method", "exact", "--no-counts", "--rejects", "r.jsonl"): DEDUP_REJECTS,
    ("dedup", "--method", "lines", "--rejects", "r.jsonl"): ("reason", "rule"),
    ("dedup", "--method", "substring", "--length", "5", "--rejects", "r.jsonl"): ("reason", "rule"),
    ("filter", "--filter", "c4", "--rejects", "r.jsonl"): ("filter", "reason", "value"),
    ("filter", "--filter", "c4", "--annotate"): ("filter",),
    ("filter", "--pii", "annotate"): ("pii",),
}
DOCUMENT = {"text": f"{WORDS} Write to ann.lee@firma-lee.de."}


@pytest.mark.parametrize("command", WRITES, ids=" ".join)
def test_every_command_keeps_the_users_fields(llmkit_here, tmp_path: Path, command: tuple[str, ...]) -> None:
    """Behaviour: where a command would write a field, a user's field of that name is an error that names file, line and
    field, or a bad line in quarantine; other commands pass it through, and so does this one once it is renamed."""
    name, *options = command
    for field in WRITES[command]:
        rows = [{"id": "a"} | DOCUMENT, {"id": "b"} | DOCUMENT | {field: ["mine"]}]
        (tmp_path / "d.jsonl").write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
        done = llmkit_here(name, "d.jsonl", *options, "-o", "o.jsonl", "-f", cwd=tmp_path)
        assert done.returncode == 1, (field, done.stderr)
        assert b"d.jsonl:2: " in done.stderr and f"the field '{field}' already exists".encode() in done.stderr
        assert not (tmp_path / "o.jsonl").exists() and not (tmp_path / "r.jsonl").exists()
    aside = ("--on-bad-line", "quarantine=q.jsonl")
    done = llmkit_here(name, "d.jsonl", *options, *aside, "-o", "o.jsonl", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (bad,) = map(orjson.loads, (tmp_path / "q.jsonl").read_bytes().splitlines())
    assert bad["line"] == 2 and orjson.loads(bad["raw"]) == rows[1]


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_own_output_is_input_again(llmkit_here, tmp_path: Path, form: str) -> None:
    """Behaviour: what each command writes, rejects included, every other command accepts, with rejects and annotations;
    in Parquet too, where the field of one document is a null in the others."""
    rows = [{"id": str(i), "text": DOCUMENT["text"] if i < 3 else f"{WORDS} {'word ' * i}{i}."} for i in range(6)]
    (tmp_path / "d.jsonl").write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    made = []
    for number, (name, *options) in enumerate(WRITES):
        options = [option.replace("r.jsonl", f"r{number}.{form}") for option in options]
        done = llmkit_here(name, "d.jsonl", *options, "-o", f"o{number}.{form}", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        made.append(f"o{number}.{form}")
        made += [option for option in options if option.startswith("r") and option.endswith(form)]
    for number, (name, *options) in enumerate(WRITES):
        done = llmkit_here(name, *made, *options, "-o", f"again{number}.jsonl", "-f", cwd=tmp_path)
        refused = {"--annotate"} & {*options} and name == "filter"  # `filter` holds the name of a filter in rejects
        assert done.returncode == 0 or refused, (name, options, done.stderr)


def test_extract_replaces_a_text_with_a_warning(llmkit_here, tmp_path: Path) -> None:
    """Behaviour: a `text` beside the page is replaced with a warning; other fields win over what a page declares."""
    page = f"<html lang=de><title>T</title><body><p>{WORDS}</p></body></html>"
    rows = [{"html": page, "title": "mine", "language": "xx"}, {"html": page, "text": "mine"}]
    (tmp_path / "d.jsonl").write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    done = llmkit_here("extract", "d.jsonl", "-o", "o.jsonl", cwd=tmp_path)
    assert b"warning: the text of the page replaces the field `text` of 1 row\n" in done.stderr
    row, other = map(orjson.loads, (tmp_path / "o.jsonl").read_bytes().splitlines())
    assert (row["title"], row["language"], other["text"]) == ("mine", "xx", WORDS)


def test_generate_keeps_the_users_fields(small_tokenizer: dict[str, str]) -> None:
    """Behaviour: a row with another `reference`, or another prompt, completion or conversation, is refused; equal ones,
    and the completions of an earlier run, are not."""
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    for row, name in (
        ({"prompt": "p", "completion": "c", "reference": "mine"}, "reference"),
        ({"prompt": "p", "completions": ["mine"]}, "completions"),
        ({"text": "p", "completion": "mine"}, "completion"),
        ({"messages": turns, "prompt": "mine"}, "prompt"),
        ({"messages": turns, "conversations": [{"from": "human", "value": "mine"}]}, "conversations"),
    ):
        with pytest.raises(RowError, match=f"the field '{name}' already exists"):
            read_prompts(row, small_tokenizer)[0]
    assert (
        read_prompts({"messages": turns, "prompt": "hi", "completion": "yo"}, small_tokenizer)[0].content == turns[:1]
    )
    earlier = {"prompt": "p", "completion": "c", "completions": ["c", "d"]}
    assert read_prompts(earlier, small_tokenizer)[0].other_fields == {"reference": "c"}
    assert read_prompts(earlier | {"reference": "gold"}, small_tokenizer)[0].other_fields == {"reference": "gold"}

"""`llmkit sft --show` and `--check`: what would be trained on, without training."""

from __future__ import annotations

import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import orjson
import pytest

Call = Callable[..., Any]
QUESTION = {"role": "user", "content": "what is <|im_end|>?"}
ROWS: list[Any] = [
    {"messages": [QUESTION, {"role": "assistant", "content": "\x1b[31m<b>sunny"}], "source": "x"},
    {"messages": [QUESTION]},
    {"messages": [QUESTION, {"role": "assistant", "content": " "}]},
    "no object",
    {"messages": [QUESTION, {"role": "assistant", "content": "yes", "reasoning_content": "it is so"}]},
    {"messages": [QUESTION, {"role": "assistant", "content": "\x1b[31m<b>sunny"}], "source": "y"},
    {"messages": [QUESTION, {"role": "assistant", "content": "sunny " * 40}]},
]


@pytest.fixture
def directory(base: Path, tmp_path: Path) -> Path:
    (tmp_path / "base").symlink_to(base)
    (tmp_path / "rows.jsonl").write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in ROWS))
    (tmp_path / "good.jsonl").write_bytes(orjson.dumps(ROWS[0]) + b"\n")
    return tmp_path


def test_show_marks_what_is_trained(directory: Path, llmkit_here: Call) -> None:
    """Behaviour: the trained part and control tokens are marked; text that looks like one is not, and nothing steers the
    terminal; rows that cannot be used are counted, and no run is made."""
    done = llmkit_here("sft", "base", "rows.jsonl", "--show", "2", cwd=directory)
    shown = done.stdout.decode()
    assert (
        done.returncode == 0 and "rows.jsonl:1\n" in shown and "rows.jsonl:5\n" in shown and "rows.jsonl:6" not in shown
    )
    assert "what is <|im_end|>?" in shown and "\x1b" not in shown
    trained = shown.split("⟦")[1].split("⟧")[0]
    assert trained.startswith("\\x1b[31m<b>sunny") and trained.endswith("›")
    assert b"cannot be used: --check says why" in done.stderr
    assert sorted(path.name for path in directory.iterdir()) == ["base", "good.jsonl", "rows.jsonl"]


def test_show_as_a_page(directory: Path, llmkit_here: Call) -> None:
    """Behaviour: the page has the text of the rows and no markup of theirs; an existing page needs -f."""

    class Page(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.tags: list[str] = []
            self.marked = ""

        def handle_starttag(self, tag: str, attrs: Any) -> None:
            self.tags.append(tag)

        def handle_data(self, data: str) -> None:
            self.marked += data if "mark" in self.tags[-2:] else ""

    call = ("sft", "base", "rows.jsonl", "--show", "page.html")
    assert llmkit_here(*call, cwd=directory).returncode == 0
    text, page = (directory / "page.html").read_text(), Page()
    page.feed(text)
    assert "<b>sunny" in page.marked and text.count("<h2>") == 4 and "script" not in page.tags and "src=" not in text
    assert llmkit_here(*call, cwd=directory).returncode != 0 and llmkit_here(*call, "-f", cwd=directory).returncode == 0


def test_check_reports_by_file(directory: Path, llmkit_here: Call) -> None:
    """Behaviour: every row is read; what is refused is named with its first line, and ends with exit code 1."""
    done = llmkit_here(
        "sft", "base", "rows.jsonl", "good.jsonl", "--check", "--sequence-length", "64", "-o", "r.json", cwd=directory
    )
    assert done.returncode == 1 and b"3 rows cannot be used" in done.stderr
    report = json.loads((directory / "r.json").read_text())
    assert list(report) == ["rows.jsonl", "good.jsonl"]
    rows, good = report["rows.jsonl"], report["good.jsonl"]
    assert [item["first_line"] for item in rows["refused"]] == [2, 3, 4] and rows["errors"] == 3
    assert (rows["rows"], rows["too_long"], rows["duplicates"], good["duplicates"]) == (4, 1, 1, 1)
    assert rows["dropped"] == 1 and good["dropped"] == 0
    assert rows["not_shown_by_the_template"] == {"reasoning_content": 1} and rows["unused_fields"] == {"source": 2}
    assert 0 < rows["trained_tokens"] < rows["tokens"] and good["errors"] == 0
    done = llmkit_here("sft", "base", "good.jsonl", "--check", cwd=directory)
    assert done.returncode == 0 and json.loads(done.stdout)["good.jsonl"] == good | {"duplicates": 0}


def test_check_of_rows_that_are_too_long(directory: Path, llmkit_here: Call) -> None:
    """Behaviour: what --too-long leaves of them is counted; with error they cannot be used, as in training."""
    turns = [{"role": role, "content": "is " * n} for role, n in (("user", 1), ("assistant", 2), ("user", 1))]
    (directory / "long.jsonl").write_bytes(
        b"".join(
            orjson.dumps({"messages": [*before, {"role": "assistant", "content": "is " * 80}]}) + b"\n"
            for before in (turns, turns[:1])
        )
    )
    call = ("sft", "base", "long.jsonl", "--check", "--sequence-length", "64", "--too-long")
    dropped = {}
    for how in ("drop", "truncate-turns", "truncate"):
        done = llmkit_here(*call, how, cwd=directory)
        report = json.loads(done.stdout)["long.jsonl"]
        assert report["too_long"] == 2
        dropped[how] = report["dropped"]
        assert done.returncode == (dropped[how] == 2), "an error only where nothing is left"
        shown = llmkit_here(*call[:3], "--show", "9", *call[4:], how, cwd=directory).stdout.decode()
        assert shown.count("dropped: ") == dropped[how] and shown.count("cut from ") == 2 - dropped[how]
        assert ("⟦" in shown) == (dropped[how] < 2)
    assert dropped == {"drop": 2, "truncate-turns": 1, "truncate": 0}
    done = llmkit_here(*call[:3], "--show", "9", *call[4:], "error", cwd=directory)
    assert done.returncode == 1 and not done.stdout and b"2 rows cannot be used" in done.stderr
    done = llmkit_here(*call, "error", cwd=directory)
    assert done.returncode == 1 and b"long.jsonl:1: " in done.stderr and b"2 rows cannot be used" in done.stderr


def test_check_and_lossy(directory: Path, llmkit_here: Call) -> None:
    """Behaviour: what the template does not show is an error without --lossy only."""
    (directory / "lost.jsonl").write_bytes(orjson.dumps(ROWS[4]) + b"\n")
    call = ("sft", "base", "lost.jsonl", "--check")
    assert [llmkit_here(*call, *more, cwd=directory).returncode for more in ((), ("--lossy",))] == [1, 0]


@pytest.mark.parametrize("template", ["--template", "--no-template"])
def test_control_tokens_at_the_end_of_answers(directory: Path, llmkit_here: Call, template: str) -> None:
    """Behaviour: text that names a control token behind an answer is reported, and no error."""
    rows = [
        {"prompt": "what", "completion": "sunny" + end} for end in ("<|im_end|>", " <|endoftext|>\n", "", "<|im_end")
    ]
    (directory / "named.jsonl").write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    done = llmkit_here("sft", "base", "named.jsonl", "--check", template, cwd=directory)
    assert done.returncode == 0
    assert b"(they stay text: remove them from the rows) (2 rows)" in done.stderr


def test_show_without_a_usable_row(directory: Path, llmkit_here: Call) -> None:
    """Behaviour: an error that says how many rows there are."""
    (directory / "odd.jsonl").write_bytes(b'{"odd": 1}\n' * 2)
    done = llmkit_here("sft", "base", "odd.jsonl", "--show", "3", cwd=directory)
    assert done.returncode == 1 and b"2 rows cannot be used" in done.stderr


def test_bad_calls(directory: Path, llmkit_here: Call) -> None:
    """Behaviour: --show takes a number of rows or a page."""
    for what in ("0", "-1", "page.txt"):
        assert llmkit_here("sft", "base", "rows.jsonl", "--show", what, cwd=directory).returncode == 2
    assert llmkit_here("sft", "base", "no.jsonl", "--check", cwd=directory).returncode == 1

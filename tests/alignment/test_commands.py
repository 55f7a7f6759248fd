"""`llmkit sft` and `llmkit dpo` from the command line."""

from __future__ import annotations

import io
import json
import math
import shutil
from pathlib import Path

import orjson
import pytest

from llmkit.chat.templates import chat_template, special_contents
from llmkit.cli.main import run_command
from llmkit.lineage.formats import read_lineage
from llmkit.model.pretrained.checkpoint import load_info
from llmkit.training.metrics.log import read_metrics


def call(command: str, *arguments: str) -> int:
    return run_command(command, [*arguments, "-q"])


def weights(run: str) -> bytes:
    return (Path(run) / "final" / "model.safetensors").read_bytes()


def records(run: str) -> list[dict[str, float]]:
    return list(read_metrics(Path(run) / "metrics.jsonl"))


def test_sft_learns_the_answers_and_to_stop(
    directory: Path, files: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Behaviour: loss falls far; the template is stored in both places; every stop token is listed; the model then says the answer and stops."""
    import torch

    from llmkit.chat.templates import render, tokenizer_of
    from llmkit.model.pretrained.checkpoint import load_model

    arguments = ("base", "chat.jsonl", "--lr", "1e-2", "--epochs", "12", "--batch-size", "2", "-o", "sft")
    assert run_command("sft", [*arguments, "--heldout", "chat.jsonl"]) == 0
    said = capsys.readouterr().err
    assert "using chatml" in said
    assert "60 rows" in said
    log = records("sft")
    assert log[-1]["loss"] < 0.3 * log[0]["loss"]
    assert log[-1]["heldout_loss"] < 0.3 * log[0]["loss"]
    ids = special_contents(files)
    info = load_info("sft")
    assert info.stop_ids == [ids["<|im_end|>"], ids["<|endoftext|>"]]
    assert "<|im_start|>" in str(chat_template(info.tokenizer_files))
    config = json.loads((directory / "sft" / "final" / "tokenizer_config.json").read_text())
    assert config["chat_template"] == (directory / "sft" / "final" / "chat_template.jinja").read_text()
    model, info = load_model("sft")
    prompt = render([{"role": "user", "content": "what is the weather"}], info.tokenizer_files, True)
    tokenizer = tokenizer_of(info.tokenizer_files)
    tokens = tokenizer.encode(prompt, add_special_tokens=False).ids
    start = len(tokens)
    with torch.no_grad():
        while tokens[-1] not in info.stop_ids and len(tokens) < start + 20:
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    assert tokenizer.decode(tokens[start:], skip_special_tokens=False) == "it is sunny<|im_end|>"
    record = read_lineage("sft")
    assert record is not None
    assert [item["name"] for item in record["inputs"]] == ["base", "chat.jsonl"]
    assert call("sft", *arguments, "--resume") == 0


def test_dpo_prefers_the_chosen(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behaviour: ln 2 at step 0, then margin and accuracy rise; rows on stdin give the same weights; a resumed run the same bytes."""
    arguments = ("--lr", "3e-3", "--epochs", "4", "--save-every", "2")
    assert call("dpo", "base", "pairs.jsonl", *arguments, "-o", "dpo") == 0
    log = records("dpo")
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert log[0]["margin"] == pytest.approx(0, abs=1e-5)
    assert log[-1]["margin"] > 0.3
    assert log[-1]["accuracy"] > 0.9
    assert log[-1]["reward_chosen"] > log[-1]["reward_rejected"]
    before = weights("dpo")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO((directory / "pairs.jsonl").read_bytes())))
    assert call("dpo", "base", *arguments, "-o", "piped") == 0
    assert records("piped")[-1]["loss"] == log[-1]["loss"]
    import shutil

    (directory / "dpo" / "final").unlink()
    for step in sorted((directory / "dpo" / "checkpoints").iterdir())[2:]:
        shutil.rmtree(step)
    assert call("dpo", "base", "pairs.jsonl", *arguments, "-o", "dpo", "--resume") == 0
    assert weights("dpo") == before


@pytest.mark.parametrize(
    ("command", "rows", "more", "message"),
    [
        ("sft", [{"messages": [{"role": "user", "content": "x"}]}], (), "rows.jsonl:1: nothing to learn"),
        ("sft", [{"question": "x"}], (), "rows.jsonl:1: no schema fits"),
        ("sft", [{"prompt": "a", "completion": "b " * 200}], (), "longer than 96 tokens"),
        ("sft", [], (), "no rows were read"),
        ("sft", [{"prompt": "a", "completion": "b"}], ("--chat-template", "bad.jinja"), "no stop token"),
        ("sft", [{"prompt": "a", "completion": "b"}], ("--too-long", "cut"), "--too-long 'cut'"),
        ("dpo", [{"prompt": "a", "chosen": "b", "rejected": "c"}], ("--too-long", "truncate-turns"), "is for sft"),
        ("sft", [{"prompt": "a", "completion": "b"}], ("--sequence-length", "500"), "exceeds the model's context of 96"),
        ("dpo", [{"prompt": "a", "chosen": "b", "rejected": "b"}], (), "rows.jsonl:1: 'chosen' and 'rejected' are equal"),
        ("dpo", [{"prompt": "a", "chosen": "b"}], (), "no field 'rejected'"),
        ("dpo", [{"prompt": "a", "chosen": "b", "rejected": "c"}], ("--beta", "0"), "--beta"),
    ],
)  # fmt: skip
def test_bad_rows_and_calls(
    directory: Path,
    capsys: pytest.CaptureFixture[str],
    command: str,
    rows: list[object],
    more: tuple[str, ...],
    message: str,
) -> None:
    """Behaviour: file, line and field are named, and nothing is left behind."""
    (directory / "rows.jsonl").write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    (directory / "bad.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    assert call(command, "base", "rows.jsonl", "-o", "x", *more) in (1, 2)
    assert message in capsys.readouterr().err
    assert not (directory / "x").exists()


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('no\nway') }}", "the chat template fails: no way"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "too much work"),
        ("{{ broken", "chat_template.jinja:1: "),
    ],
)
def test_refusing_templates(directory: Path, capfd: pytest.CaptureFixture[str], template: str, reason: str) -> None:
    """Behaviour: one line that names the template's file, in every command that renders; no internal error."""
    shutil.copytree(directory / "base", directory / "model")
    (directory / "model" / "chat_template.jinja").write_text(template)
    (directory / "row.jsonl").write_bytes(b'{"messages": [{"role": "user", "content": "is it"}]}\n')
    calls = [("sft", "model", "chat.jsonl"), ("dpo", "model", "pairs.jsonl"), ("generate", "model", "row.jsonl")]
    for command, *arguments in [*calls, ("generate", "model", "--chat", "-p", "a")]:
        assert call(command, *arguments, "-o", "x.jsonl" if command == "generate" else "x") == 1
        error, *hints = capfd.readouterr().err.splitlines()
        assert "chat_template.jinja" in error and reason in error and "internal error" not in error
        assert all(hint.startswith("hint: ") for hint in hints) and len(hints) < 2
    assert not (directory / "x").exists() and not (directory / "x.jsonl").exists()


def test_a_template_that_refuses_a_row_makes_it_bad(directory: Path) -> None:
    """Behaviour: the other rows are completed."""
    shutil.copytree(directory / "base", directory / "model")
    template = "{% if 'b' in messages[0].content %}{{ raise_exception('no b') }}{% endif %}{{ messages[0].content }}"
    (directory / "model" / "chat_template.jinja").write_text(template)
    (directory / "rows.jsonl").write_bytes(b'{"prompt": "a"}\n{"prompt": "b"}\n{"prompt": "c"}\n')
    skip = ["--on-bad-line", "quarantine=bad.jsonl", "--max-tokens", "1"]
    assert call("generate", "model", "rows.jsonl", "--chat", *skip, "-o", "x.jsonl") == 0
    assert len((directory / "x.jsonl").read_bytes().splitlines()) == 2
    assert "no b" in json.loads((directory / "bad.jsonl").read_bytes())["reason"]


def test_skipped_rows_are_counted(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Behaviour: --on-bad-line quarantine keeps refused rows aside with their reason."""
    (directory / "rows.jsonl").write_bytes(b'{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\nnot json\n')
    assert call("sft", "base", "rows.jsonl", "--on-bad-line", "quarantine=bad.jsonl", "-o", "x") == 0
    reasons = [json.loads(line)["reason"] for line in (directory / "bad.jsonl").read_text().splitlines()]
    assert len(reasons) == 2


def test_trees_in_files_with_other_names(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Behaviour: messages of trees under other names train sft and dpo; both report what they leave out; the names are in the
    record."""
    rows = [{"id": "q", "up": None, "text": "what is", "role": "prompter", "lang": "en"}]
    rows += [{"id": str(i), "up": "q", "text": "it is " + "so " * i, "role": "assistant", "rank": i} for i in range(3)]
    (directory / "rows.jsonl").write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    names = ("--map", "message_id=id,parent_id=up")
    for command, count, left_out in (
        ("sft", "1 rows", "2 lower-ranked answers, with their replies"),
        ("dpo", "2 rows", ""),
    ):
        assert run_command(command, ["base", "rows.jsonl", *names, "-o", command]) == 0
        said = capsys.readouterr().err
        assert count in said and (f"left out: {left_out}" if left_out else "lang (1 rows)") in said
        record = read_lineage(command)
        assert record is not None and record["options"]["map"] == ["message_id=id,parent_id=up"]
    assert call("sft", "base", "rows.jsonl", "--map", "message_id=key", "-o", "x") == 1
    assert "rows.jsonl:1: no field 'key' for 'message_id'" in capsys.readouterr().err


def test_a_call_that_fails_removes_nothing_of_others(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Behaviour: a directory that holds somebody's data/ is no run that was cut short; one that was empty stays; nothing else is left."""
    (directory / "project" / "data").mkdir(parents=True)
    (directory / "project" / "data" / "thesis.txt").write_text("years of work")
    (directory / "empty").mkdir()
    for output in ("project", "empty", "new"):
        assert call("sft", "base", "nowhere.jsonl", "-o", output) == 1
    assert (directory / "project" / "data" / "thesis.txt").exists()
    assert list((directory / "empty").iterdir()) == [] and not (directory / "new").exists()
    assert "error: project exists" in capsys.readouterr().err


def test_force_replaces_a_run_only_by_another(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Behaviour: with -f the old run stays until the call is known to be good, and is never its own input."""
    assert call("sft", "base", "chat.jsonl", "-o", "run") == 0
    before = weights("run")
    assert call("sft", "base", "nowhere.jsonl", "-f", "-o", "run") == 1
    assert call("sft", "run", "chat.jsonl", "-f", "-o", "run") == 2
    assert "run is in the output run" in capsys.readouterr().err
    assert weights("run") == before
    assert call("sft", "base", "chat.jsonl", "--seed", "1", "--epochs", "2", "-f", "-o", "run") == 0
    assert weights("run") != before and len(records("run")) > 0
    assert call("sft", "base", "chat.jsonl", "--seed", "1", "--epochs", "2", "-o", "clean") == 0
    assert weights("run") == weights("clean")
    names = [sorted(path.name for path in (directory / run / "checkpoints").iterdir()) for run in ("run", "clean")]
    assert names[0] == names[1]


def test_files_from_names_rows_once(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Behaviour: what --files-from lists is read once, and is not part of what --heldout names."""
    (directory / "list").write_text("chat.jsonl\n")
    (directory / "other.jsonl").write_text('{"prompt": "what", "completion": "today"}\n')
    outcomes = []
    for named in (("chat.jsonl",), ("--files-from", "list")):
        assert call("sft", "base", *named, "--heldout", "other.jsonl", "--json", "-f", "-o", "x") == 0
        outcomes.append(json.loads(capsys.readouterr().err.splitlines()[-1]))
    assert outcomes[0]["rows"] == outcomes[1]["rows"] == 60
    assert outcomes[0]["heldout_loss"] == outcomes[1]["heldout_loss"]
    assert outcomes[0]["tokens"] != outcomes[0]["row_tokens"]  # a row's last token is only a target


def test_one_quarantine_for_all_files(directory: Path) -> None:
    """Behaviour: bad lines of the rows and of the held-out rows go into one file."""
    (directory / "rows.jsonl").write_text('{"prompt": "what", "completion": "today"}\nnot json\n')
    more = ("--heldout", "rows.jsonl", "--on-bad-line", "quarantine=bad.jsonl")
    assert call("sft", "base", "rows.jsonl", *more, "-o", "x") == 0
    assert [json.loads(line)["line"] for line in (directory / "bad.jsonl").read_text().splitlines()] == [2, 2]

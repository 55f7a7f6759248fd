"""Options as dataclasses, former flags, --help and --help-all, and JSON output: `help --json` and errors."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any

import pytest
import typer

from llmkit.alignment.options import DpoOptions, SftOptions
from llmkit.cli.main import main, run_command
from llmkit.cli.shared.options import build, command
from llmkit.cli.shared.schema import schema
from llmkit.cli.shared.table import COMMANDS
from llmkit.errors import ExitCode, UsageError
from llmkit.options import COMMON, NEUTRAL, Formerly, Help, Without, from_values, option_fields, values_of
from llmkit.training.optim.schedule import SCHEDULES
from llmkit.training.options import PretrainOptions


@dataclass(frozen=True)
class Pace:
    speed: Annotated[int, typer.Option("--speed", help="Speed"), COMMON] = 1
    colour: Annotated[str | None, typer.Option("--colour", help="Colour"), NEUTRAL, Formerly("--color")] = None


@dataclass(frozen=True)
class Options:
    pace: Annotated[Pace, Help(speed="How fast")] = Pace(speed=3)


def parsed(arguments: list[str]) -> tuple[Options, dict[str, Any]]:
    """The options that a command receives for these arguments, and those that it would record."""
    calls = []

    @command()
    def walk(run: Any, options: Options = Options()) -> None:
        calls.append((options, run.options))

    build(walk, "walk")(arguments)
    return calls[0]


def test_groups_become_flags_and_back() -> None:
    """Behaviour: fields are flags with the defaults of their command; neutral ones are not recorded."""
    assert parsed([])[0] == Options()
    options, recorded = parsed(["--speed", "7", "--colour", "red"])
    assert options == Options(Pace(7, "red"))
    assert recorded == {"speed": 7, "seed": 0}
    assert from_values(Options, {"speed": 7, "colour": "red"}) == options
    assert values_of(options) == {"speed": 7, "colour": "red"}
    with pytest.raises(UsageError, match="unknown option 'sped'"):
        from_values(Options, {"sped": 1})


def test_former_spellings(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """Behaviour: a former flag, variable or config key is accepted, with one note; after `--` it is an argument."""
    assert parsed(["--color=red", "--color", "blue"])[0].pace.colour == "blue"
    assert capsys.readouterr().err == "llmkit walk: --color is now called --colour\n"
    (tmp_path / "c.toml").write_text('color = "green"\n')
    assert parsed(["-c", str(tmp_path / "c.toml")])[0].pace.colour == "green"
    monkeypatch.setenv("LLMKIT_WALK_COLOR", "black")
    assert parsed([])[0].pace.colour == "black"
    with pytest.raises(UsageError):
        parsed(["--", "--color"])


def test_both_spellings_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """Behaviour: an option given by its former and its present name is an error, wherever it comes from; the value of
    another option, and an empty variable, are neither."""
    with pytest.raises(UsageError, match="are one option"):
        parsed(["--color", "red", "--colour", "blue"])
    (tmp_path / "c.toml").write_text('color = "green"\ncolour = "blue"\n')
    with pytest.raises(UsageError, match="are one option"):
        parsed(["-c", str(tmp_path / "c.toml")])
    assert parsed(["--colour", "--color"])[0].pace.colour == "--color"
    monkeypatch.setenv("LLMKIT_WALK_COLOR", "black")
    monkeypatch.setenv("LLMKIT_WALK_COLOUR", "")
    assert parsed([])[0].pace.colour == "black"
    with pytest.raises(UsageError, match="are one option"):
        from_values(Options, {"color": "red", "colour": "blue"})
    assert from_values(Options, {"color": "red"}).pace.colour == "red"


def test_values_from_python_are_those_of_the_command_line() -> None:
    """Property: strings are parsed as flags are; another type, or a value out of bounds, is a usage error."""
    from pathlib import Path

    given = {"tokens": "1k", "lr": "1e-4", "warmup": 1, "heldout": ["a"], "prompts": "p.txt", "clip": 1}
    options = from_values(PretrainOptions, given)
    assert (options.stream.tokens, options.schedule.lr, options.schedule.warmup) == (1000, 1e-4, 1.0)
    assert options.samples.prompts == Path("p.txt") and options.heldout.heldout == ["a"]
    assert type(options.optimizer.clip) is float
    for wrong in (
        {"document_mask": "false"},
        {"heldout": "shards/"},
        {"betas": (0.9, 0.95)},
        {"tokens": 512.5},
        {"tokens": True},
        {"keep": False},
        {"processes": True},
        {"batch_size": 0},
        {"clip": -1.0},
        {"lr": "fast"},
    ):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            from_values(PretrainOptions, wrong)


@pytest.mark.parametrize("text", ["speed = true", "colour = ['a']", "[colour]\na = 1"])
def test_values_of_a_file_that_no_option_has(text: str, tmp_path: Any) -> None:
    """Behaviour: a boolean for a number, a list for one value, a table: a usage error that names file and key."""
    (tmp_path / "c.toml").write_text(text + "\n")
    with pytest.raises(UsageError, match=r"c\.toml: (speed|colour)"):
        parsed(["-c", str(tmp_path / "c.toml")])


def test_counts_of_a_file(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Behaviour: a count in TOML may be a number with an exponent."""
    (tmp_path / "c.toml").write_text("tokens = 1e4\n")
    assert run_command("train", ["x", "-c", str(tmp_path / "c.toml"), "--print-config"]) == 0
    assert "tokens = 10000 " in capsys.readouterr().out


def test_a_command_takes_a_group_in_part() -> None:
    """Behaviour: fields excluded from a group are not options of the command, and keep their defaults."""

    @dataclass(frozen=True)
    class Slow:
        pace: Annotated[Pace, Without("colour")] = Pace(speed=1)

    globals()["Slow"] = Slow
    assert [field.name for field in option_fields(Slow)] == ["speed"]
    with pytest.raises(UsageError):
        from_values(Slow, {"colour": "red"})
    assert [field.name for field in option_fields(DpoOptions) if field.name in ("z_loss", "optimizer", "betas")] == []


@pytest.mark.parametrize("options", [PretrainOptions, SftOptions, DpoOptions])
def test_every_schedule_is_listed(options: type) -> None:
    """Property: the help of train, sft and dpo lists every schedule."""
    field = next(field for field in option_fields(options) if field.name == "schedule")
    text = field.help or next(mark.help for mark in field.marks() if hasattr(mark, "help"))
    assert all(name in text for name in SCHEDULES)


def test_help_is_short_and_complete(capsys: pytest.CaptureFixture[str]) -> None:
    """Behaviour: --help shows about a dozen options of train and refers to --help-all, which shows all of them."""
    assert run_command("train", ["--help"]) == 0
    short = capsys.readouterr().out
    assert run_command("train", ["--help-all"]) == 0
    full = capsys.readouterr().out
    names = [flag for option in schema(["train"])["commands"][0]["options"] for flag in option["flags"][:1]]
    assert all(name in full for name in names)
    assert 10 <= sum(f" {name} " in short for name in names) <= 24
    assert "--help-all shows" in short and "--help-all shows" not in full
    assert "--keep-every" not in short


def test_schema(capsys: pytest.CaptureFixture[str]) -> None:
    """Property: every command, with typed options, defaults and flags, and every exit code; defaults are those of the code."""
    with pytest.raises(SystemExit) as exit_info:
        main(["help", "--json"])
    assert not exit_info.value.code
    content = json.loads(capsys.readouterr().out)
    assert [command["name"] for command in content["commands"]] == list(COMMANDS)
    assert {code["code"] for code in content["exit_codes"]} == {int(code) for code in ExitCode}
    train = next(command for command in content["commands"] if command["name"] == "train")
    options = {option["name"]: option for option in train["options"]}
    assert options["keep"] | {"help": ""} == {
        "name": "keep",
        "type": "integer",
        "metavar": "N",
        "multiple": False,
        "required": False,
        "default": 0,
        "help": "",
        "flags": ["--keep"],
        "negative_flags": [],
        "group": "Checkpoints",
        "common": False,
        "decides_content": False,
        "environment": "LLMKIT_TRAIN_KEEP",
        "minimum": 0,
    }
    assert options["tokens"]["type"] == "count" and options["document_mask"]["negative_flags"] == ["--no-document-mask"]
    types = {item["type"] for command in content["commands"] for item in command["options"] + command["arguments"]}
    assert types <= {"boolean", "count", "integer", "number", "path", "string"}
    with pytest.raises(SystemExit) as exit_info:
        main(["help", "trane", "--json"])
    assert exit_info.value.code == 2
    assert json.loads(capsys.readouterr().err.splitlines()[-1])["error"]["hint"] == "did you mean 'train' or 'trace'?"


def test_errors_as_json(tmp_path: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Behaviour: with --json an error is one line with code, message, hint, file and line."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs.jsonl").write_bytes(b'{"text": "a"}\n{"tex\n')
    assert run_command("filter", ["docs.jsonl", "-o", "out.jsonl", "--json"]) == 1
    error = json.loads(capsys.readouterr().err.splitlines()[-1])["error"]
    assert error["command"] == "filter" and error["code"] == 1
    assert (error["file"], error["line"]) == ("docs.jsonl", 2)
    assert "invalid JSON" in error["message"] and "--on-bad-line" in error["hint"]
    assert run_command("filter", ["nothing.jsonl", "-o", "out.jsonl", "--json"]) == 1
    assert json.loads(capsys.readouterr().err.splitlines()[-1])["error"]["file"] == "nothing.jsonl"
    assert run_command("filter", ["--presett", "x", "--json"]) == 2
    error = json.loads(capsys.readouterr().err.splitlines()[-1])["error"]
    assert error["file"] is None and "--preset" in error["hint"]


def test_json_from_the_environment(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Behaviour: errors are JSON wherever --json comes from, and text again in the next call."""
    monkeypatch.setenv("LLMKIT_FILTER_JSON", "1")
    assert run_command("filter", ["nothing.jsonl", "-o", "out.jsonl"]) == 1
    assert json.loads(capsys.readouterr().err.splitlines()[-1])["error"]["file"] == "nothing.jsonl"
    monkeypatch.delenv("LLMKIT_FILTER_JSON")
    assert run_command("filter", ["nothing.jsonl", "-o", "out.jsonl"]) == 1
    assert capsys.readouterr().err.startswith("llmkit filter: error: ")


def test_help_on_a_full_disk() -> None:
    """Behaviour: help that cannot be written ends in one line; nothing behind `llmkit help COMMAND` runs the command."""
    import subprocess
    import sys

    for arguments in (["help"], ["help", "--json"], ["--help"]):
        with open("/dev/full", "w") as full:
            done = subprocess.run([sys.executable, "-m", "llmkit", *arguments], stdout=full, stderr=subprocess.PIPE)
        assert done.returncode == 1
        assert done.stderr.startswith(b"llmkit: error: standard output: No space left on device\n")
    with pytest.raises(SystemExit) as end:
        main(["help", "lineage", "--"])
    assert not end.value.code

"""Scripts of records that were made to run code, or to write somewhere else."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from llmkit.cli.release.lineage import WRITES, _flags
from llmkit.cli.shared.options import NEUTRAL, RECORDED_IF_USED, signature
from llmkit.cli.shared.table import COMMANDS, module_of
from llmkit.lineage.formats import digest_path, read_lineage
from llmkit.lineage.script import as_script
from llmkit.options import marks_of

# Options that name what is written: shared ones, and those that a script never gives. Any other path is read.
WRITTEN = {"output", "summary", *WRITES}


def commands_of(script: str) -> list[str]:
    return [line for line in script.splitlines() if line.startswith("llmkit")]


def test_own_rules_run_only_when_allowed(tmp_path: Path, llmkit_here: Any, preloaded_text_bin: Path) -> None:
    """Behaviour: the script of a filter of one's own stops before it; with --allow-code it makes the same bytes, but not
    where the code has another digest."""
    (tmp_path / "d.jsonl").write_text('{"id":"1","text":"lower"}\n{"id":"2","text":"UPPER"}\n')
    rules = tmp_path / "rules.py"
    rules.write_text("from pathlib import Path\nPath('ran').touch()\ndef ok(page):\n    return page.text.islower()\n")
    assert llmkit_here("filter", "d.jsonl", "--rule", "rules.py:ok", "-o", "o.jsonl.zst", cwd=tmp_path).returncode == 0
    script = llmkit_here("lineage", "o.jsonl.zst", "--script", cwd=tmp_path).stdout.decode()
    assert not commands_of(script) and f"# needs the code of rules.py ({digest_path(rules)}): llmkit filter" in script
    allowed = llmkit_here("lineage", "o.jsonl.zst", "--script", "--allow-code", cwd=tmp_path).stdout.decode()
    (tmp_path / "ran").unlink()

    def run(text: str, out: str) -> subprocess.CompletedProcess[bytes]:
        environment = {"PATH": f"{preloaded_text_bin}:/usr/bin:/bin"}
        call = ["bash", "-c", text, "again.sh", ".", out]
        return subprocess.run(call, cwd=tmp_path, env=environment, capture_output=True)

    stopped = run(script, "a")
    assert stopped.returncode == 1 and b"with --allow-code" in stopped.stderr and not (tmp_path / "ran").exists()
    done = run(allowed, "b")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "b/o.jsonl.zst").read_bytes() == (tmp_path / "o.jsonl.zst").read_bytes()
    (tmp_path / "ran").unlink()
    rules.write_text(rules.read_text() + "#\n")
    other = run(allowed, "c")
    assert other.returncode == 1 and b"rules.py is not what was recorded" in other.stderr
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("allow", [False, True])
@pytest.mark.parametrize(
    ("command", "options", "inputs"),
    [
        ("filter", {"rule": ["model/rules.py:ok"]}, []),
        ("filter", {"rule": ["rules.py:ok.min=1"]}, []),
        ("filter", {}, [{"name": "rules.py", "role": "rule *:ok", "digest": "none"}]),
        ("filter", {}, [{"name": "x", "role": "rule rules.py:ok*", "digest": "none"}]),
        ("eval", {"include_path": ["tasks"], "tasks": "t"}, []),
        ("eval", {"tasks": "t"}, [{"name": "tasks", "role": "include_path"}]),
        ("train", {}, [{"name": "tasks", "role": "include_path"}]),
    ],
)
def test_code_without_a_digest_never_runs(command: str, options: Any, inputs: Any, allow: bool) -> None:
    """Behaviour: what names code and has no digest stops the script, with --allow-code too."""
    record = {"command": command, "options": options, "inputs": inputs}
    script = as_script(record, "out", _flags, allow_code=allow)
    assert not commands_of(script) and "\nstop " in script


@pytest.mark.parametrize("name", COMMANDS)
def test_no_record_gives_an_output(name: str) -> None:
    """Property: whatever the value or role, no option that writes is given, no value of another type and no path that
    leads elsewhere; and a new option with a path is looked at here."""
    from importlib import import_module

    parameters = signature(import_module(module_of(name)).main)
    flags = _flags(name)
    for option, parameter in parameters.items():
        metavar = next((mark.metavar for mark in marks_of(parameter.annotation) if hasattr(mark, "metavar")), None)
        if metavar in ("FILE", "DIR") and option not in WRITTEN:
            help_text = next(mark.help for mark in marks_of(parameter.annotation) if hasattr(mark, "help"))
            assert not any(word in help_text.lower() for word in ("write", "output", "store")), option
        values = ("/home/x/precious", ["/home/x/precious"], {"a": "/home/x/precious"}, "../precious", True)
        records: list[dict[str, Any]] = [{"command": name, "options": {option: value}} for value in values]
        records.append({"command": name, "inputs": [{"name": "precious", "role": option}]})
        for record in records:
            words = " ".join(commands_of(as_script(record, "out", lambda _: flags))).split()
            if option in (NEUTRAL - RECORDED_IF_USED) | WRITTEN:
                assert f"--{option.replace('_', '-')}" not in words
            if "options" in record and isinstance(record["options"][option], dict):
                assert not any("precious" in word for word in words)


def test_paths_stay_in_the_directories() -> None:
    """Behaviour: a path, or the end of a specification, that leads elsewhere is left out with a comment."""
    elsewhere = ("/etc/passwd", "../../x", "~/x", "a/../../x")
    for path in elsewhere:
        record = {"command": "mix", "options": {"stages": path, "tokenizer": path, "tokens": 5}}
        script = as_script(record, "m", _flags)
        assert path not in commands_of(script)[0] and f"# left out: --stages {path}" in script
        suffixed = {"command": "mix", "options": {"specs": [path]}, "inputs": [{"name": "shards", "role": "input"}]}
        assert commands_of(as_script(suffixed, "m", _flags)) == ['llmkit mix "$IN"/shards -o "$OUT"/m']


def test_honest_records_lose_nothing(tmp_path: Path, llmkit_here: Any) -> None:
    """Property: the options of a real record all reach the script."""
    (tmp_path / "d.jsonl").write_text('{"id":"1","text":"some text of a page"}\n')
    call = [
        "filter",
        "d.jsonl",
        "--preset",
        "gopher",
        "--rule",
        "gopher_quality.min_doc_words=20",
        "--id-key",
        "id",
        "--seed",
        "3",
    ]
    assert llmkit_here(*call, "--max-line-bytes", "1M", "-o", "o.jsonl.zst", cwd=tmp_path).returncode == 0
    record = read_lineage(tmp_path / "o.jsonl.zst")
    assert record
    script = as_script(record, "o.jsonl.zst", _flags)
    assert "left out" not in script and "--seed 3" in script and "--max-line-bytes 1000000" in script


def test_wide_and_large_records_take_linear_time() -> None:
    """Behaviour: 5,000 inputs of one name, 200 commands and options of 10 MB are no matter of minutes."""
    import time

    from llmkit.lineage.check import check

    wide = {
        "command": "average",
        "inputs": [{"name": "same", "digest": f"xxh3:{number:032x}"} for number in range(5_000)],
    }
    made = [{"name": "m", "digest": "", "lineage": {"command": "quantize", "options": {"seed": i}}} for i in range(200)]
    began = time.process_time()
    assert as_script(wide, "x", _flags).count("\noriginal ") == 5_000
    assert sum(result.state == "not found" for result in check(wide, "/nowhere/x", [])) == 5_000
    assert len(commands_of(as_script({"command": "average", "inputs": made}, "x", _flags))) == 201
    large = as_script({"command": "filter", "options": {"rule": ["x" * 10**7], "words": "spacy"}}, "x", _flags)
    assert len(large) < 1000 and "# left out: --rule" in large and "--words spacy" in large
    assert time.process_time() - began < 10

"""What records hold, and what becomes of malformed ones: no paths, no alarm, no internal error."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmkit.cli.shared.options import NEUTRAL, neutral_options, signature
from llmkit.cli.shared.table import COMMANDS, module_of
from llmkit.errors import LlmkitError
from llmkit.io.record import Input, Lineage, recorded
from llmkit.lineage.check import check
from llmkit.lineage.fields import is_intact
from llmkit.lineage.script import as_script
from llmkit.lineage.tree import as_tree
from llmkit.options import Recorded, marks_of

Call = Callable[..., subprocess.CompletedProcess[bytes]]
PATHLIKE = ("FILE", "NAME|FILE", "PATH", "DIR", "TOML", "MODEL", "DOCS", "INPUT", "[NAME=]PATH")
# Options with a path that enter the record by their command, as an input or by base name.
BY_COMMAND = {"filter": {"quality", "decontaminate"}, "train": {"model", "from_", "recipe"}}
BY_COMMAND |= {"sft": {"chat_template"}, "dpo": {"chat_template"}}
WITHOUT_RECORD = {"eval", "lineage", "trace", "vocab report", "vocab advise", "filter train"}


@pytest.mark.parametrize("command", sorted(COMMANDS.keys() - WITHOUT_RECORD))
def test_every_option_with_a_path_is_known(command: str) -> None:
    """Property: an option whose help shows a path is neutral, a Path, converted for the record, or listed above."""
    function = import_module(module_of(command)).main
    neutral = NEUTRAL | neutral_options(function) | BY_COMMAND.get(command, set())
    for name, parameter in signature(function).items():
        marks = marks_of(parameter.annotation)
        metavar = next((mark.metavar for mark in marks if getattr(mark, "param_decls", None)), None)
        if metavar in PATHLIKE and name not in neutral:
            assert "Path" in str(parameter.annotation) or any(isinstance(mark, Recorded) for mark in marks), name


def test_a_record_holds_no_directory(tmp_path: Path) -> None:
    """Property: paths become base names on their way into a record, wherever they stand."""
    file = tmp_path / "a b.toml"
    file.write_text("")
    assert recorded(file, ()) == recorded(str(file), ()) == "a b.toml"
    assert recorded([str(file), "/no/such/file"], ()) == ["a b.toml", "/no/such/file"]


def test_two_directories_give_the_same_bytes(tmp_path: Path, preloaded_bin: Path) -> None:
    """Behaviour: a pipeline with a quarantine by absolute path and a process substitution has the same bytes in two
    directories, and no record in them names a directory or a file descriptor."""
    rows = [json.dumps({"id": str(i), "text": f"seven birds over {i} stones and a river {i}"}) for i in range(20)]
    outputs = []
    for place in ("one", "another/deeper"):
        directory = tmp_path / place
        directory.mkdir(parents=True)
        (directory / "docs.jsonl").write_text("\n".join([*rows, "{broken"]) + "\n")
        script = (
            "exec 9</dev/null\n"
            * (place != "one")
            + "llmkit filter --filter length docs.jsonl --on-bad-line quarantine=$PWD/bad.jsonl.zst -q |"
            " llmkit dedup --method exact - <(llmkit filter --filter length docs.jsonl --on-bad-line skip -q)"
            " -q -o out.jsonl.zst"
        )
        environment = {"PATH": f"{preloaded_bin}:/usr/bin:/bin"}
        done = subprocess.run(["bash", "-ec", script], cwd=directory, env=environment, capture_output=True)
        assert done.returncode == 0, done.stderr
        outputs.append([(directory / name).read_bytes() for name in ("out.jsonl.zst", "bad.jsonl.zst")])
    assert outputs[0] == outputs[1]
    assert not any(word in outputs[0][0] for word in (str(tmp_path).encode(), b"quarantine", b"/dev/fd", b"pipe:"))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just("\ud800") | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
INPUTS = st.fixed_dictionaries(
    {},
    optional={
        "name": JSON | st.just("web"), "role": JSON | st.just("index"), "digest": JSON, "part": JSON | st.just("a/../../b"),
        "runs": JSON | st.lists(st.just({"command": "dedup", "inputs": [{"role": "index", "name": "i"}]}), max_size=2),
        "lineage": st.sampled_from([{"command": "dedup"}, {"command": "train", "counts": {"steps": 3}}, {"command": "mix"}]),
    },
)  # fmt: skip
RECORDS = st.fixed_dictionaries(
    {"command": st.sampled_from(["dedup", "mix", "train", "average", "anneal", "cat", "dedup --rejects"]) | JSON},
    optional={
        "options": JSON | st.dictionaries(st.sampled_from(["specs", "steps", "last", "keep", "index", "step"]), JSON),
        "inputs": JSON | st.lists(INPUTS, max_size=3), "counts": JSON, "digest": JSON, "files": JSON, "record": JSON,
    },
)  # fmt: skip


@settings(max_examples=30, suppress_health_check=[HealthCheck.too_slow])
@given(RECORDS)
def test_a_malformed_record_is_no_internal_error(record: dict[str, Any]) -> None:
    """Property: fields of any type read as absent ones, or the record is refused with a LlmkitError."""
    from llmkit.cli.release.lineage import _flags

    as_tree(record, "x")
    list(check(record, "/nonexistent/x.jsonl", []))
    try:
        script = as_script(record, "x", _flags)
    except LlmkitError:
        return
    assert "/../" not in script


def test_deep_and_wide_records_are_bounded() -> None:
    """Behaviour: records nested without end are refused by the script, and cut off in the tree and the check; a record
    whose inputs share their own inputs is walked once for each place where it is stored."""
    from llmkit.cli.release.lineage import _flags

    deep: dict[str, Any] = {"command": "dedup", "inputs": []}
    for _ in range(400):
        deep = {"command": "dedup", "inputs": [{"name": "a.jsonl", "digest": "", "lineage": deep}]}
    as_tree(deep, "x"), list(check(deep, "/nonexistent/x", []))
    with pytest.raises(LlmkitError, match="nested too deeply"):
        as_script(deep, "x", _flags)


def test_a_record_knows_when_it_is_damaged() -> None:
    """Property: a record survives its stored form, and any change of it is noticed; the digest of one file is not part
    of the records of later ones."""
    record = Lineage("mix", {"tokens": 5, "x": (1, 2)}, [], {1: 2.5}, "xxh3:1").to_dict()
    stored = json.loads(json.dumps(record))
    assert is_intact(stored) and is_intact({"command": "old"}) is None
    assert not is_intact(stored | {"counts": {"1": 2.6}})
    assert "record" not in Input("input", "a", "d", record).to_dict()["lineage"]

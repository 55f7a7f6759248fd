"""Trees and scripts of lineage records from untrusted files."""

from __future__ import annotations

import subprocess
from pathlib import Path

from llmkit.lineage.script import as_script
from llmkit.lineage.tree import as_tree

FLAGS = {
    "filter": {"preset": ("--preset", "", ["gopher"])},
    "mix": {"tokens": ("--tokens", "", None), "even": ("--even", "--no-even", True)},
}


def test_script_quotes_hostile_records(tmp_path: Path) -> None:
    """Behaviour: names, digests and options of a hostile record are quoted, and none leads outside the directories."""
    evil = "$(touch owned)\n`touch owned`; touch owned #"
    record = {
        "llmkit": evil,
        "command": "filter",
        "options": {"preset": [evil], "unknown": evil},
        "inputs": [{"role": "input", "name": "../../" + evil, "digest": evil}],
    }
    script = as_script(record, "x.jsonl", lambda name: FLAGS[name])
    (tmp_path / "llmkit").write_text("#!/bin/sh\nexit 0\n")
    (tmp_path / "llmkit").chmod(0o755)
    subprocess.run(["bash", "-c", script], cwd=tmp_path, env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, check=True)
    assert not list(tmp_path.rglob("owned"))


def test_shared_inputs_are_made_once() -> None:
    """Behaviour: an artefact that is used twice is one line; two artefacts of one name are made in different directories."""
    leaf = {"role": "input", "name": "docs.jsonl", "digest": "xxh3:1"}

    def made(digest: str, preset: str) -> dict[str, object]:
        record = {"command": "filter", "options": {"preset": [preset]}, "inputs": [leaf]}
        return {"role": "input", "name": "clean.jsonl", "digest": digest, "lineage": record}

    specs = [":0.5", ":x2", ""]
    record = {
        "command": "mix",
        "options": {"specs": specs, "even": False},
        "inputs": [made("a", "c4"), made("b", "fineweb"), made("a", "c4")],
    }
    script = as_script(record, "m", lambda name: FLAGS[name])
    lines = [line for line in script.splitlines() if line.startswith("llmkit")]
    assert lines == [
        'llmkit filter "$IN"/docs.jsonl --preset c4 -o "$OUT"/clean.jsonl',
        'llmkit filter "$IN"/docs.jsonl --preset fineweb -o "$OUT"/2/clean.jsonl',
        'llmkit mix "$OUT"/clean.jsonl:0.5 "$OUT"/2/clean.jsonl:x2 "$OUT"/clean.jsonl --no-even -o "$OUT"/m',
    ]


def test_tree_of_a_malformed_record() -> None:
    """Behaviour: fields of the wrong type read as absent."""
    record = {"command": 3, "options": "x", "inputs": [None, {"name": 1}, {"name": "a", "lineage": [1]}], "counts": 7}
    assert as_tree(record, "x").splitlines()[0].startswith("x  <- 3")


def test_originals_of_one_name_are_distinguished() -> None:
    """Behaviour: two inputs with one name and different content are two files for the script, the second in a numbered
    directory."""
    inputs = [{"role": "input", "name": "part-0.jsonl", "digest": digest} for digest in ("xxh3:1", "xxh3:2", "xxh3:1")]
    record = {"llmkit": "0", "command": "dedup", "options": {}, "inputs": inputs}
    script = as_script(record, "out.jsonl.zst", lambda command: {})
    assert 'dedup "$IN"/part-0.jsonl "$IN"/2/part-0.jsonl "$IN"/part-0.jsonl' in script
    assert "#   2/part-0.jsonl  xxh3:2" in script


def test_a_record_leads_out_of_no_directory(tmp_path: Path) -> None:
    """Behaviour: options that name outputs, and inputs called `..`, do not reach the script; a former name beside the
    present one is left out."""
    from llmkit.cli.release.lineage import _flags
    from llmkit.lineage.check import check
    from llmkit.lineage.script import as_script

    shared = {"summary": "/tmp/written", "output": "/tmp/x", "force": True, "config": "/etc/passwd", "version": True}
    inputs = [{"name": "..", "digest": "1"}, {"name": "../..", "digest": "2", "lineage": {"command": "vocab"}}]
    record = {"command": "vocab", "options": {"size": 512} | shared, "inputs": inputs}
    script = as_script(record, "tok", _flags)
    assert "--size 512" in script
    assert not any(word in script for word in ("/tmp", "/etc", "--force", "--version", "/.."))
    assert {state for name, state in check(record, str(tmp_path), [str(tmp_path)]) if ".." in name} == {"not found"}
    both = {"command": "train", "options": {"final_lr_fraction": 0.25, "min_lr": 0.5}}
    assert "--final-lr-fraction 0.25" in (script := as_script(both, "run", _flags)) and "0.5" not in script

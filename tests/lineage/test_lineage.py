"""Trees and scripts of lineage records from untrusted files."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from llmkit.lineage.formats import digest_path
from llmkit.lineage.script import Flag, as_script
from llmkit.lineage.tree import as_tree

FLAGS = {
    "filter": {"preset": Flag("--preset", "", ["gopher"])},
    "mix": {"tokens": Flag("--tokens"), "even": Flag("--even", "--no-even", True)},
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
    (tmp_path / evil).touch()
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


@pytest.mark.parametrize("shell", ["bash", "sh"])
def test_the_script_tells_where_an_original_belongs(tmp_path: Path, shell: str) -> None:
    """Behaviour: the script stops before it uses an original that is not there, or another one of the same name, and
    tells which file belongs there."""
    for place, text in (("", "one"), ("2/", "two")):
        (tmp_path / place).mkdir(exist_ok=True)
        (tmp_path / f"{place}a.jsonl").write_text(text)
    digests = [digest_path(tmp_path / name) for name in ("a.jsonl", "2/a.jsonl")]
    made = {"command": "filter", "inputs": [{"name": "a.jsonl", "digest": digests[0]}]}
    inputs = [{"name": "b.jsonl.zst", "digest": "", "lineage": made}, {"name": "a.jsonl", "digest": digests[1]}]
    script = as_script({"command": "dedup", "inputs": inputs}, "c.jsonl.zst", lambda command: {})
    (tmp_path / "again.sh").write_text(script.replace("set -euo pipefail", "set -eu"))
    digest = f'case $(cat "$2") in one) echo {digests[0]};; two) echo {digests[1]};; *) exit 1;; esac'
    (tmp_path / "llmkit").write_text(f'#!/bin/sh\nif [ "$1" = lineage ]; then {digest}; else echo "$1" >> ran; fi\n')
    (tmp_path / "llmkit").chmod(0o755)

    def run() -> tuple[int, bytes, str]:
        (tmp_path / "ran").write_text("")
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
        done = subprocess.run([shell, "again.sh"], cwd=tmp_path, env=environment, capture_output=True)
        return done.returncode, done.stderr, (tmp_path / "ran").read_text()

    assert run() == (0, b"", "filter\ndedup\n")
    (tmp_path / "2/a.jsonl").write_text("one")  # the same one twice
    code, message, ran = run()
    assert (code, ran) == (1, "filter\n") and b"./2/a.jsonl is another of the 2 originals of this name" in message
    assert digests[1].encode() in message
    (tmp_path / "2/a.jsonl").unlink()
    code, message, ran = run()
    assert (code, ran) == (
        1,
        "filter\n",
    ) and f"there is no ./2/a.jsonl: put the original there whose digest is {digests[1]}" in (message.decode())
    (tmp_path / "2/a.jsonl").write_text("damaged")
    assert run() == (0, b"", "filter\ndedup\n")


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
    assert {state for name, state, _ in check(record, str(tmp_path), [str(tmp_path)]) if ".." in name} == {"not found"}
    both = {"command": "train", "options": {"final_lr_fraction": 0.25, "min_lr": 0.5}}
    assert "--final-lr-fraction 0.25" in (script := as_script(both, "run", _flags)) and "0.5" not in script


HOSTILE = "$(touch owned)\x1b[31m\x07\u202e\n'`\\"


def test_nothing_steers_the_terminal(tmp_path: Path) -> None:
    """Property: whatever a record holds, script and tree print no control characters, and the words of the script are
    still what the record holds."""
    record = {
        "command": "filter", "options": {"preset": [HOSTILE]}, "counts": {HOSTILE: HOSTILE}, "llmkit": HOSTILE,
        "inputs": [{"name": HOSTILE, "digest": HOSTILE, "role": HOSTILE}],
    }  # fmt: skip
    script = as_script(record, HOSTILE, lambda name: FLAGS[name])
    for text in (script, as_tree(record, HOSTILE), as_tree(record, HOSTILE, 40)):
        assert all(line.isprintable() for line in text.split("\n"))
    (tmp_path / "llmkit").write_text('#!/bin/sh\nprintf "%s\\0" "$@" > words\n')
    (tmp_path / "llmkit").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    stopped = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True)
    assert b"there is no ./" in stopped.stderr and not any(byte in stopped.stderr[:-1] for byte in b"\x1b\x07\n")
    (tmp_path / HOSTILE).touch()
    subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, check=True)
    words = (tmp_path / "words").read_text().split("\0")
    assert words[1:4] == [f"./{HOSTILE}", "--preset", HOSTILE] and not (tmp_path / "owned").exists()


def test_a_wide_tree_fits_the_terminal() -> None:
    """Behaviour: lines are wrapped under their own branch; without a width they are not."""
    options = {"preset": ["gopher", "fineweb", "c4"], "rule": [f"rule.number{i}=0.5" for i in range(20)], "seed": 1}
    leaf = {"name": "docs.jsonl", "digest": "xxh3:" + "0" * 32}
    inner = {"command": "filter", "options": options, "counts": {f"count{i}": i for i in range(30)}, "inputs": [leaf]}
    record = {"command": "dedup", "inputs": [{"name": "a.jsonl", "digest": "", "lineage": inner}] * 2}
    lines = as_tree(record, "out.jsonl.zst", 70).splitlines()
    assert max(map(len, lines)) <= 70 and len(lines) > len(as_tree(record, "out.jsonl.zst").splitlines())
    assert " ".join(" ".join(lines).replace("│", "").split()) == " ".join(
        as_tree(record, "out.jsonl.zst").replace("│", "").split()
    )


def test_records_of_earlier_versions_are_scripted_as_what_they_did() -> None:
    """Behaviour: all numbers were equal for minhash before it had --normalise, and a quarantine was recorded by its
    path; a record must not make the script write there, nor to any other output."""
    from llmkit.cli.release.lineage import _flags

    leaf = {"name": "docs.jsonl", "digest": "1"}
    old = {
        "method": "minhash",
        "threshold": 0.75,
        "on_bad_line": "quarantine=/tmp/bad",
        "rejects": "/tmp/r",
        "index": "/tmp/i",
    }
    script = as_script({"command": "dedup", "options": old, "inputs": [leaf]}, "x.jsonl.zst", _flags)
    assert "--normalise loose" in script and "--on-bad-line skip" in script and "/tmp" not in script
    rejects = as_script({"command": "dedup --rejects", "options": old, "inputs": [leaf]}, "x.jsonl.zst", _flags)
    assert "--normalise loose" in rejects
    for options in ({"method": "exact"}, {"method": "lines"}, old | {"shingle": "words"}, old | {"normalise": "none"}):
        script = as_script({"command": "dedup", "options": options, "inputs": [leaf]}, "x.jsonl.zst", _flags)
        assert "loose" not in script


def test_a_directory_of_documents_names_a_file_with_lineage(tmp_path: Path, llmkit_here) -> None:
    """Behaviour: the hint says where the lineage is, or why there is none."""
    from llmkit.io.document_writer import DocumentWriter
    from llmkit.io.record import Lineage

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.jsonl").write_text("{}\n")
    assert b"other tools do not write it" in llmkit_here("lineage", "out", cwd=tmp_path).stderr
    with DocumentWriter(str(tmp_path / "out" / "b.jsonl.zst"), Lineage("filter")) as writer:
        writer.finish({}, [])
    done = llmkit_here("lineage", "out", cwd=tmp_path)
    assert done.returncode == 1 and b"hint: its files have their own, such as out/b.jsonl.zst" in done.stderr

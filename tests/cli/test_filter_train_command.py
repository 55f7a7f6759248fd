"""`filter train` from the command line, and `filter` with what it made."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from llmkit.corpus.fasttext import load

Command = Callable[..., subprocess.CompletedProcess[bytes]]
NAME = "filter train"
GOOD = "the proof of the theorem follows from the measured energy of the river number"
BAD = "click here to buy cheap offers now and subscribe for free to page"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory with good.jsonl and bad.jsonl."""
    for name, text in (("good", GOOD), ("bad", BAD)):
        rows = [json.dumps({"text": f"{text} {i}", "kind": name, "grade": i % 3}) + "\n" for i in range(20)]
        (tmp_path / f"{name}.jsonl").write_text("".join(rows))
    return tmp_path


def test_trains_by_file_names(place: Path, llmkit_here: Command) -> None:
    """Behaviour: labels are the files' names; the same call gives the same bytes, and an existing model is not replaced."""
    call = (NAME, "good.jsonl", "bad.jsonl", "--dim", "8", "--epochs", "10")
    for output in ("a.bin", "b.bin"):
        done = llmkit_here(*call, "-o", output, cwd=place)
        assert done.returncode == 0, done.stderr
    assert b"40 documents (20 good, 20 bad); written to b.bin" in done.stderr
    assert (place / "a.bin").read_bytes() == (place / "b.bin").read_bytes()
    assert load(place / "a.bin").predict(GOOD)[0][0] == "good"
    again = llmkit_here(*call, "-o", "a.bin", cwd=place)
    assert again.returncode == 1 and b"a.bin exists" in again.stderr
    other = llmkit_here(*call, "-o", "a.bin", "-f", "--seed", "1", cwd=place)
    assert other.returncode == 0 and (place / "a.bin").read_bytes() != (place / "b.bin").read_bytes()


def test_trains_by_a_field(place: Path, llmkit_here: Command) -> None:
    """Behaviour: --label-key takes the label from each document, numbers too; stdin then serves."""
    data = (place / "good.jsonl").read_bytes() + (place / "bad.jsonl").read_bytes()
    assert llmkit_here(NAME, "--label-key", "grade", "--dim", "4", "-o", "m.bin", stdin=data, cwd=place).returncode == 0
    assert load(place / "m.bin").labels == ("0", "1", "2")
    refused = llmkit_here(NAME, "-o", "n.bin", stdin=data, cwd=place)
    assert refused.returncode == 2 and b"--label-key" in refused.stderr


def test_cross_validates(place: Path, llmkit_here: Command) -> None:
    """Behaviour: --folds alone writes nothing, and reports agreement, its interval and the area under the curve."""
    done = llmkit_here(NAME, "good.jsonl", "bad.jsonl", "--dim", "8", "--folds", "4", "--summary", "s.json", cwd=place)
    assert done.returncode == 0, done.stderr
    assert b"4-fold cross-validation" in done.stderr and b"nothing written" in done.stderr
    counts = json.loads((place / "s.json").read_bytes())
    assert counts["agreement"] == counts["auc"] == 1 and counts["interval"] == pytest.approx([0.9124, 1], abs=1e-3)
    assert sorted(path.name for path in place.iterdir()) == ["bad.jsonl", "good.jsonl", "s.json"]


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["good.jsonl", "bad.jsonl"], 2, b"no output"),
        (["good.jsonl", "-o", "m.bin"], 2, b"one class (good)"),
        (["good.jsonl", "bad.jsonl", "--folds", "21"], 2, b"smallest class has 20"),
        (["good.jsonl", "bad.jsonl", "--folds", "1"], 2, b"--folds 1"),
        (["good.jsonl", "--label-key", "text", "-o", "m.bin"], 1, b"good.jsonl:1: 'text' is not a label"),
        (["good.jsonl", "--label-key", "absent", "-o", "m.bin"], 1, b"'absent' is not a label: None"),
        (["good.jsonl", "bad.jsonl", "-o", "no/m.bin"], 1, b"is not a directory"),
        (["good.jsonl", "bad.jsonl", "--ngrams", "9", "-o", "m.bin"], 2, b"'--ngrams'"),
    ],
)
def test_wrong_calls_are_one_line(
    place: Path, llmkit_here: Command, arguments: list[str], code: int, says: bytes
) -> None:
    """Behaviour: what is wrong and what to do, no traceback, nothing written."""
    done = llmkit_here(NAME, *arguments, cwd=place)
    assert done.returncode == code and says in done.stderr and b"Traceback" not in done.stderr
    assert not (place / "m.bin").exists()


def test_dry_run_writes_nothing(place: Path, llmkit_here: Command) -> None:
    """Behaviour: -n reads and checks alone."""
    done = llmkit_here(NAME, "good.jsonl", "bad.jsonl", "-n", "-o", "m.bin", cwd=place)
    assert done.returncode == 0 and not (place / "m.bin").exists() and b"nothing written" in done.stderr


def test_filter_applies_the_model(place: Path, llmkit_here: Command) -> None:
    """Behaviour: the chain from two files to a filtered one; the score stands in the kept documents."""
    assert llmkit_here(NAME, "good.jsonl", "bad.jsonl", "--dim", "8", "-o", "m.bin", cwd=place).returncode == 0
    call = (
        "filter",
        "good.jsonl",
        "bad.jsonl",
        "--filter",
        "quality",
        "--rule",
        "quality.model=m.bin",
        "-o",
        "kept.jsonl",
    )
    done = llmkit_here(*call, cwd=place)
    assert done.returncode == 0, done.stderr
    kept = [json.loads(line) for line in (place / "kept.jsonl").read_text().splitlines()]
    assert {row["kind"] for row in kept} == {"good"} and all(row["quality"] > 0.5 for row in kept) and len(kept) == 20

"""The example scripts at tiny size: the nightly refresh under all that can go wrong at night, the CI check, the quickstart's own parts."""

from __future__ import annotations

import fcntl
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

from quickstart import scale, scores

WORDS = [
    "the",
    "of",
    "and",
    "to",
    "that",
    "with",
    "river",
    "mountain",
    "weather",
    "season",
    "harvest",
    "village",
    "market",
    "people",
    "morning",
    "evening",
    "stone",
    "bridge",
    "water",
    "light",
]


def document(number: int, words: int = 120) -> dict:
    """English enough for the gopher rules, and unlike every other one."""
    rng = random.Random(number)
    drawn = [rng.choice(WORDS[:5]) if i % 3 == 0 else rng.choice(WORDS) + rng.choice("abcdefg") for i in range(words)]
    return {"id": f"d{number}", "text": " ".join(drawn) + "."}


def write(path: Path, rows: list[dict], bad: str = "") -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + bad)
    os.utime(path, (1, 1))  # long settled
    return path


@pytest.fixture
def script(preloaded_bin: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run an example with arguments and an environment."""

    def run(name: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        path = f"{preloaded_bin}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        return subprocess.run(
            ["bash", str(EXAMPLES / name), *map(str, arguments)],
            capture_output=True,
            text=True,
            env={**os.environ, "PATH": path, **environment},
        )

    return run


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """An incoming directory with one file of six documents, one of them twice, and a tokenizer."""
    (tmp_path / "incoming").mkdir()
    rows = [document(n) for n in range(6)]
    write(tmp_path / "incoming/first.jsonl", [*rows, {**rows[0], "id": "again"}])
    command = [sys.executable, "-m", "llmkit", "vocab", str(tmp_path / "incoming/first.jsonl"), "--size", "320", "-q", "-o"]  # fmt: skip
    subprocess.run([*command, str(tmp_path / "tok")], check=True)
    return tmp_path


def test_refresh_takes_new_files_only(script, place: Path) -> None:
    """Behaviour: the first night takes the file; the next finds nothing; of a new file what is new is added; its copy under another name is passed over;
    a night of nothing but known documents adds none."""
    arguments = [place / "incoming", place / "store", place / "tok"]
    first = script("nightly_refresh.sh", *arguments)
    assert first.returncode == 0, first.stderr
    counts = json.loads(first.stdout)
    assert (counts["files"], counts["filter"]["documents"], counts["dedup"]["kept"]) == (1, 7, 6)
    again = script("nightly_refresh.sh", *arguments)
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    rows = [document(n) for n in (6, 7, 3)]  # the last one is known
    write(place / "incoming/second.jsonl", rows)
    write(place / "incoming/copy.jsonl", rows)
    counts = json.loads(script("nightly_refresh.sh", *arguments).stdout)
    assert (counts["files"], counts["filter"]["documents"], counts["dedup"]["kept"]) == (1, 3, 2)
    assert counts["tokenize"]["documents"] == 2
    assert len((place / "store/seen.txt").read_text().split()) == 2
    write(place / "incoming/third.jsonl", [document(6), document(1)])
    done = script("nightly_refresh.sh", *arguments)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["dedup"]["kept"] == 0 and len(list((place / "store/shards").iterdir())) == 3


def test_refresh_puts_bad_lines_aside(script, place: Path) -> None:
    """Behaviour: a night with bad lines goes on, and they can be looked at in the morning."""
    write(place / "incoming/bad.jsonl", [document(9)], bad='{"text": \n{"no": "text"}\n')
    done = script("nightly_refresh.sh", place / "incoming", place / "store", place / "tok")
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    assert counts["filter"]["bad_lines"] == 2
    aside = (place / "store/quarantine" / f"{counts['batch']}.jsonl").read_text().splitlines()
    assert len(aside) == 2


def test_refresh_leaves_files_that_still_grow(script, place: Path) -> None:
    """Behaviour: a file that was written a moment ago waits for the next night."""
    os.utime(place / "incoming/first.jsonl")
    done = script("nightly_refresh.sh", place / "incoming", place / "store", place / "tok")
    assert (done.returncode, done.stdout) == (0, "")
    assert not list((place / "store/clean").iterdir())


def test_refresh_runs_once_at_a_time(script, place: Path) -> None:
    """Behaviour: exit 75 while another run holds the lock, and nothing is touched."""
    (place / "store").mkdir()
    with open(place / "store/.refresh.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = script("nightly_refresh.sh", place / "incoming", place / "store", place / "tok")
    assert done.returncode == 75
    assert not (place / "store/seen.txt").exists()


def test_refresh_that_fails_takes_the_files_again(script, place: Path) -> None:
    """Behaviour: without a usable tokenizer the run fails with llmkit's code, remembers nothing, and the next one makes it good."""
    failed = script("nightly_refresh.sh", place / "incoming", place / "store", place / "nowhere")
    assert failed.returncode == 1
    assert (place / "store/seen.txt").read_text() == ""
    assert script("nightly_refresh.sh", place / "incoming", place / "store", place / "tok").returncode == 0


def test_check_passes_and_fails_by_its_bounds(script, place: Path) -> None:
    """Behaviour: a report on stdout, exit 0 within bounds, 1 outside with the reason, 2 for a wrong call."""
    good = script("ci_check.sh", place / "incoming/first.jsonl")
    assert good.returncode == 0, good.stderr
    report = json.loads(good.stdout)
    assert report["documents"] == 7 and report["kept"] == 1.0 and report["problems"] == []
    strict = script("ci_check.sh", place / "incoming/first.jsonl", MAX_DUPLICATES="0.05")
    assert strict.returncode == 1 and "near duplicates" in json.loads(strict.stdout)["problems"][0]
    short = write(place / "short.jsonl", [{"text": "Too short."}, document(1)], bad="no json\n")
    found = script("ci_check.sh", short, MIN_KEPT="0.9")
    assert found.returncode == 1
    assert len(json.loads(found.stdout)["problems"]) == 2
    assert script("ci_check.sh").returncode == 2
    assert script("ci_check.sh", place / "missing.jsonl").returncode == 1


def scores_of(models: dict[str, tuple[float, float, float]]) -> dict:
    """What `llmkit eval` writes: model -> (perplexity, PMI, sums)."""
    return {
        "models": {
            model: {
                "perplexity": {"sample.jsonl": {"perplexity": perplexity, "bits_per_byte": 1.0}},
                "tasks": {
                    "docstring_choice": {"acc": 0.3, "acc_norm": 0.3, "acc_mutual_info": pmi, "acc_mutual_info_stderr": 0.02, "items": 500},
                    "two_digit_sums": {"exact_match,last_number": sums, "items": 400},
                },
            }
            for model, (perplexity, pmi, sums) in models.items()
        }
    }  # fmt: skip


@pytest.mark.parametrize(("pmi", "above"), [(0.30, True), (0.28, False)])
def test_table_says_what_holds(tmp_path: Path, pmi: float, above: bool) -> None:
    """Behaviour: the verdicts follow the figures: two standard errors above chance, 1 % of perplexity, 80 % of sums."""
    base = {"run/": (150.0, 0.25, 0.0), "annealed/": (120.0, 0.25, 0.0), "averaged/": (121.0, 0.25, 0.0)}
    chat = {"sft/": (200.0, 0.3, 0.9), "chat/": (220.0, pmi, 0.9), "chat-int8/": (223.0, 0.3, 0.9), "chat-int4/": (250.0, 0.3, 0.7)}  # fmt: skip
    files = []
    for name, models in (("base", base), ("chat", chat)):
        files.append(tmp_path / f"{name}.json")
        files[-1].write_text(json.dumps(scores_of(models)))
    found = scores.rows(files)
    verdicts = list(scores.verdicts(found).values())
    assert verdicts == [True, False, above, True]
    lines = scores.table(found, {"rule": 0.74})
    assert len(lines) == 1 + 7 + 2 and len({len(line) for line in lines}) == 1
    assert lines[1].startswith("base ") and lines[-1].split()[-1] == "%"


@pytest.mark.parametrize(
    ("measured", "probes", "best"), [([2_000.0, 9_000.0], 2, 9_000.0), ([2_000.0, 5_000.0, 3_000.0], 3, 5_000.0)]
)
def test_speed_is_that_of_the_best_probe(
    monkeypatch: pytest.MonkeyPatch, measured: list[float], probes: int, best: float
) -> None:
    """Behaviour: a moment in which the machine is busy does not cut the training; a probe that is fast enough is the last."""
    left = iter(measured)
    monkeypatch.setattr(scale, "tokens_per_second", lambda: next(left))
    assert scale.best_speed(8_000.0) == best
    assert len(list(left)) == len(measured) - probes


def test_what_the_quickstart_leaves_behind_does_not_count_as_code(tmp_path: Path) -> None:
    """Behaviour: beside a directory quickstart/ in the checkout, with Python files in it, ruff finds nothing, in a git checkout or not."""
    pytest.importorskip("ruff")
    root = EXAMPLES.parent
    shutil.copy(root / "pyproject.toml", tmp_path)
    shutil.copytree(EXAMPLES, tmp_path / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "quickstart" / "code").mkdir(parents=True)
    (tmp_path / "quickstart" / "left.py").write_text("import os\n")
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "."]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout

"""The whole quickstart at its smallest: every stage of the pipeline on real input, as a newcomer would run it."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_quickstart_runs_and_repeats(tmp_path: Path, preloaded_bin: Path) -> None:
    """Behaviour: exit 0 with a table of all seven models and a conversation; run again, every stage is passed over and
    the scores are the same. The environment is one whose llmkit has its imports behind it."""
    environment, work = tmp_path / "environment", tmp_path / "work"
    environment.mkdir()
    (environment / "bin").symlink_to(preloaded_bin)
    (environment / ".llmkit-installed").touch()

    def quickstart() -> subprocess.CompletedProcess[str]:
        variables = {**os.environ, "LLMKIT_TINY": "1", "LLMKIT_VENV": str(environment), "LLMKIT_WORK": str(work)}
        command = ["bash", str(EXAMPLES / "quickstart.sh")]
        return subprocess.run(command, capture_output=True, text=True, env=variables, cwd=tmp_path)

    first = quickstart()
    assert first.returncode == 0, first.stderr[-3000:]
    for name in (
        "base",
        "annealed",
        "average of 3",
        "fine-tuned",
        "aligned",
        "aligned, int8",
        "aligned, int4",
        "rule, no model",
    ):
        assert any(line.startswith(name) for line in first.stdout.splitlines()), name
    assert first.stdout.count("[user]") == 8 and first.stdout.count("[assistant]") == 8
    scores = json.loads((work / "base-scores.json").read_text())["models"]
    base, annealed = (scores[name]["perplexity"]["heldout.jsonl"] for name in ("run/", "annealed/"))
    assert annealed["perplexity"] < base["perplexity"]
    assert base["documents"] == scores["run/"]["tasks"]["two_digit_sums"]["items"] == 20
    weights = {path: path.stat().st_mtime_ns for path in work.glob("*/checkpoints/*/model.safetensors")}
    assert len(weights) >= 4

    second = quickstart()
    assert second.returncode == 0, second.stderr[-3000:]
    assert {path: path.stat().st_mtime_ns for path in work.glob("*/checkpoints/*/model.safetensors")} == weights
    assert second.stderr.count("nothing to do") >= 10
    assert second.stdout.split("Done in")[0] == first.stdout.split("Done in")[0]

"""examples/forks.sh, whole, with little text and less training."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from llmkit.lineage.formats import read_lineage

ROOT = Path(__file__).resolve().parents[2]


def test_one_trunk_and_its_forks(tmp_path: Path, preloaded_bin: Path) -> None:
    """Behaviour: both tables stand there, the forks start from one trunk and cost half, the average is made of all three, and the rates are as asked."""
    train = tmp_path / "data/train"
    train.mkdir(parents=True)
    (tmp_path / "data/test").mkdir()
    sources = sorted(Path(json.__file__).parent.parent.glob("*.py"))
    rows = {
        name: [
            {"id": f"{name}-{path.stem}", "text": path.read_text(errors="replace")[:3000] + name, "source": name}
            for path in sources[start : start + 40]
        ]
        for start, name in ((0, "docs"), (40, "prose"), (80, "code"))
    }
    for name, content in rows.items():
        (train / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    few = [row for content in rows.values() for row in content[:2]]
    (tmp_path / "data/test/sample.jsonl").write_text("".join(json.dumps(row) + "\n" for row in few))
    (tmp_path / "data/summary.json").write_text("{}")
    environment = os.environ | {"PATH": f"{preloaded_bin}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    command = ["bash", str(ROOT / "examples/forks.sh"), str(tmp_path), "1k"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "21,000 for the three forks, 45,000 for three runs from scratch (47%)" in run.stdout
    figures = [float(word) for line in run.stdout.splitlines() for word in line.split()[-2:] if word.count(".") == 1]
    assert len(figures) == 16 and all(3 < figure < 9 for figure in figures)
    average = read_lineage(tmp_path / "average")
    assert average is not None and len(average["inputs"]) == 3
    trunks = {item["lineage"]["inputs"][0]["digest"] for item in average["inputs"]}
    assert len(trunks) == 1
    rates = {
        name: [json.loads(line)["lr"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("old", "continued", "rewarmed", "fork-both")
    }
    assert set(rates["continued"]) == {rates["old"][-1]} and max(rates["rewarmed"]) > 5 * rates["old"][-1]
    assert rates["fork-both"] == sorted(rates["fork-both"], reverse=True) and rates["fork-both"][-1] < 5e-4

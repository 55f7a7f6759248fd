"""examples/tokens.sh, whole, on a little of the corpus that it builds."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_from_text_to_training_order(tmp_path: Path, shared_data: Path, preloaded_bin: Path) -> None:
    """Behaviour: twenty languages are measured, the mix has the multipliers asked for, and a plan gives `train` the batches of the mix."""
    train = tmp_path / "data/train"
    train.mkdir(parents=True)
    for name in ("docs", "prose", "code"):
        sources = sorted(Path(json.__file__).parent.parent.glob("*.py"))[: 60 if name == "docs" else 20]
        rows = [
            {"id": f"{name}-{path.stem}", "text": path.read_text(errors="replace")[:4000] + name} for path in sources
        ]
        (train / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "data/summary.json").write_text("{}")
    environment = os.environ | {"PATH": f"{preloaded_bin}:{os.environ['PATH']}"}
    run = subprocess.run(
        ["bash", ROOT / "examples/tokens.sh", shared_data / "lang/udhr_xml_text.jsonl.zst", tmp_path],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    digests = [line.split()[0] for line in run.stdout.splitlines() if "1,000 batches" in line]
    assert len(digests) == 2 and digests[0] == digests[1]
    report = json.loads((tmp_path / "fertility.json").read_text())
    assert {row["value"] for row in report["groups"]} >= {"eng", "tha", "cmn_hans"} and len(report["groups"]) == 21
    assert (
        "warning" in run.stderr and "6.000" in run.stderr
    )  # some language costs far more than English; docs come six times

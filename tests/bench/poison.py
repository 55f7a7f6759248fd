"""Poison in the training data, one and two processes: what the guard does about it, beside a run over clean data. Prints a dated table.

    python tests/bench/poison.py [--work DIR] > tests/bench/poison.md

Three documents of 512 tokens (half a step each) are broken: random bytes as text, one token repeated, random bytes again; at another step a row of
the embedding becomes NaN; two steps begin with Georgian, which is no more than rare. The clean run reads ordinary text of the same length in
the places of the three.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from pathlib import Path

import torch
from run_data import TRAIN, disturbing, events, losses, prepare, start

STEPS = 200
POISON = {61: "noise", 91: "repetition", 121: "noise"}
RARE = (76, 106)
NAN_AT = 135
AFTER = 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path)
    work = parser.parse_args().work or Path(tempfile.mkdtemp(prefix="poison-"))
    prepare(work, STEPS, POISON, RARE)
    print(f"# Poison\n\n{time.strftime('%Y-%m-%d')}, two shared CPU cores, torch {torch.__version__}, Python {platform.python_version()}. `python tests/bench/poison.py`\n")  # fmt: skip
    print(f"{STEPS} steps of 1,024 tokens; poison at steps {', '.join(f'{n} ({what})' for n, what in POISON.items())}; a NaN at step {NAN_AT}; Georgian, which nothing else is in, at {RARE[0]} and {RARE[1]}.\n")  # fmt: skip
    print(f"| processes | skipped | named | other rollbacks | rare steps | loss {AFTER} steps later, over clean | last held-out loss, over clean |\n|---|---|---|---|---|---|---|")  # fmt: skip
    for processes in (1, 2):
        for name in ("clean", "poisoned"):
            what = f"llmkit.training.loop:accumulate:{NAN_AT}:nan:all" if name == "poisoned" else ""
            tokens = str(STEPS * 1024)
            run = ["train", name, *TRAIN, "--tokens", tokens, "--heldout", "heldout.arrow", "--processes", str(processes), "-o", f"{name}{processes}", "-f"]  # fmt: skip
            process = start(work, run, disturbing(work, what))
            _, said = process.communicate(timeout=1200)
            assert process.returncode == 0, said
        clean, poisoned = losses(work / f"clean{processes}"), losses(work / f"poisoned{processes}")
        back = events(work / f"poisoned{processes}", "rollback")
        skipped = [n for e in back for n in e["skipped"]]
        named = [d["id"] for e in back for d in e["documents"]]
        other = [f"step {e['step']}: {e['cause']}, back to {e['to']}" for e in back if not e["skipped"]]
        kept = [n for n in RARE if n not in skipped]
        odd = {e["step"] for e in events(work / f"poisoned{processes}", "spike")} & set(RARE)
        ratios = [poisoned[n + AFTER] / clean[n + AFTER] for n in POISON]
        held = [last_heldout(work / f"{name}{processes}") for name in ("poisoned", "clean")]
        print(f"| {processes} | {skipped} | {', '.join(named)} | {'; '.join(other)} | {len(kept)} of {len(RARE)} taken, {len(odd)} of them looked at | {', '.join(f'{r:.4f}' for r in ratios)} | {held[0] / held[1]:.4f} |")  # fmt: skip


def last_heldout(run: Path) -> float:
    import json

    return [r["heldout_loss"] for r in map(json.loads, (run / "metrics.jsonl").open()) if "heldout_loss" in r][-1]


if __name__ == "__main__":
    main()

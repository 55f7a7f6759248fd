"""AdamW against Muon: held-out loss of the same model after the same tokens, at several learning rates each.

    python tests/bench/muon_adamw.py [--shared DIR] [--tokens N] [--rates 1e-3,3e-3,...] [--seeds N]

Passages of the Gutenberg books in ../shared in a drawn order, fifty of them held out; a vocabulary of 4,096 of their own; the preset 5m at 256
tokens a sequence; cosine schedule, a warm-up over a twentieth. Both take the same batches and start from the same weights.
Prints the table of muon_adamw.md: mean held-out loss (least, most), and the CPU time of each run. Under ten minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from peers import SHARED, members, spread, store

WORDS = 400  # of a passage
HELD_OUT = 50  # passages
OPTIMIZERS = ("adamw", "muon")


def passages(path: Path) -> list[dict[str, str]]:
    """All books in pieces, shuffled."""
    rows = []
    for name, content in members(path):
        words = content.decode("utf-8", "replace").split(" ")
        rows += [{"id": f"{name}-{i}", "text": " ".join(words[i : i + WORDS])} for i in range(0, len(words), WORDS)]
    random.Random(0).shuffle(rows)
    return rows


def llmkit(*arguments: object) -> str:
    """What a call says on stderr."""
    command = [sys.executable, "-m", "llmkit", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return done.stderr


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, default=SHARED)
    parser.add_argument("--tokens", default="160k")
    parser.add_argument("--rates", default="1e-3,3e-3,1e-2")
    parser.add_argument("--seeds", type=int, default=1)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        rows = passages(given.shared / "text" / "gutenberg_17_books.tar.zst")
        held_out, rows = rows[:HELD_OUT], rows[HELD_OUT:]
        print(
            f"{store(rows, place / 'train.jsonl.zst'):.1f} MB to train on, {store(held_out, place / 'h.jsonl.zst'):.2f} MB held out"
        )
        llmkit("vocab", place / "train.jsonl.zst", "--size", 4096, "-o", place / "tok")
        for name in ("train", "h"):
            llmkit("tokenize", place / f"{name}.jsonl.zst", "-t", place / "tok", "-o", place / name)
        print("| optimizer | learning rate | held-out loss | CPU seconds |\n|---|---:|---:|---:|", flush=True)
        for rate in given.rates.split(","):
            for optimizer in OPTIMIZERS:
                losses, seconds = [], []
                for seed in range(given.seeds):
                    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
                    run = place / f"{optimizer}-{rate}-{seed}"
                    said = llmkit(
                        "train", place / "train", "-m", "5m", "--sequence-length", 256, "--tokens", given.tokens, "--lr", rate,
                        "--optimizer", optimizer, "--heldout", place / "h", "--eval-every", 10**6, "--save-every", 10**6,
                        "--seed", seed, "-o", run, "--json", "-q",
                    )  # fmt: skip
                    losses.append(json.loads(said.splitlines()[-1])["heldout_loss"])
                    seconds.append(resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before)
                print(f"| {optimizer} | {rate} | {spread(losses, 3)} | {spread(seconds, 0)} |", flush=True)


if __name__ == "__main__":
    main()

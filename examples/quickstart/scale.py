"""Measure the training speed of this machine and print the amounts of training as shell variables.

    python examples/quickstart/scale.py --tiny 0 --minutes 5 > scale.sh        # in the directory of text/ and model.json

The full amounts take about five minutes on two idle cores. Most of the time is for fine-tuning, and the learning rate
of pre-training is low: a model pre-trained on a megabyte or two with a high rate learns to read a question far more
slowly than a new one. For less time, all amounts are scaled by one factor, down to the minimum needed to learn
anything.

The speed is the best of up to three probes, and the first that is fast enough for the full amounts ends the search.
Other work on the machine can only slow a probe down, so the best probe is the closest to the machine's real speed, while
a mean would count a short busy moment as if it lasted: one probe measured 2,179 tokens/s where training then ran at
8,000 to 9,000, and cut it to a third.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

EPOCHS = 3  # of fine-tuning
# name: (full amount, minimum, amount with LLMKIT_TINY=1, cost of a unit in tokens)
AMOUNTS = {
    "TRAIN_TOKENS": (200_000, 100_000, 24_000, 1.0),
    "ANNEAL_TOKENS": (80_000, 40_000, 8_000, 1.0),
    "ANSWER_ROWS": (6_000, 4_500, 60, 65.0 * EPOCHS),  # with the bare answer
    "SUM_ROWS": (2_500, 2_000, 60, 44.0 * EPOCHS),
    "PAIR_ROWS": (1_500, 500, 40, 150.0),  # two answers, and a third more for the reference model
}
PROBE = 30_720  # tokens
PROBES = 3


def tokens_per_second() -> float:
    """Speed of `llmkit train` on the real model and data, after warm-up."""
    with tempfile.TemporaryDirectory(dir=".") as directory:
        summary = Path(directory) / "summary.json"
        command = [sys.executable, "-m", "llmkit", "train", "text/", "-m", "model.json", "--tokens", str(PROBE), "--batch-size", "4", "--quiet",
                   "--summary", str(summary), "-o", str(Path(directory) / "run")]  # fmt: skip
        subprocess.run(command, check=True)
        return float(json.loads(summary.read_text())["tokens_per_second"])


def best_speed(enough: float) -> float:
    """The best speed of up to PROBES probes; stops at the first that reaches `enough`."""
    best = 0.0
    for _ in range(PROBES):
        best = max(best, tokens_per_second())
        if best >= enough:
            break
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=5.0)
    options = parser.parse_args()
    if options.tiny:
        print("# LLMKIT_TINY=1: every stage runs, nothing is learnt")
        amounts = {name: tiny for name, (_, _, tiny, _) in AMOUNTS.items()}
    else:
        total_cost = sum(full * cost for full, _, _, cost in AMOUNTS.values())
        full_speed = total_cost / (options.minutes * 60)
        speed = best_speed(full_speed)
        share = min(1.0, speed / full_speed)
        amounts = {name: max(least, round(full * share)) for name, (full, least, _, _) in AMOUNTS.items()}
        print(f"# {speed:,.0f} tokens/s: {share:.0%} of the full training" + (", cut down to fit" if share < 1 else ""))
    amounts["EPOCHS"] = 1 if options.tiny else EPOCHS
    for name, amount in amounts.items():
        print(f"{name}={amount}")


if __name__ == "__main__":
    main()

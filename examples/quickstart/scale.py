"""How much to train on this machine: measure its speed, print shell variables.

    python examples/quickstart/scale.py --tiny 0 --minutes 5 > scale.sh        # in the directory that holds text/ and model.json

The full amounts are what a machine with two quiet cores trains on in about five minutes. Most of it is fine-tuning, and the rate of pre-training
is low: a model that has seen a megabyte or two with a high rate learns to read a question far more slowly than a fresh one. Where there is
less time everything is cut by one factor, down to amounts that are needed to learn anything.

The speed is the best of up to three probes. Other work on the machine only ever slows a probe down, so the best one is the nearest to what the
machine can do, while a mean would count a busy moment as if it lasted: one probe measured 2,179 tokens/s where training then ran at 8,000 to 9,000, and
cut it to a third. The first probe that is fast enough for the full amounts is the last.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

EPOCHS = 3  # of fine-tuning
# name: (all of it, the least that it is cut to, what LLMKIT_TINY=1 takes, tokens that one unit of it costs)
AMOUNTS = {
    "TRAIN_TOKENS": (200_000, 100_000, 60_000, 1.0),
    "ANNEAL_TOKENS": (80_000, 40_000, 20_000, 1.0),
    "ANSWER_ROWS": (6_000, 4_500, 100, 65.0 * EPOCHS),  # with the bare answer
    "SUM_ROWS": (2_500, 2_000, 100, 44.0 * EPOCHS),
    "PAIR_ROWS": (1_500, 500, 40, 150.0),  # two answers, and a third of that for the reference
}
PROBE = 30_720  # tokens
PROBES = 3


def tokens_per_second() -> float:
    """Speed of `llmkit train` on the real model and data, once it is warm."""
    with tempfile.TemporaryDirectory(dir=".") as place:
        summary = Path(place) / "summary.json"
        command = [sys.executable, "-m", "llmkit", "train", "text/", "-m", "model.json", "--tokens", str(PROBE), "--batch-size", "4", "--quiet",
                   "--summary", str(summary), "-o", str(Path(place) / "run")]  # fmt: skip
        subprocess.run(command, check=True)
        return float(json.loads(summary.read_text())["tokens_per_second"])


def best_speed(enough: float) -> float:
    """The best of some probes, the last of which is the first that reaches `enough`."""
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
        wanted = sum(full * cost for full, _, _, cost in AMOUNTS.values())
        enough = wanted / (options.minutes * 60)
        speed = best_speed(enough)
        share = min(1.0, speed / enough)
        amounts = {name: max(least, round(full * share)) for name, (full, least, _, _) in AMOUNTS.items()}
        print(f"# {speed:,.0f} tokens/s: {share:.0%} of the full training" + (", cut down to fit" if share < 1 else ""))
    amounts["EPOCHS"] = 1 if options.tiny else EPOCHS
    for name, amount in amounts.items():
        print(f"{name}={amount}")


if __name__ == "__main__":
    main()

"""CPU milliseconds of the help pages, and the heavy modules they load (there should be none).

    python tests/bench/startup.py

Each command runs once to warm the file cache and then 15 times; the figure is user + system time of the finished process. Target: `llmkit --help`
at most 60 ms, `llmkit COMMAND --help` at most 350 ms. Results: startup.md.
"""

from __future__ import annotations

import platform
import resource
import statistics
import subprocess
import sys
from datetime import date

RUNS = 15
HEAVY = {
    "torch",
    "accelerate",
    "lm_eval",
    "numba",
    "pyarrow",
    "numpy",
    "tokenizers",
    "transformers",
    "duckdb",
    "rich",
    "jinja2",
}


def cpu_ms(arguments: list[str]) -> float:
    """User + system milliseconds of one finished child."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "llmkit", *arguments], stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return 1000 * (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def heavy_modules(arguments: list[str]) -> list[str]:
    """Which of HEAVY a call imports."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "llmkit", *arguments], capture_output=True, text=True, check=True
    )
    loaded = {line.rsplit("|", 1)[1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    return sorted(HEAVY & loaded)


def main() -> None:
    print(f"{date.today()}, Python {platform.python_version()}, CPU ms over {RUNS} runs\n")
    print("| command | median | minimum | maximum | heavy modules |\n|---|---|---|---|---|")
    for arguments in (["--version"], ["--help"], ["filter", "--help"], ["train", "--help"], ["eval", "--help"]):
        cpu_ms(arguments)
        runs = [cpu_ms(arguments) for _ in range(RUNS)]
        heavy = ", ".join(heavy_modules(arguments)) or "none"
        print(
            f"| llmkit {' '.join(arguments)} | {statistics.median(runs):.0f} | {min(runs):.0f} | {max(runs):.0f} | {heavy} |"
        )


if __name__ == "__main__":
    main()

"""Does a damaged or hostile file ever end a reader in anything but an error that names it? Mutated files, by target.

    python tests/fuzz/run.py [--minutes 60 | --cases 1000000] [--target NAME]... [--seed 0] [--findings DIR]

Reads the cases of readers.TARGETS: the kept corpus, then mutations of it (mutation.py), in forked workers (isolated.py).
A finding is any exception but LlmkitError, a signal, more than 10 s of CPU time, more memory than the target's budget
and 300 MB, or a forbidden event: a program started, a connection, a pickle, a file written outside the scratch
directory. Each finding is made smaller and written to corpus/TARGET/found-*, from where every later run reads it.

Prints a table of cases, cases per second, the share that was read without error, and findings with their tracebacks;
exit code 1 if there are any. All targets get the same time. Cost: see run.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

from isolated import Result, keep, run, shrunk
from readers import CORPUS, TARGETS, Target

ROUND = 30  # seconds of a target in a round; rounds repeat until the time or the cases are used up
MOST = 1 << 40  # cases


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, help="end after this time")
    parser.add_argument("--cases", type=int, help="end after this number of cases over all targets")
    parser.add_argument("--target", action="append", help="only this target (repeatable)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--findings", type=Path, default=CORPUS, help="directory for findings")
    options = parser.parse_args()
    targets = [target for target in TARGETS if target.name in (options.target or [t.name for t in TARGETS])]
    if not targets or not (options.minutes or options.cases):
        parser.error(f"give --minutes or --cases; targets: {', '.join(target.name for target in TARGETS)}")
    deadline = time.monotonic() + options.minutes * 60 if options.minutes else float("inf")
    totals = {target.name: Result() for target in targets}
    rounds = 0
    while time.monotonic() < deadline and sum(t.cases for t in totals.values()) < (options.cases or float("inf")):
        for target in targets:
            first = totals[target.name].cases + len(totals[target.name].findings)
            result = run(target, options.seed, first, MOST, min(deadline, time.monotonic() + ROUND))
            _add(totals[target.name], result, target, options.findings)
        rounds += 1
        whole = _sum(totals)
        print(f"round {rounds}: {whole.cases:,} cases in {whole.seconds:,.0f} s", file=sys.stderr, flush=True)
    print(f"\nseed {options.seed}\n\n{table(totals)}")
    return 1 if any(total.findings for total in totals.values()) else 0


def _add(total: Result, result: Result, target: Target, directory: Path) -> None:
    for outcome, count in result.counts.items():
        total.counts[outcome] += count
    total.seconds += result.seconds
    total.peak = max(total.peak, result.peak)
    for key, finding in result.findings.items():
        if key not in total.findings:
            total.findings[key] = finding
            print(f"--- {key} (case {finding.case})", flush=True)
            smaller = shrunk(target, finding)
            path = keep(smaller, target, directory)
            print(f"{path}: {len(smaller.data):,} bytes\n{smaller.detail}", flush=True)


def table(totals: dict[str, Result]) -> str:
    """The results as Markdown."""
    rows = ["| target | cases | per second | intact | peak MiB | findings |", "|---|---:|---:|---:|---:|---:|"]
    for name, total in [*totals.items(), ("all", _sum(totals))]:
        rate, intact = total.cases / max(total.seconds, 1e-9), total.counts["intact"] / max(total.cases, 1)
        rows.append(
            f"| {name} | {total.cases:,} | {rate:,.0f} | {intact:.0%} | {total.peak >> 20:,} | {len(total.findings)} |"
        )
    return "\n".join(rows)


def _sum(totals: dict[str, Result]) -> Result:
    whole = Result()
    for total in totals.values():
        whole.seconds += total.seconds
        whole.peak = max(whole.peak, total.peak)
        whole.findings |= total.findings
        for outcome, count in total.counts.items():
            whole.counts[outcome] += count
    return whole


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env bash
# What a CI job runs on a change of a corpus: does it still look the way a corpus should?
#
#   bash examples/ci_check.sh docs/*.jsonl.zst
#
# Nothing is written but a report on stdout, one JSON object. Exit codes: 0 all within bounds, 1 something is not (the report says what) or a
# file cannot be read at all, 2 wrong call. Bounds, from the environment:
#   MIN_KEPT=0.5         share of documents that the filter keeps
#   MAX_DUPLICATES=0.2   share of the kept documents that are near duplicates of another
#   MAX_BAD_LINES=0      lines that are no documents
#   PRESET=gopher        rules of the filter: a preset or a TOML file
set -euo pipefail
if [ $# -eq 0 ]; then
    echo "usage: ci_check.sh FILE..." >&2
    exit 2
fi
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT

# One pipe; each stage leaves its counts. Data goes nowhere: only the counts matter.
llmkit filter "$@" --preset "${PRESET:-gopher}" --on-bad-line skip -q --summary "$work/filter.json" |
    llmkit dedup --method minhash -q --summary "$work/dedup.json" > "$work/unique"

python3 - "$work" "${MIN_KEPT:-0.5}" "${MAX_DUPLICATES:-0.2}" "${MAX_BAD_LINES:-0}" <<'PYTHON'
import json
import sys

place, min_kept, max_duplicates, max_bad = sys.argv[1], *map(float, sys.argv[2:])
filtered, unique = (json.load(open(f"{place}/{name}.json")) for name in ("filter", "dedup"))
kept = filtered["kept"] / max(filtered["documents"], 1)
duplicates = 1 - unique["kept"] / max(unique["documents"], 1)
bad = filtered.get("bad_lines", 0)
problems = []
if kept < min_kept:
    worst = sorted(filtered["reasons"].items(), key=lambda item: -item[1])[:3]
    problems.append(f"{kept:.1%} of the documents pass the filter, {min_kept:.1%} are wanted; most often dropped by {worst}")
if duplicates > max_duplicates:
    problems.append(f"{duplicates:.1%} of the kept documents are near duplicates, {max_duplicates:.1%} are allowed")
if bad > max_bad:
    problems.append(f"{bad} bad lines, {max_bad:.0f} are allowed")
report = {"documents": filtered["documents"], "kept": round(kept, 4), "duplicates": round(duplicates, 4), "bad_lines": bad, "problems": problems}
print(json.dumps(report))
sys.exit(1 if problems else 0)
PYTHON

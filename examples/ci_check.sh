#!/usr/bin/env bash
# Quality gate for a corpus in CI: checks the share of good documents, of near duplicates and of bad lines.
#
#   bash examples/ci_check.sh docs/*.jsonl.zst
#
# Writes only a report to stdout, as one JSON object. Exit codes: 0 within all bounds; 1 out of bounds (see "problems"
# in the report) or unreadable input; 2 usage error. Bounds, from the environment:
#   MIN_KEPT=0.5         minimum share of documents that the filter keeps
#   MAX_DUPLICATES=0.2   maximum share of near duplicates among the kept documents
#   MAX_BAD_LINES=0      maximum number of lines that are not documents
#   PRESET=gopher        rules of the filter: a preset or a TOML file
set -euo pipefail
if [ $# -eq 0 ]; then
    echo "usage: ci_check.sh FILE..." >&2
    exit 2
fi
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT

# Only the counts of each stage matter; the data is thrown away.
llmkit filter "$@" --preset "${PRESET:-gopher}" --on-bad-line skip -q --summary "$work/filter.json" |
    llmkit dedup --method minhash -q --summary "$work/dedup.json" > "$work/unique"

python3 - "$work" "${MIN_KEPT:-0.5}" "${MAX_DUPLICATES:-0.2}" "${MAX_BAD_LINES:-0}" <<'PYTHON'
import json
import sys

directory, min_kept, max_duplicates, max_bad = sys.argv[1], *map(float, sys.argv[2:])
filtered, unique = (json.load(open(f"{directory}/{name}.json")) for name in ("filter", "dedup"))
kept = filtered["kept"] / max(filtered["documents"], 1)
duplicates = 1 - unique["kept"] / max(unique["documents"], 1)
bad = filtered.get("bad_lines", 0)
problems = []
if kept < min_kept:
    worst = sorted(filtered["reasons"].items(), key=lambda item: -item[1])[:3]
    problems.append(f"{kept:.1%} of the documents pass the filter, at least {min_kept:.1%} are required; most often dropped by {worst}")
if duplicates > max_duplicates:
    problems.append(f"{duplicates:.1%} of the kept documents are near duplicates, at most {max_duplicates:.1%} are allowed")
if bad > max_bad:
    problems.append(f"{bad} bad lines, at most {max_bad:.0f} are allowed")
report = {"documents": filtered["documents"], "kept": round(kept, 4), "duplicates": round(duplicates, 4), "bad_lines": bad, "problems": problems}
print(json.dumps(report))
sys.exit(1 if problems else 0)
PYTHON

"""What is removed that only looks like a duplicate? `llmkit dedup` beside datatrove's MinHash, by normalisation; prints a dated table.

    python tests/bench/dedup_numbers.py [--shared ../shared/data] > tests/bench/dedup_numbers.md

Recall on the corpus of dedup_speed.py, counted as there. Beside it, families of 40 texts each that no one should lose: exercises, logs and tables that
differ in every number, functions that differ in every operator, and real documents of which at least one word in twelve is a number, each beside a copy
with all of its numbers replaced. Then parity: what datatrove's `simplify_text` and our normalisation make of random texts, for every combination of parts.
"""

from __future__ import annotations

import datetime
import itertools
import json
import platform
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from dedup_speed import OURS, PEERS, WORKER, corpus, found, grams
from filter_speed import documents
from peers import asked, call, compete, rows_of, store

from llmkit.corpus.dedup.normalise import NONE, normaliser

DATATROVE = "from datatrove.utils.text import TextNormConfig\n" + WORKER["datatrove"]
WAYS = {
    "default": ("llmkit dedup", OURS.format(options=[])),
    "prose": ("llmkit dedup --preset prose", OURS.format(options=["--preset", "prose"])),
    "code": ("llmkit dedup --preset code", OURS.format(options=["--preset", "code"])),
    "tables": ("llmkit dedup --preset tables", OURS.format(options=["--preset", "tables"])),
    "loose": ("llmkit dedup --normalise loose", OURS.format(options=["--normalise", "loose"])),
    "datatrove": ("datatrove 0.10.1", DATATROVE),
    "datatrove-numbers": (
        "datatrove 0.10.1, norm_numbers=False",
        DATATROVE.replace("hashes_per_bucket=8", "hashes_per_bucket=8, norm_config=TextNormConfig(norm_numbers=False)"),
    ),
}
FAMILY = 40
OPERATORS = ["+", "-", "*", "/", "%", "==", "<", ">", "|", "&", "^", "<=", ">=", "~"]
THINGS = ["apples", "pears", "books", "coins", "stamps"]
PIECES = [*"aZ09.,٣ \t\n-’ΣéİßA가+*=<>|~%^&/(){}[]#$@!?:;_\"'≠×日。％～", "１", "\u0301", "1.5", "Über", "the "]
INTENDED = """Not equal, by intention: a number that counts keeps the marks in it (`1.5`; datatrove `1 5`); a symbol that counts keeps its stroke (`≠`; datatrove `=`); if
whitespace counts, line breaks stay line breaks under removal of marks (datatrove: spaces), and the ends are not stripped."""
PARITY = """
import itertools, json, sys
from datatrove.utils.text import TextNormConfig, simplify_text
for line in sys.stdin:
    text = json.loads(line)
    print(json.dumps([simplify_text(text, TextNormConfig(*on)) for on in itertools.product((True, False), repeat=5)]))
"""


def exercise(random_: random.Random) -> str:
    number = lambda: random_.randint(2, 900)  # noqa: E731
    return "\n".join(
        f"{i}. Tom has {number()} {thing} and buys {number()} more. How many {thing} does he have? {number()}."
        for i, thing in enumerate(THINGS * 8, 1)
    )


def log(random_: random.Random) -> str:
    return "\n".join(
        f"2026-{random_.randint(10, 12)}-{random_.randint(10, 28)} INFO request {random_.randint(1, 10**6)} served in "
        f"{random_.uniform(0, 90):.2f} ms from cache"
        for _ in range(60)
    )


def table(random_: random.Random) -> str:
    return "\n".join(
        f"| item {name} | {random_.uniform(-90, 90):.2f} | {random_.randint(10, 99)} % |" for name in "abcdefghijkl" * 4
    )


def function(random_: random.Random) -> str:
    return "\n".join(
        f"def {name}(left, right):\n    total = left {random_.choice(OPERATORS)} right\n"
        f"    return total {random_.choice(OPERATORS)} left"
        for name in ["add", "scale", "shift", "blend"] * 6
    )


def lookalikes(shared: Path) -> list[dict[str, str]]:
    """Documents that differ in every number or operator; their ids begin with their family."""
    rows = [
        {"id": f"{family.__name__}.{seed}", "text": family(random.Random(seed))}
        for family in (exercise, log, table, function)
        for seed in range(FAMILY)
    ]
    random_ = random.Random(8)
    real = 0
    for row in documents(shared):
        numbers, words = len(re.findall(r"\d+", row["text"])), len(row["text"].split())
        if 60 <= words < 3000 and 12 * numbers >= words and real < FAMILY:
            other = re.sub(r"[1-9]\d*", lambda match: str(random_.randrange(1, 10 ** len(match[0]) + 9)), row["text"])
            rows += [{"id": f"real.{real}", "text": row["text"]}, {"id": f"real.{real}.other", "text": other}]
            real += 1
    return rows


def parity(python: str) -> list[str]:
    """Rows of a table: combinations of parts, texts, and how many results are equal."""
    random_ = random.Random(5)
    texts = ["".join(random_.choices(PIECES, k=random_.choice((3, 12, 40)))) for _ in range(2000)]
    lines = "".join(json.dumps(text) + "\n" for text in texts)
    answers = subprocess.run([python, "-c", PARITY], input=lines, capture_output=True, text=True, check=True).stdout
    equal: dict[str, list[int]] = {"all": [0, 0]}
    for text, line in zip(texts, answers.splitlines(), strict=True):
        for on, theirs in zip(itertools.product((True, False), repeat=5), json.loads(line), strict=True):
            case, whitespace, marks, accents, numbers = on
            names = {"case": case, "whitespace": whitespace, "punctuation,operators": marks, "accents": accents}
            how = ",".join(name for name, used in (names | {"numbers": numbers}).items() if used) or NONE
            kind = "all" if all(on) else "numbers count, marks do not" if marks and not numbers else ""
            kind = kind or ("marks count, accents do not" if accents and not marks else "other combinations")
            kind += "" if whitespace else "; whitespace counts"
            ours = normaliser(how)(text)
            total = equal.setdefault(kind, [0, 0])
            total[0] += ours == (" ".join(theirs.split()) if whitespace else theirs)
            total[1] += 1
    return [f"| {kind} | {whole:,} | {part:,} |" for kind, (part, whole) in equal.items()]


def main() -> None:
    given, pythons = asked(__doc__, {"datatrove": PEERS["datatrove"]})
    rows, alike = corpus(given.shared), lookalikes(given.shared)
    sets = {row["id"]: grams(row["text"]) for row in rows}
    families = list(dict.fromkeys(row["id"].partition(".")[0] for row in alike))
    print(
        f"# Near duplicates: numbers and operators\n\n{datetime.date.today()}, Python {platform.python_version()}; ",
        end="",
    )
    print(f"`{call()}`\n\n{len(rows):,} documents with known copies (datatrove on them: dedup_speed.md):\n")
    with tempfile.TemporaryDirectory() as temporary:
        here = Path(temporary)
        store(rows, here / "corpus.jsonl.zst")
        store(alike, here / "alike.jsonl.zst")
        store(rows[:20], here / "warm.jsonl.zst")
        workers = {
            name: (pythons["datatrove"] if name.startswith("datatrove") else sys.executable, code)
            for name, (_, code) in WAYS.items()
        }
        ours = {name: worker for name, worker in workers.items() if not name.startswith("datatrove")}
        compete(ours, 1, here / "corpus.jsonl.zst", here / "warm.jsonl.zst")
        print(
            "| what | copies found | edited ones at 0.75 found | removed with a kept one at 0.75 |\n|---|---:|---:|---:|"
        )
        for name in ours:
            print(f"| {WAYS[name][0]} | {' | '.join(found(rows, sets, here / f'{name}.jsonl.zst'))} |")
        compete(workers, 1, here / "alike.jsonl.zst", here / "warm.jsonl.zst")
        print(f"\n{len(alike)} documents that only look alike:\n")
        print(f"| what | {' | '.join(f'lost: {name}' for name in families)} |\n|---|" + "---:|" * len(families))
        for name, (label, _) in WAYS.items():
            kept = {row["id"] for row in rows_of(here / f"{name}.jsonl.zst")}
            lost = [row["id"].partition(".")[0] for row in alike if row["id"] not in kept]
            counts = [f"{lost.count(f)} of {sum(r['id'].startswith(f + '.') for r in alike)}" for f in families]
            print(f"| {label} | {' | '.join(counts)} |", flush=True)
    print("\n| parity with `simplify_text`: parts that do not count | texts | equal |\n|---|---:|---:|")
    print("\n".join(parity(pythons["datatrove"])) + f"\n\n{INTENDED}")


if __name__ == "__main__":
    main()

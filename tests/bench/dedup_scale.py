"""How do time, memory and index of `llmkit dedup` grow with the corpus? Generated documents; prints a dated table.

    python tests/bench/dedup_scale.py [--documents 100000,1000000] > tests/bench/dedup_scale.md

Documents are 120 words of a vocabulary of 50,000; of every ten one is a copy of an earlier one and one such a copy with 1 to 8 words replaced. The whole
command on one core: CPU time and peak memory (resident, pages of temporary files that are mapped included). Then nights on an index of as many documents:
one percent of new ones, half of them edited copies of indexed ones; the share of those removed whose true similarity to the document named is under the
threshold, since an index knows signatures only.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import orjson
import zstandard

WORDS = 120
THRESHOLD = 0.75


def vocabulary() -> list[str]:
    random_ = random.Random(1)
    return ["".join(random_.choices("abcdefghijklmnopqrstuvwxyz", k=random_.randint(2, 9))) for _ in range(50_000)]


def words_of(number: int, known: list[str]) -> list[str]:
    """The words of the original with that number."""
    return random.Random(number).choices(known, k=WORDS)


def edited(number: int, edits: int, known: list[str]) -> list[str]:
    random_ = random.Random(-1 - number * 16 - edits)
    words = words_of(number, known)
    for place in random_.sample(range(WORDS), edits):
        words[place] = random_.choice(known)
    return words


def generated(count: int, known: list[str]) -> Iterator[tuple[str, list[str]]]:
    random_ = random.Random(7)
    for i in range(count):
        kind = i % 10
        if kind == 8:
            yield f"d{i}", words_of(random_.randrange(i), known)
        elif kind == 9:
            yield f"d{i}", edited(random_.randrange(i), random_.randint(1, 8), known)
        else:
            yield f"d{i}", words_of(i, known)


def night(first: int, count: int, known: list[str]) -> Iterator[tuple[str, list[str]]]:
    """New documents, and edited copies of earlier ones: their ids say of which, and how many words were replaced."""
    random_ = random.Random(first)
    for i in range(first, first + count):
        if i % 2:
            number, edits = random_.randrange(first), random_.randint(1, 9)
            yield f"n{i}:{number}:{edits}", edited(number, edits, known)
        else:
            yield f"n{i}", words_of(i, known)


def store(documents: Iterator[tuple[str, list[str]]], path: Path) -> float:
    """Megabytes of text."""
    size = 0
    with open(path, "wb") as raw, zstandard.ZstdCompressor(level=1).stream_writer(raw) as sink:
        for name, words in documents:
            text = " ".join(words)
            size += len(text)
            sink.write(orjson.dumps({"id": name, "text": text}) + b"\n")
    return size / 1e6


def command(*arguments: object) -> tuple[float, float]:
    """(CPU s, peak MB) of one `llmkit dedup`."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.Popen([sys.executable, "-m", "llmkit", "dedup", "-q", "-f", *map(str, arguments)])
    _, status, used = os.wait4(process.pid, 0)
    assert status == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, used.ru_maxrss / 1024


def grams(words: list[str]) -> set[tuple[str, ...]]:
    return set(zip(*(words[k:] for k in range(5)), strict=False))


def wrong(rejects: Path, known: list[str], count: int) -> tuple[int, int]:
    """(removed for an indexed document, of those how many are under the threshold)."""
    removed = under = 0
    wanted: dict[str, list[str]] = {}
    rows = []
    data = zstandard.ZstdDecompressor().stream_reader(rejects.read_bytes(), read_across_frames=True).read()
    for line in data.splitlines():
        row = orjson.loads(line)
        if row["duplicate_of"].startswith("d"):
            rows.append(row)
            wanted[row["duplicate_of"]] = []
    for name, words in generated(count, known):
        if name in wanted:
            wanted[name] = words
    for row in rows:
        a, b = grams(row["text"].split()), grams(wanted[row["duplicate_of"]])
        removed += 1
        under += len(a & b) / len(a | b) < THRESHOLD
    return removed, under


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", default="100000,1000000")
    given = parser.parse_args()
    os.sched_setaffinity(0, {0})
    known = vocabulary()
    print(
        f"# Deduplication: growth\n\n{datetime.date.today()}, Python {platform.python_version()}, {os.cpu_count()} cores; ",
        end="",
    )
    print(f"`python tests/bench/dedup_scale.py {' '.join(sys.argv[1:])}`\n")
    print(
        "| documents | MB of text | CPU s | µs a document | MB a CPU second | peak MB | with --index: CPU s | bytes a document in it | a night of 1 %: CPU s | share of the full run |"
    )
    print("|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
    notes = []
    for count in map(int, given.documents.split(",")):
        with tempfile.TemporaryDirectory() as temporary:
            here = Path(temporary)
            megabytes = store(generated(count, known), here / "all.jsonl.zst")
            store(night(count, count // 100, known), here / "night.jsonl.zst")
            (here / "empty.jsonl").write_bytes(b'{"text": "warm up the kernels with words"}\n')
            start, _ = command(here / "empty.jsonl", "-o", here / "e.jsonl.zst")
            start, _ = command(here / "empty.jsonl", "-o", here / "e.jsonl.zst")
            cpu, peak = command(here / "all.jsonl.zst", "-o", here / "o.jsonl.zst")
            indexed, _ = command(here / "all.jsonl.zst", "-o", here / "o.jsonl.zst", "--index", here / "i.duckdb")
            kept = sum(
                1
                for _ in zstandard.ZstdDecompressor()
                .stream_reader(open(here / "o.jsonl.zst", "rb"), read_across_frames=True)
                .read()
                .splitlines()
            )
            size = (here / "i.duckdb").stat().st_size / kept
            later, _ = command(
                here / "night.jsonl.zst",
                "-o",
                here / "n.jsonl.zst",
                "--index",
                here / "i.duckdb",
                "--rejects",
                here / "r.jsonl.zst",
            )
            print(
                f"| {count:,} | {megabytes:.0f} | {cpu:.1f} | {1e6 * (cpu - start) / count:.0f} | {megabytes / cpu:.1f} | {peak:.0f} "
                f"| {indexed:.1f} | {size:.0f} | {later:.1f} | {(later - start) / (indexed - start):.1%} |",
                flush=True,
            )
            removed, under = wrong(here / "r.jsonl.zst", known, count)
            notes.append(
                f"{count:,} documents: {removed:,} of the night removed by signatures of 8 bits, {under / max(1, removed):.1%} of them under {THRESHOLD}."
            )
    print(f"\nStart-up, {start:.1f} s, is left out of µs and shares.\n\n" + "\n".join(notes))


if __name__ == "__main__":
    main()

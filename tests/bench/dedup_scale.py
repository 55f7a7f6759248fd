"""How do time, memory and index of `llmkit dedup` grow with the corpus? Generated documents; prints a dated table.

    python tests/bench/dedup_scale.py [--documents 100000,1000000,10000000] [--memory 4GB] > tests/bench/dedup_scale.md

Documents are 120 words of a vocabulary of 50,000; of every ten one is a copy of an earlier one and one such a copy with 1 to 8 words replaced. The whole
command on one core: CPU time and peak memory (resident, pages of temporary files that are mapped included). Then nights on an index of as many documents:
one percent of new ones, half of them edited copies of indexed ones; the share of those removed whose true similarity to the document named is under the
threshold, since an index knows signatures only. 10,000,000 documents take 8 GB of text, 30 GB of disk and half an hour.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import random
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import orjson
import zstandard
from peers import measured

WORDS = 120
MIX, STEP = np.uint64(0x9E3779B97F4A7C15), np.uint64(0x5851F42D4C957F2D)
THRESHOLD = 0.75


class Made(NamedTuple):
    """How a document is made: its id, the original that its words are from, and how many of them are replaced."""

    id: str
    original: int
    edits: int


def words_of(made: list[Made], known: list[str]) -> Iterator[list[str]]:
    """The words of some documents: originals are drawn by a linear congruential generator, all at once."""
    state = np.array([document.original for document in made], np.uint64) * MIX + np.uint64(1)
    places = np.empty((len(made), WORDS), np.int64)
    for column in range(WORDS):
        state = state * STEP + MIX
        places[:, column] = (state >> np.uint64(33)) % np.uint64(len(known))
    for document, row in zip(made, places.tolist(), strict=True):
        words = [known[place] for place in row]
        if document.edits:
            random_ = random.Random(-1 - document.original * 16 - document.edits)
            for place in random_.sample(range(WORDS), document.edits):
                words[place] = random_.choice(known)
        yield words


def vocabulary() -> list[str]:
    random_ = random.Random(1)
    return ["".join(random_.choices("abcdefghijklmnopqrstuvwxyz", k=random_.randint(2, 9))) for _ in range(50_000)]


def corpus(count: int) -> Iterator[Made]:
    random_ = random.Random(7)
    for i in range(count):
        copy = i % 10 >= 8
        yield Made(f"d{i}", random_.randrange(i) if copy else i, random_.randint(1, 8) if i % 10 == 9 else 0)


def night(first: int, count: int) -> Iterator[Made]:
    """New documents, and edited copies of earlier ones."""
    random_ = random.Random(first)
    for i in range(first, first + count):
        copy = i % 2
        yield Made(f"n{i}", random_.randrange(first) if copy else i, random_.randint(1, 9) if copy else 0)


def store(documents: Iterator[Made], known: list[str], path: Path) -> float:
    """Megabytes of text."""
    size = 0
    with open(path, "wb") as raw, zstandard.ZstdCompressor(level=1).stream_writer(raw) as sink:
        while block := list(islice(documents, 4096)):
            for made, words in zip(block, words_of(block, known), strict=True):
                text = " ".join(words)
                size += len(text)
                sink.write(orjson.dumps({"id": made.id, "text": text}) + b"\n")
    return size / 1e6


def lines(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as raw:
        rest = b""
        reader = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
        while block := reader.read(1 << 20):
            *whole, rest = (rest + block).split(b"\n")
            yield from whole


def grams(words: list[str]) -> set[tuple[str, ...]]:
    return set(zip(*(words[k:] for k in range(5)), strict=False))


def wrong(rejects: Path, known: list[str], count: int) -> tuple[int, int]:
    """(removed for an indexed document, of those how many are under the threshold)."""
    rows = [row for row in map(orjson.loads, lines(rejects)) if row["duplicate_of"].startswith("d")]
    wanted = {row["duplicate_of"] for row in rows}
    indexed = {made.id: made for made in corpus(count) if made.id in wanted}
    under = 0
    for row, words in zip(rows, words_of([indexed[row["duplicate_of"]] for row in rows], known), strict=True):
        a, b = grams(row["text"].split()), grams(words)
        under += len(a & b) / len(a | b) < THRESHOLD
    return len(rows), under


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", default="100000,1000000,10000000")
    parser.add_argument("--memory", default="4GB")
    given = parser.parse_args()
    known = vocabulary()
    print(
        f"# Deduplication: growth\n\n{datetime.date.today()}, Python {platform.python_version()}, {os.cpu_count()} cores; ",
        end="",
    )
    print(f"`python tests/bench/dedup_scale.py --documents {given.documents} --memory {given.memory}`\n")
    print(
        "| documents | MB of text | CPU s | µs a document | MB a CPU second | peak MB | with --index: CPU s | bytes a document in it | a night of 1 %: CPU s | share of the full run |"
    )
    print("|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
    notes, bars = [], []
    for count in map(int, given.documents.split(",")):
        with tempfile.TemporaryDirectory() as temporary:
            here = Path(temporary)
            megabytes = store(corpus(count), known, here / "all.jsonl.zst")
            store(night(count, count // 100), known, here / "night.jsonl.zst")
            store(corpus(300), known, here / "few.jsonl.zst")
            call = ["dedup", "-q", "-f", "--temp-dir", here, "--memory", given.memory, "-o", here / "out.jsonl.zst"]
            index = ["--index", here / "seen.duckdb"]
            for _ in range(2):
                start, _, _ = measured(*call, here / "few.jsonl.zst")
            cpu, _, peak = measured(*call, here / "all.jsonl.zst")
            indexed, _, _ = measured(*call, here / "all.jsonl.zst", *index)
            kept = sum(1 for _ in lines(here / "out.jsonl.zst"))
            size = (here / "seen.duckdb").stat().st_size / kept
            later, _, _ = measured(*call, here / "night.jsonl.zst", *index, "--rejects", here / "r.jsonl.zst")
            each = 1e6 * (cpu - start) / count
            print(
                f"| {count:,} | {megabytes:.0f} | {cpu:.1f} | {each:.0f} | {megabytes / cpu:.1f} | {peak:.0f} "
                f"| {indexed:.1f} | {size:.0f} | {later:.1f} | {(later - start) / (indexed - start):.1%} |",
                flush=True,
            )
            removed, under = wrong(here / "r.jsonl.zst", known, count)
            notes.append(
                f"{count:,} documents: {removed:,} of the night removed by signatures of 8 bits, {under / max(1, removed):.1%} of them under {THRESHOLD}."
            )
            bars.append(
                f"{count:>12,}  {'#' * round(each / 2):<40} {each:.0f} µs a document\n{'':>12}  {'=' * round(peak / 100):<40} {peak:.0f} MB"
            )
    print(f"\nStart-up, {start:.1f} s, is left out of µs and shares.\n\n" + "\n".join(notes))
    print("\n```\n" + "\n".join(bars) + "\n```")


if __name__ == "__main__":
    main()

"""How fast is `llmkit filter`? The FineWeb chain beside datatrove's and dolma's taggers on the same documents; prints a dated table.

    python tests/bench/filter_speed.py [--shared ../shared/data] [--pairs 5] > tests/bench/filter_speed.md

Ratios: three long-lived processes pinned to one core (ours, datatrove, dolma), each warmed up, then each in turn reads the same JSONL.zst and does its
work; CPU time of the process. Ours is the whole command, JSONL.zst in and out; datatrove's are its reader, four filters and writer; dolma's only read
and tag. Absolute figures: the real command on a larger corpus, to a file and into a pipe, start-up included. The peers' environments are made under
.cache/ on first use. Machines differ and are noisy: trust the ratios.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from filter_parity import REQUIREMENTS, all_sources
from peers import asked, call, compete, measured, ratios, spread, store

PEERS = {"datatrove": REQUIREMENTS, "dolma": ["dolma==1.2.1", "orjson", "zstandard"]}
SAMPLE_BYTES = 3_000_000
REPEATED = 8  # how often the whole command meets all documents: start-up then is a small part

WORKER = {
    "llmkit": """
import os, sys, time
from llmkit.cli.main import run_command
def work(source, target):
    if run_command("filter", [source, "--preset", "fineweb", "-o", target, "-f", "-q"]): sys.exit("llmkit failed")
""",
    "datatrove": """
import os, sys, time, logging, shutil
from loguru import logger
logger.remove()
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.filters import GopherRepetitionFilter, GopherQualityFilter, C4QualityFilter, FineWebQualityFilter
from datatrove.pipeline.writers import JsonlWriter
filters = [GopherRepetitionFilter(), GopherQualityFilter(), C4QualityFilter(filter_no_terminal_punct=False), FineWebQualityFilter()]
def work(source, target):
    data = JsonlReader(os.path.dirname(source), glob_pattern=os.path.basename(source), compression="zstd").run()
    for step in filters: data = step.run(data)
    with JsonlWriter(target + ".d", output_filename="out.jsonl.zst", compression="zstd") as writer:
        for document in data: writer.write(document)
""",
    "dolma": """
import os, sys, time, io
import orjson, zstandard
from dolma import TaggerRegistry
from dolma.core.data_types import InputSpec, Document
taggers = [TaggerRegistry.get(name)() for name in ("gopher_v2", "c4_v2")]
def work(source, target):
    with open(source, "rb") as raw:
        for line in io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(raw)):
            row = orjson.loads(line)
            document = Document(source="", id=row["id"], text=row["text"])
            for tagger in taggers: tagger.predict(document)
""",
}


def documents(shared: Path) -> list[dict[str, str]]:
    """Web pages, books, reviews, Python documentation and sources, shuffled by a fixed seed; about 6 kB each."""
    rows = [
        {"id": f"{name}-{i}", "text": text}
        for name, texts in all_sources(shared).items()
        if name not in ("made", "languages", "instructions")
        for i, text in enumerate(texts)
    ]
    random.Random(0).shuffle(rows)
    return rows


def main() -> None:
    given, pythons = asked(__doc__, PEERS)
    rows = documents(given.shared)
    with tempfile.TemporaryDirectory() as temporary:
        here = Path(temporary)
        sample: list[dict[str, str]] = []
        size = 0
        while size < SAMPLE_BYTES:
            sample.append(rows[len(sample)])
            size += len(sample[-1]["text"].encode())
        megabytes = store(sample, here / "sample.jsonl.zst")
        store(sample[:1], here / "warm.jsonl.zst")
        workers = {name: (python, WORKER[name]) for name, python in {"llmkit": sys.executable, **pythons}.items()}
        seconds, memory = compete(workers, given.pairs, here / "sample.jsonl.zst", here / "warm.jsonl.zst")
        print(
            f"# Speed of `llmkit filter`\n\n{datetime.date.today()}, Python {platform.python_version()}, {os.cpu_count()} cores; ",
            end="",
        )
        print(f"`{call()}`")
        print(
            f"\n{len(sample):,} documents, {megabytes:.1f} MB of text, JSONL.zst; {given.pairs} rounds in turn, one core, CPU time.\n"
        )
        print("| what | MB/s, median | ratio to ours, median (minimum to maximum) | peak MB |\n|---|---:|---:|---:|")
        for name, runs in seconds.items():
            what = {
                "llmkit": "llmkit filter --preset fineweb, to a file",
                "datatrove": "datatrove 0.10.1: reader, the same four filters, writer",
                "dolma": "dolma 1.2.1: gopher_v2 and c4_v2, tags not written",
            }[name]
            ratio = spread(ratios(runs, seconds["llmkit"]), 0) if name != "llmkit" else "1"
            print(f"| {what} | {megabytes / statistics.median(runs):.2f} | {ratio} | {memory[name]:.0f} |")
        whole(rows, here)


def whole(rows: list[dict[str, str]], here: Path) -> None:
    """The command on all documents, several times over: to a file, into a pipe, with two workers; memory; long documents."""
    megabytes = store(rows * REPEATED, here / "all.jsonl.zst")
    source = str(here / "all.jsonl.zst")
    arguments = ["filter", "-q", "--preset", "fineweb"]
    kinds = {
        "to a file": partial(measured, *arguments, source, "-f", "-o", here / "o.jsonl.zst"),
        "into a pipe": partial(measured, *arguments, source, drain=True),
    }
    measured(*arguments, here / "warm.jsonl.zst", drain=True)  # compile
    runs = {kind: [run() for _ in range(3)] for kind, run in kinds.items()}
    print(
        f"\nThe whole command, start-up included, {len(rows) * REPEATED:,} documents, {megabytes:.0f} MB of text, one core, 3 runs:\n"
    )
    print("| | MB a CPU second, median (minimum to maximum) | peak MB |\n|---|---:|---:|")
    for kind, found in runs.items():
        speeds = [megabytes / cpu for cpu, _, _ in found]
        print(f"| {kind} | {spread(speeds)} | {max(peak for _, _, peak in found):.0f} |")
    shares = []
    for _ in range(3):
        start = time.perf_counter()
        two = [
            subprocess.Popen([sys.executable, "-m", "llmkit", *arguments, source, "-f", "-o", here / f"{i}.jsonl.zst"])
            for i in range(2)
        ]
        for process in two:
            process.wait()
        apart = time.perf_counter() - start
        _, together, _ = measured(*arguments, source, "-j", 2, "-f", "-o", here / "2.jsonl.zst", cores="0,1")
        shares.append(apart / 2 / together)
    print(
        f"\n`-j 2` beside two runs with `-j 1` at once: {statistics.median(shares):.0%} of their throughput ({min(shares):.0%} to {max(shares):.0%}, 3 rounds)."
    )
    print(
        "\nOne document, FineWeb chain under --annotate (nothing stops early), peak memory and CPU seconds beyond those for an empty one:\n"
    )
    print("| document | CPU s | peak MB |\n|---|---:|---:|")
    prose = " ".join(row["text"] for row in rows if row["id"].startswith("books"))
    base = None
    for label, text in (
        ("1 word", "word"),
        ("1 MB of prose", prose[:1_000_000]),
        ("10 MB of prose", (prose * 2)[:10_000_000]),
        ("10 MB, each character a word", "?!" * 5_000_000),
        ("10 MB of one letter", "x" * 10_000_000),
    ):
        (here / "long.jsonl").write_bytes(json.dumps({"text": text}).encode() + b"\n")
        cpu, _, peak = measured(*arguments, here / "long.jsonl", "--annotate", "--plain", drain=True)
        base = base or cpu
        print(f"| {label} | {cpu - base:.2f} | {peak:.0f} |")


if __name__ == "__main__":
    main()

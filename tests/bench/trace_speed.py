"""How long `llmkit trace` works beyond its start, over a million documents: shards as they are stored, and a mix that follows a plan.

    taskset -c 0 python tests/bench/trace_speed.py [--documents 1000000] [--rounds 7] > tests/bench/trace_speed.md

Every round is a process of its own, with nothing opened before but the modules: opening the trace, and all pieces of a step in the middle, or all
places of one document. CPU time, files in the page cache (nothing is waited for). No peer: none that we know of leads from a step to its documents. Beside it what the tables take on disk, and how long
they take to write when a run starts.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow

from llmkit.cli.main import run_command
from llmkit.cli.shared.options import parse_count
from llmkit.io.record import Lineage
from llmkit.mixing.order import OrderedTokens
from llmkit.shards.arrow import as_arrow, encode_sources
from llmkit.shards.tokenizer_info import TokenizerInfo
from llmkit.shards.writer import ShardWriter
from llmkit.training.trace import write_trace

MEASURE = """
import sys, time
import pyarrow.ipc, numpy
from llmkit.training import trace
how, run, what = sys.argv[1:]
began = time.process_time()
found = trace.Trace(run)
pieces = list(found.step(int(what)) if how == "step" else found.find(what))
print(time.process_time() - began, len(pieces))
"""
ROWS, LENGTH = 64, 2048


def make(place: Path, name: str, documents: int, seed: int) -> None:
    """Shards of documents of 150 tokens on average, with ids as crawls have them."""
    draw = np.random.default_rng(seed)
    info = TokenizerInfo("xxh3:0", 50_000, 0)
    with ShardWriter(str(place / name), info, Lineage("tokenize")) as writer:
        for first in range(0, documents, 10_000):
            count = min(10_000, documents - first)
            lengths = draw.integers(20, 280, count)
            ids = as_arrow([f"<urn:uuid:{name}-{i:026d}>" for i in range(first, first + count)])
            tokens = draw.integers(0, 50_000, int(lengths.sum())).astype(np.uint16)
            writer.extend(tokens, lengths, ids, encode_sources([name] * count))
        writer.finish({}, [])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=parse_count, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=7)
    asked = parser.parse_args()
    print("# Tracing a step to its documents\n")
    print(
        f"{datetime.date.today()}, {platform.machine()}, two shared CPU cores, one used; Python {platform.python_version()}, pyarrow {pyarrow.__version__}, numpy {np.__version__}.\n"
    )
    print(f"    taskset -c 0 python tests/bench/trace_speed.py --documents {asked.documents} --rounds {asked.rounds}\n")
    print("| data | question | pieces | work, median (min to max) |\n|---|---|---|---|")
    notes = []
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        make(place, "web", asked.documents // 2, 0)
        make(place, "code", asked.documents // 2, 1)
        sources = [str(place / "web"), str(place / "code")]
        for form, more in {
            "mixed shards": [],
            "plan": ["--plan"],
            "packed plan": ["--plan", "--pack", "best-fit", "--sequence-length", str(LENGTH)],
        }.items():
            data, run = place / form.replace(" ", "-"), place / f"run-{form.replace(' ', '-')}"
            assert run_command("mix", [f"{sources[0]}:x1", f"{sources[1]}:x1", "-o", str(data), "-q", *more]) == 0
            stream = OrderedTokens.open(str(data))
            (run / "checkpoints").mkdir(parents=True)
            began = time.perf_counter()
            write_trace(run, stream, [(0, 0, ROWS, LENGTH)], stream.tokens)
            seconds = time.perf_counter() - began
            size = sum(file.stat().st_size for file in (run / "trace").iterdir())
            notes.append(
                f"{form}: {stream.documents:,} rows, {size / 1e6:.1f} MB ({size / stream.documents:.1f} bytes a row), written in {seconds:.2f} s"
            )
            middle = stream.tokens // (ROWS * LENGTH) // 2
            questions = {"step": str(middle), "find": stream.id(stream.documents * 2 // 3 // 2)}
            del stream
            for how, what in questions.items():
                times, pieces = [], 0
                for _ in range(asked.rounds + 1):
                    done = subprocess.run(
                        [sys.executable, "-c", MEASURE, how, str(run), what], check=True, capture_output=True, text=True
                    )
                    spent, pieces = float(done.stdout.split()[0]), int(done.stdout.split()[1])
                    times.append(spent * 1000)
                times = times[1:]
                print(
                    f"| {form} | --{how} | {pieces:,} | {statistics.median(times):.1f} ms ({min(times):.1f} to {max(times):.1f}) |"
                )
    print("\nTables of the trace: " + "; ".join(notes) + ".")


if __name__ == "__main__":
    main()

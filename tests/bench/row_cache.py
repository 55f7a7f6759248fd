"""CPU seconds of `sft` until the first step is done, without a cache of encoded rows, with a cold and with a warm one.

    python tests/bench/row_cache.py MODEL ROWS [--repeats 3]
    python tests/bench/row_cache.py MODEL ROWS --padding

Each measurement is a process of its own, with one thread; the three kinds take turns. `rows` is the part of it before the
model is loaded: reading and encoding. --padding prints the share of padding with and without --pack and --group-by-length
instead.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STEP = """
import os, sys, time
from llmkit.alignment import fine_tuning
began, prepare = [], fine_tuning.read_sources
def timed(*arguments):
    start = time.process_time()
    result = prepare(*arguments)
    began.append(time.process_time() - start)
    return result
fine_tuning.read_sources = timed
def report(record):
    print(began[0], time.process_time(), flush=True)
    os._exit(0)
model, rows, output, cache = sys.argv[1:]
fine_tuning.fine_tune(model, [rows], output, report=report, threads=1, **({"row_cache": cache} if cache else {}))
"""


def show_padding(model: str, rows: str) -> None:
    """The share of padding at batches of 8 and 32, each in one forward pass, and in passes of 2 sequences."""
    sys.path.insert(0, str(ROOT))
    from llmkit.chat.encode import encode_conversations
    from llmkit.chat.templates import chat_template, default_template, with_template
    from llmkit.io.documents import DocumentReader, ReadOptions
    from llmkit.model.pretrained.checkpoint import load_info
    from llmkit.training.data import PackedSource

    info = load_info(model)
    files = info.tokenizer_files
    if chat_template(files) is None:
        files = with_template(files, default_template(files)[1])
    length = info.config.max_position_embeddings
    pairs = encode_conversations(DocumentReader([rows], ReadOptions(text_key=None)), files, length).pairs()
    for batch_size in (8, 32):
        for name, more in (
            ("packed", {}),
            ("--no-pack", {"pack": False}),
            ("--no-pack --group-by-length", {"pack": False, "group_by_length": True}),
        ):
            source = PackedSource(pairs, length, batch_size, **more)
            shares = " ".join(f"{source.padding(at_once):.1%}" for at_once in (batch_size, 2))
            print(f"{batch_size} a batch, {name}: {source.steps} steps, padding {shares}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("rows")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--padding", action="store_true")
    arguments = parser.parse_args()
    if arguments.padding:
        show_padding(arguments.model, arguments.rows)
        return
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    seconds: dict[str, list[tuple[float, float]]] = {"none": [], "cold": [], "warm": []}
    with tempfile.TemporaryDirectory() as directory:
        cache = Path(directory, "cache")
        for repeat in range(arguments.repeats):
            shutil.rmtree(cache, ignore_errors=True)
            for kind, times in seconds.items():
                run = str(Path(directory, f"{kind}{repeat}"))
                call = [arguments.model, arguments.rows, run, "" if kind == "none" else str(cache)]
                done = subprocess.run(
                    [sys.executable, "-c", STEP, *call], env=environment, capture_output=True, text=True, check=True
                )
                rows, whole = map(float, done.stdout.split())
                times.append((rows, whole))
        size = sum(path.stat().st_size for path in cache.rglob("*.safetensors"))
    print(f"cache: {size / 1e6:.1f} MB; median of {arguments.repeats} (least to most), CPU seconds")
    for kind, times in seconds.items():
        columns = (f"{statistics.median(t):6.2f} ({min(t):.2f}-{max(t):.2f})" for t in zip(*times, strict=True))
        print(f"{kind:5}  rows {'  to the first step '.join(columns)}")


if __name__ == "__main__":
    main()

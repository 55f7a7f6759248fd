"""Two checkouts of llmkit, the same commands in turn: has a change made anything slower? Prints a dated table.

    python tests/bench/checkout_speed.py OLD NEW [--pairs 5]

Both run with this interpreter on the same corpus, pinned to one core: `extract`, `filter`, `dedup`, `tokenize` and a short
`train` as whole commands, and `llmkit --help`, `llmkit train --help`. After a warm-up of each, which also compiles the kernels,
OLD and NEW take turns. The figure is the ratio NEW / OLD of CPU time (user and system, children included): median and
range over the pairs, the ratio of the least times, which other work on the machine disturbs least, and the peak memory
of each.
"""

from __future__ import annotations

import argparse
import gzip
import html
import os
import resource
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import orjson

MODEL = "tiny"
COMMANDS = {
    "llmkit --help": ("--help",),
    "llmkit train --help": ("train", "--help"),
    "extract": ("extract", "pages.warc.gz", "-q", "-f", "-o", "extracted.jsonl.zst"),
    "filter": ("filter", "docs.jsonl", "--preset", "fineweb", "-q", "-f", "-o", "filtered.jsonl.zst"),
    "dedup": ("dedup", "docs.jsonl", "-q", "-f", "-o", "unique.jsonl.zst"),
    "tokenize": ("tokenize", "docs.jsonl", "-t", "tok/", "-q", "-f", "-o", "tokens.arrow"),
    "train": ("train", "shards.arrow", "-m", MODEL, "--tokens", "40k", "--threads", "1", "-q", "-f", "-o", "run/"),
}


def run(checkout: Path, directory: Path, *arguments: str) -> tuple[float, float]:
    """CPU seconds and peak memory in MB of one call."""
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    # As installed: with PYTHONDONTWRITEBYTECODE every start would compile the sources, and more source seem slower.
    environment |= {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(directory.parent / "bytecode")}
    child = subprocess.Popen(
        [sys.executable, "-P", "-m", "llmkit", *arguments],
        cwd=directory,
        env=environment,
        stdout=subprocess.DEVNULL,
        preexec_fn=lambda: os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}),
    )
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"{checkout}: llmkit {' '.join(arguments)} ended with status {status}")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def corpus(path: Path, size: int) -> None:
    """Sources and documentation of the standard library as documents, `size` bytes of text."""
    written = 0
    with open(path, "wb") as sink:
        for source in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
            if "site-packages" in source.parts:
                continue
            text = source.read_text(errors="replace")
            for start in range(0, len(text), 4000):
                piece = text[start : start + 4000]
                sink.write(orjson.dumps({"text": piece}) + b"\n")
                written += len(piece)
            if written > size:
                return


def archive(documents: Path, path: Path) -> None:
    """The documents as HTML pages of 4 kB in a WARC file, a gzip member each."""
    with open(documents, "rb") as source, open(path, "wb") as sink:
        for number, line in enumerate(source):
            paragraphs = "".join(f"<p>{html.escape(part)}</p>" for part in orjson.loads(line)["text"].split("\n\n"))
            page = f"<html><head><title>{number}</title></head><body>{paragraphs}</body></html>".encode()
            body = b"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\n\r\n" + page
            head = (
                "WARC/1.0\r\nWARC-Type: response\r\n"
                f"WARC-Record-ID: <urn:uuid:00000000-0000-0000-0000-{number:012}>\r\n"
                f"WARC-Target-URI: https://example.org/{number}\r\nWARC-Date: 2024-01-01T00:00:00Z\r\n"
                f"Content-Type: application/http; msgtype=response\r\nContent-Length: {len(body)}\r\n\r\n"
            )
            sink.write(gzip.compress(head.encode() + body + b"\r\n\r\n", mtime=0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--megabytes", type=int, default=12)
    parser.add_argument("--only", nargs="*", choices=list(COMMANDS), help="these alone")
    options = parser.parse_args()
    checkouts = (options.old.resolve(), options.new.resolve())
    print(f"# Two checkouts: CPU time, {time.strftime('%Y-%m-%d')}\n")
    print(
        f"{options.pairs} pairs after a warm-up, {options.megabytes} MB of text, one core, Python {sys.version.split()[0]}\n"
    )
    print(
        "| command | NEW / OLD, median | range | least / least | OLD, CPU s | NEW, CPU s | OLD, MB | NEW, MB |\n"
        "|---|---:|---:|---:|---:|---:|---:|---:|"
    )
    with tempfile.TemporaryDirectory() as temporary:
        directories = [Path(temporary, name) for name in ("old", "new")]
        for directory in directories:
            directory.mkdir()
            corpus(directory / "docs.jsonl", options.megabytes * 1_000_000)
            archive(directory / "docs.jsonl", directory / "pages.warc.gz")
        for checkout, directory in zip(checkouts, directories, strict=True):
            run(checkout, directory, "vocab", "docs.jsonl", "--size", "4096", "-q", "-o", "tok/")
            run(checkout, directory, "tokenize", "docs.jsonl", "-t", "tok/", "-q", "-o", "shards.arrow")
        for name in options.only or COMMANDS:
            arguments = COMMANDS[name]
            seconds: list[list[float]] = [[], []]
            memory = [0.0, 0.0]
            for turn in range(options.pairs + 1):
                for i in (0, 1):
                    cpu, peak = run(checkouts[i], directories[i], *arguments)
                    memory[i] = max(memory[i], peak)
                    if turn:
                        seconds[i].append(cpu)
            ratios = [new / old for old, new in zip(*seconds, strict=True)]
            old, new = map(statistics.median, seconds)
            print(
                f"| {name} | {statistics.median(ratios):.3f} | {min(ratios):.3f} to {max(ratios):.3f} "
                f"| {min(seconds[1]) / min(seconds[0]):.3f} | {old:.2f} | {new:.2f} | {memory[0]:.0f} | {memory[1]:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    main()

"""How fast is `llmkit tokenize`? Beside the `tokenizers` library and tiktoken on the same documents; prints a dated table.

    python tests/bench/tokenize_speed.py [--shared ../shared/data] [--pairs 5] > tests/bench/tokenize_speed.md

Ratios: three long-lived processes pinned to one core, with their tokenizer loaded and warmed up, then each in turn reads the same JSONL.zst; CPU time of
the process. Ours does what the command does, documents to token shards on disk; the others only parse the lines and encode (`encode_batch`,
`encode_ordinary_batch`, one thread) and write nothing. All use one vocabulary of 32,768 tokens, and the numbers of ids are compared (tokenize_parity.py
compares the ids). Absolute figures: the real command, start-up included, from an empty table of pieces. Growth: one document of up to 50 MB. Machines differ and are noisy: trust the ratios.
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
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from peers import asked, call, compete, measured, ratios, spread, store
from tokenize_parity import texts_of

PEERS = {
    "tokenizers": ["tokenizers==0.23.3", "orjson", "zstandard"],
    "tiktoken": ["tiktoken==0.12.0", "orjson", "zstandard"],
}
SAMPLE_BYTES = 32_000_000
TRAINED_BYTES = 16_000_000
ALL_BYTES = 100_000_000
SIZE = 32768
REPEATED = 4  # how often the whole command meets all documents: start-up then is a small part
LENGTHS = (5_000_000, 10_000_000, 20_000_000, 30_000_000, 40_000_000, 50_000_000)

READ = """
import sys, time, io, json, os
import orjson, zstandard
os.environ["TOKENIZERS_PARALLELISM"] = "false"
def texts(source):
    with open(source, "rb") as raw:
        for line in io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(raw)):
            text = orjson.loads(line)["text"]
            if text and not text.isspace(): yield text
def batches(source):
    held = []
    for text in texts(source):
        held.append(text)
        if len(held) == 256:
            yield held
            held = []
    if held: yield held
"""
WORKER = {
    "llmkit": """
import sys, time
from llmkit.io.documents import DocumentReader, ReadOptions
from llmkit.io.record import Lineage
from llmkit.shards.arrow import as_arrow, encode_sources
from llmkit.shards.reader import load_tokenizer_info
from llmkit.shards.writer import ShardWriter
from llmkit.tokens.encode import Encoder
info = load_tokenizer_info(TOKENIZER)
options = ReadOptions()
encoder = Encoder(info, options)
def work(source, target):
    with ShardWriter(target + ".arrow", info, Lineage("tokenize"), force=True) as writer, DocumentReader([source], options) as reader:
        for block in map(encoder, reader.chunks()):
            writer.extend(block.tokens, block.lengths, as_arrow(block.ids), encode_sources(block.sources))
        writer.finish({}, reader.inputs)
""",
    "tokenizers": READ + """
from tokenizers import Tokenizer
tokenizer = Tokenizer.from_file(TOKENIZER + "/tokenizer.json")
tokenizer.encode_special_tokens = True
def work(source, target):
    total = 0
    for batch in batches(source):
        total += sum(len(item.ids) for item in tokenizer.encode_batch(batch, add_special_tokens=False))
    print(total, file=open(target + ".count", "w"))
""",
    "tiktoken": READ + """
import tiktoken
from pathlib import Path
content = json.loads(Path(TOKENIZER, "tokenizer.json").read_text())
printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
free = iter(range(0x100, 0x200))
byte_of = {(chr(byte) if byte in printable else chr(next(free))): byte for byte in range(256)}
special = {token["content"] for token in content["added_tokens"]}
ranks = {bytes(byte_of[c] for c in word): id for word, id in content["model"]["vocab"].items() if word not in special}
regex = content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
encoding = tiktoken.Encoding("bench", pat_str=regex, mergeable_ranks=ranks, special_tokens={})
def work(source, target):
    total = 0
    for batch in batches(source):
        total += sum(map(len, encoding.encode_ordinary_batch(batch, num_threads=1)))
    print(total, file=open(target + ".count", "w"))
""",
}  # fmt: skip


def documents(shared: Path) -> Iterator[dict[str, str]]:
    """Books, reviews, web pages and the like, then sources and documentation of installed Python packages; pieces of up to 20,000 characters, no text twice."""
    seen = set()
    paths = sysconfig.get_paths()
    prose = (text for path in sorted((shared / "text").iterdir()) for text in texts_of(path))
    files = (
        path
        for place in (paths["stdlib"], paths["purelib"])
        for path in sorted(Path(place).rglob("*"))
        if path.suffix in (".py", ".pyi", ".rst", ".md", ".txt")
    )
    for text in (*prose, *(path.read_text(errors="replace") for path in files if path.is_file())):
        for start in range(0, len(text), 20_000):
            piece = text[start : start + 20_000]
            if piece.strip() and hash(piece) not in seen:
                seen.add(hash(piece))
                yield {"id": str(len(seen)), "text": piece}


def up_to(rows: list[dict[str, str]], size: int) -> list[dict[str, str]]:
    taken: list[dict[str, str]] = []
    for row in rows:
        if size <= 0:
            break
        taken.append(row)
        size -= len(row["text"].encode())
    return taken


def tokens_in(path: Path) -> int:
    """Tokens in a file of token shards."""
    from llmkit.shards.reader import TokenStore

    return TokenStore.open(str(path)).tokens


def main() -> None:
    given, pythons = asked(__doc__, PEERS)
    rows = list(documents(given.shared))
    random.Random(0).shuffle(rows)
    with tempfile.TemporaryDirectory() as temporary:
        here = Path(temporary)
        rows = up_to(rows, ALL_BYTES)
        store(up_to(rows[::-1], TRAINED_BYTES), here / "train.jsonl.zst")
        subprocess.run(
            [
                sys.executable,
                "-m",
                "llmkit",
                "vocab",
                "-q",
                here / "train.jsonl.zst",
                "--size",
                str(SIZE),
                "-o",
                here / "tok",
            ],
            check=True,
        )
        sample = up_to(rows, SAMPLE_BYTES)
        megabytes = store(sample, here / "sample.jsonl.zst")
        store(rows[:50], here / "warm.jsonl.zst")
        named = {name: f"TOKENIZER = {str(here / 'tok')!r}\n{code}" for name, code in WORKER.items()}
        workers = {name: (python, named[name]) for name, python in {"llmkit": sys.executable, **pythons}.items()}
        seconds, memory = compete(workers, given.pairs, here / "sample.jsonl.zst", here / "warm.jsonl.zst")
        made = tokens_in(here / "llmkit.jsonl.zst.arrow")
        for name in PEERS:
            assert int((here / f"{name}.jsonl.zst.count").read_text()) + len(sample) == made, "other ids"
        print(
            f"# Speed of `llmkit tokenize`\n\n{datetime.date.today()}, Python {platform.python_version()}, {os.cpu_count()} cores; `{call()}`"
        )
        print(
            f"\n{len(sample):,} documents, {megabytes:.1f} MB of text, JSONL.zst; {given.pairs} rounds in turn, one core, CPU time.\n"
        )
        print("| what | MB/s, median | ratio to ours, median (minimum to maximum) | peak MB |\n|---|---:|---:|---:|")
        for name, runs in seconds.items():
            what = {
                "llmkit": "llmkit tokenize, read, encoded and written to token shards",
                "tokenizers": "tokenizers 0.23.3: encode_batch, nothing written",
                "tiktoken": "tiktoken 0.12.0: encode_ordinary_batch, nothing written",
            }[name]
            ratio = spread(ratios(runs, seconds["llmkit"])) if name != "llmkit" else "1"
            print(f"| {what} | {megabytes / statistics.median(runs):.2f} | {ratio} | {memory[name]:.0f} |")
        whole(rows, here)


def whole(rows: list[dict[str, str]], here: Path) -> None:
    """The command on all documents, from an empty table; two workers; one document of many lengths."""
    arguments = ["tokenize", "-q", "-f", "-t", here / "tok"]
    print("\nThe whole command, start-up included, from an empty table of pieces, one core, 3 runs:\n")
    print("| text | documents | MB a CPU second, median (minimum to maximum) | peak MB |\n|---:|---:|---:|---:|")
    for times in (1, REPEATED):
        megabytes = store(rows * times, here / "all.jsonl.zst")
        found = [measured(*arguments, here / "all.jsonl.zst", "-o", here / "all") for _ in range(3)]
        speeds, peak = [megabytes / cpu for cpu, _, _ in found], max(peak for _, _, peak in found)
        again = "" if times == 1 else f" ({times} times the same)"
        print(f"| {megabytes:.0f} MB{again} | {len(rows) * times:,} | {spread(speeds)} | {peak:.0f} |")
    shares = []
    for _ in range(3):
        start = time.perf_counter()
        two = [
            subprocess.Popen(
                [sys.executable, "-m", "llmkit", *arguments, here / "all.jsonl.zst", "-o", here / f"two{i}"]
            )
            for i in range(2)
        ]
        for process in two:
            process.wait()
        apart = time.perf_counter() - start
        _, together, _ = measured(*arguments, here / "all.jsonl.zst", "-j", 2, "-o", here / "j2", cores="0,1")
        shares.append(apart / 2 / together)
    print(
        f"\n`-j 2` beside two runs with `-j 1` at once: {statistics.median(shares):.0%} of their throughput ({min(shares):.0%} to {max(shares):.0%}, 3 rounds)."
    )
    print(
        "\nOne document, CPU time beyond that for one of a word, ns a byte; linear time is a column of equal bars:\n\n```"
    )
    prose = "\n".join(row["text"] for row in rows)
    run = partial(measured, *arguments, "--max-line-bytes", "1G", here / "long.jsonl", "-o", here / "long.arrow")
    (here / "long.jsonl").write_text(json.dumps({"text": "word"}) + "\n")
    base = statistics.median(run()[0] for _ in range(3))
    for label, text in (
        ("text", prose),
        ("one letter, a single piece", "a" * LENGTHS[-1]),
        ("text without spaces", prose.replace(" ", "").replace("\n", "")),
    ):
        for length in LENGTHS:
            content = text.encode()[:length].decode(errors="ignore")
            (here / "long.jsonl").write_text(json.dumps({"text": content}, ensure_ascii=False) + "\n")
            cpu, _, peak = run()
            cost = (cpu - base) / len(content.encode()) * 1e9
            print(f"{label:<27} {length / 1e6:>4g} MB {cost:>5.0f} {'#' * round(cost / 4):<50} peak {peak:.0f} MB")
    print("```")


if __name__ == "__main__":
    main()

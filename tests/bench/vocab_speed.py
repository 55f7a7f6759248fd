"""`llmkit vocab` beside the `tokenizers` trainer: CPU time, memory, and whether the merges are the same; prints a dated table.

    python tests/bench/vocab_speed.py [--shared ../shared/data] [--megabytes 100] [--size 32000] [--pairs 3] > tests/bench/vocab_speed.md

Corpus: distinct real texts, none of them twice: web pages, books, reviews, instructions, the Universal Declaration in 500 languages, and Python's
documentation and sources with those of the installed packages, as many as are needed, all shuffled by a fixed seed.
Long-lived processes pinned to one core, in turn, CPU time; each reads the same JSONL.zst. `llmkit vocab` is the whole command and writes a tokenizer
directory; the `tokenizers` library trains with train_from_iterator, its threads off, and writes tokenizer.json, which has to be ours to the byte. From
counts: merging alone, ours in this process, the library's as what is left of its time when reading, cutting and counting are taken off (a training that
makes no merge).
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import os
import platform
import random
import statistics
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

from filter_parity import all_sources
from peers import ROOT, SHARED, compete, ratios, spread, store

SUFFIXES = {".py", ".pyi", ".md", ".rst", ".txt", ".h", ".hpp", ".c", ".js", ".html"}
LONGEST = 1_000_000  # bytes of a file; longer ones are tables rather than text

LIBRARY = """
import os, sys, time, io, json
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["RAYON_NUM_THREADS"] = "1"
import orjson, zstandard
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from llmkit.tokens import vocabulary
from llmkit.tokens.pretokenize import find_pattern, pre_tokenizer
def texts(source):
    with open(source, "rb") as raw:
        for line in io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(raw)):
            yield orjson.loads(line)["text"]
def work(source, target):
    chosen = find_pattern({pattern!r})
    tokenizer = Tokenizer(models.BPE(ignore_merges=chosen.ignore_merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer(chosen), decoders.ByteLevel()
    tokenizer.train_from_iterator(texts(source), trainers.BpeTrainer(
        vocab_size={size}, min_frequency=2, special_tokens=vocabulary.special_tokens(),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    with open(target, "w") as file: file.write(tokenizer.to_str(pretty=True) + "\\n")
"""
OURS = """
import os, sys, time
from llmkit.cli.main import run_command
def work(source, target):
    if run_command("vocab", [source, "-s", "{size}", "--multiple", "1", "-p", {pattern!r}, "-o", target + ".d", "-f", "-q"]): sys.exit("llmkit failed")
"""
WHAT = {
    "llmkit": "llmkit vocab, the whole command",
    "tokenizers": "tokenizers, train_from_iterator",
    "counting": "tokenizers, cutting and counting only",
}


def corpus(shared: Path, size: int) -> list[dict[str, str]]:
    """Distinct texts of `size` bytes: half of them or less those of the other benchmarks, then sources of installed packages."""
    paths = sorted(
        path
        for key in ("stdlib", "purelib")
        for path in Path(sysconfig.get_paths()[key]).rglob("*")
        if path.suffix in SUFFIXES and path.is_file() and not path.is_symlink()
    )
    order = random.Random(0)
    order.shuffle(paths)
    known = [text for name, texts in all_sources(shared).items() if name != "made" for text in texts]
    order.shuffle(known)

    def texts():  # type: ignore[no-untyped-def]
        yield from known
        for path in paths:
            if path.stat().st_size <= LONGEST:
                yield path.read_bytes().decode(errors="replace")

    rows: dict[bytes, str] = {}
    bytes_of = dict.fromkeys((True, False), 0)
    for i, text in enumerate(texts()):
        digest, given = hashlib.sha256(text.encode()).digest(), i < len(known)
        if digest in rows or (given and bytes_of[True] > size / 2):
            continue
        rows[digest] = text
        bytes_of[given] += len(text.encode())
        if sum(bytes_of.values()) >= size:
            break
    chosen = list(rows.values())
    order.shuffle(chosen)
    return [{"id": f"d{i}", "text": text} for i, text in enumerate(chosen)]


def merging(source: Path, size: int, pattern: str, rounds: int) -> tuple[list[float], int, int]:
    """(CPU seconds of our merging of counted words each round, distinct words, their bytes)."""
    from llmkit.io.documents import DocumentReader, ReadOptions
    from llmkit.tokens.trainer import PieceCounter, PieceCounts

    counts = PieceCounts()
    reader = DocumentReader([str(source)], ReadOptions())
    for _ in map(PieceCounter(pattern, reader.options, into=counts), reader.chunks()):
        pass
    counts.merges(1, 2)  # compiles
    found = []
    for _ in range(rounds):
        begin = time.process_time()
        counts.merges(size - 272, 2)
        found.append(time.process_time() - begin)
    pool, ends, _ = counts.pieces()
    return found, len(ends), len(pool)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, default=SHARED)
    parser.add_argument("--megabytes", type=float, default=100)
    parser.add_argument("--size", type=int, default=32_000)
    parser.add_argument("--pattern", default="llama-bpe")
    parser.add_argument("--pairs", type=int, default=3)
    given = parser.parse_args()
    rows = corpus(given.shared, int(given.megabytes * 1e6))
    settings = {"size": given.size, "pattern": given.pattern}
    with tempfile.TemporaryDirectory() as temporary:
        here = Path(temporary)
        source = here / "corpus.jsonl.zst"
        megabytes = store(rows, source)
        store(rows[:20], here / "warm.jsonl.zst")
        code = {
            "llmkit": OURS.format(**settings),
            "tokenizers": LIBRARY.replace("{size}", str(given.size)).replace("{pattern!r}", repr(given.pattern)),
            "counting": LIBRARY.replace("{size}", "272").replace("{pattern!r}", repr(given.pattern)),
        }
        workers = {name: (sys.executable, text) for name, text in code.items()}
        seconds, memory = compete(workers, given.pairs, source, here / "warm.jsonl.zst")
        ours = (here / "llmkit.jsonl.zst.d" / "tokenizer.json").read_bytes()
        assert ours == (here / "tokenizers.jsonl.zst").read_bytes(), "the tokenizers differ"
        mine, words, size = merging(source, given.size, given.pattern, given.pairs)
    rest = [whole - counted for whole, counted in zip(seconds["tokenizers"], seconds["counting"], strict=True)]
    from tokenizers import __version__

    arguments = " ".join(sys.argv[1:]).replace(str(ROOT.parent), "..")
    print(f"# Training a vocabulary\n\n{datetime.date.today()}, Python {platform.python_version()}, ", end="")
    print(f"{os.cpu_count()} cores, tokenizers {__version__}; `python tests/bench/vocab_speed.py {arguments}`\n")
    print(
        f"{len(rows):,} documents, {megabytes:.1f} MB of text, {words:,} distinct words of {size / 1e6:.1f} MB, ",
        end="",
    )
    print(
        f"{given.size:,} tokens, {given.pattern}; {given.pairs} rounds in turn, one core, CPU time. tokenizer.json is equal to the byte.\n"
    )
    print("| what | seconds, median | times llmkit's, median (minimum to maximum) | peak MB |\n|---|---:|---:|---:|")
    for name, runs in seconds.items():
        ratio = spread(ratios(runs, seconds["llmkit"]))
        print(f"| {WHAT[name]} | {statistics.median(runs):.2f} | {ratio} | {memory[name]:.0f} |")
    print(
        f"\nFrom counts to merges: llmkit {spread(mine, 2)} s, tokenizers {spread(rest, 2)} s, ratio {spread(ratios(rest, mine))}."
    )


if __name__ == "__main__":
    main()

"""A real run of fine-tuning: one base model, then full weights, LoRA, DoRA and QLoRA on halves of two files of instructions, and the held-out loss
of each.

    python tests/bench/fine_tuning.py                                  # hours
    python tests/bench/fine_tuning.py --tokens 1.2M --rows 1200        # 40 minutes

The base is the preset of 5M parameters, trained on 17 Gutenberg books, film reviews and WikiText-2 (validation), 512 tokens a sequence, with a
vocabulary of 8,192 learned there. It knows no chat format: `--chat-template chatml` adds the two control tokens, and the adapters
train their rows. Of each file the rows with even numbers are trained on, once; the first 300 of the others are held out. QLoRA trains over the base
in int4. Learning rates are the defaults. Everything is done with the command line, one process on one core.

Printed are the loss on the trained tokens of the held-out rows, before and after, the CPU time, and the size of what was written.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

import orjson
from peers import ROOT, SHARED, decompress, members, rows_of

FILES = {
    "Dolly": "dolly15k_from_docx",
    "GPTeacher, role play": "gpteacher_roleplay-simple-deduped-roleplay-instruct",
}
HELD_OUT, RANK = 300, "16"
METHODS = {
    "full weights": ("base", ()),
    "LoRA": ("base", ("--lora", RANK)),
    "DoRA": ("base", ("--lora", RANK, "--dora")),
    "QLoRA, int4": ("base-int4", ("--lora", RANK)),
}


def llmkit(place: Path, *arguments: object) -> float:
    """Run a command; CPU seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "llmkit", *map(str, arguments), "-q"]
    subprocess.run(command, cwd=place, env=environment, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def texts() -> list[str]:
    books = [
        content.decode("utf-8", "replace") for _, content in members(SHARED / "text" / "gutenberg_17_books.tar.zst")
    ]
    reviews = [
        content.decode("utf-8", "replace") for _, content in members(SHARED / "text" / "nltk_movie_reviews.tar.zst")
    ]
    articles = decompress(SHARED / "text" / "wikitext2_valid.txt.zst").decode().split("\n = ")
    return [text for text in (*books, *reviews, *articles) if text.strip()]


def make_base(place: Path, tokens: str) -> float:
    """Train the base; CPU seconds."""
    documents = [{"text": text} for text in texts()]
    (place / "documents.jsonl").write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in documents))
    llmkit(place, "vocab", "documents.jsonl", "--size", 8192, "-o", "tok")
    llmkit(place, "tokenize", "documents.jsonl", "-t", "tok", "-o", "shards")
    return llmkit(place, "train", "shards", "-m", "5m", "--tokens", tokens, "-o", "base")


def held_out_loss(place: Path, model: str, rows: str) -> float:
    """The loss of a model as `sft` reports it: of one step at a rate that changes nothing that a float32 shows."""
    few = place / "few.jsonl"
    few.write_bytes(b"".join((place / rows).read_bytes().splitlines(keepends=True)[:8]))
    options = ("--chat-template", "chatml", "--lr", "1e-12", "--heldout", rows, "-f", "-o", "before")
    llmkit(place, "sft", model, few.name, *options)
    return last(place / "before", "heldout_loss")


def last(run: Path, name: str) -> float:
    records = [orjson.loads(line) for line in (run / "metrics.jsonl").read_bytes().splitlines()]
    return float([record[name] for record in records if name in record][-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--base", type=Path, help="run of an earlier call, instead of training one")
    parser.add_argument("--tokens", default="8M", help="of the base")
    parser.add_argument("--rows", type=int, default=1 << 30, help="Rows of each half at most")
    given = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        if given.base:
            (place / "base").symlink_to(given.base.absolute())
        else:
            print(f"base: {make_base(place, given.tokens):.0f} CPU s")
        llmkit(place, "quantize", "base", "--to", "int4", "-o", "base-int4")
        steps = [orjson.loads(line) for line in (place / "base" / "metrics.jsonl").read_bytes().splitlines()]
        print(f"{date.today()}; base: {steps[-1]['tokens']:,} tokens, loss {steps[-1]['loss']:.3f}\n")
        print("| rows | method | held-out loss | CPU s | trained, MB |\n|---|---|---|---|---|")
        for number, (name, file) in enumerate(FILES.items()):
            rows = [orjson.dumps(row) + b"\n" for row in rows_of(SHARED / "instruct" / f"{file}.jsonl.zst")]
            (place / f"train{number}.jsonl").write_bytes(b"".join(rows[::2][: given.rows]))
            (place / f"held{number}.jsonl").write_bytes(b"".join(rows[1::2][:HELD_OUT]))
            before = held_out_loss(place, "base", f"held{number}.jsonl")
            print(f"| {name}, {len(rows[::2][: given.rows]):,} | none | {before:.4f} | | |", flush=True)
            for method, (model, options) in METHODS.items():
                run = f"run{number}-{len(method)}"
                seconds = llmkit(
                    place, "sft", model, f"train{number}.jsonl", "--chat-template", "chatml", *options,
                    "--heldout", f"held{number}.jsonl", "--on-bad-line", "skip", "-o", run,
                )  # fmt: skip
                loss = last(place / run, "heldout_loss")
                size = sum(file.stat().st_size for file in (place / run / "final").glob("*.safetensors")) / 1e6
                print(f"| {name} | {method} | {loss:.4f} | {seconds:.0f} | {size:.1f} |", flush=True)


if __name__ == "__main__":
    main()

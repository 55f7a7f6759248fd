"""What the training guard takes for noise: random bytes as text, and text in hundreds of languages that the vocabulary was not made for. Prints a dated table.

    python tests/bench/noise.py [--shared ../shared/data] > tests/bench/noise.md

A vocabulary of 4,096 tokens is trained on English (Wikipedia, web pages). The translations of the Universal Declaration of Human Rights are
encoded with it, two pieces of n tokens of each; noise is random bytes read as Latin-1 or as UTF-8 (what is none replaced, or left out), and random
ASCII. Each piece is asked for order as llmkit.training.guard.diagnosis does it, the loss left out: in a run only what costs a model far more than its
neighbours is asked at all.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import zstandard
from peers import SHARED
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from llmkit.training.guard.diagnosis import MIN_SYMBOLS, ORDERED, has_order

SIZES = (128, 192, 256, 512)
PIECES = 200  # of each kind of noise and size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, default=SHARED)
    shared = parser.parse_args().shared
    tokenizer = english(shared / "text")
    texts = [row["text"] for row in rows(shared / "lang" / "udhr_xml_text.jsonl.zst")]
    draw = random.Random(0)
    noise: dict[str, Callable[[], str]] = {
        "bytes as Latin-1": lambda: draw.randbytes(2000).decode("latin-1"),
        "bytes as UTF-8, replaced": lambda: draw.randbytes(3000).decode("utf-8", "replace"),
        "bytes as UTF-8, left out": lambda: draw.randbytes(4000).decode("utf-8", "ignore"),
        "random ASCII": lambda: "".join(chr(draw.randint(32, 126)) for _ in range(3000)),
    }

    def ordered(ids: list[int]) -> bool:
        return has_order(np.array(ids), lambda tokens: tokenizer.decode(tokens, skip_special_tokens=False))

    print(
        f"# Noise or text\n\n{time.strftime('%Y-%m-%d')}, Python {platform.python_version()}, numpy {np.__version__}. `python tests/bench/noise.py`"
    )
    print(f"\nThreshold {ORDERED} standard deviations, from {MIN_SYMBOLS} tokens on. {len(texts)} texts in as many languages and scripts, two pieces of each.\n")  # fmt: skip
    print("| tokens a piece | text taken for noise | " + " | ".join(f"{name} taken for text" for name in noise) + " |")
    print("|---" * (2 + len(noise)) + "|")
    encoded = [tokenizer.encode(text[:8000]).ids for text in texts]
    for size in SIZES:
        pieces = [ids[at : at + size] for ids in encoded for at in (0, 700) if len(ids) >= at + size]
        wrong = sum(not ordered(piece) for piece in pieces)
        missed = [sum(ordered(tokenizer.encode(make()).ids[:size]) for _ in range(PIECES)) for make in noise.values()]
        print(f"| {size} | {wrong} of {len(pieces):,} | " + " | ".join(f"{n} of {PIECES}" for n in missed) + " |")


def rows(path: Path) -> list[dict[str, str]]:
    return [
        json.loads(line) for line in zstandard.ZstdDecompressor().stream_reader(path.read_bytes()).read().splitlines()
    ]


def english(place: Path) -> Tokenizer:
    """A byte-level BPE tokenizer of English."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=4096, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False)  # fmt: skip
    read = zstandard.ZstdDecompressor()
    texts = [
        read.stream_reader((place / name).read_bytes()).read().decode()
        for name in ("wikitext2_valid.txt.zst", "cs336_corpus_en.txt.zst")
    ]
    tokenizer.train_from_iterator(texts + [row["text"] for row in rows(place / "olmo_c4_sample.jsonl.zst")], trainer)
    return tokenizer


if __name__ == "__main__":
    main()

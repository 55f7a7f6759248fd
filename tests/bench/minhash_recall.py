"""Do the MinHash kernels find what theory says, and how fast are they? Prints a dated table.

    python tests/bench/minhash_recall.py [--shared ../shared/data] [--pairs 30000] > tests/bench/minhash_recall.md

Recall: pairs of sets in Jaccard bins of 0.05. A pair is made from the shingles of one real document, by chance dealt to the first set, the second or both,
so that its exact similarity is known. Candidates are pairs that share a band key; theory is the mean of 1-(1-s^8)^14 over the exact similarities. For
"family" new functions are drawn for every 100 pairs, from seeds that nothing else uses; "one draw" are the functions of seed 0 for all pairs.

Throughput: each step alone, then `sketch`, which does all of them, on the documents of filter_speed.py; CPU time of this process.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from filter_speed import documents
from numpy.typing import NDArray
from peers import SHARED, call, in_turn, seconds

from llmkit.corpus.dedup.kernels import minhash, normalise
from llmkit.corpus.dedup.normalise import DEFAULT

BANDS, ROWS, NGRAM = 14, 8, 5
FIRST_SEED, PAIRS_A_DRAW = 715_517_000, 100
BINS = [(low / 100, (low + 5) / 100) for low in range(50, 95, 5)]

Hashes = NDArray[np.uint64]


def deal(hashes: Hashes, similarity: float, random: np.random.Generator) -> tuple[Hashes, Hashes, float]:
    """Two sets whose union are `hashes`, and their exact similarity, the nearest possible one to that asked for."""
    mixed = random.permutation(hashes)
    shared = round(similarity * len(mixed))
    middle = (len(mixed) + shared) // 2
    return mixed[:middle], np.concatenate([mixed[:shared], mixed[middle:]]), shared / len(mixed)


def keys(hashes: Hashes, seed: int, bits: int) -> Hashes:
    functions = minhash.functions(seed, BANDS * ROWS, bits)
    if bits == 32:
        least = minhash.least_32((hashes >> np.uint64(32)).astype(np.uint32), functions)
    else:
        least = minhash.least_61(hashes >> np.uint64(3), functions)
    return minhash.band_keys(least, BANDS)


def recall(
    sets: list[Hashes], low: float, high: float, bits: int, pairs: int, seed: Callable[[int], int]
) -> tuple[float, float]:
    """Shares of candidates among pairs of a bin: found, and by theory."""
    random = np.random.default_rng([FIRST_SEED, bits, int(100 * low)])
    found, expected = 0, 0.0
    done = 0
    while done < pairs:
        one, other, exact = deal(sets[random.integers(len(sets))], random.uniform(low, high), random)
        if not low <= exact < high:
            continue
        drawn = seed(done)
        found += bool((keys(one, drawn, bits) == keys(other, drawn, bits)).any())
        expected += 1 - (1 - exact**ROWS) ** BANDS
        done += 1
    return found / pairs, expected / pairs


def throughput(texts: list[str], rounds: int) -> dict[str, list[float]]:
    """MB of text a CPU second for each step, `rounds` figures each; all steps in turn in every round."""
    f32, f61 = (minhash.functions(0, BANDS * ROWS, bits) for bits in (32, 61))
    tables = normalise.tables(DEFAULT, True)
    data = [normalise.utf8(text, DEFAULT) for text in texts]
    normal = [normalise.normalised(one, *tables)[0].copy() for one in data]
    hashes = [minhash.shingle_hashes(one, NGRAM, False) for one in normal]
    upper = [(one >> np.uint64(32)).astype(np.uint32) for one in hashes]
    wide = [one >> np.uint64(3) for one in hashes]
    shingles = [minhash.distinct(one.copy()) for one in upper]
    signatures = [minhash.least_32(one, f32) for one in shingles]
    steps: dict[str, tuple[list, Callable[..., object]]] = {
        "UTF-8 of Python's string": (texts, lambda text: normalise.utf8(text, DEFAULT)),
        "normalisation": (data, lambda one: normalise.normalised(one, *tables)),
        "hashes of 5-grams": (normal, lambda one: minhash.shingle_hashes(one, NGRAM, False)),
        "the distinct ones, ascending": (upper, lambda one: minhash.distinct(one.copy())),
        "signature, 112 of 32 bits": (shingles, lambda one: minhash.least_32(one, f32)),
        "signature, 112 of 61 bits": (wide, lambda one: minhash.least_61(one, f61)),
        "band keys": (signatures, lambda one: minhash.band_keys(one, BANDS)),
        "all in one, 32 bits": (texts, lambda one: minhash.sketch(one, NGRAM, f32, BANDS, 32)),
        "all in one, 61 bits": (texts, lambda one: minhash.sketch(one, NGRAM, f61, BANDS, 61)),
    }
    megabytes = sum(map(len, data)) / 1e6
    ways = {name: partial(seconds, step, items) for name, (items, step) in steps.items()}
    in_turn(ways, 1)  # compiles
    return {name: [megabytes / took for took in taken] for name, taken in in_turn(ways, rounds).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, default=SHARED)
    parser.add_argument("--pairs", type=int, default=30_000, help="a bin, width, and kind of draw")
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    texts = [row["text"] for row in documents(given.shared)]
    functions = minhash.functions(0, BANDS * ROWS, 32)
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    print(
        f"# MinHash: recall and speed\n\n{datetime.date.today()}, Python {platform.python_version()}, {os.cpu_count()} cores; ",
        end="",
    )
    print(f"`{call()}`")
    found = [minhash.sketch(text, NGRAM, functions, BANDS, 32).normalised for text in texts]
    hashes = [np.unique(minhash.shingle_hashes(one, NGRAM, False)) for one in found]
    sets = [one for one in hashes if 60 <= len(one) <= 3000]
    print(
        f"\nRecall before verification: {given.pairs:,} pairs a bin and column, from the {len(sets):,} documents with 60 to 3,000 shingles (median "
        f"{statistics.median(map(len, sets)):.0f}); 14 bands of 8 rows. Family: new functions every {PAIRS_A_DRAW} pairs. Difference in points.\n"
    )
    print(
        "| Jaccard | theory | 32 bits, family | 32 bits, one draw | 61 bits, family | 61 bits, one draw |\n|---|---:|---:|---:|---:|---:|"
    )
    worst = 0.0
    for low, high in BINS:
        cells = []
        for bits in (32, 61):
            for family in (True, False):
                share, expected = recall(
                    sets, low, high, bits, given.pairs, lambda n, f=family: FIRST_SEED + n // PAIRS_A_DRAW if f else 0
                )
                cells.append(f"{100 * share:.2f} ({100 * (share - expected):+.2f})")
                worst = max(worst, abs(share - expected))
        print(f"| {low:.2f} to {high:.2f} | {100 * expected:.2f} | {' | '.join(cells)} |", flush=True)
    print(
        f"\nLargest difference: {100 * worst:.2f} points. Chance alone has a standard error of up to {50 / given.pairs**0.5:.2f}."
    )
    print(
        f"\nSpeed: {len(texts):,} documents, {megabytes:.1f} MB of text, {sum(map(len, hashes)) / len(texts):.0f} shingles each; one core, "
        f"{given.rounds} rounds, MB of text a CPU second.\n"
    )
    print("| step | best | median |\n|---|---:|---:|")
    for name, speeds in throughput(texts, given.rounds).items():
        print(f"| {name} | {max(speeds):.0f} | {statistics.median(speeds):.0f} |")


if __name__ == "__main__":
    main()

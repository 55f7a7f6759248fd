"""Are copies of evaluation items found, and nothing else? Real documents, beside datatrove's n-grams and naive 13-grams; prints a dated report.

    python tests/bench/decontamination.py [--shared ../shared/data] [--pairs 7]

Makes its own environment with the pinned datatrove under .cache/ on first use (about 500 MB) and runs itself there. Three parts:

1. GSM8K and its copies in FLAN: the share of an item that must be found is fixed on one half of the items and documents (by hash), and what it finds,
   and flags wrongly, is counted on the other half. The copies are also edited (words left out, replaced, put in), with other numbers, and in part.
2. All of bench/ as evaluation sets: how many documents of other origin each method flags, for reading by eye (--show).
3. CPU time of datatrove and llmkit over the same documents, in turns.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import re
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from filter_parity import archive, python_modules
from peers import SHARED, call, in_turn, inside, members, ratios, rows_of, seconds

REQUIREMENTS = ["datatrove==0.10.1", "spacy==3.8.*", "nltk", "regex", "orjson", "zstandard", "xxhash<4", "numba>=0.61"]
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
A_SOURCE = 2000  # documents of each, at most
PIECE = 4000  # characters of a book that make a document
Flag = Callable[[str], bool]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, default=SHARED)
    parser.add_argument("--pairs", type=int, default=7, help="turns of the speed comparison")
    parser.add_argument("--show", type=int, default=0, help="flagged documents of part 2 to print, a set and source")
    parser.add_argument("--python", help="interpreter that has datatrove and numba (default: make an environment)")
    arguments = parser.parse_args()
    inside("datatrove-decontamination", REQUIREMENTS, arguments.python)
    from importlib.metadata import version

    from llmkit import __version__

    print("# Decontamination beside datatrove and naive 13-grams\n")
    print(
        f"{time.strftime('%Y-%m-%d')}, llmkit {__version__}, datatrove {version('datatrove')}, spaCy {version('spacy')}, ",
        end="",
    )
    print(f"Python {sys.version.split()[0]}; `{call()}`\n")
    negatives = unrelated(arguments.shared)
    recall_and_errors(arguments.shared, negatives)
    every_set(arguments.shared, negatives, arguments.show)
    speed(arguments.shared, negatives, arguments.pairs)


# ---- documents


def flan(shared: Path) -> dict[str, list[tuple[str, str]]]:
    """(question, reasoning and answer) of FLAN's chain-of-thought rows, by task."""
    tasks = {}
    for name, content in members(shared / "instruct" / "flan_cot_tsv.tar.zst"):
        lines = content.decode(errors="replace").split("\n")
        cells = [line.replace("\\n", "\n").split("\t") for line in lines if line]
        tasks[name.removesuffix(".tsv")] = [(cell[0], f"{cell[2]}\n{cell[1]}") for cell in cells]
    return tasks


def unrelated(shared: Path) -> dict[str, list[str]]:
    """Documents that are no copies of GSM8K, by source; at most A_SOURCE of each, chosen by a fixed seed."""
    found = {
        f"flan {name}": [f"{q}\n{rest}" for q, rest in pairs]
        for name, pairs in flan(shared).items()
        if "gsm8k" not in name
    }
    for name in ("bench/svamp_test", "bench/basic_arithmetic", "bench/mmlu", "instruct/dolly15k_from_docx", "instruct/t0_p3_sample", "instruct/gpteacher_codegen-instruct", "text/dclm_majority_data"):  # fmt: skip
        found[Path(name).name] = ["\n".join(map(str, row.values())) for row in rows_of(shared / f"{name}.jsonl.zst")]
    books = archive(shared / "text" / "gutenberg_17_books.tar.zst")
    found["books"] = [book[i : i + PIECE] for book in books for i in range(0, len(book), PIECE)]
    found["reviews"] = list(archive(shared / "text" / "nltk_movie_reviews.tar.zst"))
    found["python docs"] = [documentation for documentation, _ in python_modules()]
    for name, texts in found.items():
        random.Random(name).shuffle(texts)
        del texts[A_SOURCE:]
    return found


def held_out(text: str) -> bool:
    """Half of all items and documents, by hash of their letters and digits."""
    return hashlib.sha256("".join(filter(str.isalnum, text.lower())).encode()).digest()[0] & 1 == 1


def edited(text: str, rate: float, seed: int, words: list[str]) -> str:
    """Each word with probability `rate` left out, replaced by another, or with one put before it."""
    choose = random.Random(seed)
    made = []
    for word in text.split():
        kind = choose.choice(("out", "replaced", "before")) if choose.random() < rate else ""
        made += {"": [word], "out": [], "replaced": [choose.choice(words)], "before": [choose.choice(words), word]}[
            kind
        ]
    return " ".join(made)


# ---- methods


class Naive:
    """Any 13 words in a row of an item, its parts joined: GPT-3's rule, on the words that llmkit counts."""

    def __init__(self, items: list[Any]) -> None:
        self.known: set[int] = set()
        for item in items:
            self.known.update(self._keys(" ".join(text for part in item.parts for text in part)))

    @staticmethod
    def _keys(text: str) -> list[int]:
        from llmkit.corpus.kernels.item_ngrams import as_bytes, ngrams, words_of

        return list(ngrams(words_of(as_bytes(text))[0], 13).tolist())

    def __call__(self, text: str) -> bool:
        return not self.known.isdisjoint(self._keys(text))


class Datatrove:
    """Its filter with its own hashes of the items; its indexer asks for lighteval, of which it needs nothing here."""

    def __init__(self, pairs: list[tuple[str, str]], with_questions: bool) -> None:
        from datatrove.pipeline.decont import NGramsDecontConfig, NGramsDecontFilter, NGramsDecontIndexer

        config = NGramsDecontConfig(find_query_ngrams=with_questions)
        self.filter = NGramsDecontFilter(".", config)
        indexer = object.__new__(NGramsDecontIndexer)
        indexer.config, indexer.tokenizer, indexer.hash_func = config, self.filter.tokenizer, self.filter.hash_func
        hashes = (indexer.compute_hashes(label, query) for query, label in pairs)
        self.filter._index_hashes = {h: "set" for found in hashes for h in found}

    def __call__(self, text: str) -> bool:
        from datatrove.data import Document

        return self.filter.filter(Document(text=text, id="")) is not True


# ---- 1: GSM8K in FLAN


def recall_and_errors(shared: Path, negatives: dict[str, list[str]]) -> None:
    from llmkit.corpus.decontaminate import build_index, read_items
    from llmkit.corpus.filters.decontaminate import Decontaminate

    path = shared / "bench" / "gsm8k_train.jsonl.zst"
    items = list(read_items(str(path), (), "gsm8k"))
    index = build_index(items)
    copies = flan(shared)["gsm8k_train"]
    vocabulary = [word for question, _ in copies[:500] for word in question.split()]
    kinds: dict[str, Callable[[str, str, int], str]] = {
        "copies in FLAN": lambda q, rest, i: f"{q}\n{rest}",
        "question alone": lambda q, rest, i: q,
        "reasoning alone": lambda q, rest, i: rest,
        "question, 5 % of words edited": lambda q, rest, i: edited(q, 0.05, i, vocabulary),
        "question, 10 % of words edited": lambda q, rest, i: edited(q, 0.10, i, vocabulary),
        "question, 20 % of words edited": lambda q, rest, i: edited(q, 0.20, i, vocabulary),
        "question, other numbers (is it the same item?)": lambda q, rest, i: re.sub(
            r"\d+", lambda _: str(random.Random(i).randrange(2, 99)), q
        ),
    }
    halves = {
        half: [(i, *pair) for i, pair in enumerate(copies) if held_out(pair[0]) == half] for half in (False, True)
    }
    others = {
        half: [text for texts in negatives.values() for text in texts if held_out(text) == half]
        for half in (False, True)
    }
    other_half = build_index([item for item in items if not held_out(item.parts[0][0])])
    print("## 1. GSM8K-train (7,473 items) and the rows that FLAN made of it\n")
    exact = {item.parts[0][0] for item in items}
    print(
        f"{len(copies)} copies, {sum(q in exact for q, _ in copies)} of them with the very same question; unrelated documents: "
    )
    print(", ".join(f"{name} {len(texts)}" for name, texts in negatives.items()) + ".\n")
    print("### The half on which the share was fixed\n")
    print("| share of an item | " + " | ".join(map(str, SHARES)) + " |\n|---" + "|---" * len(SHARES) + "|")
    for name, make in kinds.items():
        found = [index.find(make(q, rest, i), None).share for i, q, rest in halves[False]]
        print(f"| {name} ({len(found)}) | " + " | ".join(f"{percent(f >= s for f in found)}" for s in SHARES) + " |")
    shares = [index.find(text, None).share for text in others[False]]
    print(
        f"| unrelated documents ({len(shares)}) | "
        + " | ".join(f"{sum(f >= s for f in shares)}" for s in SHARES)
        + " |"
    )
    within = [other_half.find(f"{q}\n{rest}", None).share for _, q, rest in halves[True]]
    print(
        f"| copies of the other half's items ({len(within)}) | "
        + " | ".join(f"{sum(f >= s for f in within)}" for s in SHARES)
        + " |"
    )
    default = Decontaminate().min_share
    print(f"\nHighest share of an unrelated document {max(shares):.2f}. The default, {default}, is fixed here.\n")
    pairs = [(item.parts[0][0], item.parts[1][0]) for item in items]
    methods: dict[str, Flag] = {
        f"llmkit (5-grams, {default} of an item)": lambda text: bool(index.find(text, default).matches),
        "naive: any 13-gram": Naive(items),
        "datatrove: any 12-gram, answers": Datatrove(pairs, False),
        "datatrove: any 12-gram, questions too": Datatrove(pairs, True),
    }
    print("### The held-out half: documents flagged\n")
    print("| documents | " + " | ".join(methods) + " |\n|---" + "|---" * len(methods) + "|")
    for name, make in kinds.items():
        texts = [make(q, rest, i) for i, q, rest in halves[True]]
        print(
            f"| {name} ({len(texts)}) | "
            + " | ".join(percent(map(method, texts)) for method in methods.values())
            + " |",
            flush=True,
        )
    counts = [sum(map(method, others[True])) for method in methods.values()]
    cells = [f"{count} ({100 * count / len(others[True]):.3f} %)" for count in counts]
    print(f"| unrelated documents ({len(others[True])}) | " + " | ".join(cells) + " |\n", flush=True)


def percent(flags: Any) -> str:
    values = list(flags)
    return f"{100 * sum(values) / len(values):.2f} %"


# ---- 2: every set


def every_set(shared: Path, negatives: dict[str, list[str]], show: int) -> None:
    from llmkit.corpus.decontaminate import build_index, read_items, set_name
    from llmkit.corpus.filters.decontaminate import Decontaminate

    min_share = Decontaminate().min_share
    left_out = ("basic_arithmetic", "mmlu", "svamp", "oe_", "blimp")  # documents themselves, too short, or many
    paths = [p for p in sorted((shared / "bench").glob("*.jsonl.zst")) if not p.name.startswith(left_out)]
    items = [item for path in paths for item in read_items(str(path), (), set_name(str(path)))]
    begin = time.process_time()
    index = build_index(items)
    took = time.process_time() - begin
    naive = Naive(items)
    arrays = (index.slots, index.numbers, index.bounds, index.pair_part, index.pair_offset)
    size = sum(array.nbytes for array in arrays)
    grams = len(index.bounds) - 1
    print(f"## 2. {len(paths)} evaluation sets at once: {len(items)} items, {grams} 5-grams\n")
    print(f"Index: {size / 1e6:.0f} MB, {size / grams:.0f} bytes a 5-gram; made in {took:.1f} s of CPU time.\n")
    print("| documents | llmkit | naive 13-gram | both | sets that llmkit found |\n|---|---|---|---|---|")
    for name, texts in negatives.items():
        matches = [index.find(text, min_share).matches for text in texts]
        plain = [naive(text) for text in texts]
        sets: dict[str, int] = {}
        for found in matches:
            for set_ in {match.set for match in found}:
                sets[set_] = sets.get(set_, 0) + 1
        both = sum(bool(found) and flag for found, flag in zip(matches, plain, strict=True))
        listed = ", ".join(f"{set_} {n}" for set_, n in sorted(sets.items(), key=lambda pair: -pair[1]))
        print(f"| {name} ({len(texts)}) | {sum(map(bool, matches))} | {sum(plain)} | {both} | {listed} |", flush=True)
        for text, found, flag in zip(texts, matches, plain, strict=True):
            for match in found[:1]:
                if show and sets.get(match.set, 0) <= show:
                    print(
                        f"  shown: {match.set}:{match.item} {match.share:.2f} naive={flag} {text[match.start : match.end]!r:.200}",
                        file=sys.stderr,
                    )
    print()


# ---- 3: speed


def speed(shared: Path, negatives: dict[str, list[str]], pairs: int) -> None:
    from llmkit.corpus.decontaminate import load_index

    index = load_index((str(shared / "bench" / "gsm8k_train.jsonl.zst"),))
    gsm8k = [(row["question"], row["answer"]) for row in rows_of(shared / "bench" / "gsm8k_train.jsonl.zst")]
    datatrove = Datatrove(gsm8k, True)
    texts = negatives["books"][:100] + negatives["reviews"][:100] + negatives["python docs"][:20]
    small = negatives["flan creak_train"][:1000]
    print("## 3. CPU time of one process, in turns\n")
    print("| documents | datatrove MB/s | llmkit MB/s | ratio: median | lowest | highest |\n|---|---|---|---|---|---|")
    for name, chosen in (
        ("books, reviews, Python's documentation", texts),
        ("claims of some 200 characters (FLAN creak)", small),
    ):
        size = sum(len(text.encode()) for text in chosen) / 1e6
        ways = {
            "datatrove": partial(seconds, datatrove, chosen),
            "llmkit": partial(seconds, lambda text: index.find(text, 0.4), chosen, 20),
        }
        in_turn(ways, 1)  # warms up
        times = in_turn(ways, pairs)
        rates = [size / statistics.median(taken) for taken in times.values()]
        beside = ratios(times["datatrove"], times["llmkit"])
        print(
            f"| {name}: {len(chosen)}, {size:.2f} MB | {rates[0]:.2f} | {rates[1]:.0f} | {statistics.median(beside):.0f} "
            f"| {min(beside):.0f} | {max(beside):.0f} |",
            flush=True,
        )
    print(f"\n{pairs} turns; llmkit's share of a turn is 20 passes, averaged.")


if __name__ == "__main__":
    main()

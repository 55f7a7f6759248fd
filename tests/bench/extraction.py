"""Main content of pages with gold text: token-level F1 and speed of every engine of `llmkit extract`.

    taskset -c 0 python tests/bench/extraction.py > tests/bench/extraction.md

F1 of the multisets of words (`\\w+`) of a page's text and its gold text, averaged over pages. trafilatura_eval: strings that must and must not be in the
text, all pages together. Speed: megabytes of HTML a CPU second, median of 5 rounds in which the engines take turns over the first set.
"""

from __future__ import annotations

import datetime
import json
import platform
import re
import statistics
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from importlib.metadata import version

from peers import SHARED, in_turn, members, ratios, seconds, spread

from llmkit.corpus.extract.archives import PageRecord
from llmkit.corpus.extract.engines import ENGINES, Skip, document_of

WEB = SHARED / "web"
ROUNDS = 5
Pairs = list[tuple[bytes, str]]


def files_of(name: str) -> dict[str, bytes]:
    """Path -> content of a packed set."""
    return {path.removeprefix("./"): content for path, content in members(WEB / f"{name}.tar.zst")}


def scrapinghub() -> Pairs:
    files = files_of("scrapinghub_article_extraction")
    gold = json.loads(files["ground-truth.json"])
    return [
        (files[f"html/{key}.html"], row["articleBody"])
        for key, row in sorted(gold.items())
        if f"html/{key}.html" in files
    ]


def with_gold_lines(name: str) -> Pairs:
    """Sets in the form of CleanEval: input/N.html, GoldStandard/N.txt whose lines begin with <p>, <h> or <l>."""
    files = files_of(name)
    pairs = []
    for path, content in sorted(files.items()):
        page = path.replace("/GoldStandard/", "/input/").removesuffix(".txt") + ".html"
        if "/GoldStandard/" in path and page in files:
            text = re.sub(r"(?m)^URL:.*$|^\s*<[phl]>", "", content.decode("utf-8", "replace"))
            pairs.append((files[page], text))
    return pairs


def extracted(page: bytes, engine: Callable[..., str]) -> str:
    try:
        return str(document_of(PageRecord("page", page), engine)["text"])
    except Skip:
        return ""


def f1(found: str, gold: str) -> tuple[float, float, float]:
    """F1, precision and recall of the words."""
    a, b = Counter(re.findall(r"\w+", found)), Counter(re.findall(r"\w+", gold))
    common = sum((a & b).values())
    precision, recall = common / max(1, a.total()), common / max(1, b.total())
    return (2 * precision * recall / (precision + recall) if common else 0.0), precision, recall


def strings(engine: Callable[..., str]) -> tuple[float, float, float]:
    """F1, precision and recall of the strings of trafilatura_eval."""
    files = files_of("trafilatura_eval")
    hits = wrong = missed = 0
    for row in json.loads(files["evaldata.json"]).values():
        if f"html/{row['file']}" not in files:
            continue
        text = extracted(files[f"html/{row['file']}"], engine)
        hits += sum(part in text for part in row["with"])
        missed += sum(part not in text for part in row["with"])
        wrong += sum(part in text for part in row["without"])
    precision, recall = hits / (hits + wrong), hits / (hits + missed)
    return 2 * precision * recall / (precision + recall), precision, recall


def main() -> None:
    if not WEB.is_dir():
        sys.exit("the shared test data is not beside this checkout")
    sets = {
        "scrapinghub": scrapinghub(),
        "cleaneval": with_gold_lines("cleaneval"),
        "cleanportaleval": with_gold_lines("cleanportaleval"),
    }
    first = [page for page, _ in sets["scrapinghub"]]
    size = sum(map(len, first)) / 1e6
    ways = {name: partial(seconds, partial(extracted, engine=engine), first) for name, engine in ENGINES.items()}
    in_turn(ways, 1)  # warms up
    speeds = {name: [size / took for took in taken] for name, taken in in_turn(ways, ROUNDS).items()}
    print("# Main content of web pages: quality and speed\n")
    print(
        f"`taskset -c 0 python tests/bench/extraction.py`, {datetime.date.today()}, Python {platform.python_version()}, ",
        end="",
    )
    print(", ".join(f"{name} {version(name)}" for name in ("resiliparse", "trafilatura")) + ", one core.\n")
    print(
        "F1 (precision / recall) of words against gold text, mean over pages; the last set by strings that must and must not be there.\n"
    )
    print(
        "| engine | "
        + " | ".join(f"{name} ({len(pairs)})" for name, pairs in sets.items())
        + " | trafilatura_eval | MB of HTML a CPU second, median (min to max) |"
    )
    print("|---" * (len(sets) + 3) + "|")
    for name, engine in ENGINES.items():
        cells = []
        for pairs in sets.values():
            scores = [f1(extracted(page, engine), gold) for page, gold in pairs]
            cells.append(tuple(statistics.fmean(column) for column in zip(*scores, strict=True)))
        cells.append(strings(engine))
        shown = " | ".join(f"{f:.3f} ({p:.3f} / {r:.3f})" for f, p, r in cells)
        print(f"| {name} | {shown} | {spread(speeds[name])} |", flush=True)
    faster = spread(ratios(speeds["resiliparse"], speeds["trafilatura"]))
    print(f"\nresiliparse beside trafilatura: {faster} times the speed, {ROUNDS} pairs.")


if __name__ == "__main__":
    main()

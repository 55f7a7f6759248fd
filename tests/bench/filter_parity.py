"""Do the quality filters decide as datatrove's do? Real documents, the same word lists on both sides; prints a dated table.

    python tests/bench/filter_parity.py [--shared ../shared/data] [--documents 2000]

Makes its own environment with the pinned datatrove under .cache/ on first use (about 600 MB) and runs itself there. Three questions:

1. With `--compat datatrove` and the same words and sentences (ours are put in the place of datatrove's tokeniser, and datatrove's in the place of
   ours), does each filter give the same decision, the same reason and, for C4, the same text? Anything but 0 differences is a bug.
2. How many decisions change where the quirks that --compat brings back are mended?
3. How often does each kind of words (`--words`) decide as stock datatrove with its spaCy words does?
"""

from __future__ import annotations

import argparse
import ast
import random
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from peers import SHARED, call, decompress, inside, members, rows_of

REQUIREMENTS = ["datatrove==0.10.1", "spacy==3.8.*", "nltk", "regex", "orjson", "zstandard", "xxhash", "numba==0.68.*"]
MAX_CHARACTERS = 20_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, default=SHARED)
    parser.add_argument("--documents", type=int, default=2000, help="at most so many, an even share of each source")
    parser.add_argument("--python", help="interpreter that has datatrove (default: make an environment)")
    arguments = parser.parse_args()
    inside("datatrove-0.10.1", REQUIREMENTS, arguments.python)
    compare(collect(arguments.shared, arguments.documents))


# ---- documents


def collect(shared: Path, limit: int) -> list[tuple[str, str]]:
    """(source, text), an even share of every source, shuffled by a fixed seed."""
    sources = {name: list(found) for name, found in all_sources(shared).items()}
    share = -(-limit // len(sources))
    chosen: list[tuple[str, str]] = []
    for name, texts in sorted(sources.items()):
        random.Random(name).shuffle(texts)
        chosen += [(name, text[:MAX_CHARACTERS]) for text in texts[:share]]
    return chosen


def all_sources(shared: Path) -> dict[str, Iterator[str]]:
    text = shared / "text"
    return {
        "dclm web": json_texts(text / "dclm_majority_data.jsonl.zst"),
        "dolma web": json_texts(text / "dolma_cc_en_head_0091.jsonl.zst", text / "dolma_documents_000.jsonl.zst"),
        "c4 web": json_texts(text / "olmo_c4_sample.jsonl.zst"),
        "garbage": excerpts(decompress(text / "ungoliant_garbage.txt.zst").decode(errors="replace"), 3000),
        "books": (part for book in archive(text / "gutenberg_17_books.tar.zst") for part in excerpts(book, 6000)),
        "reviews": archive(text / "nltk_movie_reviews.tar.zst"),
        "instructions": instructions(shared / "instruct" / "dolly15k_from_docx.jsonl.zst"),
        "languages": json_texts(shared / "lang" / "udhr_xml_text.jsonl.zst"),
        "python": (text for pair in python_modules() for text in pair),
        "made": made(),
    }


def json_texts(*paths: Path) -> Iterator[str]:
    for path in paths:
        yield from (row["text"] for row in rows_of(path))


def instructions(path: Path) -> Iterator[str]:
    for row in rows_of(path):
        yield "\n\n".join(row[key] for key in ("instruction", "context", "response") if row.get(key))


def archive(path: Path) -> Iterator[str]:
    yield from (content.decode(errors="replace") for name, content in members(path) if name.endswith(".txt"))


def excerpts(text: str, size: int) -> Iterator[str]:
    yield from (text[start : start + size] for start in range(0, len(text), size))


def python_modules() -> Iterator[tuple[str, str]]:
    """Docstrings of the standard library's modules, joined a module, each with its source."""
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        source = path.read_text(encoding="utf-8", errors="replace")
        tree = ast.parse(source)
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
        yield "\n\n".join(filter(None, found)), source


def made() -> Iterator[str]:
    """Texts near the thresholds and odd ones, by a fixed seed."""
    random_ = random.Random(0)
    base = 'the cat and a dog have to be with that lot of ab c a bc # ... … • - { } 12 １１ 。 lorem ipsum [1] "x" it\'s'.split()
    yield from ("", " ", "\n\n\n", "\x1c\x85\u2028", "{", "!!!", "a", "🙂" * 40)
    for _ in range(1000):
        words = random_.choices(base, weights=[random_.random() ** 3 for _ in base], k=random_.randrange(1, 300))
        breaks = random_.choice([" ", " ", " ", ". ", "\n", "\n\n", ".\n", "...\n"])
        ends = random_.choice([0.02, 0.1, 0.4])
        yield "".join(word + (breaks if random_.random() < ends else " ") for word in words)


# ---- comparison

Decision = tuple[str, str]  # reason ("" = kept), text


def compare(documents: list[tuple[str, str]]) -> None:
    from llmkit.corpus.chain import Chain
    from llmkit.corpus.chain_loader import load_chain
    from llmkit.corpus.words import SPLITTERS, Splitter

    theirs = Reference()
    modes: dict[str, Splitter] = {
        "spacy": Splitter(theirs.words, theirs.sentences),
        "unicode": SPLITTERS.get("unicode"),
        "whitespace": SPLITTERS.get("whitespace"),
    }
    single = {name: (name, []) for name in ("gopher_repetition", "gopher_quality", "c4", "fineweb")}
    single["c4 (fineweb)"] = ("c4", ["c4.require_end_mark=false"])
    steps = {
        compat: {name: load_chain([], [kind], rules, "unicode", compat).steps for name, (kind, rules) in single.items()}
        | {"whole fineweb chain": load_chain(["fineweb"], [], [], "unicode", compat).steps}
        for compat in ("datatrove", "")
    }
    texts = [text for _, text in documents]
    real = [i for i, (source, _) in enumerate(documents) if source != "made"]
    stock: dict[str, list[Decision]] = {}
    mine: dict[tuple[str, str, str], list[Decision]] = {}
    rows = []
    for mode, splitter in modes.items():
        theirs.use(splitter if mode != "spacy" else None)
        for compat, chains in steps.items():
            for name, chosen in chains.items():
                mine[compat, mode, name] = [judge(Chain(chosen, splitter), text) for text in texts]
        for name in single:
            reference = [theirs.judge(name, text) for text in texts]
            if mode == "spacy":
                stock[name] = reference
            ours = mine["datatrove", mode, name]
            wrong = [i for i, pair in enumerate(zip(ours, reference, strict=True)) if pair[0] != pair[1]]
            reasons = len({reason for reason, _ in reference})
            mended = sum(a[0] != b[0] for a, b in zip(ours, mine["", mode, name], strict=True))
            rows.append((mode, name, len(texts), sum(not r for r, _ in reference), reasons, len(wrong), mended))
            for i in wrong[:5]:
                print(
                    f"differs: {documents[i][0]} {i} {mode} {name}: {ours[i]!r:.200} {reference[i]!r:.200}",
                    file=sys.stderr,
                )
    from importlib.metadata import version

    from llmkit import __version__

    size = sum(len(text.encode()) for text in texts) / 1e6
    print(
        f"# Filter decisions beside datatrove\n\n{time.strftime('%Y-%m-%d')}, llmkit {__version__}, datatrove {version('datatrove')}, ",
        end="",
    )
    print(f"spaCy {version('spacy')}, Python {sys.version.split()[0]}; `{call()}`")
    counts = Counter(source for source, _ in documents)
    print(
        f"\n{len(texts)} documents, {size:.1f} MB, {len(real)} of them real: "
        + ", ".join(f"{source} {n}" for source, n in counts.items())
        + "."
    )
    print("\n## Same words and sentences on both sides, `--compat datatrove`: decision, reason and text\n")
    print("The last column: outcomes that change where the quirks are mended, as they are without --compat.\n")
    print("| words | filter | documents | kept | outcomes seen | differences | mended |\n|---|---|---|---|---|---|---|")
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |")
    print("\n## Each kind of words against stock datatrove (spaCy words): same decision, and same reason too\n")
    print("| words | " + " | ".join(single) + " |\n|---|" + "---|" * len(single))
    for mode in ("unicode", "whitespace"):
        cells = []
        for name in single:
            pairs = list(zip(mine["datatrove", mode, name], stock[name], strict=True))
            same = sum((not a[0]) == (not b[0]) for a, b in pairs) / len(pairs)
            exact = sum(a[0] == b[0] for a, b in pairs) / len(pairs)
            cells.append(f"{100 * same:.1f} %, {100 * exact:.1f} %")
        print(f"| {mode} | " + " | ".join(cells) + " |")
    print(
        "\nThe whole FineWeb chain on documents of the web sources (dclm, dolma, c4), on all real ones, then on all:\n"
    )
    name = "whole fineweb chain"
    web = [i for i, (source, _) in enumerate(documents) if source.endswith("web")]
    for label, chosen_ones in (("web", web), ("real", real), ("all", list(range(len(texts))))):
        spacy = mine["datatrove", "spacy", name]
        for mode, compat in (("unicode", "datatrove"), ("whitespace", "datatrove"), ("spacy", "")):
            same = sum((not mine[compat, mode, name][i][0]) == (not spacy[i][0]) for i in chosen_ones) / len(
                chosen_ones
            )
            what = "quirks mended, spaCy words" if not compat else f"{mode} words"
            print(
                f"- {label}, {what}: {100 * same:.2f} % of {len(chosen_ones)} decisions as with spaCy words and the quirks"
            )


def judge(chain: Any, text: str) -> Decision:
    verdict = chain.judge(text)
    return ("", verdict.text) if verdict.drop is None else (verdict.drop.reason, "")


class Reference:
    """datatrove's filters, with its own words or given ones."""

    def __init__(self) -> None:
        import datatrove.pipeline.filters as filters
        from datatrove.pipeline.filters import (
            c4_filters,
            fineweb_quality_filter,
            gopher_quality_filter,
            gopher_repetition_filter,
        )
        from datatrove.utils.text import split_into_sentences, split_into_words

        own_words = cache(
            lambda text, language=None: split_into_words(text)
        )  # spaCy is slow, and both sides ask five times
        own_sentences = cache(lambda line, language=None: split_into_sentences(line))
        self.words = own_words
        self.sentences = lambda line: len(own_sentences(line))
        self._own = (own_words, own_sentences)
        self._modules = (c4_filters, fineweb_quality_filter, gopher_quality_filter, gopher_repetition_filter)
        self._filters = {
            "gopher_repetition": filters.GopherRepetitionFilter(),
            "gopher_quality": filters.GopherQualityFilter(),
            "c4": filters.C4QualityFilter(),
            "c4 (fineweb)": filters.C4QualityFilter(filter_no_terminal_punct=False),
            "fineweb": filters.FineWebQualityFilter(),
        }

    def use(self, splitter: Any) -> None:
        """Take words and sentences from `splitter` (None: from spaCy)."""
        words, sentences = self._own
        if splitter is not None:
            words = lambda text, language=None: splitter.words(text)  # noqa: E731
            sentences = lambda line, language=None: [""] * splitter.sentences(line)  # noqa: E731
        for module in self._modules:
            for name, function in (("split_into_words", words), ("split_into_sentences", sentences)):
                if hasattr(module, name):
                    setattr(module, name, function)

    def judge(self, name: str, text: str) -> Decision:
        from datatrove.data import Document

        document = Document(text=text, id="")
        answer = self._filters[name].filter(document)
        return ("", document.text) if answer is True else (answer[1], "")


if __name__ == "__main__":
    main()

"""Do the quality filters decide as datatrove's do? Real documents, the same word lists on both sides; prints a dated table.

    python tests/bench/filter_parity.py [--shared ../shared/data] [--documents 2000]

Makes its own environment with the pinned datatrove under .cache/ on first use (about 400 MB) and runs itself there. Two questions:

1. Given the same words and sentences (ours are put in the place of datatrove's tokeniser, and datatrove's in the place of ours), does each
   filter give the same decision, the same reason and, for C4, the same text? Anything but 100 % is a bug.
2. How often does each kind of words (`--words`) decide as stock datatrove with its spaCy words does?
"""

from __future__ import annotations

import argparse
import ast
import io
import os
import random
import shlex
import subprocess
import sys
import sysconfig
import tarfile
import time
import venv
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = ROOT / ".cache" / "datatrove-0.10.1"
REQUIREMENTS = ["datatrove==0.10.1", "spacy==3.8.*", "nltk", "regex", "orjson", "zstandard", "xxhash"]
INSIDE = "LLMKIT_PARITY_INSIDE"
MAX_CHARACTERS = 20_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--documents", type=int, default=2000, help="at most so many, an even share of each source")
    parser.add_argument("--python", help="interpreter that has datatrove (default: make an environment)")
    arguments = parser.parse_args()
    if not os.environ.get(INSIDE):
        python = arguments.python or str(make_environment())
        environment = os.environ | {INSIDE: "1", "PYTHONPATH": str(ROOT)}
        sys.exit(subprocess.run([python, __file__, *sys.argv[1:]], env=environment).returncode)
    compare(collect(arguments.shared, arguments.documents))


def make_environment() -> Path:
    python = ENVIRONMENT / "bin" / "python"
    if not (ENVIRONMENT / "complete").exists():
        venv.create(ENVIRONMENT, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *REQUIREMENTS], check=True)
        (ENVIRONMENT / "complete").touch()
    return python


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
        "books": (
            part for book in archive(text / "gutenberg_17_books.tar.zst", ".txt") for part in excerpts(book, 6000)
        ),
        "reviews": archive(text / "nltk_movie_reviews.tar.zst", ".txt"),
        "languages": json_texts(shared / "lang" / "udhr_xml_text.jsonl.zst"),
        "python": python_texts(),
        "made": made(),
    }


def decompress(path: Path) -> bytes:
    import zstandard

    with open(path, "rb") as file:
        return zstandard.ZstdDecompressor().stream_reader(file).read()


def json_texts(*paths: Path) -> Iterator[str]:
    import orjson

    for path in paths:
        for line in decompress(path).splitlines():
            yield orjson.loads(line)["text"]


def archive(path: Path, suffix: str) -> Iterator[str]:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as packed:
            yield from (
                packed.read(name).decode(errors="replace") for name in packed.namelist() if name.endswith(suffix)
            )
        return
    with tarfile.open(fileobj=io.BytesIO(decompress(path))) as packed:
        for member in packed:
            if member.isfile() and member.name.endswith(suffix):
                yield packed.extractfile(member).read().decode(errors="replace")  # type: ignore[union-attr]


def excerpts(text: str, size: int) -> Iterator[str]:
    yield from (text[start : start + size] for start in range(0, len(text), size))


def python_texts() -> Iterator[str]:
    """Docstrings of the standard library's modules, joined a module, and the sources themselves."""
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        source = path.read_text(encoding="utf-8", errors="replace")
        tree = ast.parse(source)
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        yield "\n\n".join(filter(None, (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))))
        yield source


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
    from llmkit.corpus.rules import load_chain
    from llmkit.corpus.words import SPLITTERS, Splitter

    theirs = Reference()
    modes: dict[str, Splitter] = {
        "spacy": Splitter(theirs.words, theirs.sentences),
        "unicode": SPLITTERS.get("unicode"),
        "whitespace": SPLITTERS.get("whitespace"),
    }
    ours = {
        name: load_chain([], [name], [], "unicode").steps[0][1]
        for name in ("gopher_repetition", "gopher_quality", "c4", "fineweb")
    }
    ours["c4 (fineweb)"] = load_chain([], ["c4"], ["c4.require_end_mark=false"], "unicode").steps[0][1]
    texts = [text for _, text in documents]
    stock: dict[str, list[Decision]] = {}
    mine: dict[tuple[str, str], list[Decision]] = {}
    rows = []
    for mode, splitter in modes.items():
        theirs.use(splitter if mode != "spacy" else None)
        for name, check in ours.items():
            reference = [theirs.judge(name, text) for text in texts]
            mine[mode, name] = [judge(check, text, splitter) for text in texts]
            if mode == "spacy":
                stock[name] = reference
            wrong = [i for i, pair in enumerate(zip(mine[mode, name], reference, strict=True)) if pair[0] != pair[1]]
            reasons = len({reason for reason, _ in reference})
            rows.append((mode, name, len(texts), sum(not r for r, _ in reference), reasons, len(wrong)))
            for i in wrong[:5]:
                print(
                    f"differs: {documents[i][0]} {i} {mode} {name}: {mine[mode, name][i]!r:.200} {reference[i]!r:.200}",
                    file=sys.stderr,
                )
    from importlib.metadata import version

    from llmkit import __version__

    size = sum(len(text.encode()) for text in texts) / 1e6
    print(
        f"# Filter decisions beside datatrove\n\n{time.strftime('%Y-%m-%d')}, llmkit {__version__}, datatrove {version('datatrove')}, ",
        end="",
    )
    print(
        f"spaCy {version('spacy')}, Python {sys.version.split()[0]}; `python tests/bench/filter_parity.py {shlex.join(sys.argv[1:])}`"
    )
    counts = Counter(source for source, _ in documents)
    print(
        f"\n{len(texts)} documents, {size:.1f} MB: " + ", ".join(f"{source} {n}" for source, n in counts.items()) + "."
    )
    print("\n## Same words and sentences on both sides: decision, reason and text\n")
    print("| words | filter | documents | kept | outcomes seen | differences |\n|---|---|---|---|---|---|")
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |")
    print("\n## Each kind of words against stock datatrove (spaCy words): same decision, and same reason too\n")
    print("| words | " + " | ".join(ours) + " |\n|---|" + "---|" * len(ours))
    for mode in ("unicode", "whitespace"):
        cells = []
        for name in ours:
            pairs = list(zip(mine[mode, name], stock[name], strict=True))
            same = sum((not a[0]) == (not b[0]) for a, b in pairs) / len(pairs)
            exact = sum(a[0] == b[0] for a, b in pairs) / len(pairs)
            cells.append(f"{100 * same:.1f} %, {100 * exact:.1f} %")
        print(f"| {mode} | " + " | ".join(cells) + " |")
    chain = load_chain(["fineweb"], [], [], "unicode").steps
    print("\nThe whole FineWeb chain on documents of the web sources (dclm, dolma, c4), then on all:\n")
    for label, chosen in (("web", [t for s, t in documents if s.endswith("web")]), ("all", texts)):
        verdicts = {mode: [run(chain, text, splitter) for text in chosen] for mode, splitter in modes.items()}
        for mode in ("unicode", "whitespace"):
            same = sum((not a) == (not b) for a, b in zip(verdicts[mode], verdicts["spacy"], strict=True)) / len(chosen)
            print(f"- {label}, {mode}: {100 * same:.1f} % of {len(chosen)} decisions as with spaCy words")


def judge(check: Callable[[Any], Any], text: str, splitter: Any) -> Decision:
    from llmkit.corpus.page import Page

    page = Page(text, splitter)
    drop = check(page)
    return ("", page.text) if drop is None else (drop.reason, "")


def run(chain: Any, text: str, splitter: Any) -> str:
    """Reason of the first drop in a chain, "" when kept."""
    from llmkit.corpus.page import Page

    page = Page(text, splitter)
    for _, check in chain:
        if drop := check(page):
            return str(drop.reason)
    return ""


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

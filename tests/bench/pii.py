"""How well and how fast is personal data found, beside datatrove's and dolma's patterns? Prints dated tables.

    python tests/bench/pii.py [--shared ../shared/data] [--rounds 7]

Makes three environments under .cache/ on first use (about 1 GB): the pinned datatrove, the pinned dolma, and Faker and phonenumbers, which make values; llmkit
runs where this is started. Each side is a process of its own that answers requests; the CPU time of a pass is taken inside it, and the sides take turns. Questions:

1. Precision and recall by kind on the labelled examples of tests/corpus/pii_examples.py (two seeds that no threshold was set on).
2. Recall on values that others made: Faker's generators and the example numbers of every region in phonenumbers.
3. CPU time on real text, and how often each kind is found in it; CPU time on text that is made to be slow.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from filter_parity import all_sources
from peers import ROOT, SHARED, environment_of, in_turn, ratios, seconds, spread

COMPARED = ("llmkit", "datatrove", "dolma")
SIDES = {
    "llmkit": [],
    "datatrove": ["datatrove==0.10.1", "spacy==3.8.*", "nltk", "regex", "orjson", "zstandard", "xxhash"],
    "dolma": ["dolma==1.2.1"],
    "makers": ["Faker==40.*", "phonenumbers==9.*"],
}
KINDS = ("email", "ipv4", "ipv6", "phone", "card", "iban", "secret")
Found = list[tuple[str, int, int]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, default=SHARED)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--python",
        action="append",
        default=[],
        metavar="SIDE=INTERPRETER",
        help="use this one (default: make an environment)",
    )
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        return answer(arguments.side)
    given = dict(item.split("=", 1) for item in arguments.python)
    pythons = {"llmkit": sys.executable} | given
    every = {name: Side(name, pythons.get(name) or environment_of(f"pii-{name}", SIDES[name])) for name in SIDES}
    sides, makers = {name: every[name] for name in COMPARED}, every["makers"]
    versions = ", ".join(f"{name} {side.ask('version')}" for name, side in sides.items())
    print(
        f"# Personal data: precision, recall and speed\n\n{time.strftime('%Y-%m-%d')}, Python {sys.version.split()[0]}, {versions};"
    )
    print(f"`python tests/bench/pii.py --rounds {arguments.rounds}`\n")
    labelled(sides)
    made_by_others(sides["llmkit"], makers.ask("others"))
    real(sides, arguments.shared, arguments.rounds)
    hostile(sides["llmkit"])


class Side:
    """A process that has one of the libraries; a request and its answer are a line of JSON each."""

    def __init__(self, name: str, python: str) -> None:
        environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests/corpus'}"}
        self.process = subprocess.Popen([python, __file__, "--side", name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, text=True)  # fmt: skip

    def ask(self, request: str, texts: list[str] | None = None) -> Any:
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            json.dump(texts, file)
            file.flush()
            assert self.process.stdin and self.process.stdout
            self.process.stdin.write(json.dumps([request, file.name]) + "\n")
            self.process.stdin.flush()
            return json.loads(self.process.stdout.readline())


# ---- inside a side


def answer(name: str) -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    find, work, version = {"llmkit": ours, "datatrove": datatrove, "dolma": dolma, "makers": makers}[name]()
    for line in sys.stdin:
        request, path = json.loads(line)
        texts = json.loads(Path(path).read_text())
        if request == "find":
            result: Any = [find(text) for text in texts]
        elif request == "time":
            result = seconds(work, texts)
        else:
            result = version if request == "version" else others()
        print(json.dumps(result), file=out, flush=True)


Tools = tuple[Callable[[str], Iterable[tuple[str, int, int]]], Callable[[str], object], str]


def ours() -> Tools:
    from llmkit import __version__
    from llmkit.corpus.filters.pii import redact
    from llmkit.corpus.pii import find

    return find, lambda text: redact(text, find(text)), __version__


def makers() -> Tools:
    return lambda text: [], str, ""


def datatrove() -> Tools:
    from importlib.metadata import version

    from datatrove.pipeline.formatters import PIIFormatter

    formatter = PIIFormatter()
    replacers = [("email", formatter.emails_replacer), ("ipv4", formatter.ip_replacer)]

    def find(text: str) -> Found:
        return [
            (kind, *match.span())
            for kind, replacer in replacers
            for match in replacer.regex.finditer(text)
            if not replacer.validator or replacer.validator(match[0])
        ]

    return find, formatter.format, version("datatrove")


def dolma() -> Tools:
    from importlib.metadata import version

    from dolma.core.data_types import Document
    from dolma.taggers.pii import FastPiiRegex

    tagger = FastPiiRegex()
    names = {"EMAIL_ADDRESS": "email", "PHONE_NUMBER": "phone", "IP_ADDRESS": "ipv4"}

    def predict(text: str) -> Any:
        return tagger.predict(Document(source="", id="", text=text)).spans

    return (
        lambda text: [(names[s.type], s.start, s.end) for s in predict(text) if s.type in names],
        predict,
        version("dolma"),
    )


def others() -> list[tuple[str, str, list[str]]]:
    """(maker, kind, values)."""
    import phonenumbers
    from faker import Faker

    made = []
    for label, form in (("international", 1), ("E.164", 0), ("national", 2)):
        numbers = [
            phonenumbers.example_number_for_type(region, kind)
            for region in sorted(phonenumbers.SUPPORTED_REGIONS)
            for kind in (0, 1)
        ]
        made.append((f"phonenumbers, {label}", "phone", [phonenumbers.format_number(n, form) for n in numbers if n]))
    Faker.seed(0)
    for (
        name
    ) in "en_US en_GB de_DE fr_FR es_ES it_IT nl_NL pl_PL pt_BR ja_JP sv_SE en_IN en_AU zh_CN ru_RU tr_TR".split():
        made.append((f"Faker {name}", "phone", [Faker(name).phone_number() for _ in range(100)]))
    fake = Faker(["de_DE", "fr_FR", "es_ES", "it_IT", "nl_NL", "pl_PL"])
    made.append(("Faker", "email", [fake.email(safe=False) for _ in range(500)]))
    made.append(("Faker", "iban", [fake.iban() for _ in range(500)]))
    made.append(("Faker", "ipv4", [fake.ipv4_public() for _ in range(500)]))
    made.append(("Faker, Visa, Mastercard, American Express, Discover", "card", [fake.credit_card_number(c) for c in ("visa16", "mastercard", "amex", "discover") for _ in range(125)]))  # fmt: skip
    made.append(("Faker, every issuer, obsolete ones too", "card", [fake.credit_card_number() for _ in range(500)]))
    return made


# ---- tables


def labelled(sides: dict[str, Side]) -> None:
    sys.path.insert(0, str(ROOT / "tests" / "corpus"))
    from pii_examples import examples

    chosen = [inside_prose(example) for seed in (11, 12) for example in examples(seed, 300)]
    positives = Counter(kind for example in chosen for kind, _, _ in example.labels)
    traps = sum(not example.labels for example in chosen)
    print(
        f"## Labelled examples\n\n{sum(positives.values())} positives, {traps} traps. Recall: the span covers the whole value (`exact`: and nothing else)."
    )
    print("Precision: share of the spans of a kind that touch a value of that kind.\n")
    print(
        "| kind | positives | "
        + " | ".join(f"{name}: recall, exact, precision" for name in sides)
        + " |\n|---|---|"
        + "---|" * len(sides)
    )
    cells: dict[str, dict[str, str]] = {}
    for name, side in sides.items():
        right, exact, hits, wrong = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
        for example, spans in zip(chosen, side.ask("find", [e.text for e in chosen]), strict=True):
            for kind, start, end in example.labels:
                right[kind] += any(k == kind and a <= start and end <= b for k, a, b in spans)
                exact[kind] += [kind, start, end] in spans
            for kind, a, b in spans:
                touches = any(kind == k and a < end and start < b for k, start, end in example.labels)
                (hits if touches else wrong)[kind] += 1
        cells[name] = {
            kind: f"{right[kind] / positives[kind]:.3f}, {exact[kind] / positives[kind]:.3f}, {hits[kind] / (hits[kind] + wrong[kind]):.3f}"
            if hits[kind] + wrong[kind] else "not looked for"
            for kind in KINDS
        }  # fmt: skip
    for kind in KINDS:
        print(f"| {kind} | {positives[kind]} | " + " | ".join(cells[name][kind] for name in sides) + " |")


def inside_prose(example: Any) -> Any:
    """The example as a line among others, for patterns that want white space around a value."""
    before, after = "It was written down on that day.\n", "\nAnd so it went on.\n"
    moved = frozenset((kind, start + len(before), end + len(before)) for kind, start, end in example.labels)
    return example._replace(text=before + example.text + after, labels=moved)


def made_by_others(side: Side, made: list[tuple[str, str, list[str]]]) -> None:
    contexts = {"behind “Tel.”": "Tel. {}", "in a sentence": "You can reach me at {} in the evening."}
    print(
        "\n## Values made by others: recall\n\n| maker | kind | values | "
        + " | ".join(contexts)
        + " |\n|---|---|---|"
        + "---|" * len(contexts)
    )
    for maker, kind, values in made:
        shares = []
        for context in contexts.values():
            start = context.index("{")
            found = side.ask("find", [context.format(value) for value in values])
            whole = [
                any(k == kind and a <= start + (v[0] == "(") and start + len(v) <= b for k, a, b in spans)
                for v, spans in zip(values, found, strict=True)
            ]
            shares.append(f"{sum(whole) / len(values):.3f}")
        print(f"| {maker} | {kind} | {len(values)} | " + " | ".join(shares) + " |")


def real(sides: dict[str, Side], shared: Path, rounds: int) -> None:
    sources = {name: list(texts) for name, texts in all_sources(shared).items() if name != "made"}
    sources["web"] = [text for name in ("dclm web", "dolma web", "c4 web") for text in sources.pop(name)]
    print(
        f"\n## Real text\n\nMB of UTF-8 a CPU second, median of {rounds} rounds in which the sides take turns; ratios are of the same round, with their range. Ours redacts all"
    )
    print("seven kinds, datatrove redacts two, dolma finds three.\n")
    print(
        "| text | MB | llmkit | datatrove | dolma | llmkit / datatrove | llmkit / dolma | found by llmkit, a MB |\n|---|---|---|---|---|---|---|---|"
    )
    for name, texts in sources.items():
        size = sum(len(text.encode()) for text in texts) / 1e6
        times = in_turn({name: partial(side.ask, "time", texts) for name, side in sides.items()}, rounds)
        speed = [f"{size / statistics.median(times[side]):.1f}" for side in sides]
        beside = [spread(ratios(times[other], times["llmkit"])) for other in ("datatrove", "dolma")]
        found = Counter(kind for spans in sides["llmkit"].ask("find", texts) for kind, _, _ in spans)
        rates = ", ".join(f"{kind} {found[kind] / size:.1f}" for kind in KINDS if found[kind]) or "nothing"
        print(f"| {name} | {size:.1f} | " + " | ".join(speed + beside) + f" | {rates} |")


def hostile(side: Side) -> None:
    from pii_examples import HOSTILE

    worst = sorted(
        ((side.ask("time", [(unit * (1_000_000 // len(unit) + 1))[:1_000_000]]), unit) for unit in HOSTILE),
        reverse=True,
    )
    shown = ", ".join(f"{took:.1f} s for {unit!r}" for took, unit in worst[:5])
    print(
        f"\n## Hostile text\n\n1 MB of one thing repeated, {len(HOSTILE)} different ones, CPU time of llmkit; the slowest: {shown}."
    )


if __name__ == "__main__":
    main()

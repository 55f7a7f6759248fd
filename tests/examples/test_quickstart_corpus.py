"""The builders behind examples/quickstart.sh: what they must guarantee for the scores to mean anything."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

from quickstart import questions, sums
from quickstart.definitions import (
    DEVELOPMENT,
    TEST,
    TRAIN,
    Source,
    family,
    first_sentence,
    of_extensions,
    of_source,
    split,
)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus of this Python installation, as the quickstart builds it."""
    out = tmp_path_factory.mktemp("corpus")
    subprocess.run([sys.executable, str(EXAMPLES / "build_corpus.py"), str(out)], check=True, capture_output=True)
    return out


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def source(module: str, text: str) -> Source:
    return Source(module, text, ast.parse(text))


def test_definitions_are_found_with_their_signatures() -> None:
    """Behaviour: functions, classes with their constructor, methods without self; what has no docstring is left out."""
    text = '''
def add(a, b: int = 1, *rest, key=None):
    """Add things."""
def silent(): pass
class Box:
    """A box.

    More."""
    def __init__(self, size=3): pass
    @classmethod
    def of(cls, other):
        """Make a box of another."""
'''
    found = [(d.name, d.signature, first_sentence(d.docstring)) for d in of_source(source("things", text))]
    assert found == [
        ("add", "(a, b=1, *rest, key=None)", "Add things."),
        ("Box", "(size=3)", "A box."),
        ("Box.of", "(other)", "Make a box of another."),
    ]


def test_extension_modules_are_found_in_a_virtual_environment_too() -> None:
    """Behaviour: the modules in C of this interpreter contribute, with the bound argument removed from signatures."""
    found = {(d.module, d.name): d for d in of_extensions()}
    assert found["math", "sqrt"].signature == "(x)"
    assert found["builtins", "str.join"].signature == "(iterable)"
    assert any(module == "_json" or module == "zlib" for module, _ in found)


@pytest.mark.parametrize(
    ("docstring", "sentence"),
    [
        ("Return it.\n\nMore.", "Return it."),
        ("Return the name, e.g. 'x'. Then more.", "Return the name, e.g. 'x'."),
        ("Join\n  two lines", "Join two lines."),
        ("join(a, b) -> string\n\nJoin.", ""),
        (">>> 1\n1", ""),
        ("excepthandler = ExceptHandler(expr? type)", ""),
    ],
)
def test_first_sentence(docstring: str, sentence: str) -> None:
    """Behaviour: prose only, whole sentences, on one line."""
    assert first_sentence(docstring) == sentence


def test_parts_of_one_module_share_a_split() -> None:
    """Property: private halves and other names of a module belong to its family, so neither gives the other away."""
    assert family("_pydecimal") == family("_decimal") == family("decimal") == "decimal"
    assert family("_collections_abc") == "collections"
    assert family("ntpath") == family("posixpath") == family("posix") == "os"
    assert family("_sha256") == family("_md5") == "hashlib"
    assert family("xml.dom.minidom") == family("pyexpat") == "xml"


def test_split_is_fixed() -> None:
    """Property: the split is part of the published figures and must not drift: its shares, and some names."""
    names = sorted({family(name) for name in sys.stdlib_module_names})
    shares = [sum(split(name) == part for name in names) / len(names) for part in (TRAIN, DEVELOPMENT, TEST)]
    assert shares[0] > 0.7
    assert (split("email"), split("xml"), split("asyncio")) == (TEST, DEVELOPMENT, TRAIN)


def test_same_installation_same_bytes(built: Path, tmp_path: Path) -> None:
    """Property: another process with another hash seed writes the same files to the byte (task files name their own directory)."""
    subprocess.run(
        [sys.executable, str(EXAMPLES / "build_corpus.py"), str(tmp_path / "again")],
        check=True,
        capture_output=True,
        env={"PYTHONHASHSEED": "7", "PATH": ""},
    )
    files = sorted(path.relative_to(built) for path in built.rglob("*") if path.is_file())
    assert len(files) >= 17
    for name in files:
        expected, found = (root / name for root in (built, tmp_path / "again"))
        if name.suffix == ".yaml":
            assert found.read_text().replace(str(tmp_path / "again"), "") == expected.read_text().replace(
                str(built), ""
            )
        else:
            assert found.read_bytes() == expected.read_bytes(), name


def test_documents_are_disjoint_by_module(built: Path) -> None:
    """Property: no module, nor any part of its family, is in two splits."""
    owners: dict[str, set[str]] = {}
    for name in ("train/docs", "train/code", "train/prose", "development/documents", "test/documents"):
        for row in read(built / f"{name}.jsonl"):
            kind, _, rest = row["id"].partition("/")
            key = family(rest) if kind in ("docs", "code") else f"{kind} {rest}"
            owners.setdefault(key, set()).add(name.partition("/")[0])
            assert row["text"].strip() and row["source"] in ("docs", "code", "prose")
    assert {len(parts) for parts in owners.values()} == {1}
    held_out = {json.dumps(row) for row in read(built / "test/documents.jsonl")}
    assert {json.dumps(row) for row in read(built / "test/sample.jsonl")} <= held_out


def test_real_duplicates_are_in_the_corpus(built: Path) -> None:
    """Property: there is something for dedup to find: a paragraph of 200 characters or more that stands in two documents."""
    seen: dict[str, str] = {}
    repeated = set()
    for row in read(built / "train/docs.jsonl"):
        for paragraph in {part.strip() for part in row["text"].split("\n\n") if len(part) >= 200}:
            if paragraph in seen:
                repeated.add(paragraph)
            seen[paragraph] = row["id"]
    assert len(repeated) >= 10


@pytest.mark.parametrize("suffix", ["", "_development"])
def test_choices_say_nothing_by_their_length(built: Path, suffix: str) -> None:
    """Property: enough items; four different choices within 30 % of each other; the right one is longest, or shortest, by chance only."""
    items = read(built / f"tasks/docstring_choice{suffix}.jsonl")
    assert len(items) >= 400
    longest = shortest = 0
    for item in items:
        lengths = [len(choice) for choice in item["choices"]]
        assert len(set(item["choices"])) == 4
        assert max(lengths) <= 1.3 * min(lengths)
        longest += max(range(4), key=lambda i: lengths[i]) == item["gold"]
        shortest += min(range(4), key=lambda i: lengths[i]) == item["gold"]
    error = (0.25 * 0.75 / len(items)) ** 0.5
    assert abs(longest / len(items) - 0.25) < 4 * error
    assert abs(shortest / len(items) - 0.25) < 4 * error
    positions = [sum(item["gold"] == i for item in items) / len(items) for i in range(4)]
    assert max(positions) < 0.25 + 4 * error


@pytest.mark.parametrize("suffix", ["", "_development"])
def test_training_modules_give_no_answer_away(built: Path, suffix: str) -> None:
    """Property: no right answer, and no question, of a held-out item stands in any row that is trained on."""
    rows = read(built / "rows/answers.jsonl")
    answers = {" ".join(questions.words(row["messages"][1]["content"])) for row in rows}
    for pair in read(built / "rows/pairs.jsonl"):
        answers |= {" ".join(questions.words(pair[side][0]["content"])) for side in ("chosen", "rejected")}
    for item in read(built / f"tasks/docstring_choice{suffix}.jsonl"):
        assert " ".join(questions.words(item["choices"][item["gold"]])) not in answers


def test_pairs_prefer_the_right_answer_of_similar_length(built: Path) -> None:
    """Property: the chosen side is the docstring's own, the rejected one another of similar length; neither side is longer on average."""
    right = {}
    for row in read(built / "rows/answers.jsonl"):
        right.setdefault(row["messages"][0]["content"], set()).add(row["messages"][1]["content"])
    longer = 0
    pairs = read(built / "rows/pairs.jsonl")
    for pair in pairs:
        chosen, rejected = pair["chosen"][0]["content"], pair["rejected"][0]["content"]
        assert chosen in right[pair["prompt"][0]["content"]] and chosen != rejected
        assert max(len(chosen), len(rejected)) <= 1.3 * min(len(chosen), len(rejected))
        longer += (len(chosen) > len(rejected)) - (len(chosen) < len(rejected))
    assert abs(longer) < 0.1 * len(pairs)


def test_held_out_sums_are_never_trained_on() -> None:
    """Property: in neither order of the two numbers; every sum of two digits is in exactly one split or its mirror image is."""
    parts = sums.sums(0)
    trained = set(parts[TRAIN])
    for name in (DEVELOPMENT, TEST):
        assert len(parts[name]) == sums.HELD_OUT[name]
        assert not {pair for a, b in parts[name] for pair in ((a, b), (b, a))} & trained
    covered = trained | {pair for name in (DEVELOPMENT, TEST) for a, b in parts[name] for pair in ((a, b), (b, a))}
    assert len(covered) == 90 * 90


def test_working_of_a_sum() -> None:
    """Behaviour: every step of the working is right, and it ends in the sum."""
    assert sums.working(37, 45) == "7+5=12, 3+4+1=8: 82"
    for a, b in sums.sums(1)[TRAIN][:500]:
        steps, _, result = sums.working(a, b).partition(": ")
        for step in steps.split(", "):
            terms, _, value = step.partition("=")
            assert sum(map(int, terms.split("+"))) == int(value)
        assert int(result) == a + b


def test_word_rule_counts_shared_words() -> None:
    """Behaviour: words of the name are split at underscores, dots and capitals; equal choices share the credit."""
    assert questions.words("Thread.addHandler_2x") == ["thread", "add", "handler", "2", "x"]
    certain = {"name": "Box.add_item", "choices": ["Adds items.", "Remove it.", "None of it.", "Gone."], "gold": 0}
    guess = {"name": "zzz", "choices": ["One a.", "Two b.", "Three c.", "Four d."], "gold": 3}
    assert questions.word_rule([certain])[0] == 1.0
    assert questions.word_rule([guess])[0] == 0.25
    assert questions.word_rule([certain, guess])[0] == pytest.approx(0.625)

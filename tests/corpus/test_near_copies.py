"""What is a near duplicate, and what only looks like one: numbers, operators and cells that differ everywhere."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packed import rows_of
from rows import texts_to_rows
from test_dedup import deduplicate, prose

from llmkit.corpus.dedup.exact import Exact
from llmkit.corpus.dedup.minhash import MinHash
from llmkit.corpus.dedup.passages import PassageDedup
from llmkit.engine.local import Local
from llmkit.lineage.formats import read_lineage

OPERATORS = ["+", "-", "*", "/", "%", "==", "<", ">", "|", "&", "^", "<=", ">=", "~"]
Text = Callable[[random.Random], str]


def exercises(random_: random.Random) -> str:
    """Numbered exercises: the same sentences, other numbers."""
    things = ["apples", "pears", "books", "coins", "stamps"] * 8
    return "\n".join(
        f"{random_.randint(1, 999)}. Tom has {random_.randint(2, 900)} {thing} and buys {random_.randint(2, 900)} more. "
        f"How many {thing} does he have now? The answer is {random_.randint(2, 2000)}."
        for thing in things
    )


def log(random_: random.Random) -> str:
    return "\n".join(
        f"{random_.randint(2000, 2030)}-{random_.randint(10, 12)}-{random_.randint(10, 28)} INFO request "
        f"{random_.randint(1, 10**6)} served in {random_.uniform(0, 90):.2f} ms from cache"
        for _ in range(60)
    )


def table(random_: random.Random) -> str:
    return "| item | price | sold |\n|---|---|---|\n" + "\n".join(
        f"| item {name} | {random_.uniform(-90, 90):.2f} | {random_.randint(10, 99)} % |"
        for name in "abcdefghijklmnop" * 3
    )


def code(random_: random.Random) -> str:
    """The same functions with other operators."""
    return "\n".join(
        f"def {name}(left, right):\n    total = left {random_.choice(OPERATORS)} right\n"
        f"    return total {random_.choice(OPERATORS)} left"
        for name in ["add", "scale", "shift", "blend"] * 6
    )


KINDS: list[Text] = [exercises, log, table, code]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "more", [{}, {"clusters": "components"}, {"keep": "longest", "engine": Local(2)}, {"method": "exact"}]
)
def test_texts_that_differ_in_every_number_or_operator_stay(kind: Text, more: dict[str, Any]) -> None:
    """Property: long texts of the same words, with other numbers or operators throughout, are all kept; `loose` makes
    them one."""
    more = dict(more)
    exact = Exact(normalise="case,accents,whitespace,punctuation") if more.pop("method", None) else None
    texts = [kind(random.Random(seed)) for seed in range(12)]
    kept, _ = deduplicate(texts_to_rows(texts), exact, None if exact else MinHash(), **more)
    assert len(kept) == 12
    loose, _ = deduplicate(texts_to_rows(texts), near=MinHash(normalise="loose"))
    assert len(loose) == 1


@settings(deadline=None, max_examples=40)
@given(st.randoms(use_true_random=False), st.sampled_from(KINDS), st.integers(0, 6))
def test_near_copies_still_go(random_: random.Random, kind: Text, edit: int) -> None:
    """Property: a copy that differs in case, whitespace, prose marks, diacritics, one word, one number or one operator of
    a long text is removed."""
    text = kind(random_)
    words = text.split(" ")
    place = random_.randrange(len(words))
    copy = [
        text.upper(),
        re.sub(r"\s+", "\n  ", text),
        text.replace(".", "!").replace(":", ";") if kind is exercises else f"“{text}”",
        text.replace("a", "\u00e1").replace("e", "e\u0301"),
        " ".join([*words[:place], words[place] + "x", *words[place + 1 :]]),
        re.sub(r"\d+", lambda match: str(int(match[0]) + 1), text, count=1),
        re.sub(r"[-+*/%=<>|]", "&", text, count=1),
    ][edit]
    kept, rejects = deduplicate(texts_to_rows([text, copy]), near=MinHash())
    assert len(kept) == 1 and rejects[0]["similarity"] >= 0.75


def test_one_number_in_a_page_and_in_a_line() -> None:
    """Behaviour: a number counts as one word: edited in a page it leaves a near copy, in a line it does not."""
    page = prose(300, "page")
    for length, kept in ((300, 1), (20, 2)):
        rows = texts_to_rows(
            " ".join([*page[: length // 2], number, *page[length // 2 : length]]) for number in ("7", "35")
        )
        assert len(deduplicate(rows, near=MinHash())[0]) == kept


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("x = 1", "x = 2"),
        ("3 - 2", "3 + 2"),
        ("a < b", "a > b"),
        ("1.5 kg", "15 kg"),
        ("a ≠ b", "a = b"),
        ("+", "*"),
        ("-5", "5"),
    ],
)
def test_short_texts(one: str, other: str) -> None:
    """Behaviour: texts without shingles are compared whole, numbers and operators included."""
    assert len(deduplicate(texts_to_rows([one, other, one.upper()]), near=MinHash())[0]) == 2


def test_spaces_around_operators_make_no_difference() -> None:
    """Behaviour: code that was formatted otherwise is a near copy."""
    text = code(random.Random(1))
    tight = re.sub(r" *([-+*/%=<>|&^~]+) *", r"\1", text)
    assert tight != text and len(deduplicate(texts_to_rows([text, tight]), near=MinHash())[0]) == 1


def test_characters() -> None:
    """Behaviour: Chinese text with a few characters changed is a near copy by shingles of characters."""
    random_ = random.Random(3)
    text = "".join(chr(random_.randrange(0x4E00, 0x5E00)) for _ in range(400))
    edited = text[:90] + "人" + text[91:250] + "家" + text[251:]
    rows = texts_to_rows([text, edited])
    assert len(deduplicate(rows, near=MinHash())[0]) == 2
    assert len(deduplicate(rows, near=MinHash(unit="characters"))[0]) == 1


def test_lines_and_exact_texts_by_parts() -> None:
    """Behaviour: any list of parts for lines and whole texts; what is not listed counts."""
    lines = ["Total: 3 + 4 = 7", "total  3 + 4 = 7", "Total: 3 - 4 = 7", "Total: 3 + 4 = 8"]
    stage = PassageDedup(normalise="case,whitespace,punctuation")
    results = list(stage.run(_reader(["\n".join(lines)])))
    assert orjson.loads(b"".join(result.kept for result in results))["text"].split("\n") == [lines[0], *lines[2:]]
    kept, _ = deduplicate(texts_to_rows(lines), Exact(normalise="punctuation,whitespace,case"))
    assert [row["text"] for row in kept] == [lines[0], *lines[2:]]
    stage = PassageDedup(normalise="case")  # whitespace counts
    results = list(stage.run(_reader(["A b\na b\na  b"])))
    assert orjson.loads(b"".join(result.kept for result in results))["text"] == "A b\na  b"


def _reader(texts: list[str]) -> Any:
    from rows import Rows

    return Rows(texts_to_rows(texts))


# ---- the command


def write(path: Path, texts: list[str], start: int = 0) -> None:
    rows = texts_to_rows(texts)
    path.write_bytes(
        b"".join(orjson.dumps(row | {"id": f"{path.stem}{i}"}) + b"\n" for i, row in enumerate(rows, start))
    )


def test_nights_with_other_numbers(llmkit_here, tmp_path: Path) -> None:
    """Property: beside an index too, texts with other numbers or operators stay and near copies go, for any -j."""
    nights = [[kind(random.Random(seed)) for kind in KINDS for seed in (night, night + 10)] for night in range(2)]
    copies = [text.upper() for text in nights[0]]
    write(tmp_path / "n0.jsonl", nights[0])
    write(tmp_path / "n1.jsonl", nights[1] + copies)
    for jobs in "12":
        (tmp_path / jobs).mkdir()
        for night in range(2):
            call = ("dedup", f"../n{night}.jsonl", "--index", "seen.duckdb", "-j", jobs, "-o", f"n{night}.jsonl.zst")
            done = llmkit_here(*call, "--rejects", f"r{night}.jsonl.zst", cwd=tmp_path / jobs)
            assert done.returncode == 0 and len(rows_of(tmp_path / jobs / f"n{night}.jsonl.zst")) == 8, done.stderr
        rejects = rows_of(tmp_path / jobs / "r1.jsonl.zst")
        assert [row["duplicate_of"] for row in rejects] == [f"n0{i}" for i in range(8)]
    for name in ("n0", "n1", "r0", "r1"):
        assert (tmp_path / "1" / f"{name}.jsonl.zst").read_bytes() == (
            tmp_path / "2" / f"{name}.jsonl.zst"
        ).read_bytes()


def test_an_index_keeps_its_normalisation(llmkit_here, tmp_path: Path) -> None:
    """Behaviour: an index is refused with another normalisation, in one line that names the option; one that records
    none was made with `loose`, and is used with it."""
    import duckdb

    write(tmp_path / "a.jsonl", [exercises(random.Random(1))])
    write(tmp_path / "b.jsonl", [exercises(random.Random(2)), log(random.Random(2))])
    call = ("dedup", "a.jsonl", "--index", "i.duckdb", "-o", "a.jsonl.zst", "--normalise", "loose")
    assert llmkit_here(*call, cwd=tmp_path).returncode == 0
    with duckdb.connect(str(tmp_path / "i.duckdb")) as sql:
        (text,) = sql.execute("SELECT settings FROM llmkit").fetchone() or ("",)
        settings_ = json.loads(text)
        assert settings_.pop("minhash normalise") == "loose" and settings_.pop("shingle") == "words"
        sql.execute("UPDATE llmkit SET settings = ?", [json.dumps(settings_)])  # as a former version wrote it
    later = ("dedup", "b.jsonl", "--index", "i.duckdb", "-o", "b.jsonl.zst")
    done = llmkit_here(*later, cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.count(b"\n") == 2, done.stderr
    assert b"i.duckdb was made with minhash normalise loose" in done.stderr and b"use --normalise loose" in done.stderr
    done = llmkit_here(*later, "--normalise", "loose", "--shingle", "characters", cwd=tmp_path)
    assert done.returncode == 1 and b"shingle words, this call has characters" in done.stderr
    # The run is the one that a former version entered: repeated, it does not meet its own documents.
    (tmp_path / "a.jsonl.zst").unlink()
    assert llmkit_here(*call, cwd=tmp_path).returncode == 0 and len(rows_of(tmp_path / "a.jsonl.zst")) == 1
    every = "numbers,operators,punctuation,whitespace,accents,case"
    done = llmkit_here(*later, "--normalise", every, "--rejects", "r.jsonl", cwd=tmp_path)
    assert done.returncode == 0 and [row["id"] for row in rows_of(tmp_path / "b.jsonl.zst")] == ["b1"], done.stderr
    row = orjson.loads((tmp_path / "r.jsonl").read_bytes())
    assert row["duplicate_of"] == "a0" and "--normalise loose" in row["rule"]


def test_rejects_and_record_tell_the_rule(llmkit_here, tmp_path: Path) -> None:
    """Behaviour: a reject has its rule as options, with which the command gives the same result; the record has them."""
    body = " ".join(prose(60, "rule"))
    write(tmp_path / "d.jsonl", [body, body, body.upper(), f"{body}\n{body}"])

    def rules(*arguments: str) -> tuple[set[str], dict[str, Any]]:
        done = llmkit_here(
            "dedup", "d.jsonl", "-f", "-o", "o.jsonl.zst", "--rejects", "r.jsonl", *arguments, cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr
        record = read_lineage(tmp_path / "o.jsonl.zst")
        assert record is not None
        return {orjson.loads(line)["rule"] for line in (tmp_path / "r.jsonl").read_bytes().splitlines()}, record[
            "options"
        ]

    standard = "--normalise case,accents,whitespace,punctuation --shingle words --ngram 5 --threshold 0.75"
    found, options = rules()
    assert found == {f"--method minhash {standard}"}
    assert (options["normalise"], options["threshold"]) == ("case,accents,whitespace,punctuation", 0.75)
    assert (options["shingle"], options["ngram"]) == ("words", 5)
    before = (tmp_path / "o.jsonl.zst").read_bytes()
    assert rules(*found.pop().split())[0] and (tmp_path / "o.jsonl.zst").read_bytes() == before
    found, options = rules("--preset", "tables", "--ngram", "2")
    assert found == {
        "--method minhash --normalise case,whitespace,punctuation --shingle words --ngram 2 --threshold 0.9"
    }
    assert (options["preset"], options["ngram"], options["threshold"]) == ("tables", 2, 0.9)
    assert rules("--method", "exact")[0] == {"--method exact --normalise none"}
    assert rules("--method", "exact", "--no-counts", "--normalise", "case")[0] == {"--method exact --normalise case"}
    found, options = rules("--method", "exact,minhash")
    assert found == {"--method exact --normalise none", f"--method minhash {standard}"} and "normalise" not in options
    assert rules("--method", "lines")[0] == {"--method lines --normalise whitespace"}
    assert rules("--method", "substring")[0] == {"--method substring --length 50 --unit words"}
    assert rules("--no-verify")[0] == {f"--method minhash {standard.partition(' --threshold')[0]} --no-verify"}


def test_presets(llmkit_here, tmp_path: Path) -> None:
    """Behaviour: prose ignores the marks of Markdown, code tells capitals and brackets apart, tables one cell in a few."""
    words = prose(40, "preset")
    texts = [" ".join(words), " ".join(f"**{word}**" for word in words), " ".join(f"{word}()" for word in words)]
    rows = [f"{name} | {i} | {i * 7}" for i, name in enumerate(prose(15, "cells"))]
    texts += ["\n".join(rows), "\n".join([*rows[:7], rows[7] + "1", *rows[8:]])]
    write(tmp_path / "d.jsonl", texts)
    kept = {}
    for preset in ("prose", "code", "tables", ""):
        more = ("--preset", preset) if preset else ()
        done = llmkit_here("dedup", "d.jsonl", "-f", "-o", "o.jsonl.zst", *more, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        kept[preset] = [int(row["id"][1:]) for row in rows_of(tmp_path / "o.jsonl.zst")]
    assert kept == {"prose": [0, 3], "code": [0, 1, 2, 3, 4], "tables": [0, 1, 3, 4], "": [0, 1, 3]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "pros"], "prose"),
        (["--shingle", "letters"], "words, characters"),
        (["--normalise", "cases"], "case"),
        (["--normalise", "loose,case"], "stands alone"),
        (["--method", "exact", "--preset", "code"], "minhash"),
        (["--method", "substring", "--normalise", "case"], "exact"),
    ],
)
def test_usage_errors(llmkit_here, tmp_path: Path, arguments: list[str], message: str) -> None:
    """Behaviour: exit 2 and a hint, before any output."""
    write(tmp_path / "d.jsonl", ["a"])
    done = llmkit_here("dedup", "d.jsonl", "-o", "out.jsonl", *arguments, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr.decode()
    assert [path.name for path in tmp_path.iterdir()] == ["d.jsonl"]


def test_options_of_former_records(llmkit_here, tmp_path: Path) -> None:
    """Behaviour: a script made from a former record gives options of minhash, at their defaults, to other methods too."""
    write(tmp_path / "d.jsonl", ["a", "a"])
    call = ("dedup", "d.jsonl", "--method", "exact", "--ngram", "5", "--threshold", "0.75", "--plain")
    assert llmkit_here(*call, cwd=tmp_path).returncode == 0


@pytest.mark.parametrize("name", ["same_words_other_numbers", "code_other_operators"])
def test_cases(shared_data: Path, name: str) -> None:
    """Behaviour: the small inputs that were taken for duplicates stay."""
    path = shared_data.parent / "cases" / "documents" / f"{name}.jsonl"
    rows = [orjson.loads(line) for line in path.read_bytes().splitlines()]
    assert deduplicate(rows, near=MinHash())[0] == rows

"""Evaluation items in training text: words, matches, non-matches, cuts, hostile input, and FLAN's copy of GSM8K.

The figures on real data are properties: at least 99 % of the copies found, at most 0.1 % of unrelated documents flagged.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packed import files_of, rows_of

from llmkit.corpus.decontaminate import Item, ItemIndex, build_index, load_index, parts_of
from llmkit.corpus.filters import FILTERS, Check
from llmkit.corpus.kernels.item_ngrams import as_bytes, words_of
from llmkit.corpus.page import Page
from llmkit.corpus.words import SPLITTERS
from llmkit.errors import LlmkitError, UsageError

QUESTION = (
    "Nora's 3 hens lay 48 eggs a month, and her 5 ducks half as many; how many eggs does she get from both in a year?"
)
SOLUTION = "The ducks lay 48/2 = <<48/2=24>>24 eggs, both together 48+24 = <<48+24=72>>72 a month, so 72*12 = <<72*12=864>>864 a year."
FILLER = " ".join(f"filler{i}" for i in range(60))


def one(*texts: str) -> ItemIndex:
    """An index of one item with these parts."""
    return build_index([Item("set", "1", list(parts_of(dict(enumerate(texts)))))])


def share(index: ItemIndex, text: str) -> float:
    return index.find(text, None).share


def distinct(count: int, name: str = "w") -> list[str]:
    return [f"{name}{i}" for i in range(count)]


def write(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# ---- words


SAME = [
    ("Café, twelve!", "CAFE\u0301   twelve"),
    ("48/2=24", "48 / 2 = 24"),
    ("٣ hens", "3 hens"),
    ("a-b_c", "a b c"),
    ("日本語", "日 本 語"),
    ("ไทย๓", "ไ ท ย 3"),
    ("İstanbul", "istanbul"),
]


@pytest.mark.parametrize(("one_text", "other"), SAME)
def test_same_words(one_text: str, other: str) -> None:
    """Behaviour: case, marks, diacritics, spacing and the script of digits are ignored."""
    assert words_of(as_bytes(one_text))[0].tolist() == words_of(as_bytes(other))[0].tolist()


@pytest.mark.parametrize(("one_text", "other"), [("5 hens", "6 hens"), ("1,000", "1000"), ("ab c", "a bc"), ("я", "r")])
def test_different_words(one_text: str, other: str) -> None:
    """Behaviour: different numbers differ, and so do words that join to the same letters."""
    assert words_of(as_bytes(one_text))[0].tolist() != words_of(as_bytes(other))[0].tolist()


ALPHABETS = st.text(st.sampled_from("aZé9 .-\n٣µßя\u0301İ語กิｱ\ud800\U0001f642\U00020000"), max_size=40)


@settings(max_examples=300, deadline=None)
@given(st.one_of(ALPHABETS, st.text(max_size=40)))
def test_words_match_plain_python(text: str) -> None:
    """Parity with `unicodedata`: words contain every letter, digit and mark of the text, and nothing else, in order."""
    _, starts, ends = words_of(as_bytes(text))
    data = text.encode("utf-8", "surrogatepass")
    found = [data[start:end].decode("utf-8", "surrogatepass") for start, end in zip(starts, ends, strict=True)]

    def letters(piece: str) -> str:
        return "".join(c for c in piece if c.isalnum() or unicodedata.category(c) == "Mc")

    assert letters("".join(found)) == letters(text)
    assert all(letters(word) for word in found)
    outside = {"Mn", "Mc"}
    assert all(c.isalnum() or unicodedata.category(c) in outside for word in found for c in word)


# ---- matches


def test_question_and_solution_are_found_separately() -> None:
    """Behaviour: in any surrounding text, with other spacing and case, and without the calculator annotations."""
    index = one(QUESTION, SOLUTION)
    plain = "the ducks lay 48 / 2 = 24 eggs, both together 48 + 24 = 72 a month, so 72 * 12 = 864 a year."
    for text in (QUESTION.upper(), plain):
        found = index.find(f"{FILLER}\n{text}\n{FILLER}", 0.99).matches
        assert [(m.set, m.item, m.share) for m in found] == [("set", "1", 1.0)]
    assert index.find(FILLER, 0.01).matches == []


def test_share_counts_n_grams() -> None:
    """Property: w of 30 consecutive words give w - 4 of 26 5-grams; of two windows the larger share counts."""
    words = distinct(30)
    index = one(" ".join(words))
    for count in (8, 13, 29, 30):
        text = f"{FILLER} {' '.join(words[:count])} {FILLER}"
        assert share(index, text) == pytest.approx((count - 4) / 26)
    assert share(index, " ".join([*words[:10], *distinct(100, "x"), *words[10:]])) == pytest.approx(16 / 26)


def test_fewer_words_than_min_words_do_not_match() -> None:
    """Behaviour: 7 consecutive words of an item do not match, even if they are most of it; nor do items of 7 words."""
    words = distinct(9)
    assert share(one(" ".join(words)), " ".join(words[:7])) == 0
    assert share(one(" ".join(words)), " ".join(words[:8])) == pytest.approx(4 / 5)
    assert share(one(" ".join(words[:7])), " ".join(words)) == 0
    assert share(one("一二三四五六七八"), "〇一二三四五六七八九") == 1  # eight characters are eight words


def test_numbers_count_as_words() -> None:
    """Property: a changed number, like a changed word, breaks the 5-grams that contain it: 5 of 26."""
    words = distinct(30)
    words[10] = "48"
    for changed in ("49", "4.8", "forty"):
        assert share(one(" ".join(words)), " ".join([*words[:10], changed, *words[11:]])) == pytest.approx(21 / 26)


def test_shared_n_grams_weigh_little() -> None:
    """Property: an n-gram of k items weighs 1/k, or 0 for k > 32; an instruction alone matches none of its items."""
    template = "Read the claim below and say whether common sense supports it"
    for count in (8, 40):
        items = [Item("set", str(i), [[f"{template} {' '.join(distinct(10, f'item{i}x'))}"]]) for i in range(count)]
        index = build_index(items)
        light = 7 / count if count <= 32 else 0  # 11 words: 7 n-grams; then 4 + 6 of the item alone
        assert share(index, template) == pytest.approx(light / (10 + light), abs=1e-9)
        assert share(index, items[3].parts[0][0]) == pytest.approx(1)
    alone = build_index([Item("set", str(i), [[template], [" ".join(distinct(20, f"i{i}x"))]]) for i in range(8)])
    assert share(alone, template) == 0


def test_lists_of_texts_are_one_part_and_need_not_be_joined() -> None:
    """Behaviour: choices are found even with letters printed between them."""
    choices = [" ".join(distinct(7, name)) for name in "abcd"]
    index = build_index([Item("set", "1", [choices])])
    assert share(index, f"A. {choices[0]} B. {choices[1]} C. {choices[2]} D. {choices[3]}") == pytest.approx(1)


def test_items_are_read_from_any_rows(tmp_path: Path) -> None:
    """Behaviour: questions, messages, nested choices; named by id or line; `fields` selects; equal file names differ."""
    text = {name: " ".join(distinct(12, name)) for name in "abcdef"}
    rows = [
        {"id": "x7", "question": text["a"], "answer": text["b"], "n": 3, "none": None},
        {"messages": [{"role": "user", "content": text["c"]}, {"role": "assistant", "content": text["d"]}]},
        {"choices": {"text": [text["e"][:30], text["e"][30:]], "label": ["A", "B"]}, "query": text["f"]},
    ]
    (tmp_path / "other").mkdir()
    path = write(tmp_path / "eval.jsonl", *rows)
    index = load_index((path,))
    found = {name: [m.item for m in index.find(text[name], 0.5).matches] for name in "abcdf"}
    assert found == {"a": ["x7"], "b": ["x7"], "c": ["2"], "d": ["2"], "f": ["3"]}
    only = load_index((path,), ("answer", "query", "messages"))
    assert [bool(only.find(text[name], 0.5).matches) for name in "abc"] == [False, True, True]
    both = load_index((path, write(tmp_path / "other" / "eval.jsonl", {"text": "y " + " ".join(distinct(9, "z"))})))
    assert {name for name, _ in both.items} == {f"{tmp_path.name}/eval", "other/eval"}


# ---- the filter


def judge(text: str, **settings: object) -> tuple[list[Check], Page]:
    page = Page(text, SPLITTERS.get("unicode"))
    return list(FILTERS.get("decontaminate")(**settings)(page)), page


@pytest.fixture
def items(tmp_path: Path) -> tuple[str, ...]:
    return (write(tmp_path / "gsm.jsonl", {"question": QUESTION, "answer": SOLUTION}),)


def test_drop(items: tuple[str, ...]) -> None:
    """Behaviour: the share is a statistic, the item is the value; None switches the rule off."""
    checks, page = judge(f"{FILLER} {QUESTION}", files=items)
    assert checks == [Check("contaminated", 1.0, False, "contaminated_share"), Check("contaminated", "gsm:1", True)]
    assert page.notes == {}
    assert judge(FILLER, files=items)[0][-1] == Check("contaminated", None, False)
    off, _ = judge(QUESTION, files=items, min_share=None)
    assert [(check.value, check.broken) for check in off] == [(1.0, False), (None, False)]


def test_annotate(items: tuple[str, ...]) -> None:
    """Behaviour: the document is unchanged, and each item is listed once."""
    text = f"{QUESTION} {FILLER} {QUESTION}"
    checks, page = judge(text, files=items, action="annotate")
    assert (checks[-1].broken, page.text) == (False, text)
    assert page.notes == {"contamination": [{"set": "gsm", "item": "1", "share": 1.0}]}


def test_cut(items: tuple[str, ...]) -> None:
    """Behaviour: each copy is cut with the marks after it, also with changed words at its ends and after multi-byte text."""
    before, after = "Überall 🙂 “quoted” " + FILLER + ".\n", "\nÉnd " + FILLER
    changed = QUESTION.replace("Nora's", "Cora's").replace("year?", "decade?")
    for text in (QUESTION, changed):
        checks, page = judge(before + text + after + "\n" + text + "!?", files=items, action="cut")
        assert page.text == before + after + "\n"
        assert not checks[-1].broken
    assert judge(f"Short. {QUESTION}", files=items, action="cut")[0][-1] == Check("contaminated", "gsm:1", True)
    checks, page = judge(f"Short. {QUESTION}", files=items, action="cut", min_words_left=None)
    assert (page.text, checks[-1].broken) == ("Short. ", False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"action": "burn"}, "action: 'burn'"),
        ({"min_share": 0}, "min_share: 0 is not a share"),
        ({"n": 9}, "n: 9 and min_words: 8"),
        ({}, "files names no evaluation items"),
        ({"files": ("-",)}, "stdin"),
    ],
)
def test_wrong_settings(settings: dict[str, object], message: str) -> None:
    """Behaviour: the error names the setting."""
    with pytest.raises(UsageError, match=message):
        judge("text", **settings)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "e.jsonl: no evaluation item"),
        (b'{"question": "too short"}\n{"n": 5}\n', "e.jsonl: no evaluation item"),
        (b'{"text": "fine"}\n{oops\n', r"e.jsonl:2: invalid JSON"),
        (b'{"text": "fine"}\n["list"]\n', r"e.jsonl:2: not a JSON object"),
        (b'{"text": "\xff"}\n', r"e.jsonl:1: invalid UTF-8"),
        (b"\x28\xb5\x2f\xfd\x00\x00", r"e.jsonl: "),
    ],
)
def test_bad_files(tmp_path: Path, content: bytes, message: str) -> None:
    """Behaviour: the error names file and line; an index never silently finds nothing."""
    (tmp_path / "e.jsonl").write_bytes(content)
    with pytest.raises(LlmkitError, match=message):
        load_index((str(tmp_path / "e.jsonl"),))
    with pytest.raises(LlmkitError, match="absent"):
        load_index((str(tmp_path / "absent.jsonl"),))


def test_a_row_without_the_chosen_fields(tmp_path: Path) -> None:
    """Behaviour: the error names the line and the fields of the row."""
    path = write(tmp_path / "e.jsonl", {"question": QUESTION}, {"prompt": QUESTION})
    with pytest.raises(LlmkitError, match=r"e.jsonl:2: none of the fields question") as error:
        load_index((path,), ("question",))
    assert "'prompt'" in error.value.hint


# ---- hostile input


def test_hostile_texts() -> None:
    """Behaviour: a word of 10 MB, and 1 MB of one word, the item's words, or marks: seconds, and no false match."""
    words = QUESTION.split()
    index = one(QUESTION, " ".join(["the"] * 300), "and of the to be in it is that he was for on are as with")
    index.find(QUESTION, 0.5)  # compiled
    turn = " ".join(words[:9]) + " "
    begin = time.process_time()
    assert index.find("x" * 10_000_000, 0.5).matches == []
    assert index.find("the " * 250_000, 0.5).matches == []  # one repeated n-gram is not a match
    assert index.find("\u0301!" * 300_000, 0.5).matches == []
    assert index.find("語" * 300_000, 0.5).matches == []
    assert index.find(turn * (1_000_000 // len(turn)), 0.5).matches == []
    assert len(index.find((QUESTION + " x ") * 5000, 0.5).matches) >= 1
    assert time.process_time() - begin < 10


def test_long_documents_are_matched_in_blocks() -> None:
    """Property: an item is found at its position anywhere in a text of 600,000 words, however often it occurs."""
    index = one(QUESTION)
    filler = [f"w{i % 1000}" for i in range(600_000)]
    for place in (0, (1 << 18) - 5, 1 << 18, 599_999):
        text = " ".join([*filler[:place], QUESTION, *filler[place:]])
        (match,) = index.find(text, 0.5).matches
        assert text[match.start : match.end] == QUESTION.rstrip("?")


def test_items_of_stop_words_match_only_themselves() -> None:
    """Behaviour: common words match only in the order of the item."""
    stop = "and of the to be in it is that he was for on are as with".split()
    index = one(" ".join(stop))
    random.seed(1)
    prose = " ".join(random.choices(stop, k=20_000))
    assert share(index, prose) < 0.5
    assert share(index, " ".join(stop)) == 1


def test_deep_and_odd_rows(tmp_path: Path) -> None:
    """Behaviour: JSON nested 500 levels deep and empty objects are accepted."""
    deep: object = "deep"
    for _ in range(500):
        deep = [deep, {"x": deep}] if deep == "deep" else [deep]
    path = tmp_path / "e.jsonl"
    path.write_bytes(b"{}\n" + json.dumps({"deep": deep, "text": QUESTION}).encode() + b"\n")
    assert share(load_index((str(path),)), QUESTION) == 1


def test_result_depends_neither_on_order_nor_on_compilation() -> None:
    """Property: neither the order of the items nor compilation of the kernels changes the result."""
    parts = [[[QUESTION]], [[SOLUTION]], [[QUESTION + " " + SOLUTION]], [[" ".join(distinct(40))]]]
    made = [Item("set", str(i), part) for i, part in enumerate(parts)]
    text = f"É {QUESTION} {FILLER} {SOLUTION} {' '.join(distinct(25))} 語"
    there, back = build_index(made).find(text, 0.3), build_index(made[::-1]).find(text, 0.3)
    assert there == back
    assert len(there.matches) >= 4
    script = (
        "import sys, warnings; warnings.simplefilter('error')\n"
        "from llmkit.corpus.decontaminate import Item, build_index\n"
        f"print(repr(build_index([Item(*row) for row in {[tuple(item) for item in made]!r}]).find({text!r}, 0.3)))"
    )
    environment = os.environ | {"NUMBA_DISABLE_JIT": "1", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, env=environment, timeout=120)
    assert done.stdout.decode().strip() == repr(there), done.stderr.decode()


# ---- real data


def flan(shared_data: Path) -> dict[str, list[str]]:
    """FLAN's chain-of-thought tasks, each question, reasoning and answer as one document."""
    tasks = {}
    for name, data in files_of(shared_data / "instruct" / "flan_cot_tsv.tar.zst").items():
        rows = [line.replace("\\n", "\n").split("\t") for line in data.decode().split("\n") if line]
        tasks[name] = [f"{row[0]}\n{row[2]}\n{row[1]}" for row in rows]
    return tasks


def held_out(text: str) -> bool:
    """Whether a text is in the half, by hash of letters and digits, that was not used to set the default threshold."""
    return hashlib.sha256(letters(text).encode()).digest()[0] & 1 == 1


def letters(text: str) -> str:
    return "".join(filter(str.isalnum, text.lower()))


@pytest.fixture(scope="module")
def gsm8k(shared_data: Path) -> ItemIndex:
    return load_index((str(shared_data / "bench" / "gsm8k_train.jsonl.zst"),))


def test_copies_of_gsm8k_are_found(shared_data: Path, gsm8k: ItemIndex) -> None:
    """Property: at least 99 % of FLAN's rewritten GSM8K rows, complete or the reasoning alone, match the right item."""
    min_share = FILTERS.get("decontaminate")().min_share
    rows = enumerate(rows_of(shared_data / "bench" / "gsm8k_train.jsonl.zst"), 1)
    right = {letters(row["question"]): str(i) for i, row in rows}
    documents = [text.split("\n", 1) for text in flan(shared_data)["gsm8k_train.tsv"]]
    held = [(question, rest) for question, rest in documents if held_out(question)]
    assert len(held) > 3500
    named = reasoning = 0
    for question, rest in held:
        named += right[letters(question)] in {
            match.item for match in gsm8k.find(f"{question}\n{rest}", min_share).matches
        }
        reasoning += right[letters(question)] in {match.item for match in gsm8k.find(rest, min_share).matches}
    assert named >= 0.99 * len(held)
    assert reasoning >= 0.99 * len(held)


def test_unrelated_documents_are_kept(shared_data: Path, gsm8k: ItemIndex) -> None:
    """Property: at most 0.1 % of documents without a GSM8K item, a fifth of them mathematics, are flagged."""
    min_share = FILTERS.get("decontaminate")().min_share
    documents = [text for name, texts in flan(shared_data).items() if name != "gsm8k_train.tsv" for text in texts]
    for name in ("bench/svamp_test", "bench/mmlu", "bench/basic_arithmetic", "instruct/dolly15k_from_docx"):
        documents += ["\n".join(map(str, row.values())) for row in rows_of(shared_data / f"{name}.jsonl.zst")]
    negatives = [text for text in documents if held_out(text)]
    assert len(negatives) > 10_000
    flagged = [text for text in negatives if gsm8k.find(text, min_share).matches]
    assert len(flagged) <= 0.001 * len(negatives), flagged[:3]

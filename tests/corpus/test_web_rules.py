"""RefinedWeb's, TxT360's and Dolma's rules, on texts whose statistics are computed by hand.

Dolma's values and decisions are compared with dolma itself on real documents by tests/bench/dolma_parity.py.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from statistics import median

import pytest
from chains import chain_of, reason_of
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.corpus.chain import FilterDecision
from llmkit.corpus.chain_loader import load_chain
from llmkit.corpus.filters.dolma import Dolma
from llmkit.corpus.page import Page
from llmkit.corpus.words import splitter

pytest.importorskip("re2", reason="google-re2 is not installed")

LINE = "This is a line of the text that stays as it is."  # 11 words


def judge(name: str, text: str, **thresholds: object) -> FilterDecision:
    return chain_of(name, **thresholds).judge(text)


def reason(name: str, text: str, **thresholds: object) -> tuple[str, object]:
    return reason_of(chain_of(name, **thresholds), text)


def lines_left(name: str, lines: list[str], **thresholds: object) -> list[str]:
    """The remaining text of lines between two good ones."""
    verdict = judge(name, "\n".join([LINE, *lines, LINE]), max_removed_words="off", **thresholds)
    assert verdict.drop is None
    first, *left, last = verdict.text.split("\n")
    assert first == last == LINE
    return left


@pytest.mark.parametrize(
    ("line", "left"),
    [
        ("A TITLE THAT IS ALL IN CAPITALS", None),
        ("NASA and ESA met in Paris", "NASA and ESA met in Paris"),
        ("NASA ESA EU in UK", None),  # 11 of 13
        ("AB cd", "AB cd"),  # exactly half
        ("1,234.56 - 99 %", None),
        ("$ 12", None),
        ("12 of them", "12 of them"),
        ("2024-01-02 10:30", None),
        ("3 likes", None),
        ("1.2k Followers", None),
        ("3 likely cases", "3 likely cases"),
        ("Word", None),
        ("two words", "two words"),
        ("Sign in", None),
        ("Sign-in to comment on this", "to comment on this"),
        ("Signing a treaty is hard", "Signing a treaty is hard"),
        ("They sign in ink", "They sign in ink"),
        ("The cat sat on the mat. Read more...", "The cat sat on the mat."),
        ("People who read more books", "People who read more books"),
        ("You have 2 items in cart now", "You have  now"),
        ("This line has more than ten words so that nothing is cut, read more", "This line has more than ten words so that nothing is cut, read more"),
        ("", ""),
        ("Ein Satz mit Ümlaut und Straße", "Ein Satz mit Ümlaut und Straße"),
    ],
)  # fmt: skip
def test_refinedweb_lines(line: str, left: str | None) -> None:
    """Behaviour: the treatment of one line among good ones."""
    assert lines_left("refinedweb", [line]) == ([] if left is None else [left])


def test_refinedweb_share_of_removed_words() -> None:
    """Parity with the paper: over 5 % of removed words drop the document, including words of cut phrases."""
    body = "\n".join(["word " * 9 + "end."] * 19)  # 190 words
    assert reason("refinedweb", body + "\nONE TWO THREE FOUR FIVE SIX SEVEN EIGHT NINE TEN") == ("", None)
    assert reason("refinedweb", body + "\nA B C D E F G H I J K") == ("too_many_removed_words", 11 / 201)
    assert reason("refinedweb", "a b c. Read more\n" + "x y " * 10) == ("too_many_removed_words", 2 / 25)
    assert judge("refinedweb", body).text == body
    assert judge("refinedweb", body + "\n").text == body + "\n"  # unchanged, including the last newline
    assert reason("refinedweb", "") == ("", None)


def test_refinedweb_rules_are_settings() -> None:
    """Behaviour: every rule can be switched off or given the words of another language."""
    lines = [
        "TITLE IN CAPITALS",
        "12.5",
        "3 likes",
        "word",
        "Sign in now please",
        "Text here. Read more",
        "2 items in cart now",
    ]
    off = {"max_uppercase": "off", "drop_numbers": "false", "counted": "", "max_single_words": "off"}
    assert lines_left("refinedweb", lines, **off, starts="", ends="", anywhere="") == lines
    german = lines_left(
        "refinedweb",
        ["5 Kommentare", "Hier steht etwas. Weiterlesen", "3 likes"],
        counted="Kommentare",
        ends="Weiterlesen",
    )
    assert german == ["Hier steht etwas.", "3 likes"]  # fmt: skip


@pytest.mark.parametrize(
    ("line", "kept"),
    [
        ("Please enable JavaScript to go on with this", False),
        ("We wrote it in JavaScript last year", True),
        ("ALL CAPITALS 12!", False),
        ("12 345", False),
        ("12 345 and", True),
        ("7 Likes", False),
        ("7 comments", True),
        ("Word", False),
        ("No end mark here", True),
        ("", True),
    ],
)
def test_txt360_lines(line: str, kept: bool) -> None:
    """Parity with the published rules: the treatment of one line among good ones."""
    assert lines_left("txt360", [line], min_sentences="off") == ([line] if kept else [])


def test_txt360_documents() -> None:
    """Parity with the published thresholds: 5 % of the words (without JavaScript notices), 3 sentences, lorem ipsum."""
    body = "\n".join(["word " * 9 + "end."] * 19)  # 190 words
    assert reason("txt360", body + "\n" + "\n".join(["Word"] * 10)) == ("", None)
    assert reason("txt360", body + "\n" + "\n".join(["Word"] * 11)) == ("too_many_removed_words", 11 / 201)
    assert reason("txt360", body + "\n" + "\n".join(["Enable javascript in your browser now"] * 11)) == ("", None)
    assert reason("txt360", "One here. Two here.") == ("too_few_sentences", 2)
    assert reason("txt360", "One here. Two here. Three here.") == ("", None)
    assert reason("txt360", body + "\nLorem Ipsum is here.") == ("lorem_ipsum", 1)
    assert reason("txt360", body + " {}") == ("", None)
    assert reason("txt360", body + " {}", max_curly_brackets=0.0001)[0] == "curly_brackets"
    assert reason("txt360", "") == ("too_few_sentences", 0)
    assert judge("txt360", body + "\n").text == body + "\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Some { bracket.", ("curly_bracket", 1)),
        ("Some Lorem IPSUM text.", ("lorem_ipsum", 1)),
        ("About JavaScripts.", ("javascript", 1)),
        ("All is well here.", ("", None)),
    ],
)
def test_dolma_c4_documents(text: str, expected: tuple[str, object]) -> None:
    """Parity with the tagger c4_v2: rules that drop the document."""
    assert reason("dolma_c4", text) == expected


def test_dolma_c4_lines() -> None:
    """Parity with c4_v2 and the mixer: a line is removed with its newline; dots are an end mark, ' is not."""
    text = "One two three.\n\nNo end mark here\nTwo words.\nIt ends with dots...\nHe said 'yes indeed'\nShe said \"no way\"  \nLast one is cut"
    assert judge("dolma_c4", text).text == 'One two three.\nIt ends with dots...\nShe said "no way"  \n'
    assert judge("dolma_c4", text, require_end_mark="false").text.startswith(
        "One two three.\nNo end mark here\nIt ends"
    )
    assert judge("dolma_c4", "Two words.\nlast", min_words_per_line="off").text == "Two words.\n"
    assert judge("dolma_c4", "").text == ""


STOPS = "the of "


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the " * 49, ("min_words", 49)),
        ("", ("min_words", 0)),
        ("of a " * 30, ("min_median_word_length", 1.5)),
        (STOPS + "abcdefghijk " * 50, ("max_median_word_length", 11.0)),
        (STOPS + "a" * 300 + " " + "b" * 400 + " " + " ".join(["c" * 600] * 57), ("max_median_word_length", 600.0)),
        (STOPS + "##a... " * 6 + "abcde " * 45 + "… " * 3, ("max_symbol_words", 9 / 56)),
        (STOPS + "abcde " * 38 + "12345 " * 11, ("min_alpha_words", 40 / 51)),
        ("The OF " + "abcde " * 50, ("min_stop_words", 0)),
        ("the " + "abcde " * 50, ("min_stop_words", 1)),
        ("\n".join(["-the abcde of jklmn abcdef"] * 19 + ["x"]), ("max_bullet_lines", 0.95)),
        (
            "\n\n".join(["the abcde efghi of xy jklmn…", "the abcde efghi of xy jklmn"] * 10),
            ("max_ellipsis_lines", 0.5),
        ),
        (
            "\n".join(["the abcde efghi jklmn x"] * 4 + [f"the abcde efghi jklmn {i}" for i in range(8)]),
            ("dup_line_frac", 4 / 12),
        ),
    ],
)
def test_dolma_reasons(text: str, expected: tuple[str, object]) -> None:
    """Parity with dolma's definitions: first failing rule and its value."""
    got = reason("dolma", text)
    assert got[0] == expected[0]
    assert got[1] == pytest.approx(expected[1])


def dolma_by_hand(text: str, empty_lines: bool) -> list[float]:
    """Every value of the filter, in order, by straightforward definitions."""
    words = text.split()
    size = max(1, sum(map(len, words)))
    lines = text.split("\n") if empty_lines else re.split(r"\n+", text)
    copies = {line: count for line, count in Counter(lines).items() if count > 1}
    middle = median(map(len, words)) if words else 0.0
    stops = sum(word in Dolma().stop_words for word in words)
    values = [len(words)] * 2 + [middle] * 2
    values += [sum("#" in word or "…" in word for word in words) / max(1, len(words))]
    values += [sum(any(map(str.isalpha, word)) for word in words) / max(1, len(words)), stops]
    values += [sum(line.startswith(("*", "-")) for line in lines) / len(lines)]
    values += [sum(line.endswith("…") for line in lines) / len(lines), sum(copies.values()) / len(lines)]
    values += [sum(len(line) * count for line, count in copies.items()) / size]
    for n in range(2, 11):
        counts = Counter(zip(*(words[i:] for i in range(n)), strict=False))
        if not counts:
            values.append(0.0)
        elif n <= 4:
            ngram, count = counts.most_common(1)[0]
            values.append(count * len("".join(ngram)) / size)
        else:
            sizes = {ngram: count * len("".join(ngram)) for ngram, count in counts.items()}
            values.append(sum(sizes[ngram] for ngram, count in counts.items() if count > 1) / sum(sizes.values()))
    return values


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.sampled_from(["the", "of", "a", "ab", "#x", "…", "é1", "\n", "\n", "\n\n", "*", "-", " ", "\u2003", "x" * 300, "東京"]), max_size=60),
    st.booleans(),
)  # fmt: skip
def test_dolma_values(parts: list[str], empty_lines: bool) -> None:
    """Property: every value equals that of the definition, for texts with many repeats."""
    text = " ".join(parts).replace(" \n ", "\n")
    checks = list(Dolma(empty_lines=empty_lines)(Page(text, splitter("unicode"))))
    assert [float(check.value) for check in checks] == pytest.approx(dolma_by_hand(text, empty_lines))  # type: ignore[arg-type]


def test_presets_run() -> None:
    """Behaviour: prose passes each preset for web text, a menu does not, and lines are edited before document rules."""
    prose = "\n".join([
        "The old mill by the river had been empty for thirty years when a baker from the next village bought it.",
        "She wanted to grind her own flour, and nobody could tell her that this was a bad idea.",
        "First the roof was mended, because rain had come in wherever tiles were missing.",
        "Then two carpenters took the great wheel apart, piece by piece, numbering each board with chalk.",
        "Half of the oak turned out to be sound; the rest they cut anew from trees that fell in a storm.",
        "In spring, water ran through the channel again, and children came to watch it turn.",
        "It took another month until the stones were dressed, a craft that only one man nearby still knew.",
        "He was eighty and glad to have an audience while he worked.",
        "Today visitors can buy bread that is made within sight of where its grain becomes flour.",
        "On Sundays there is a queue, so be early if you like the dark loaf with walnuts.",
    ])  # fmt: skip
    for name in ("refinedweb", "txt360", "dolma"):
        chain = load_chain([name], [], [], "whitespace")
        assert chain.judge(prose).drop is None, name
        assert chain.judge("Home\nAbout us\nContact\n" * 30).drop is not None, name
    assert load_chain(["dolma"], [], [], "whitespace").judge(prose + "\nno end mark").text == prose + "\n"


@pytest.mark.parametrize(
    "text",
    ["x" * 1_000_000, "\n" * 1_000_000, " " * 1_000_000, "1" + " " * 1_000_000, "A\n" * 500_000, "read more " * 100_000, "3 likes\n" * 100_000,
     "#" * 1_000_000, "… " * 300_000, "javascript enable\n" * 50_000, "1," * 500_000, "sign in\n" * 100_000],
    ids=["letters", "newlines", "spaces", "number", "lines", "phrase", "counters", "hashes", "ellipses", "javascript", "digits", "sign in"],
)  # fmt: skip
def test_hostile_texts_take_linear_time(text: str) -> None:
    """Behaviour: a megabyte of one pattern takes every filter seconds (0.6 s when measured)."""
    start = time.process_time()
    for name in ("refinedweb", "txt360", "dolma", "dolma_c4"):
        chain_of(name).measure(Page(text, splitter("unicode")))
    assert time.process_time() - start < 20

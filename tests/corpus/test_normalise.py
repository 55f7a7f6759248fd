"""Normalisations for deduplication."""

from __future__ import annotations

import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmkit.corpus.dedup.normalise import DEFAULT, comparable, name_of, normaliser, parts_of, symbols
from llmkit.errors import UsageError

loose, single_spaces = normaliser("loose"), normaliser("whitespace")


@pytest.mark.parametrize(
    ("text", "normalised"),
    [
        ("Hello, World!", "hello world"),
        (
            "It’s 3.14 or 1,000 or 1,000,000",
            "it s 0 or 0 or 0 0",
        ),  # one decimal part per number, the remainder is another number
        ("v1.2.3", "v0 0"),
        ("٣٫١٤ and १२३", "0 and 0"),
        ("Café Ångström naïve", "cafe angstrom naive"),
        ("e\u0301a \u0301 b", "ea b"),
        ("a_b-c/d", "a b c d"),
        ("日本語。文", "日本語 文"),
        ("１２ and １", "0 and 0"),  # full-width digits are digits first
        ("  a\t\n\x00b\u00a0c  ", "a b c"),
        ("ΣΊΣΥΦΟΣ", "σισυφος"),
        ("!!! ...", ""),
        ("", ""),
    ],
)
def test_loose(text: str, normalised: str) -> None:
    """Parity with the definition: lower case, numbers, punctuation, diacritics, spaces, in this order."""
    assert loose(text) == normalised


@given(st.text())
def test_loose_gives_words_between_single_spaces(text: str) -> None:
    """Property: no double, leading or trailing space, no ASCII capital; whitespace and ASCII case do not matter."""
    out = loose(text)
    assert out == " ".join(out.split())
    assert not any("A" <= c <= "Z" for c in out)
    assert loose("\n " + "  ".join(text.split(" ")) + "\t") == out


@given(st.text())
def test_single_spaces(text: str) -> None:
    """Property: words as `str.split` sees them, idempotent."""
    assert single_spaces(text).split() == text.split()
    assert single_spaces(single_spaces(text)) == single_spaces(text)


# Text, and what datatrove 0.10.1 makes of it by default.
DATATROVE = [
    ("Tom has 3.14 apples, 1,000 pears & 7% more!", "tom has 0 apples 0 pears 0 more"),
    ("v1.2.3 ≠ ٣٫١٤", "v0 0 = 0"),
    ("Ünïcode — “quotes” … a+b*c/d=e", "unicode quotes a b c d e"),
    ("日本語。１２ ％ ～", "日本語 0"),
    ("def f(x): return x ** -2  # note\n\tpass", "def f x return x 0 note pass"),
    ("ΣΊΣΥΦΟΣ İstanbul", "σισυφος istanbul"),
    ("a_b-c  \x00 d\xa0e", "a b c d e"),
]
PARTS = ["case", "accents", "whitespace", "punctuation", "operators", "numbers"]
DIFFERENCES = {
    "case": ("Some Words", "some words"),
    "accents": ("café", "cafe"),
    "whitespace": (" two\n\twords ", "two words"),
    "punctuation": ("(yes); no!", " yes   no "),
    "operators": ("a+b=c", "a b c"),
    "numbers": ("3.14 and 1,000", "7 and ٣"),
}


@pytest.mark.parametrize("part", PARTS)
def test_each_part_makes_its_difference_equal_and_no_other(part: str) -> None:
    """Property: a part alone makes equal exactly what its name says; all the others together do not."""
    others = ",".join(name for name in PARTS if name != part)
    for name, (one, other) in DIFFERENCES.items():
        assert (normaliser(part)(one) == normaliser(part)(other)) == (name == part)
    one, other = DIFFERENCES[part]
    assert normaliser(others)(one) != normaliser(others)(other) or part == "whitespace"
    assert normaliser("loose")(one) == normaliser("loose")(other)


@given(
    st.sets(st.sampled_from(PARTS)),
    st.text() | st.lists(st.sampled_from(["a", "É", "1.5", " ", "\n", "+", "(", "≠", "x_y"])).map("".join),
)
def test_normalisation_is_idempotent(parts: set[str], text: str) -> None:
    """Property: what is normalised already stays as it is, except that letters without accents may form new pairs."""
    how = ",".join(parts) or "none"
    once = normaliser(how)(text)
    assert normaliser(how)(once) == once or not text.isascii()


@pytest.mark.parametrize(
    ("text", "how", "comparable_text"),
    [
        ("a+b", DEFAULT, "a +b"),
        ("a  + -\nb", DEFAULT, "a +-b"),
        ("x == -1.50, y != 2", DEFAULT, "x ==-1.50 y =2"),
        ("f(x)[0]", DEFAULT, "f x 0"),
        ("f(x)[0]", "whitespace", "f (x )[0 ]"),
        ("v1.2.3", "whitespace", "v1.2 .3"),
        ("well-known — “it’s”", DEFAULT, "well -known it s"),
        ("a ≠ b", DEFAULT, "a ≠b"),
        ("a ≠ b", "loose", "a = b"),
        ("Σίσυφος Σ", DEFAULT, "σισυφος σ"),
        ("a + b", "case", "a + b"),
    ],
)
def test_marks_that_count_precede_the_next_word(text: str, how: str, comparable_text: str) -> None:
    """Behaviour: spaces around marks make no difference, numbers keep their decimals, symbols are not decomposed."""
    assert comparable(how)(text) == comparable_text


@given(st.text())
def test_marks_do_not_add_words(text: str) -> None:
    """Property: without digits and mathematical symbols, a text has as many words as if its marks did not count."""
    text = "".join(c for c in text if not c.isdecimal() and c not in symbols()) + " end"
    assert len(comparable(DEFAULT)(text).split()) == len(
        normaliser("case,accents,whitespace,punctuation,operators")(text).split()
    )


def test_symbols() -> None:
    """Parity with Unicode's category Sm: every one is in the ranges that are looked through."""
    assert symbols() == {c for c in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(c) == "Sm"}


def test_names() -> None:
    """Behaviour: the values of --normalise; equal parts have one name."""
    assert name_of(parts_of("numbers, case")) == "case,numbers"
    assert name_of(parts_of(",".join(reversed(PARTS)))) == "loose" and name_of(parts_of("none")) == "none"
    for wrong in ("lose", "case,none", "", "case,,numbers"):
        with pytest.raises(UsageError) as caught:
            normaliser(wrong)
        assert "loose" in caught.value.hint or "case" in caught.value.hint


def test_loose_is_datatroves_default() -> None:
    """Parity with datatrove 0.10.1, `simplify_text` with its default TextNormConfig; the results were taken from there."""
    for text, simplified in DATATROVE:
        assert loose(text) == simplified.strip()

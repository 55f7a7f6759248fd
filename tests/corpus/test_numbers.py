"""Deduplication never takes texts for equal that differ in the value of a number or in a sign of their script."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rows import texts_to_rows
from test_dedup import deduplicate
from test_minhash_kernels import compiled

from llmkit.corpus.dedup.minhash import MinHash
from llmkit.corpus.dedup.normalise import DEFAULT, comparable, normaliser

FORM = comparable(DEFAULT)
TABLES = "case,whitespace,punctuation"  # of the preset
DIGITS = st.sampled_from(["1", "5", "15", "234", "000"])
SEPARATORS = st.sampled_from([",", ".", "'", "’", "_", ":", "/", "-", "–", "，", "٫"])
SCRIPTS = {script: str.maketrans("0123456789", digits) for script, digits in (("deva", "०१२३४५६७८९"), ("wide", "０１２３４５６７８９"))}  # fmt: skip


@st.composite
def numbers(draw: st.DrawFn) -> str:
    """Notations of numbers: signs, currencies, groups, decimals, ratios, times, dates, versions, units, exponents."""
    body = draw(DIGITS)
    for separator in draw(st.lists(SEPARATORS, max_size=3)):
        body += separator + draw(DIGITS)
    sign, currency = draw(st.sampled_from(["", "", "-", "−", "–", "+"])), draw(st.sampled_from(["", "", "$", "€"]))
    tail = draw(st.sampled_from(["", "", "%", "‰", "'", '"', "″", "²", "½", "e5", "e-5", "°", "\u0305", "$"]))
    text = sign + currency + draw(st.sampled_from(["", "."])) + body + tail
    return text.translate(SCRIPTS[draw(st.sampled_from(["deva", "wide"]))]) if draw(st.integers(0, 4)) == 0 else text


@settings(max_examples=400, deadline=None)
@given(numbers(), numbers(), st.sampled_from(["it costs {} today", "({})", "{}.", "a {}, b", "[{}] x"]))
def test_other_numbers_are_never_equal(one: str, other: str, frame: str) -> None:
    """Property: two notations give two forms, by default and for tables, in whatever prose; the kernel agrees."""
    for how in (DEFAULT, TABLES):
        forms = [comparable(how)(frame.format(number)) for number in (one, other)]
        assert (forms[0] == forms[1]) == (one == other), forms
        assert normaliser(how)(frame.format(one)) != normaliser(how)(frame.format(other)) or one == other
        assert compiled(frame.format(one), how) in (None, forms[0].encode())


PAIRS = [
    (".5 million", "5 million"),
    ("1,234,567 euro", "1,234.567 euro"),
    ("-.5 C", "-5 C"),
    ("–5 C", "5 C"),
    ("5–3", "5 3"),
    ("12:30", "12 30"),
    ("5' tall", '5" tall'),
    ("costs $5", "costs 5"),
    ("3.14.15", "3.14 15"),
    ("0.3\u0305", "0.3"),
    ("かぎ", "かき"),
    ("パンダ", "ハンダ"),
    ("कुल", "कल"),
    ("का", "क"),
    ("שָׁלוֹם", "שלום"),
    ("ไม้", "ไม"),
    ("a = b", "a \u2260 b"),
    ("a =\u0338 b", "a = b"),
]


@pytest.mark.parametrize("pair", PAIRS)
def test_what_stays(pair: tuple[str, str]) -> None:
    """Behaviour: short texts whose difference was dropped are both kept by default; `loose` drops it as datatrove does."""
    assert len(deduplicate(texts_to_rows(list(pair)), near=MinHash())[0]) == 2


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("In 1995, he (5) said: “7!” It’s 5.", "in 1995 he 5 said 7 it s 5"),
        ("See p. 5; [12] #4 x_1 … 3", "see p 5 12 4 x 1 3"),
        ("Café ÀÉÎ Ǖ Ñandú", "cafe aei u nandu"),
        ("Ἀθῆναι ΐ", "αθηναι ι"),
        ("Й ё й", "и е и"),
        ("e\u0301\u0323\u0301", "e"),
        ("v1.2.3 costs .5", "v1.2.3 costs .5"),
        ("1990's 5…7", "1990's 5 7"),
    ],
)
def test_what_does_not_count(text: str, form: str) -> None:
    """Behaviour: the marks of prose around numbers, and the accents of Latin, Greek and Cyrillic, still make no difference."""
    assert FORM(text) == form and compiled(text, DEFAULT) == form.encode()


MARKED = [chr(c) for a, b in ((0x591, 0x5EB), (0x621, 0x65F), (0x900, 0x964), (0xE01, 0xE4F), (0x3041, 0x30FF), (0x3099, 0x309B)) for c in range(a, b) if chr(c).isprintable() and unicodedata.category(chr(c))[0] in "LM"]  # fmt: skip


@given(st.lists(st.sampled_from(MARKED), min_size=1, max_size=6).map("".join), st.lists(st.sampled_from(MARKED), min_size=1, max_size=6).map("".join))  # fmt: skip
@settings(max_examples=300, deadline=None)
def test_signs_of_other_scripts_count(one: str, other: str) -> None:
    """Property: texts in Hebrew, Arabic, Devanagari, Thai and kana are equal exactly if they are canonically equivalent;
    the kernel does them itself where nothing is reordered."""
    normal = [unicodedata.normalize("NFD", text) for text in (one, other)]
    assert (FORM(one) == FORM(other)) == (normal[0] == normal[1])
    assert compiled(one, DEFAULT) in (None, FORM(one).encode())
    assert compiled(unicodedata.normalize("NFC", one), DEFAULT) is not None or unicodedata.normalize("NFC", one) != one
    assert compiled(normal[0], DEFAULT) == normal[0].encode()

"""Normalisations for deduplication."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmkit.corpus.dedup.normalise import NORMALISERS, loose, single_spaces


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


def test_names() -> None:
    """Behaviour: the values of --normalise."""
    assert NORMALISERS.names() == ["loose", "none", "whitespace"]

"""Words, sentences and character sets."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmkit.corpus.page import Page
from llmkit.corpus.words import (
    MARKS,
    PUNCTUATION,
    SPLITTERS,
    TERMINALS,
    count_sentences,
    splitter,
    unicode_words,
    whitespace_words,
)
from llmkit.errors import LlmkitError, UsageError


def test_character_sets() -> None:
    """Parity with datatrove 0.10.1: 129 punctuation marks, 159 terminal marks, 281 together, and some members."""
    assert (len(PUNCTUATION), len(TERMINALS), len(MARKS)) == (129, 159, 281)
    assert {".", "!", "?", "。", "۔", "។", "။"} <= TERMINALS
    assert not {'"', "…", "'", ";", ":"} & TERMINALS
    assert {"…", "“", "”", "、", "\x00", "\x1f", "\x9f", "_", "１"} <= PUNCTUATION
    assert not {" ", "\t", "\n", "°", "©", "€", "•"} & MARKS


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Don't stop -- (now).", ["Don", "'t", "stop", "--", "(", "now", ")", "."]),
        ("the author’s 'quoted' word", ["the", "author", "’s", "'", "quoted", "'", "word"]),
        ("a_b x=1,5 $3", ["a_b", "x", "=", "1,5", "$", "3"]),
        (
            "at 10:30, 3.5% of covid-19 well-known",
            ["at", "10:30", ",", "3.5", "%", "of", "covid-19", "well", "-", "known"],
        ),
        ("end.The U.S. and/or 1/2", ["end", ".", "The", "U.S.", "and", "/", "or", "1/2"]),
        ("J. B. at 5 p.m. in N.Y... b.", ["J.", "B.", "at", "5", "p.m.", "in", "N.Y", "...", "b."]),
        ("(see http://a.org/b-c?d=1).", ["(", "see", "http://a.org/b-c?d=1", ")", "."]),
        (
            "a://. x_ _y 5- -5 a@b.org AT&T",
            ["a", ":", "//", ".", "x", "_", "_", "y", "5", "-", "-", "5", "a@b.org", "AT&T"],
        ),
        ("wait... what?!", ["wait", "...", "what", "?", "!"]),
        ("हिन्दी cafe\u0301 🙂🙂", ["हिन्दी", "cafe\u0301", "🙂", "🙂"]),
        ("日本語。文", ["日本語", "。", "文"]),
        (" \n\t", []),
        ("", []),
    ],
)
def test_unicode_words(text: str, words: list[str]) -> None:
    """Behaviour: runs of letters and digits with combining and joining marks, endings after an apostrophe, runs of a mark."""
    assert unicode_words(text) == words


@given(st.text())
def test_words_cover_the_text(text: str) -> None:
    """Property: the words of both kinds contain every visible character, in order, and no spaces."""
    visible = "".join(text.split())
    assert "".join(unicode_words(text)) == visible == "".join(whitespace_words(text))


@pytest.mark.parametrize(
    ("line", "sentences"),
    [
        ("", 1),
        ("One sentence without an end", 1),
        ("One. Two! Three?", 3),
        ('He said "no." Then he left.', 2),
        ("Mr. Smith met J. K. Rowling in the U.S. on Monday.", 1),
        ("Pi is 3.14 and the file is a.txt now.", 1),
        ("Wait... what?! Really", 2),
        ("你好。再见。", 2),
    ],
)
def test_count_sentences(line: str, sentences: int) -> None:
    """Behaviour: terminal marks before a space end a sentence; initials, titles, numbers and ellipses do not."""
    assert count_sentences(line) == sentences


def test_edits_reset_measurements() -> None:
    """Behaviour: later rules count the text as edited by an earlier rule."""
    page = Page("one two\nthree", SPLITTERS.get("unicode"))
    assert len(page.words) == 3 and len(page.lines) == 2
    page.edit("one")
    assert page.words == ["one"] and page.lines == ["one"]


def test_unknown_kind_of_words() -> None:
    """Behaviour: the error for a typo suggests the closest name."""
    with pytest.raises(UsageError) as caught:
        SPLITTERS.get("unicod")
    assert "unicode" in caught.value.hint


def test_spacy_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behaviour: without spaCy, the error for --words spacy names what to install."""
    monkeypatch.setitem(sys.modules, "spacy", None)
    splitter.cache_clear()
    with pytest.raises(LlmkitError) as caught:
        splitter("spacy")
    assert "not installed" in caught.value.message and "pip install" in caught.value.hint

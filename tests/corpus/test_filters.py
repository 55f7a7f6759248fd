"""Every reason of every filter, on texts whose statistics are computed by hand from the definitions.

The same decisions come from datatrove 0.10.1 given the same words; tests/bench/filter_parity.py compares the two on real documents.
"""

from __future__ import annotations

import time

import pytest

from llmkit.corpus.chain_loader import load_chain
from llmkit.corpus.filters import FILTERS
from llmkit.corpus.filters.gopher_repetition import joined_duplicates
from llmkit.corpus.kernels.repetition import ngram_repeats
from llmkit.corpus.kernels.tokens import tokens_of
from llmkit.corpus.page import Page
from llmkit.corpus.words import SPLITTERS

# 60 different words of 5 letters, with the stop words that a real text has.
WORDS = [f"{a}{b}aso" for a in "bcdfgklm" for b in "aeiouyrl"][:60]
PROSE = " ".join(WORDS[:30]) + " the cat and dog. " + " ".join(WORDS[30:]) + " to be with that."


def decide(name: str, text: str, words: str = "whitespace", **thresholds: object) -> tuple[str, float | None]:
    """(reason, value) of one filter; the reason is "" if the text is kept."""
    checks = FILTERS.get(name)(**thresholds)(Page(text, SPLITTERS.get(words)))
    return next(((check.reason, check.value) for check in checks if check.broken), ("", None))


def distinct(count: int, start: int = 0, width: int = 6) -> list[str]:
    """Distinct words of `width` characters."""
    return [f"w{i:0{width - 1}d}" for i in range(start, start + count)]


@pytest.mark.parametrize("name", ["gopher_repetition", "gopher_quality", "fineweb"])
@pytest.mark.parametrize("words", ["unicode", "whitespace"])
def test_plain_prose_is_kept(name: str, words: str) -> None:
    """Behaviour: a text that breaks no rule is kept."""
    assert decide(name, PROSE, words) == ("", None)


REPETITION = [
    # 10 paragraphs, 4 of which repeat: 0.4 > 0.3
    ("\n\n".join([f"a unique paragraph {i}" for i in range(6)] + ["a unique paragraph 0"] * 4), "dup_para_frac", 0.4),
    # 4 paragraphs, 1 repeats (0.25), with 60 of 60 + 60 + 2*10 + 6 = 146 characters
    ("\n\n".join(["x" * 60, "x" * 60, "y" * 10, "z" * 10]), "dup_para_char_frac", 60 / 146),
    # single newlines make one paragraph of 10 lines; 4 repeat
    ("\n".join([f"a unique line number {i}" for i in range(6)] + ["a unique line number 0"] * 4), "dup_line_frac", 0.4),
    ("\n".join(["x" * 60, "x" * 60, "y" * 10, "z" * 10]), "dup_line_char_frac", 60 / 143),
    # "ab cd" 4 times: 5 * 4 = 20 of the characters
    (" ".join(["ab cd", *distinct(3), "ab cd", *distinct(3, 3), "ab cd", *distinct(3, 6), "ab cd"]), "top_2_gram", 20 / 86),
    # top 2-gram "ab cd" 3 * 5 / 97 = 0.155, top 3-gram "ab cd ef" 3 * 8 / 97 = 0.247
    (" ".join(["ab cd ef", *distinct(5), "ab cd ef", *distinct(5, 5), "ab cd ef"]), "top_3_gram", 24 / 96),
    # 1 word has no n-gram at all and is kept; two words are one 2-gram of the whole length
    ("one two", "top_2_gram", 1.0),
    ("", "empty", None),
]  # fmt: skip


@pytest.mark.parametrize(("text", "reason", "value"), REPETITION)
def test_gopher_repetition(text: str, reason: str, value: float | None) -> None:
    """Parity with the definitions: first failing rule and its value."""
    got, measured = decide("gopher_repetition", text)
    assert got == reason
    assert measured == (None if value is None else pytest.approx(value, abs=1e-12))


@pytest.mark.parametrize("n", range(5, 11))
def test_duplicate_n_grams(n: int) -> None:
    """Parity with the definition: one n-gram of n six-letter words occurs twice among d other words.

    The text has 7 (2n + d) - 1 characters.

    Only the repeat counts, 6n characters (no spaces) of the text; with d chosen so that the share is just over or just under the limit.
    """
    limit = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}[n]
    off: dict[str, object] = {f"duplicated_{m}_n_grams": None for m in range(5, 11) if m != n}
    off |= {f"top_{m}_gram": None for m in (2, 3, 4)}
    most = int((6 * n / limit + 1) / 7 - 2 * n)  # the most other words with the share still over the limit
    for others, reason in ((most, f"duplicated_{n}_n_grams"), (most + 1, "")):
        phrase = distinct(n)
        text = " ".join([*phrase, *distinct(others, 1000), *phrase])
        share = 6 * n / (7 * (2 * n + others) - 1)
        assert (share > limit) == bool(reason)
        got, value = decide("gopher_repetition", text, **off)
        assert got == reason and (value is None or value == pytest.approx(share))


def test_ngram_counting_by_hand() -> None:
    """Parity: overlaps, ties, and n-grams compared word by word or by their letters alone."""

    def counted(words: list[str], n: int) -> int:
        tokens = tokens_of(words)
        return int(ngram_repeats(tokens.hashes, tokens.lengths)[n - 2])

    assert counted(list("ababa"), 2) == 2 * 3  # "a b" and "b a" twice each: the first met
    assert counted(["word"], 2) == 0
    # at 0 new, at 1 seen before (continue at 6), at 6 seen before
    assert counted(["a"] * 11, 5) == joined_duplicates(["a"] * 11, 5) == 10
    assert joined_duplicates(["ab", "c", "a", "bc"], 2) == 3  # abc, ca, abc again
    separated = ["ab", "c", "x", "y", "z", "0", "a", "bc", "x", "y", "z"]
    assert (counted(separated, 5), joined_duplicates(separated, 5)) == (0, 6)
    assert joined_duplicates(["a", "b", "c"], 4) == 0


QUALITY = [
    (" ".join(WORDS[:49]), {}, "gopher_short_doc", 49),
    (" ".join(["!!", "--"] * 50 + WORDS[:49]), {}, "gopher_short_doc", 49),  # symbols are not words
    (PROSE, {"max_doc_words": 67}, "gopher_long_doc", 68),
    (" ".join(["ab"] * 60), {}, "gopher_below_avg_threshold", 2.0),
    (" ".join(["a" * 11] * 60), {}, "gopher_above_avg_threshold", 11.0),
    (PROSE + " #" * 8, {}, "gopher_too_many_hashes", 8 / 76),
    (PROSE + " ..." * 4 + " …" * 4, {}, "gopher_too_many_ellipsis", 8 / 76),
    ("\n".join(f"{'•' if i % 2 else '-'} {w} {w}x the of" for i, w in enumerate(WORDS[:20])), {}, "gopher_too_many_bullets", 1.0),
    ("\n".join(f"{w} a{w} b{w} the of{'...' if i < 4 else ''}" for i, w in enumerate(WORDS[:12])), {}, "gopher_too_many_end_ellipsis", 4 / 12),
    (PROSE + " 12345" * 18, {}, "gopher_below_alpha_threshold", 68 / 86),
    (" ".join(WORDS[:50]) + " the The Of", {}, "gopher_enough_stop_words", 1),
]  # fmt: skip


@pytest.mark.parametrize(("text", "thresholds", "reason", "value"), QUALITY)
def test_gopher_quality(text: str, thresholds: dict[str, object], reason: str, value: float) -> None:
    """Parity with the definitions: first broken rule and its value (whitespace words, which can be counted by eye)."""
    got, measured = decide("gopher_quality", text, **thresholds)
    assert got == reason
    assert measured == pytest.approx(value)


def test_thresholds_are_strict_and_can_be_off() -> None:
    """Behaviour: a document exactly at the limit is kept; None switches a rule off."""
    fifty = " ".join([*WORDS[:48], "the", "of"])
    assert decide("gopher_quality", fifty) == ("", None)
    assert decide("gopher_quality", " ".join(WORDS[:10]), min_doc_words=None, min_stop_words=None) == ("", None)
    assert decide("gopher_quality", "", min_doc_words=None, min_alpha_words_ratio=None, min_stop_words=None) == (
        "",
        None,
    )


SENTENCES = [
    "This is the first line.",
    "Here comes a second one!",
    "Is there a third?",
    'She said "yes indeed"',
    "And 'so on'",
]


def c4(lines: list[str], **thresholds: object) -> tuple[str, str]:
    page = Page("\n".join(lines), SPLITTERS.get("unicode"))
    broken = next((check for check in FILTERS.get("c4")(**thresholds)(page) if check.broken), None)
    return (broken.reason, "") if broken else ("", page.text)


@pytest.mark.parametrize(
    ("extra", "kept"),
    [
        ("x" * 1001 + " is a very long word.", False),
        ("x" * 1000 + " is not too long.", True),
        ("no end mark in this line", False),
        ("ends with dots in this line...", False),
        ("Two words.", False),
        ("Please switch JavaScript on to see this.", False),
        ("Read our Privacy Policy before you go on.", False),
        ("This site uses cookies for everything.", False),
        ("", False),
        ("  spaces around are stripped away.  ", True),
    ],
)
def test_c4_lines(extra: str, kept: bool) -> None:
    """Parity with the definition: the treatment of one line among good ones."""
    assert c4([*SENTENCES, extra]) == ("", "\n".join([*SENTENCES, extra.strip()] if kept else SENTENCES))


def test_c4_citations_are_deleted() -> None:
    """Parity: [n], [], [edit] and [citation needed] are deleted; words are counted before that."""
    reason, text = c4(
        [
            *SENTENCES,
            "Known since 1900[12][] in the north[edit] they say[citation needed].",
            "[1] [2] yes.",
            "[see 3] is kept.",
        ]
    )
    assert reason == ""
    assert text.splitlines()[5:] == ["Known since 1900 in the north they say.", "  yes.", "[see 3] is kept."]


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ([*SENTENCES, "Here is Lorem Ipsum for you."], "lorem_ipsum"),
        ([*SENTENCES, "if (x) { return it. }."], "curly_bracket"),
        ([*SENTENCES, "{"], "curly_bracket"),
        (SENTENCES[:4], "too_few_sentences"),
        ([], "too_few_sentences"),
        (["One here. Two here. Three here. Four here. Five here."], ""),
    ],
)
def test_c4_documents(lines: list[str], reason: str) -> None:
    """Parity with the definition: rules that drop the document."""
    assert c4(lines)[0] == reason


def test_c4_line_by_line_misses_a_lone_bracket() -> None:
    """Parity with datatrove, whole_page off: a short line is removed before the bracket is looked for."""
    assert c4([*SENTENCES, "{"], whole_page=False)[0] == ""
    assert c4([*SENTENCES, "if (x) { return it. }."], whole_page=False)[0] == "curly_bracket"


def test_c4_in_fineweb_keeps_lines_without_end_mark() -> None:
    """Behaviour: FineWeb turns off require_end_mark."""
    assert c4([*SENTENCES, "no end mark in this line"], require_end_mark=False)[1].endswith("line")


FINEWEB = [
    ("\n \n\n", "empty", None),
    ("\n".join(f"a line of some length that ends without a mark {i}" for i in range(10)) + " here.", "line_punct_ratio", 0.1),
    ("\n".join(f"short line {i}." for i in range(10)), "short_line_ratio", 1.0),
    # three lines of 50 characters, the third repeats the first
    ("\n".join(["a" * 49 + ".", "b" * 49 + ".", "a" * 49 + "."]), "char_dup_ratio", 50 / 150),
    # 6 newlines, 10 words
    ("\n\n\n".join(["one verylongwordwithoutanyend two three.", "four verylongwordwithnospaces five six.", "seven anotherverylongwordthatneverends."]), "list_ratio", 0.6),
]  # fmt: skip


@pytest.mark.parametrize(("text", "reason", "value"), FINEWEB)
def test_fineweb(text: str, reason: str, value: float | None) -> None:
    """Parity with the definitions: first failing rule and its value."""
    got, measured = decide("fineweb", text)
    assert got == reason
    assert measured == (None if value is None else pytest.approx(value))


@pytest.mark.parametrize(
    "text",
    ["x" * 1_000_000, "\n" * 1_000_000, " " * 1_000_000, "!?" * 500_000, "-" * 1_000_000, "[" * 1_000_000, "a'" * 500_000, "Mr. " * 250_000,
     "\u0301" * 1_000_000, "1.," * 300_000, "A b c " + "!" * 900 + ("\nA b c " + "。" * 900) * 300, ("A b c d " + "!" * 100_000 + "x\n") * 5],
    ids=["letters", "newlines", "spaces", "marks", "dashes", "brackets", "apostrophes", "titles", "combining", "numbers", "short runs", "long runs"],
)  # fmt: skip
def test_hostile_texts_take_linear_time(text: str) -> None:
    """Behaviour: a megabyte of one pattern takes every filter seconds (0.5 s when measured)."""
    start = time.process_time()
    for name in ("gopher_repetition", "gopher_quality", "c4", "fineweb"):
        load_chain([], [name], [], "unicode").judge(text)
    assert time.process_time() - start < 20

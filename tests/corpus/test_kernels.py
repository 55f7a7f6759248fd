"""Parity of the compiled kernels with plain Python (tests/corpus/plain.py), on generated texts full of edge cases."""

from __future__ import annotations

import random
import sys
import time
import unicodedata

import numpy as np
import plain
import pytest

from llmkit.corpus.chain_loader import load_chain
from llmkit.corpus.filters.kernels import c4
from llmkit.corpus.kernels import characters
from llmkit.corpus.kernels.repetition import group
from llmkit.corpus.kernels.tokens import has_words
from llmkit.corpus.page import Page
from llmkit.corpus.words import MARKS, SPLITTERS, TERMINALS, count_sentences

PIECES = """the cat and a dog have to be with that lot of ab c a bc # ... … • - -- { } 12 １１ 。 。。 [1] [] [edit] [12 [citation needed] "x" it's don’t
’tis O’' _a_ é e\u0301 \u0301 ½ Ⅳ 你好 你好。 नमस्ते हैं। Mr. Dr. J. U.S. etc. a.b x... y.… .?! "Yes." (No.) Hm? Ha!” \u212a use cooKies privacy Policy JavaScript
lorem ipsum Terms of Use İ ß \u2028 \x1c \x85 \r \r\n \x0b \xa0 \u3000 \x00 \u200b 🙂🙂 –– ·· .. ... . ! ? ？ ！ ' " \t""".split(
    " "
)
PIECES += """3.5 1,000 10:30 1/2/03 covid-19 19-year well-known end.The U.S e.g a_b _ a@b.com AT&T & @ http://a.b/c?d=e-f. ://x. a:// b://. (http://x.y) a.b://c://d) c://你.。
- , : / . a- -1 1- .5 5. é.É a.B É.a x..y 1::2 //""".split()
PIECES = [piece.replace("\\n", "") for piece in PIECES] + [
    "\u2028",
    "\x1c",
    "\x85",
    "\r",
    "\r\n",
    "\x0b",
    "\xa0",
    "\u3000",
    "\t",
    " ",
    "x" * 1001,
]


def texts(count: int) -> list[str]:
    """Texts of these pieces, by a fixed seed: short and long, with many and few line breaks and repeats."""
    random_ = random.Random(7)
    found = ["", " ", "\n", "\n\n", "\n\n\na\n\na", "a", "a\n", "\na", " a\n\na ", "a\r\nb", "{", "\x00", "...", "a..."]
    for _ in range(count):
        pieces = random_.choices(
            PIECES, weights=[random_.random() ** 4 for _ in PIECES], k=random_.choice((3, 30, 300))
        )
        breaks = random_.choice([" ", " ", ". ", "\n", "\n\n", ".\n", "...\n", "", "\r\n"])
        often = random_.choice([0.02, 0.1, 0.4])
        found.append(
            "".join(
                piece + (breaks if random_.random() < often else random_.choice(("", " ", " "))) for piece in pieces
            )
        )
    found += [" ".join(random_.choices(("a", "b", "ab", "ba", "aa"), k=random_.randrange(8, 40))) for _ in range(50)]
    return found


TEXTS = texts(700)
WORDS = ["unicode", "whitespace"]


def statistics(name: str, text: str, words: str, *rules: str) -> dict[str, object]:
    chain = load_chain([], [name], list(rules), words)
    return {check.statistic or check.reason: check.value for _, check in chain.measure(Page(text, chain.splitter))}


def test_character_classes() -> None:
    """Property: the bits of every character agree with str methods and the tables of marks."""
    table = characters.classes()
    for code in range(sys.maxunicode + 1):
        if 0xD800 <= code < 0xE000:
            continue
        c, bits = chr(code), int(table[code])
        found = tuple(
            bool(bits & bit) for bit in (characters.ALNUM, characters.ALPHA, characters.SPACE, characters.UPPER)
        )
        assert found == (c.isalnum(), c.isalpha(), c.isspace(), c.isupper()), hex(code)
    assert {chr(i) for i in np.flatnonzero(table & characters.MARK)} == MARKS
    assert {chr(i) for i in np.flatnonzero(table & characters.TERMINAL)} == TERMINALS
    assert all(unicodedata.category(chr(i))[0] == "M" for i in np.flatnonzero(table & characters.COMBINING))


@pytest.mark.parametrize("words", WORDS)
def test_words(words: str) -> None:
    """Parity with the regular expression and str.split: number, lengths and flags of words; equal hashes for equal words."""
    splitter = SPLITTERS.get(words)
    by_hash: dict[int, str] = {}
    for text in TEXTS:
        page = Page(text, splitter)
        assert page.tokens.lengths.tolist() == [len(word) for word in page.words], repr(text)
        for word, hash_, flags in zip(page.words, page.tokens.hashes.tolist(), page.tokens.flags.tolist(), strict=True):
            assert by_hash.setdefault(hash_, word) == word
            assert bool(flags & characters.ALPHA) == any(map(str.isalpha, word))
            assert bool(flags & characters.MARK) == (set(word) <= MARKS)
    assert len(set(by_hash.values())) == len(by_hash) > 50


def test_tokens_of_words_match_the_scan() -> None:
    """Property: the arrays for a list of words (from a splitter without kernel) equal those of the compiled scan."""
    plain_splitter = SPLITTERS.get("unicode").__class__(SPLITTERS.get("unicode").words, count_sentences)
    for text in TEXTS:
        for a, b in zip(Page(text, plain_splitter).tokens, Page(text, SPLITTERS.get("unicode")).tokens, strict=True):
            assert a.tolist() == b.tolist()


@pytest.mark.parametrize("words", WORDS)
def test_repetition(words: str) -> None:
    """Parity with the plain definition, with n-grams compared word by word and by their letters alone."""
    splitter = SPLITTERS.get(words)
    differ = 0
    for text in filter(None, TEXTS):
        expected = plain.repetition(text, splitter.words(text))
        joined = plain.repetition(text, splitter.words(text), separate=False)
        assert statistics("gopher_repetition", text, words) == pytest.approx(expected), repr(text)
        assert statistics("gopher_repetition", text, words, "gopher_repetition.separate_words=false") == pytest.approx(
            joined
        )
        differ += expected != joined
    assert differ > 5


@pytest.mark.parametrize("words", WORDS)
def test_lower_bound_of_words(words: str) -> None:
    """Property: the estimate never exceeds the number of words, and FineWeb's decisions do not depend on it."""
    chain = load_chain([], ["fineweb"], [], words)
    for text in [*TEXTS, *(text.replace(" ", "\x01") for text in TEXTS)]:
        page = Page(text, SPLITTERS.get(words))
        assert has_words(page.data, 0) and not has_words(page.data, len(page.words) + 1)
        broken = [check for _, check in chain.measure(page) if check.broken]
        assert chain.judge(text).drop == (broken[0] if broken else None), repr(text)


@pytest.mark.parametrize("words", WORDS)
def test_lines(words: str) -> None:
    """Parity with str.splitlines and str.split for the line statistics of the Gopher and FineWeb rules."""
    for text in TEXTS:
        quality = statistics("gopher_quality", text, words)
        assert quality.items() >= plain.line_quality(text).items(), repr(text)
        expected = plain.fineweb(text, SPLITTERS.get(words).words(text)) or {"empty": None}
        assert statistics("fineweb", text, words) == pytest.approx(expected), repr(text)


@pytest.mark.parametrize("end_mark", [True, False])
@pytest.mark.parametrize("whole_page", [True, False])
def test_c4(end_mark: bool, whole_page: bool) -> None:
    """Parity with the plain definition: reason and text, on single texts and on concatenations of several."""
    rules = [f"c4.require_end_mark={str(end_mark).lower()}", f"c4.whole_page={str(whole_page).lower()}"]
    chain = load_chain([], ["c4"], rules, "unicode")
    outcomes = set()
    for whole in [*TEXTS, "Here is Lorem Ipsum for you.\n" * 5] + [
        "\n".join(TEXTS[i : i + 40]) for i in range(0, len(TEXTS), 40)
    ]:
        for text in (whole, whole.replace("{", "").replace("lorem", "")):
            verdict = chain.judge(text)
            found = (verdict.drop.reason, "") if verdict.drop else ("", verdict.text)
            assert found == plain.c4(text, SPLITTERS.get("unicode"), end_mark, whole_page), repr(text)
            outcomes.add(found[0])
    assert outcomes == {"", "lorem_ipsum", "curly_bracket", "too_few_sentences"}


def test_sentences() -> None:
    """Parity with the regular expression."""
    for text in TEXTS:
        lines = [line.strip() for line in text.splitlines()]
        data = np.frombuffer("".join(line + "\n" for line in lines).encode(), np.uint8)
        found = c4.sentences(data, characters.classes(), c4.SHORT_FORMS)
        assert found == sum(map(count_sentences, lines)), repr(text)


@pytest.mark.parametrize("run", ["!", "。", "?)", "...!"])
def test_sentences_of_long_runs_take_linear_time(run: str) -> None:
    """Property: 200,000 marks before a letter or the end of the line are counted quickly."""
    data = np.frombuffer(f"a b c {run * 200_000}\na {run * 200_000}x\n".encode(), np.uint8)
    start = time.process_time()
    c4.sentences(data, characters.classes(), c4.SHORT_FORMS)
    assert time.process_time() - start < 3


def test_groups() -> None:
    """Behaviour: equal keys get one number in order of first occurrence, also if keys differ only in their high bits."""
    keys = np.array([5, 5 << 32, 5, 7, 5 << 32, 1 << 63], np.uint64)
    numbers, counts, places, groups = group(keys, len(keys))
    assert numbers.tolist() == [0, 1, 0, 2, 1, 3] and groups == 4
    assert counts[:4].tolist() == [2, 2, 1, 1] and places[:4].tolist() == [0, 1, 3, 5]

"""Near-duplicate kernels: normalisation, shingles, signatures and keys equal those of plain Python."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
import unicodedata

import numpy as np
import pytest
import xxhash
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmkit.corpus.dedup.kernels import minhash, normalise
from llmkit.corpus.dedup.normalise import DEFAULT, comparable

FORMS = [
    "loose",
    DEFAULT,
    "whitespace",
    "accents,whitespace",
    "case,whitespace,numbers",
    "case,accents,whitespace,operators",
]
loose = comparable("loose")

PRIME = 2**61 - 1
MODULUS = {32: 2**32, 61: PRIME}

# Characters that depend on their neighbours: digits and points of several scripts, sigmas, combining marks that are
# reordered, all kinds of whitespace.
PIECES = [
    *"aZ09.,+-=(≠×٣१１٫،\u2396 \t\u00a0\u3000\x1c-’ΣσςİßéΆ가각한日🙂'",
    "\u0301",
    "\u0323",
    "\u034f",
    "\u302e",
    "\u302f",
    "\u1b44",
]
PIECES += [*"$–—'´\"”:_．，：кηがא்ไ", "\u3099", "\u093c", "\u094d", "\u05b8", "\u0e49", "\u0338", "\ufe0f"]
PIECES += [
    "\U0001d165",
    "\U0001d16d",
    "\U0001d15e",
    "\u0344",
    "\u037e",
    "\u1fef",
    "\u2000",
    "\u212a",
    "\u0958",
    "\u00ad",
    "\ue000",
]


def compiled(text: str, how: str = "loose") -> bytes | None:
    """The kernel's result; None if it leaves the text to Python."""
    result, done = normalise.normalised(normalise.utf8(text, how), *normalise.tables(how, True))
    return result.tobytes() if done else None


def sketch(
    text: str, ngram: int = 5, bits: int = 32, seed: int = 0, how: str = "loose", characters: bool = False
) -> minhash.Sketch:
    return minhash.sketch(text, ngram, minhash.functions(seed, 112, bits), 14, bits, how, characters)


def words(count: int, seed: int, kinds: int = 500) -> str:
    return " ".join(
        f"w{chr(97 + n % 26)}{chr(97 + n // 26)}" for n in random.Random(seed).choices(range(kinds), k=count)
    )


# ---- normalisation


@pytest.mark.parametrize("how", FORMS[:3])
def test_every_character_alone_and_inside(how: str) -> None:
    """Parity with the Python function: every code point by itself; also in words and numbers, after a point, next to
    whitespace and a mark (an eighth of the letters without case)."""
    left_to_python = []
    for start in range(0, sys.maxunicode + 1, 512):
        characters = [c for c in map(chr, range(start, start + 512)) if unicodedata.category(c) != "Cs"]
        together = [f" {c} " for c in characters]
        assigned = [c for c in characters if unicodedata.category(c) not in ("Cn", "Co")]
        together += [
            f"{c}a{c} 1{c}2 1.{c}\u0301{c}3" for c in assigned if unicodedata.category(c) != "Lo" or ord(c) % 8 == 0
        ]
        if compiled("".join(together), how) == comparable(how)("".join(together)).encode():
            continue
        for text in together:
            found = compiled(text, how)
            if found is None:
                left_to_python.append(text)
            else:
                assert found == comparable(how)(text).encode(), ascii(text)
    assert ("accents" in how or how == "loose") == (len(left_to_python) > 0) and len(left_to_python) < 1000
    for text in left_to_python:  # they hold marks in another order than the canonical one, or signs that are no marks
        kept = [c for c in unicodedata.normalize("NFD", text) if how != "loose" or unicodedata.category(c) != "Mn"]
        assert any(map(unicodedata.combining, kept))


def test_random_strings() -> None:
    """Parity with the Python function on many strings of characters that depend on their neighbours."""
    random_ = random.Random(4)
    done = 0
    for _ in range(5000):
        text = "".join(
            random_.choices(PIECES, weights=[random_.random() ** 3 for _ in PIECES], k=random_.choice((3, 12, 40)))
        )
        how = random_.choice(FORMS)
        found, expected = compiled(text, how), comparable(how)(text).encode()
        done += found == expected
        assert found in (None, expected), ascii(text)
    assert done > 500


@settings(deadline=None)
@given(
    st.text() | st.lists(st.sampled_from(PIECES), max_size=14).map("".join), st.sampled_from([*FORMS, "case", "none"])
)
@example("ΑΣ ΑΣΑ Σ Α'Σ'", "loose")
@example("1.2.3 1,,2 1.a ٣٫१ 1.\u03014", "whitespace")
@example("x\U0001d16d\U0001d165\u302e", "loose")
@example("+\u0301 a -\u0301+b+ \u0301c (", "accents,whitespace")
def test_any_string(text: str, how: str) -> None:
    """Parity with the Python function: strings of characters that depend on neighbours, and of any characters."""
    expected = comparable(how)(text).encode()
    assert "whitespace" not in how or compiled(text, how) in (None, expected)
    assert sketch(text, how=how).normalised.tobytes() == expected


def test_growth_is_bounded() -> None:
    """Property: no character needs more room than the kernel reserves (it writes unchecked); the bound is tight."""
    most = max(len(loose(f"a{c}b").encode()) - 2 - normalise.GROWTH * len(c.encode()) for c in map(chr, range(0xD800)))
    assert most == 0
    assert compiled("각" * 1000) == unicodedata.normalize("NFD", "각" * 1000).encode()


@pytest.mark.parametrize("piece", ["1.", "Σ'", " ", "1,1", "\u0301", "\u302e\u302f", "각", "a"])
def test_time_is_linear(piece: str) -> None:
    """Property: eight times the text takes at most thirty times as long, even for one long number, space or run of marks."""
    times = []
    for count in (20_000, 160_000):
        text = piece * count
        runs = []
        for _ in range(3):
            start = time.perf_counter()
            sketch(text)
            runs.append(time.perf_counter() - start)
        times.append(min(runs))
    assert times[1] < 30 * times[0] + 0.1


# ---- shingles


@pytest.mark.parametrize("ngram", [1, 2, 5, 7])
@pytest.mark.parametrize("kinds", [2, 500])
def test_shingles_are_the_distinct_word_n_grams(ngram: int, kinds: int) -> None:
    """Parity with a set of Python tuples: the same number, ascending, and the same similarities between texts."""
    texts = [words(n, seed, kinds) for seed, n in enumerate([*range(9), 60, 61, 300])]
    texts += [f"{texts[-1]} {texts[-2]}", texts[-1].partition(" ")[2]]
    sets = [{tuple(text.split()[i : i + ngram]) for i in range(len(text.split()) - ngram + 1)} for text in texts]
    shingles = [sketch(text, ngram).shingles for text in texts]
    for values, expected in zip(shingles, sets, strict=True):
        assert values.dtype == np.uint32 and values.tolist() == sorted(set(values.tolist()))
        assert len(values) == len(expected)
    for a, one in zip(shingles, sets, strict=True):
        for b, other in zip(shingles, sets, strict=True):
            assert minhash.jaccard(a, b) == len(one & other) / max(1, len(one | other))


def test_shingles_of_characters() -> None:
    """Parity with a set of Python strings, for characters of any width."""
    texts = [
        "人人生而自由,在尊严和权利上一律平等。",
        "人人生而自由,在尊严和权力上一律平等。",
        "aé🙂人" * 9,
        "four",
        "日本語",
    ]
    sets = [{text[i : i + 4] for i in range(len(text) - 3)} for text in texts]
    shingles = [sketch(text, 4, how="none", characters=True).shingles for text in texts]
    assert [len(values) for values in shingles] == [len(grams) for grams in sets]
    for a, one in zip(shingles, sets, strict=True):
        for b, other in zip(shingles, sets, strict=True):
            assert minhash.jaccard(a, b) == len(one & other) / max(1, len(one | other))


def test_former_sketches() -> None:
    """Golden: the sketches of a former version, which had one normalisation; indexes that hold them stay valid."""
    text = "Ἡ ΣΊΣΥΦΟΣ, 3.14 Café: a+b = 7 % of 1,000 — " + words(60, 3)
    for bits, digest in ((32, "9541ae0a7c814589"), (61, "10b6ff4e6e0c2474")):
        parts = sketch(text, bits=bits)
        assert xxhash.xxh3_64_hexdigest(b"".join(part.tobytes() for part in parts)) == digest


def test_shingles_depend_on_order_and_words() -> None:
    """Property: the same letters divided into other words, or words in another order, give other shingles."""
    texts = [
        "ab c d e f",
        "a bc d e f",
        "c ab d e f",
        "ab c d f e",
        "ab ab c c d",
        "c c ab ab d",
        "abc d e f g",
        "a b c d e",
    ]
    assert len({sketch(text).shingles.tobytes() for text in texts}) == len(texts)


def test_texts_without_shingles() -> None:
    """Behaviour: with fewer words than a shingle, only the normalised text."""
    for text, expected in [("", b""), ("!!!", b""), ("Read MORE...", b"read more"), ("a b c d", b"a b c d"), ("\u302e\u302f", "\u302e\u302f".encode())]:  # fmt: skip
        normalised, *others = sketch(text)
        assert normalised.tobytes() == expected and not any(map(len, others))
    assert [len(part) for part in sketch("a b c d e")[1:]] == [1, 112, 14]


@given(st.lists(st.integers(0, 2**32 - 1) | st.integers(0, 300)))
def test_distinct(values: list[int]) -> None:
    """Parity with Python's sorted set."""
    assert minhash.distinct(np.array(values, np.uint32)).tolist() == sorted(set(values))


# ---- signatures and keys


def signature(values: list[int], bits: int, seed: int) -> list[int]:
    """The definition, in Python integers."""
    a, b = minhash.functions(seed, 112, bits).tolist()
    return [min((a_ * x + b_) % MODULUS[bits] for x in values) for a_, b_ in zip(a, b, strict=True)]


@pytest.mark.parametrize("bits", [32, 61])
def test_signatures_are_exact_modular_arithmetic(bits: int) -> None:
    """Parity with Python integers, for random and extreme values: no product wraps, and p itself is 0."""
    functions = minhash.functions(3, 112, bits)
    top = MODULUS[bits]
    sets = [[0], [1], [top - 1], [2**32 - 1], [0, 1, top - 1]]
    sets += [[random.Random(n).randrange(top) for _ in range(n)] for n in (1, 3, 33, 5000)]
    sets += [] if bits == 32 else [[PRIME], [2**32], [2**60, 2**60 - 1]]
    for values in sets:
        least = minhash.least_32(np.array(values, np.uint32), functions) if bits == 32 else minhash.least_61(np.array(values, np.uint64), functions)  # fmt: skip
        assert least.dtype == np.uint64 and least.tolist() == signature(values, bits, 3)
    extreme = np.array([[1, top - 1, top - 1, top // 2 + 1], [0, 0, top - 1, top - 2]], np.uint64)
    assert (int(extreme[0, 1]) % 2 == 1) or bits == 61
    for values in ([top - 1], [top - 1, top - 2], [1, 2, 3]):
        least = minhash.least_32(np.array(values, np.uint32), extreme) if bits == 32 else minhash.least_61(np.array(values, np.uint64), extreme)  # fmt: skip
        assert least.tolist() == [min((a * x + b) % top for x in values) for a, b in extreme.T.tolist()]


@pytest.mark.parametrize("bits", [32, 61])
def test_a_texts_signature_is_that_of_its_shingles(bits: int) -> None:
    """Parity with Python integers from the text on: minima over the upper bits of the hashes of its runs of words."""
    text = words(700, 5)
    hashes = minhash.shingle_hashes(np.frombuffer(text.encode(), np.uint8), 5, False).tolist()
    result = sketch(text, bits=bits, seed=9)
    assert result.shingles.tolist() == sorted({h >> 32 for h in hashes})
    assert result.signature.tolist() == signature([h >> 64 - bits for h in hashes], bits, 9)


def test_functions_are_drawn_by_the_seed() -> None:
    """Property: permutations of 32 bits, or numbers below p; different for another seed or width; a prefix of a longer draw."""
    for bits in (32, 61):
        a, b = minhash.functions(1, 200, bits)
        assert (
            a.min() > 0
            and max(a.max(), b.max()) < MODULUS[bits]
            and len(set(a.tolist())) == len(set(b.tolist())) == 200
        )
        assert bits == 61 or (a % 2 == 1).all()
        assert np.array_equal(minhash.functions(1, 50, bits), np.array([a, b])[:, :50])
        assert not set(minhash.functions(2, 200, bits)[0].tolist()) & set(a.tolist())


@given(st.lists(st.lists(st.integers(0, 2), min_size=4, max_size=4), min_size=2, max_size=6))
def test_keys_are_equal_if_all_rows_are(rows: list[list[int]]) -> None:
    """Property: two bands share a key exactly if they have the same number and agree in every row."""
    signatures = [np.array([*row, *row], np.uint64) for row in rows]
    keys = [minhash.band_keys(values, 2).tolist() for values in signatures]
    for a, row in zip(keys, rows, strict=True):
        assert a[0] != a[1]  # equal rows, but another band
        for b, other in zip(keys, rows, strict=True):
            assert (a[0] == b[0]) == (a[1] == b[1]) == (row == other)
    singles = {minhash.band_keys(np.array(row, np.uint64), 4)[i] for row in rows for i in range(4)}
    assert len(singles) == len({(i, row[i]) for row in rows for i in range(4)})


@given(*[st.lists(st.integers(0, 40) | st.just(2**32 - 1))] * 2)
def test_jaccard(one: list[int], other: list[int]) -> None:
    """Parity with Python's sets."""
    a, b = (np.array(sorted(set(values)), np.uint32) for values in (one, other))
    assert minhash.jaccard(a, b) == len({*one} & {*other}) / max(1, len({*one} | {*other}))


PROGRAM = """
import warnings; warnings.simplefilter("error")
from llmkit.corpus.dedup.kernels import minhash as m
text = "Ἡ ΣΊΣΥΦΟΣ, 3.14 Café " * 3 + "각 de la \\u302e\\u302f mémoire \\U0001d16d\\U0001d165"
for bits in (32, 61):
    for n, t, how in ((2, text, "loose"), (5, text[:-3] + "x", "loose"), (5, text[:60], "whitespace"), (9, "a b", "none")):
        result = m.sketch(t, n, m.functions(4, 8, bits), 4, bits, how, n == 9)
        print([part.tolist() for part in result], m.jaccard(result.shingles, result.shingles[:2].copy()))
"""


def test_uncompiled_kernels_give_the_same_results() -> None:
    """Property: without compilation the results are the same, without warnings."""
    out = [
        subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, env=os.environ | extra).stdout
        for extra in ({}, {"NUMBA_DISABLE_JIT": "1"})
    ]  # fmt: skip
    assert out[0] == out[1] and len(out[0].splitlines()) == 8

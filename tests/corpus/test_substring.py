"""Repeats inside texts: parity with a plain Python definition, hostile input, any number of jobs and parts."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rows import outcome_of

from llmkit.corpus.dedup.kernels import substring as kernels
from llmkit.corpus.dedup.substring import SubstringDedup
from llmkit.corpus.kernels.characters import classes
from llmkit.engine.local import Local
from llmkit.errors import UsageError


def kept_texts(stage: SubstringDedup, texts: Iterable[str], chunk: int = 3) -> list[str]:
    """The kept texts."""
    return outcome_of(stage, "substring", texts, chunk)[0]


def expected_texts(texts: list[str], length: int, unit: str) -> list[str]:
    """The definition, by a dictionary of all windows: what lies in a window that occurred before, without overlap, is cut."""
    first: dict[object, tuple[int, int]] = {}
    result = []
    for number, text in enumerate(texts):
        units = text.split() if unit == "words" else list(text.encode())
        cut = [False] * len(units)
        for i in range(len(units) - length + 1):
            document, position = first.setdefault(tuple(units[i : i + length]), (number, i))
            if document < number or position + length <= i:
                cut[i : i + length] = [True] * length
        if not any(cut):
            result.append(text)
            continue
        if unit == "bytes":
            ends = np.cumsum([len(character.encode()) for character in text]).tolist()
            kept = [c for c, end in zip(text, ends, strict=True) if not all(cut[end - len(c.encode()) : end])]
            edited = "".join(kept)
        else:
            pieces = re.split(r"(\s+)", text.strip())  # words, and the whitespace after each
            ends_cut = cut[-1]
            kept = [w + gap for w, gap, is_cut in zip(pieces[::2], [*pieces[1::2], ""], cut, strict=True) if not is_cut]
            edited = text[: len(text) - len(text.lstrip())] + "".join(kept)
            edited = edited.rstrip() if ends_cut else edited + text[len(text.rstrip()) :]
        if edited.strip():
            result.append(edited)
    return result


WORDS = st.lists(st.sampled_from(["a", "b", "c", "é", "日本"]), max_size=30)
TEXTS = st.lists(
    st.tuples(WORDS, st.sampled_from([" ", "  ", "\n", "\u3000"])).map(lambda p: p[1].join(p[0])), max_size=8
)


@pytest.mark.parametrize("unit", ["words", "bytes"])
@settings(deadline=None, max_examples=80)
@given(TEXTS, st.integers(2, 9), st.sampled_from([4 << 30, 300]))
@example(["abé", "xabã", "日本x", "月本x"], 3, 4 << 30)
@example(["x a b c", "y x a b c z", "a b c z"], 3, 300)
@example(["a b c d e f", "x a b c d e f y", "d e f a b c"], 3, 4 << 30)
@example(["a " * 40, " a" * 40 + " "], 4, 300)
def test_parity_with_plain_python(unit: str, texts: list[str], length: int, memory: int) -> None:
    """Parity with the definition above, into however many parts the table of windows is divided."""
    assert kept_texts(SubstringDedup(length=length, unit=unit, memory=memory), texts) == expected_texts(
        texts, length, unit
    )


def test_long_repeats_in_real_surroundings() -> None:
    """Parity at the default length: repeats of 30 to 90 words in otherwise distinct texts; those of 50 or more are cut."""
    random_ = random.Random(3)

    def prose(count: int) -> list[str]:
        return [f"w{random_.randrange(3000)}" for _ in range(count)]

    shared = [prose(size) for size in range(30, 90)]
    texts = [
        " ".join(prose(random_.randrange(100)) + random_.choice(shared) + prose(random_.randrange(100)))
        for _ in range(300)
    ]
    kept = kept_texts(SubstringDedup(), texts)
    assert kept == expected_texts(texts, 50, "words")
    assert sum(map(len, kept)) < 0.8 * sum(map(len, texts))


@pytest.mark.parametrize("unit", ["words", "bytes"])
def test_output_does_not_depend_on_jobs_chunks_and_parts(unit: str) -> None:
    """Property: -j, the size of chunks and the parts of the table do not change the output."""
    random_ = random.Random(4)
    texts = [" ".join(random_.choices("abcd", k=120)) for _ in range(150)]
    reference = kept_texts(SubstringDedup(length=9, unit=unit), texts)
    for more, chunk in (({"engine": Local(3)}, 5), ({}, 150), ({"memory": 10_000}, 3)):
        assert kept_texts(SubstringDedup(length=9, unit=unit, **more), texts, chunk) == reference  # type: ignore[arg-type]
    assert sum(map(len, reference)) < sum(map(len, texts))


def test_least_of_windows() -> None:
    """Parity with min() of slices."""
    values = np.random.default_rng(0).integers(0, 2**63, 100).astype(np.uint64)
    for size in (0, 1, 5, 99, 100):
        for width in (1, 2, 3, 7, 26):
            expected = [min(values[i : i + width].tolist()) for i in range(size - width + 1)]
            assert kernels.least_in_windows(values[:size].copy(), width).tolist() == expected


@settings(deadline=None)
@given(st.text(st.sampled_from("ab é日\u3000\n\x1c\u2028🙂"), max_size=30))
def test_words_are_those_of_python(text: str) -> None:
    """Parity with str.split: the same words, and equal hashes only for equal words."""
    data = text.encode()
    with np.errstate(over="ignore"):
        starts, stops, hashes = kernels.words(np.frombuffer(data, np.uint8), classes())
    result = [data[a:b].decode() for a, b in zip(starts, stops, strict=True)]
    assert result == text.split() and len(set(hashes.tolist())) == len(set(result))


@pytest.mark.parametrize("unit", ["words", "bytes"])
def test_hostile_documents(unit: str) -> None:
    """Behaviour: one word a million times, a period of three, a long document twice, many copies: linear time, first kept."""
    random_ = random.Random(5)
    long = " ".join(f"{random_.randrange(10**9)}" for _ in range(200_000))
    copy = " ".join(f"{n}" for n in range(100))
    texts = ["", "a " * 10**6, "a b c " * 10**5, long, "\n", long, *[copy] * 20_000, "..."]
    began = time.process_time()
    kept = kept_texts(SubstringDedup(unit=unit), texts, 1000)
    assert time.process_time() - began < 15
    assert (kept[0], kept[3:]) == ("", [long, "\n", copy, "..."])
    assert len(kept[1]) <= 101 and len(kept[2]) <= 303


def test_invalid_parameters() -> None:
    """Behaviour: usage errors that name the option."""
    for invalid in ({"unit": "tokens"}, {"length": 1}, {"length": 1 << 30}):
        with pytest.raises(UsageError, match=next(iter(invalid))):
            SubstringDedup(**invalid)  # type: ignore[arg-type]

"""Repeated lines and paragraphs: parity with a plain Python definition, hostile input, any number of jobs."""

from __future__ import annotations

import gzip
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import orjson
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from packed import files_of
from rows import Rows, outcome_of

from llmkit.corpus.dedup.kernels.hash_set import HashSet
from llmkit.corpus.dedup.normalise import normaliser
from llmkit.corpus.dedup.passages import PassageDedup
from llmkit.engine.local import Local
from llmkit.errors import LlmkitError, UsageError


def outcome(stage: PassageDedup, texts: Iterable[str], chunk: int = 3) -> tuple[list[str], list[str]]:
    """The kept and the dropped texts."""
    return outcome_of(stage, stage.by, texts, chunk)


def expected_texts(
    texts: list[str], by: str, normalise: str, repeated: int = 0, shortest: int = 1, listed: Iterable[str] = ()
) -> list[str]:
    """The definition: the kept texts, edited or not."""

    def split(text: str) -> list[str]:
        """Passages and the separators after them, alternating."""
        return re.split("(\n)" if by == "lines" else "(\n{2,})", text)

    def key(passage: str) -> str | None:
        collapsed = " ".join(passage.split())
        return (normaliser(normalise)(passage) or collapsed) if len(collapsed) >= max(1, shortest) else None

    documents = Counter(name for text in texts for name in {key(passage) for passage in split(text)[::2]})
    boilerplate, seen, result = {key(entry) for entry in listed} - {None}, set(), []
    for text in texts:
        pieces = split(text)
        kept: list[str] = []
        for passage, gap in zip(pieces[::2], [*pieces[1::2], ""], strict=True):
            name = key(passage)
            cut = name is not None and (
                name in boilerplate or (documents[name] >= repeated if repeated else name in seen)
            )
            seen.add(name)
            if not cut:
                kept += [passage, gap]
        edited = "".join(kept[:-1])
        if edited == text or edited.strip():
            result.append(edited)
    return result


PIECES = st.sampled_from(
    ["a", "b", "Ab", " a", "a ", "ab", "A  b", "12", "3.5", "-", "--", "é", "Σας", "ΣΑΣ", "\u3000", "\r", "\x1c", "日"]
    + ["\n"] * 6
    + ["\n\n", "\n\n\n", "\u1b35", "\U0001d15e", "a b c d e f g h i j k"]
)
TEXTS = st.lists(st.lists(PIECES, max_size=12).map("".join), max_size=10)


@pytest.mark.parametrize("by", ["lines", "paragraphs"])
@pytest.mark.parametrize("normalise", ["none", "whitespace", "loose", "case", "accents,whitespace,numbers"])
@settings(deadline=None, max_examples=60)
@given(TEXTS, st.sampled_from([0, 2, 3]), st.sampled_from([1, 2, 4]))
@example(["x\n\ny", "", "\n", "y\n\n", "\n\ny"], 0, 1)
def test_parity_with_plain_python(by: str, normalise: str, texts: list[str], repeated: int, shortest: int) -> None:
    """Parity with the definition above: first occurrences, passages of many documents, all normalisations and separators."""
    stage = PassageDedup(by=by, normalise=normalise, repeated=repeated, min_characters=shortest)
    assert outcome(stage, texts)[0] == expected_texts(texts, by, normalise, repeated, shortest)


def test_edited_and_unchanged_documents() -> None:
    """Behaviour: the first of equal lines is kept; an edited document keeps its other fields; blank lines and empty
    documents are kept and not counted."""
    texts = ["Menu\n\nfirst\nend", "Menu\n\nsecond\n end", "", "\n \n", "Menu\n \nend", "Menu"]
    kept, dropped = outcome(PassageDedup(), texts)
    assert kept == ["Menu\n\nfirst\nend", "\nsecond", "", "\n \n"]
    assert dropped == ["Menu\n \nend", "Menu"]
    odd = b'{"text":   "own spaces",  "n": 1.50}\n'
    (done,) = PassageDedup().run(Rows([odd, b'{"n": 1, "text": "own spaces\\nmore", "z": [1]}\n']))  # type: ignore[arg-type]
    assert done.kept == odd + b'{"n": 1, "text": "more", "z": [1]}\n'


def test_documents_count_not_occurrences() -> None:
    """Behaviour: --repeated cuts every copy of a line that is in that many documents, the first included, and nothing else."""
    texts = ["menu\na\na\na", "menu\nb", "b\nmenu\nc"]
    assert outcome(PassageDedup(repeated=3), texts)[0] == ["a\na\na", "b", "b\nc"]
    assert outcome(PassageDedup(repeated=2), texts) == (["a\na\na", "c"], ["menu\nb"])


def test_lists_of_boilerplate(tmp_path: Path) -> None:
    """Behaviour: listed lines are cut everywhere, in either mode; a missing list is named."""
    (tmp_path / "list.txt").write_text("# menus\nRead   more\n\nCookies\n")
    listed = (str(tmp_path / "list.txt"),)
    texts = ["read more\na", "Read more\nb", "Cookies\nb", "c"]
    assert outcome(PassageDedup(boilerplate=listed), texts)[0] == ["read more\na", "b", "c"]
    assert outcome(PassageDedup(boilerplate=listed, normalise="loose"), texts)[0] == ["a", "b", "c"]
    assert outcome(PassageDedup(boilerplate=listed, repeated=4), texts)[0] == ["read more\na", "b", "b", "c"]
    with pytest.raises(LlmkitError, match=r"nowhere\.txt"):
        PassageDedup(boilerplate=(str(tmp_path / "nowhere.txt"),)).warm_up()


@pytest.mark.parametrize("more", [{}, {"repeated": 3}, {"by": "paragraphs", "normalise": "loose"}])
def test_output_does_not_depend_on_jobs_and_chunks(more: dict[str, object]) -> None:
    """Property: -j and the size of chunks do not change the output."""
    texts = ["\n\n".join(f"line {chr(97 + i * j % 23)} {'x' * (i % 7)}" for j in range(9)) for i in range(200)]
    reference = outcome(PassageDedup(**more), texts)  # type: ignore[arg-type]
    assert (
        reference == outcome(PassageDedup(engine=Local(3), **more), texts) == outcome(PassageDedup(**more), texts, 200)
    )  # type: ignore[arg-type]
    assert sum(map(len, reference[0])) < 0.9 * sum(map(len, texts))


@pytest.mark.parametrize("repeated", [0, 2])
def test_hostile_documents(repeated: int) -> None:
    """Behaviour: a million equal lines, a document of 20 MB in one line, one of only newlines: at most linear time."""
    texts = ["same line\n" * 10**6, "word " * 4_000_000, "\n" * 10**6, "same line", "word " * 4_000_000 + "end"]
    kept, dropped = outcome(PassageDedup(repeated=repeated), texts, 1)
    if repeated:
        assert kept == texts[1:3] + texts[4:] and dropped == [texts[0], "same line"]
    else:
        assert kept[0] == "same line\n" and kept[1:] == texts[1:3] + texts[4:] and dropped == ["same line"]


def test_the_table_grows() -> None:
    """Parity with a Python set and Counter while growing from 4,096 slots; at least 35 % of the slots are used."""
    random = np.random.default_rng(0)
    seen, plain, counts = HashSet(np.uint32), set(), Counter()
    for size in [0, 1, 10, 5000, 3, 40_000, 1000]:
        hashes = random.integers(0, 30_000, size).astype(np.uint64) << np.uint64(20)
        expected = [h != 0 and (h in plain or plain.add(h) is not None) for h in hashes.tolist()]
        counts.update(hashes.tolist())
        assert seen.add(hashes).tolist() == expected
    assert seen.used == len(plain) and 0.35 * len(seen.keys) < seen.used < 0.7 * len(seen.keys)
    names = np.array(sorted(plain), np.uint64)
    assert seen.frequent(names, 2).tolist() == [counts[h] >= 2 for h in names.tolist()]


def test_invalid_parameters() -> None:
    """Behaviour: usage errors that name the option."""
    for invalid in ({"repeated": 1}, {"repeated": -3}, {"normalise": "lose"}, {"by": "sentences"}):
        with pytest.raises(UsageError):
            PassageDedup(**invalid)  # type: ignore[arg-type]


def test_dolma_paragraphs(shared_data: Path) -> None:
    """Parity with dolma's expected output of deduplication by paragraph (our lines): the same lines are marked as repeats."""
    files = files_of(shared_data / "text" / "dolma_tests_provided_expected.tar.zst")
    provided, expected = (
        [orjson.loads(line) for line in gzip.decompress(files[f"tests/data/{name}.json.gz"]).splitlines()]
        for name in ("provided/deduper/documents/000", "expected/dedupe-paragraphs")
    )
    stage, seen = PassageDedup(normalise="none"), HashSet()
    for row, marked in zip(provided, expected, strict=True):
        data = row["text"].encode()
        starts, _ = stage.split(np.frombuffer(data, np.uint8))
        found = [len(data[: starts[i]].decode()) for i in np.flatnonzero(seen.add(stage.hashes(row["text"])))]
        assert found == [start for start, _, _ in marked["attributes"]["bff_duplicate_paragraph_spans"]]
    assert any(row["attributes"]["bff_duplicate_paragraph_spans"] for row in expected)

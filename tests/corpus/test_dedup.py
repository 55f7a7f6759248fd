"""Duplicates: signatures, candidates, verification, survivors."""

from __future__ import annotations

import gzip
import io
import random
import tarfile
from collections.abc import Iterable
from itertools import combinations
from pathlib import Path

import numpy as np
import orjson
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.corpus.dedup import METHODS, Deduplicator
from llmkit.corpus.dedup.bands import MAX_CHAIN, BandTable
from llmkit.corpus.dedup.exact import Exact, text_key
from llmkit.corpus.dedup.minhash import MinHash, Spool
from llmkit.corpus.kernels.minhash import Shingles, functions, jaccard, sketch
from llmkit.errors import UsageError
from llmkit.io.documents import Chunk, ReadOptions


class Rows:
    """A reader of rows in memory, cut into chunks."""

    def __init__(self, rows: Iterable[dict[str, object]], chunk: int = 7) -> None:
        self.options = ReadOptions()
        self._lines = [orjson.dumps(row) + b"\n" for row in rows]
        self._chunk = chunk

    def chunks(self) -> Iterable[Chunk]:
        for start in range(0, len(self._lines), self._chunk):
            yield Chunk("rows", start + 1, b"".join(self._lines[start : start + self._chunk]))


def deduplicate(rows: list[dict[str, object]], *methods: object, jobs: int = 1) -> tuple[list[dict], list[dict]]:
    """Kept and rejected rows."""
    done = list(Deduplicator(methods, jobs, remember_ids=True).run(Rows(rows)))  # type: ignore[arg-type]
    return (
        [orjson.loads(line) for part in done for line in part.kept.splitlines()],
        [orjson.loads(line) for part in done for line in part.rejects.splitlines()],
    )


def texts_to_rows(texts: Iterable[str]) -> list[dict[str, object]]:
    return [{"id": f"d{i}", "text": text} for i, text in enumerate(texts)]


def spell(number: int) -> str:
    """Letters for a number (numbers themselves are all one to the normalisation)."""
    return "".join("abcdefghij"[int(digit)] for digit in str(number))


def edited(tokens: list[str], share: float, seed: object) -> list[str]:
    """A copy in which about `share` of the words are replaced."""
    random_ = random.Random(repr(seed))
    return [f"x{spell(random_.randrange(10**9))}" if random_.random() < share else token for token in tokens]


def prose(count: int, seed: object) -> list[str]:
    return [f"w{spell(number)}" for number in random.Random(repr(seed)).choices(range(5000), k=count)]


# ---- exact


def test_exact_keeps_the_first_and_names_it() -> None:
    """Behaviour: the first of equal texts stays, in input order; rejects say which."""
    kept, rejects = deduplicate(texts_to_rows(["a", "b", "a", "c", "b", "A"]), Exact())
    assert [row["id"] for row in kept] == ["d0", "d1", "d3", "d5"]
    assert [(row["id"], row["duplicate_of"], row["reason"], row["similarity"]) for row in rejects] == [
        ("d2", "d0", "exact", 1.0),
        ("d4", "d1", "exact", 1.0),
    ]


@pytest.mark.parametrize(("normalise", "left"), [("none", 5), ("whitespace", 4), ("loose", 2)])
def test_exact_after_normalisation(normalise: str, left: int) -> None:
    """Behaviour: each normalisation finds more; texts of marks alone, which it empties, are compared as they are."""
    rows = texts_to_rows(["Hello  world 1", "Hello world 1", "hello, wörld 23!", "!!!", "???"])
    expected = left + (1 if normalise == "loose" else 0)
    assert len(deduplicate(rows, Exact(normalise=normalise))[0]) == expected


def test_exact_by_another_field() -> None:
    """Behaviour: --key compares that field, of any type; documents without it stay."""
    rows = [
        {"text": "a", "url": "u"},
        {"text": "b", "url": "u"},
        {"text": "c"},
        {"text": "c", "url": None},
        {"text": "d", "url": {"x": 1, "y": 2}},
        {"text": "e", "url": {"y": 2, "x": 1}},
    ]
    kept, rejects = deduplicate(rows, Exact(key="url"))
    assert [row["text"] for row in kept] == ["a", "c", "c", "d"]
    assert len(rejects) == 2


@given(st.lists(st.text(max_size=3), max_size=30))
def test_exact_is_what_a_dictionary_does(texts: list[str]) -> None:
    """Property: the kept texts are the distinct ones in order of first occurrence."""
    kept, rejects = deduplicate(texts_to_rows(texts), Exact())
    assert [row["text"] for row in kept] == list(dict.fromkeys(texts))
    assert len(kept) + len(rejects) == len(texts)


def test_unknown_names() -> None:
    """Behaviour: methods and normalisations are suggested."""
    with pytest.raises(UsageError) as caught:
        METHODS.get("minhsh")
    assert "minhash" in caught.value.hint
    with pytest.raises(UsageError) as caught:
        Exact(normalise="lose")
    assert "loose" in caught.value.hint


# ---- minhash


def shingles(text: str) -> Shingles:
    return sketch(text, 5, functions(0, 112, 32), 14, 32).shingles


@pytest.mark.parametrize("bits", [32, 61])
def test_near_duplicates_are_found_and_verified(bits: int) -> None:
    """Property, by brute force: copies are all found, near copies mostly, and every removed document has a kept one at the threshold."""
    originals = [prose(150, ("text", i)) for i in range(60)]
    texts = [" ".join(tokens) for tokens in originals]
    texts += [" ".join(tokens).upper().replace(" ", ",  ") for tokens in originals[:20]]  # equal after normalisation
    texts += [" ".join(edited(tokens, 0.02, i)) for i, tokens in enumerate(originals[20:40])]
    texts += [" ".join(edited(tokens, 0.3, i)) for i, tokens in enumerate(originals[40:])]
    rows = texts_to_rows(texts)
    kept, rejects = deduplicate(rows, MinHash(threshold=0.75, bits=bits))
    sets = {row["id"]: shingles(str(row["text"])) for row in rows}
    removed = {row["id"]: row for row in rejects}
    assert {f"d{i}" for i in range(60, 80)} <= set(removed)
    near = {f"d{i}": jaccard(sets[f"d{i}"], sets[f"d{i - 60}"]) for i in range(80, 100)}
    likely = [name for name, similarity in near.items() if similarity > 0.85]
    assert len(likely) >= 10 and sum(name in removed for name in likely) >= 0.9 * len(likely)
    assert not {f"d{i}" for i in range(100, 120)} & set(removed)
    kept_ids = {row["id"] for row in kept}
    for name, row in removed.items():
        similarity = jaccard(sets[name], sets[row["duplicate_of"]])
        assert row["duplicate_of"] in kept_ids and row["similarity"] == similarity >= 0.75
    assert [row["id"] for row in kept] == [row["id"] for row in rows if row["id"] not in removed]


def test_without_verification_candidates_go() -> None:
    """Behaviour: verify=False removes every document that shares a band, and measures no similarity."""
    base = prose(400, 1)
    rows = texts_to_rows([" ".join(base), *(" ".join(edited(base, 0.08, i)) for i in range(60))])
    _, verified = deduplicate(rows, MinHash(threshold=0.95))
    _, trusted = deduplicate(rows, MinHash(threshold=0.95, verify=False))
    assert len(verified) < len(trusted)
    assert {row["similarity"] for row in trusted} == {None}


def test_short_documents_are_compared_as_a_whole() -> None:
    """Behaviour: below five words there is no shingle; the same words, in the sense of the normalisation, are duplicates."""
    kept, rejects = deduplicate(
        texts_to_rows(["Read more...", "read more", "Read less", "", "", "!!!", "???", "!!!"]), MinHash()
    )
    assert [row["id"] for row in kept] == ["d0", "d2", "d3", "d5", "d6"]
    assert {row["reason"] for row in rejects} == {"exact"}


def test_methods_in_order_share_their_survivors() -> None:
    """Behaviour: what one method removes is no survivor for the other: every `duplicate_of` is a kept document."""
    base = prose(200, 2)
    near = " ".join([*base[:-1], "changed"])
    rows = texts_to_rows([" ".join(base), near, near, "other words in a text of its own"])
    kept, rejects = deduplicate(rows, Exact(), MinHash())
    assert [row["id"] for row in kept] == ["d0", "d3"]
    assert [(row["reason"], row["duplicate_of"]) for row in rejects] == [("minhash", "d0"), ("minhash", "d0")]


@pytest.mark.parametrize("method", [Exact(normalise="loose"), MinHash()])
def test_any_number_of_jobs_gives_the_same(method: object) -> None:
    """Property: -j decides nothing."""
    base = [prose(60, i % 17) for i in range(80)]
    rows = texts_to_rows(" ".join(edited(tokens, 0.005, i)) for i, tokens in enumerate(base))
    assert deduplicate(rows, method) == deduplicate(rows, method, jobs=3)
    assert len(deduplicate(rows, method)[0]) < 80


def test_order_changes_survivors_not_clusters() -> None:
    """Property: with well separated groups, the groups are the same in any order of the input, and the first of each stays."""
    rows = texts_to_rows(" ".join(edited(prose(300, i % 10), 0.001, i)) for i in range(50))
    for seed in range(3):
        random.Random(seed).shuffle(rows)
        kept, rejects = deduplicate(rows, MinHash())
        group = {row["id"]: int(str(row["id"])[1:]) % 10 for row in rows}
        assert sorted(group[row["id"]] for row in kept) == list(range(10))
        assert all(group[row["id"]] == group[row["duplicate_of"]] for row in rejects)
        first = {group[row["id"]]: row["id"] for row in reversed(rows)}
        assert {row["id"] for row in kept} == set(first.values())


@pytest.mark.parametrize(
    "settings_", [{"threshold": 0}, {"threshold": 1.1}, {"ngram": 0}, {"bands": 0}, {"rows": 2000}, {"bits": 64}]
)
def test_senseless_parameters(settings_: dict[str, float]) -> None:
    """Behaviour: a usage error that names the parameter."""
    with pytest.raises(UsageError, match=next(iter(settings_))):
        MinHash(**settings_)  # type: ignore[arg-type]


# ---- table of bands


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(*[st.integers(0, 5)] * 3), max_size=MAX_CHAIN))
def test_band_table_is_what_dictionaries_do(documents: list[tuple[int, int, int]]) -> None:
    """Property: candidates are the documents that share a key, more shared keys first, then earlier; key 0 and growth included."""
    table = BandTable(3, slots=4)
    spread = [0, 2**63, 2**64 - 1, 4, 8, 5]  # keys that want the same slots
    filed: list[tuple[int, ...]] = []
    for values in documents:
        keys = tuple((spread[value] + (band << 32)) % 2**64 for band, value in enumerate(values))
        met = {i: sum(x == y for x, y in zip(keys, other, strict=True)) for i, other in enumerate(filed)}
        expected = sorted((i for i in met if met[i]), key=lambda i: (-met[i], i))
        assert table.candidates(keys) == expected
        table.add(keys)
        filed.append(keys)


def test_many_unlike_documents_in_one_band_stay_bounded() -> None:
    """Behaviour: a band that everyone shares costs a bounded number of comparisons."""
    table = BandTable(2)
    for number in range(3000):
        table.add([7, 1000 + number])
    assert len(table.candidates([7, 5])) == MAX_CHAIN


def test_spool_gives_back_what_was_put_in() -> None:
    """Behaviour: arrays of any length, in any order."""
    spool = Spool(None)
    arrays = [np.arange(n, dtype=np.uint32) * 7 for n in (0, 5, 1, 3000, 0, 2)] * 300
    for values in arrays:
        spool.append(values)
    for number in (1799, 0, 3, 900, 1):
        assert spool.read(number).tolist() == arrays[number].tolist()
    spool.close()


# ---- real text


def unpack(path: Path) -> dict[str, bytes]:
    packed = zstandard.ZstdDecompressor().stream_reader(path.read_bytes()).read()
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        return {
            Path(m.name).name if "license" in m.name else m.name: archive.extractfile(m).read()
            for m in archive
            if m.isfile()
        }  # type: ignore[union-attr]


def test_near_duplicate_licences(shared_data: Path) -> None:
    """Parity with the fixture's own expectation: of two copies of one licence with other names and line breaks the first stays, the third differs."""
    found = unpack(shared_data / "text" / "cs336_data_fixtures.tar.zst")
    names = ["rails_mit_license.txt", "react_mit_license.txt", "pytorch_license.txt"]
    rows = [{"id": name, "text": found[name].decode()} for name in names]
    kept, rejects = deduplicate(rows, MinHash(threshold=0.75))
    assert [row["id"] for row in kept] == [names[0], names[2]]
    assert [row["duplicate_of"] for row in rejects] == [names[0]] and rejects[0]["similarity"] > 0.75


def test_dolma_duplicates_by_url(shared_data: Path) -> None:
    """Parity with dolma's expected output of deduplication by a key: the documents that it marks are the ones removed."""
    files = unpack(shared_data / "text" / "dolma_tests_provided_expected.tar.zst")
    provided = gzip.decompress(files["tests/data/provided/deduper/documents/000.json.gz"]).splitlines()
    expected = gzip.decompress(files["tests/data/expected/dedupe-by-url.json.gz"]).splitlines()
    marked = [row["id"] for row in map(orjson.loads, expected) if row["attributes"].get("bff_duplicate_url")]
    kept, rejects = deduplicate([orjson.loads(line) for line in provided], Exact(key="metadata.url"))
    assert [row["id"] for row in rejects] == marked and len(marked) == 1
    assert len(kept) == len(provided) - 1


def test_pairs_in_the_sample_are_distinct() -> None:
    """Property: the word source of these tests makes texts that share no 5-gram, so that what it finds was put there."""
    sets = [shingles(" ".join(prose(150, ("text", i)))) for i in range(30)]
    assert max(jaccard(a, b) for a, b in combinations(sets, 2)) < 0.02
    assert text_key("a") != text_key("b")

"""Duplicates: signatures, candidates, verification, survivors."""

from __future__ import annotations

import gzip
import random
from collections.abc import Callable, Iterable
from itertools import combinations
from pathlib import Path

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packed import files_of
from rows import Rows, texts_to_rows

from llmkit.corpus.dedup.exact import Exact, StreamingDedup, stored_key, transient_key
from llmkit.corpus.dedup.kernels import clusters as kernels
from llmkit.corpus.dedup.kernels.minhash import Shingles, functions, jaccard, sketch
from llmkit.corpus.dedup.local import NEIGHBOURS
from llmkit.corpus.dedup.minhash import MinHash, bands_for
from llmkit.corpus.dedup.results import ChunkResult
from llmkit.corpus.dedup.temp_columns import Blobs, Column
from llmkit.corpus.dedup.two_pass import TwoPassDedup
from llmkit.engine.local import Local
from llmkit.errors import UsageError


def deduplicate(
    rows: list[dict[str, object]],
    exact: Exact | None = None,
    near: MinHash | None = None,
    against: object = None,
    **more: object,
) -> tuple[list[dict], list[dict]]:
    """Kept and rejected rows of deduplication in two passes."""
    dedup = TwoPassDedup(exact=exact, near=near, rejects=True, **more)  # type: ignore[arg-type]
    reference = None if against is None else Rows(against)  # type: ignore[arg-type]
    return outcome(dedup, dedup.run(Rows(rows), reference))  # type: ignore[arg-type]


def streamed(rows: list[dict[str, object]], exact: Exact, **more: object) -> tuple[list[dict], list[dict]]:
    """Kept and rejected rows of exact deduplication in one pass."""
    stream = StreamingDedup(exact=exact, rejects=True, **more)  # type: ignore[arg-type]
    return outcome(stream, stream.run(Rows(rows)))  # type: ignore[arg-type]


def outcome(stage: TwoPassDedup | StreamingDedup, run: Iterable[ChunkResult]) -> tuple[list[dict], list[dict]]:
    results = list(run)
    kept = [orjson.loads(line) for result in results for line in result.kept.splitlines()]
    rejects = [orjson.loads(line) for result in results for line in result.rejects.splitlines()]
    assert stage.kept == len(kept) and sum(result.documents for result in results) == stage.documents
    return kept, rejects


def spell(number: int) -> str:
    """Letters for a number (the normalisation makes all numbers equal)."""
    return "".join("abcdefghij"[int(digit)] for digit in str(number))


def edited(tokens: list[str], share: float, seed: object) -> list[str]:
    """A copy in which about `share` of the words are replaced."""
    random_ = random.Random(repr(seed))
    return [f"x{spell(random_.randrange(10**9))}" if random_.random() < share else token for token in tokens]


def prose(count: int, seed: object) -> list[str]:
    return [f"w{spell(number)}" for number in random.Random(repr(seed)).choices(range(5000), k=count)]


# ---- exact


@pytest.mark.parametrize("run", [deduplicate, streamed])
def test_exact_keeps_the_first_and_names_it(run: Callable[..., tuple[list[dict], list[dict]]]) -> None:
    """Behaviour: the first of equal texts in input order is kept; rejects name it."""
    kept, rejects = run(texts_to_rows(["a", "b", "a", "c", "b", "A"]), Exact())
    assert [row["id"] for row in kept] == ["d0", "d1", "d3", "d5"]
    assert [(row["id"], row["duplicate_of"], row["reason"], row["similarity"]) for row in rejects] == [
        ("d2", "d0", "exact", 1.0),
        ("d4", "d1", "exact", 1.0),
    ]


@pytest.mark.parametrize(("normalise", "kept"), [("none", 5), ("whitespace", 4), ("loose", 2)])
def test_exact_after_normalisation(normalise: str, kept: int) -> None:
    """Behaviour: each normalisation finds more; texts of only punctuation, which it empties, are compared unchanged."""
    rows = texts_to_rows(["Hello  world 1", "Hello world 1", "hello, wörld 23!", "!!!", "???"])
    expected = kept + (1 if normalise == "loose" else 0)
    assert len(deduplicate(rows, Exact(normalise=normalise))[0]) == expected
    assert len(streamed(rows, Exact(normalise=normalise))[0]) == expected


def test_exact_by_another_field() -> None:
    """Behaviour: --key compares that field, of any type; documents without it are kept."""
    rows = [
        {"text": "a", "url": "u"},
        {"text": "b", "url": "u"},
        {"text": "c"},
        {"text": "c", "url": None},
        {"text": "d", "url": {"x": 1, "y": 2}},
        {"text": "e", "url": {"y": 2, "x": 1}},
    ]
    for run in (deduplicate, streamed):
        kept, rejects = run(rows, Exact(key="url"))
        assert [row["text"] for row in kept] == ["a", "c", "c", "d"]
        assert len(rejects) == 2


@settings(deadline=None, max_examples=50)
@given(st.lists(st.text(max_size=3), max_size=30))
def test_exact_is_what_a_dictionary_does(texts: list[str]) -> None:
    """Property: the kept texts are the distinct ones in order of first occurrence."""
    for run in (deduplicate, streamed):
        kept, rejects = run(texts_to_rows(texts), Exact())
        assert [row["text"] for row in kept] == list(dict.fromkeys(texts))
        assert len(kept) + len(rejects) == len(texts)


def test_unknown_names() -> None:
    """Behaviour: normalisations are suggested."""
    with pytest.raises(UsageError) as caught:
        Exact(normalise="lose")
    assert "loose" in caught.value.hint


# ---- minhash


def shingles(text: str) -> Shingles:
    return sketch(text, 5, functions(0, 112, 32), 14, 32).shingles


@pytest.mark.parametrize("bits", [32, 61])
def test_near_duplicates_are_found_and_verified(bits: int) -> None:
    """Property, by brute force: all copies and most near copies are found; every removed document has a kept one at the
    threshold."""
    originals = [prose(150, ("text", i)) for i in range(60)]
    texts = [" ".join(tokens) for tokens in originals]
    texts += [" ".join(tokens).upper().replace(" ", ",  ") for tokens in originals[:20]]  # equal after normalisation
    texts += [" ".join(edited(tokens, 0.02, i)) for i, tokens in enumerate(originals[20:40])]
    texts += [" ".join(edited(tokens, 0.3, i)) for i, tokens in enumerate(originals[40:])]
    rows = texts_to_rows(texts)
    kept, rejects = deduplicate(rows, near=MinHash(threshold=0.75, bits=bits))
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


def test_without_verification_candidates_are_removed() -> None:
    """Behaviour: verify=False removes every document that shares a band, and measures no similarity."""
    base = prose(400, 1)
    rows = texts_to_rows([" ".join(base), *(" ".join(edited(base, 0.08, i)) for i in range(60))])
    _, verified = deduplicate(rows, near=MinHash(threshold=0.95))
    _, trusted = deduplicate(rows, near=MinHash(threshold=0.95, verify=False))
    assert len(verified) < len(trusted)
    assert {row["similarity"] for row in trusted} == {None}


def test_short_documents_are_compared_as_a_whole() -> None:
    """Behaviour: below five words there are no shingles; the same normalised words are duplicates."""
    kept, rejects = deduplicate(
        texts_to_rows(["Read more...", "read more", "Read less", "", "", "!!!", "???", "!!!"]), near=MinHash()
    )
    assert [row["id"] for row in kept] == ["d0", "d2", "d3", "d5", "d6"]
    assert {(row["reason"], row["similarity"]) for row in rejects} == {("minhash", 1.0)}


def test_methods_share_their_survivors() -> None:
    """Behaviour: a document removed by one method does not survive for the other: every `duplicate_of` is a kept document."""
    base = prose(200, 2)
    near = " ".join([*base[:-1], "changed"])
    rows = texts_to_rows([" ".join(base), near, near, "other words in a text by itself"])
    kept, rejects = deduplicate(rows, Exact(), MinHash())
    assert [row["id"] for row in kept] == ["d0", "d3"]
    assert [(row["reason"], row["duplicate_of"]) for row in rejects] == [("minhash", "d0"), ("minhash", "d0")]


@pytest.mark.parametrize("method", [{"exact": Exact(normalise="loose")}, {"near": MinHash()}])
def test_output_does_not_depend_on_jobs(method: dict[str, object]) -> None:
    """Property: -j does not change the output."""
    base = [prose(60, i % 17) for i in range(80)]
    rows = texts_to_rows(" ".join(edited(tokens, 0.005, i)) for i, tokens in enumerate(base))
    assert deduplicate(rows, **method) == deduplicate(rows, **method, engine=Local(3))
    assert len(deduplicate(rows, **method)[0]) < 80


def test_order_changes_survivors_not_clusters() -> None:
    """Property: well separated clusters are the same in any order of the input, and the first of each is kept."""
    rows = texts_to_rows(" ".join(edited(prose(300, i % 10), 0.001, i)) for i in range(50))
    for seed in range(3):
        random.Random(seed).shuffle(rows)
        kept, rejects = deduplicate(rows, near=MinHash())
        group = {row["id"]: int(str(row["id"])[1:]) % 10 for row in rows}
        assert sorted(group[row["id"]] for row in kept) == list(range(10))
        assert all(group[row["id"]] == group[row["duplicate_of"]] for row in rejects)
        first = {group[row["id"]]: row["id"] for row in reversed(rows)}
        assert {row["id"] for row in kept} == set(first.values())


@pytest.mark.parametrize(
    "settings_", [{"threshold": 0}, {"threshold": 1.1}, {"ngram": 0}, {"bands": 0}, {"rows": 2000}, {"bits": 64}]
)
def test_invalid_parameters(settings_: dict[str, float]) -> None:
    """Behaviour: a usage error that names the parameter."""
    with pytest.raises(UsageError, match=next(iter(settings_))):
        MinHash(**settings_)  # type: ignore[arg-type]


# ---- survivors


def family(count: int) -> list[dict[str, object]]:
    """A chain of texts, each similar to the next and dissimilar to distant ones; `rank` and length grow with the number."""
    tokens = prose(300, "family")
    return [
        {
            "id": f"d{i}",
            "text": " ".join(tokens[8 * i : 8 * i + 200] + ["end"] * 5 * i),
            "rank": i % 4,
            "source": f"s{i % 2}",
        }
        for i in range(count)
    ]


def test_which_survives() -> None:
    """Behaviour: the first, the longest or the best by a field survives, the first of ties; a missing field is named."""
    rows = [
        {"id": f"d{i}", "text": " ".join(prose(150, "one") + ["x"] * extra), "n": n}
        for i, (extra, n) in enumerate([(0, 1), (2, 5), (2, 5), (1, 2)])
    ]
    for keep, survivor in (("first", "d0"), ("longest", "d1"), ("best:n", "d1")):
        kept, rejects = deduplicate(rows, near=MinHash(), keep=keep)
        assert [row["id"] for row in kept] == [survivor]
        assert {row["duplicate_of"] for row in rejects} == {survivor}
        assert [row["id"] for row in rejects] == [row["id"] for row in rows if row["id"] != survivor]
    results = TwoPassDedup(near=MinHash(), keep="best:m").run(Rows(rows))  # type: ignore[arg-type]
    bad = [line for result in results for line in result.bad]
    assert len(bad) == len(rows) and all("best:m: no such field" in line.reason for line in bad)
    for invalid in ({"keep": "last"}, {"keep": "best:"}, {"clusters": "cliques"}):
        with pytest.raises(UsageError):
            TwoPassDedup(**invalid)  # type: ignore[arg-type]


def test_stars_and_components() -> None:
    """Property: with stars every removed document is similar to a kept one; components remove whatever a chain connects."""
    rows = family(10)
    near = MinHash(threshold=0.6, bands=50, rows=2)
    stars, removed = deduplicate(rows, near=near)
    sets = {row["id"]: shingles(str(row["text"])) for row in rows}
    assert 1 < len(stars) < 10
    for row in removed:
        assert jaccard(sets[row["id"]], sets[row["duplicate_of"]]) == row["similarity"] >= 0.6
    components, _ = deduplicate(rows, near=near, clusters="components")
    assert [row["id"] for row in components] == ["d0"] and components[0]["duplicates"] == 10


def test_components_are_those_of_union_find() -> None:
    """Parity with a plain union-find over all pairs at the threshold, and stars with a plain loop over survivors."""
    random_ = random.Random(5)
    base = [prose(80, i) for i in range(12)]
    rows = texts_to_rows(" ".join(edited(random_.choice(base), random_.choice([0, 0.01, 0.04]), i)) for i in range(90))
    sets = [shingles(str(row["text"])) for row in rows]
    near = MinHash(threshold=0.6, bands=100, rows=1)  # finds all these pairs
    parents = list(range(len(rows)))

    def root(i: int) -> int:
        return i if parents[i] == i else root(parents[i])

    survivors: list[int] = []
    for i in range(len(rows)):
        similar = [j for j in range(i) if jaccard(sets[i], sets[j]) >= 0.6]
        if not set(similar) & set(survivors):
            survivors.append(i)
        for j in similar:
            a, b = sorted((root(i), root(j)))
            parents[b] = a
    kept, _ = deduplicate(rows, near=near)
    assert [row["id"] for row in kept] == [f"d{i}" for i in survivors]
    kept, _ = deduplicate(rows, near=near, clusters="components")
    assert [row["id"] for row in kept] == [f"d{i}" for i in range(len(rows)) if root(i) == i]


def test_fields_written_on_documents() -> None:
    """Behaviour: numbers add up over runs; --annotate drops nothing and writes cluster, survivor and similarity."""
    rows = texts_to_rows(["a text of some six words", "A text of some six words!", "another text of six other words"])
    kept, _ = deduplicate(rows, near=MinHash())
    assert [row.get("duplicates") for row in kept] == [2, None] and "cluster" not in kept[1]
    again, _ = deduplicate([*kept, rows[0]], near=MinHash())
    assert [row.get("duplicates") for row in again] == [3, None] and again[0]["cluster"] == kept[0]["cluster"]
    plain, _ = deduplicate(rows, near=MinHash(), write_counts=False)
    assert plain == [rows[0], rows[2]]
    marked, rejects = deduplicate(rows, near=MinHash(), annotate=True)
    assert rejects == [] and [row["id"] for row in marked] == ["d0", "d1", "d2"]
    assert marked[0] == rows[0] | {"duplicates": 2, "cluster": kept[0]["cluster"]}
    fields = {"cluster": kept[0]["cluster"], "reason": "minhash", "duplicate_of": "d0", "similarity": 1.0}
    assert marked[1] == rows[1] | fields
    assert marked[2] == rows[2]


@pytest.mark.parametrize("method", [{"exact": Exact()}, {"near": MinHash()}])
def test_groups_and_reference_documents(method: dict[str, object]) -> None:
    """Behaviour: only documents that agree in the group field are compared; those of --against always win and are not
    written."""
    rows = [{"id": f"d{i}", "text": "the same six words as ever", "source": source} for i, source in enumerate("aabb")]
    kept, rejects = deduplicate(rows, **method, group="source")
    assert [row["id"] for row in kept] == ["d0", "d2"] and [row["duplicate_of"] for row in rejects] == ["d0", "d2"]
    kept, rejects = deduplicate(
        rows, **method, against=[{"id": "old", "text": "the same six words as ever"}], keep="longest"
    )
    assert kept == [] and [row["duplicate_of"] for row in rejects] == ["old"] * 4
    other = {"id": "new", "text": "six words that nobody wrote before"}
    kept, _ = deduplicate([other], **method, against=rows)
    assert kept == [other]


def test_words_whose_first_document_was_removed_by_its_key() -> None:
    """Behaviour: near duplicates of equal words are found even if the first such document is a duplicate by its key;
    --annotate with --no-counts writes no numbers; a document without a key is in no cluster."""
    body = " ".join(prose(150, "key"))
    rows = [
        {"id": "k", "url": "a", "text": body},
        {"id": "f", "url": "a", "text": body + " zzz"},
        {"id": "d", "url": "b", "text": body + " zzz"},
    ]
    kept, rejects = deduplicate(rows, exact=Exact(key="url"), near=MinHash())
    assert [row["id"] for row in kept] == ["k"] and [row["reason"] for row in rejects] == ["exact", "minhash"]
    plain, _ = deduplicate(rows, near=MinHash(), annotate=True, write_counts=False)
    assert not any("cluster" in row or "duplicates" in row for row in plain)
    rows = [{"id": f"n{i}", "text": "a b", "duplicates": 3} for i in range(2)]
    assert deduplicate(rows, exact=Exact(key="url"))[0] == rows
    _, rejects = deduplicate(family(10), near=MinHash(threshold=0.6, bands=50, rows=2), clusters="components")
    assert {row["similarity"] for row in rejects} == {None}
    seen = [{"id": "old", "text": body}]
    assert deduplicate([{"id": "x", "text": body, "n": 1}], near=MinHash(), against=seen, keep="best:n")[0] == []


def test_sorting_in_parts() -> None:
    """Property: sorting in parts, with little memory, does not change the output."""
    rows = texts_to_rows(" ".join(edited(prose(60, i % 17), 0.005, i)) for i in range(80))
    assert deduplicate(rows, near=MinHash()) == deduplicate(rows, near=MinHash(), memory=200)


def test_pairs_of_a_band() -> None:
    """Parity with a plain loop: each document with the first ones of its key and those just before; bounded for any number."""
    keys = np.sort(np.random.default_rng(1).integers(0, 6, 300)).astype(np.uint64)
    documents = np.arange(300) * 3
    expected = set()
    for i in range(300):
        group = [j for j in range(i) if keys[j] == keys[i]]
        expected |= {(int(documents[i]), int(documents[j])) for j in group[:5] + group[-5:]}
    pairs = kernels.pairs(keys, documents, 5).tolist()
    assert len(pairs) == len(set(pairs)) and {(pair >> 32, pair & 0xFFFFFFFF) for pair in pairs} == expected
    assert len(kernels.pairs(np.zeros(3000, np.uint64), np.arange(3000), NEIGHBOURS)) < 3000 * 2 * NEIGHBOURS


def test_a_hundred_thousand_copies() -> None:
    """Behaviour: many copies of one text cost no more than as many different texts."""
    rows = [{"id": "copy", "text": "one short text that everybody copies from everybody else"}] * 100_000
    kept, rejects = deduplicate(rows, near=MinHash())
    assert len(kept) == 1 and kept[0]["duplicates"] == 100_000 and len(rejects) == 99_999


def test_bands_by_threshold() -> None:
    """Behaviour: FineWeb's shape at 0.75; other shapes find at least as many pairs with at most 112 functions."""
    assert bands_for(0.75) == (14, 8)
    for threshold in (0.05, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99, 1):
        bands, rows = bands_for(threshold)
        assert bands * rows <= 112 and (rows == 1 or 1 - (1 - threshold**rows) ** bands >= 0.77)


def test_temporary_columns_round_trip() -> None:
    """Behaviour: numbers and byte strings of any length, in any order."""
    column, blobs = Column(np.uint32), Blobs()
    assert len(column.array()) == 0
    parts = [np.arange(n, dtype=np.uint32) * 7 for n in (0, 5, 1, 3000, 0, 2)] * 300
    for values in parts:
        column.append(values)
        blobs.append([values.tobytes(), b"x"])
    assert column.array().tolist() == np.concatenate(parts).tolist()
    read = blobs.read()
    for number in (1799, 0, 3, 900, 1):
        assert read[2 * number] == parts[number].tobytes() and read[2 * number + 1] == b"x"
    column.close()
    blobs.close()


# ---- real text


def test_near_duplicate_licences(shared_data: Path) -> None:
    """Parity with the fixture's expectation: two copies of a licence with other names and line breaks, and another licence."""
    files = {
        Path(name).name: data for name, data in files_of(shared_data / "text" / "cs336_data_fixtures.tar.zst").items()
    }
    names = ["rails_mit_license.txt", "react_mit_license.txt", "pytorch_license.txt"]
    rows = [{"id": name, "text": files[name].decode()} for name in names]
    kept, rejects = deduplicate(rows, near=MinHash(threshold=0.75))
    assert [row["id"] for row in kept] == [names[0], names[2]]
    assert [row["duplicate_of"] for row in rejects] == [names[0]] and rejects[0]["similarity"] > 0.75


def test_dolma_duplicates_by_url(shared_data: Path) -> None:
    """Parity with dolma's expected output of deduplication by a key: the documents that it marks are removed."""
    files = files_of(shared_data / "text" / "dolma_tests_provided_expected.tar.zst")
    provided = gzip.decompress(files["tests/data/provided/deduper/documents/000.json.gz"]).splitlines()
    expected = gzip.decompress(files["tests/data/expected/dedupe-by-url.json.gz"]).splitlines()
    marked = [row["id"] for row in map(orjson.loads, expected) if row["attributes"].get("bff_duplicate_url")]
    kept, rejects = deduplicate([orjson.loads(line) for line in provided], Exact(key="metadata.url"))
    assert [row["id"] for row in rejects] == marked and len(marked) == 1
    assert len(kept) == len(provided) - 1


def test_pairs_in_the_sample_are_distinct() -> None:
    """Property: the texts of these tests share almost no 5-grams, so every duplicate found was created on purpose."""
    sets = [shingles(" ".join(prose(150, ("text", i)))) for i in range(30)]
    assert max(jaccard(a, b) for a, b in combinations(sets, 2)) < 0.02
    assert stored_key("a") != stored_key("b")


ALIKE = st.text(st.sampled_from("aA\x01\0é\U00010141\ud800 "), max_size=4)


@settings(max_examples=300, deadline=None)
@given(
    texts=st.lists(ALIKE, min_size=2, max_size=12),
    normalise=st.sampled_from(["none", "whitespace", "loose", "case,numbers"]),
)
def test_transient_keys_agree_with_stored_keys(texts: list[str], normalise: str) -> None:
    """Property: transient keys are equal exactly if stored keys are; ASCII is not confused with UTF-32 of the same bytes."""
    stored, transient = ([key(text, normalise) for text in texts] for key in (stored_key, transient_key))
    assert [stored.index(key) for key in stored] == [transient.index(key) for key in transient]
    assert transient_key("\U00010141") != transient_key("A\x01\x01\0")

"""Training order: budgets are met, shares hold everywhere, and it is the same order by whatever way it is reached."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.errors import LlmkitError
from llmkit.lineage.formats import digest_path
from llmkit.mixing.order import Order, OrderedTokens, permutation, resolve
from llmkit.mixing.plan import Plan, PlannedSource, plan_text
from llmkit.shards.reader import TokenStore

Write = Callable[..., Path]
SOURCES = st.lists(
    st.tuples(st.lists(st.integers(0, 50), min_size=1, max_size=40).filter(any), st.integers(0, 3_000)),
    min_size=1,
    max_size=4,
)


def order_of(sources: list[tuple[list[int], int]], seed: int) -> tuple[list[np.ndarray], Order]:
    lengths = [np.array(sizes, np.int64) for sizes, _ in sources]
    plan = Plan(tuple(PlannedSource(f"s{i}", f"d{i}", (budget,)) for i, (_, budget) in enumerate(sources)), seed)
    return lengths, resolve(plan, lengths)


@given(SOURCES, st.integers(0, 2**40))
@settings(deadline=None)
def test_budgets_are_met_to_within_half_a_document(sources: list[tuple[list[int], int]], seed: int) -> None:
    """Property: no source misses its budget by more than half its longest document; passes are whole but for the last."""
    lengths, order = order_of(sources, seed)
    for s, (sizes, budget) in enumerate(sources):
        mine = order.source == s
        documents, epochs = order.document[mine], order.epoch[mine]
        assert abs(int(lengths[s][documents].sum()) - budget) <= max(sizes) / 2
        assert (np.diff(epochs) >= 0).all()
        for epoch in range(int(epochs.max(initial=-1)) + 1):
            members = documents[epochs == epoch]
            assert len(set(members)) == len(members)
            if epoch < epochs.max():
                assert len(members) == len(sizes)
        seen: dict[int, int] = {}
        for document, epoch in zip(documents.tolist(), epochs.tolist(), strict=True):
            assert epoch == seen.get(document, 0)  # how often it was seen before
            seen[document] = epoch + 1


@given(SOURCES, st.integers(0, 2**40))
@settings(deadline=None)
def test_shares_hold_in_every_stretch(sources: list[tuple[list[int], int]], seed: int) -> None:
    """Property: at any point all sources have given the same part of their tokens, to within a document of each."""
    lengths, order = order_of(sources, seed)
    progress, slack = [], []
    for s in range(len(sources)):
        mine = order.source == s
        tokens = np.where(mine, lengths[s][np.where(mine, order.document, 0)], 0)
        if total := tokens.sum():
            progress.append(np.cumsum(tokens) / total)
            slack.append(lengths[s].max() / total)
    for a in range(len(progress)):
        for b in range(a):
            assert np.abs(progress[a] - progress[b]).max() <= slack[a] + slack[b] + 1e-9


def test_order_is_random_and_pure() -> None:
    """Property: equal calls give equal orders, other seeds and other passes other ones, another source leaves the first one's order."""
    sources = [([7] * 200, 2_800), ([5] * 100, 400)]
    _, one = order_of(sources, 1)
    for again, equal in ((order_of(sources, 1)[1], True), (order_of(sources, 2)[1], False)):
        assert np.array_equal(one.document, again.document) == equal
    first = one.document[one.source == 0]
    assert not np.array_equal(first[:200], first[200:]) and sorted(first[:200]) == sorted(first[200:])
    assert np.array_equal(order_of(sources[:1], 1)[1].document, first)
    assert abs(np.corrcoef(first[:200], np.arange(200))[0, 1]) < 0.2


def test_permutations_never_change() -> None:
    """Golden: computed by hand from splitmix64 (Steele et al. 2014) in plain integers, so a resumed run finds its order on any machine."""

    def mixed(x: int) -> int:
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    for seed in (0, 1, 2**64 - 1):
        keys = [mixed(((i + 1) * 0x9E3779B97F4A7C15 + seed) % 2**64) for i in range(50)]
        assert permutation(seed, 50).tolist() == sorted(range(50), key=keys.__getitem__)
    assert mixed(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF  # the generator's published first output for seed 0


@pytest.fixture
def planned(tmp_path: Path, write_shards: Write) -> Path:
    """A plan over two shard directories: web whole and a half, code not quite."""
    random = np.random.default_rng(0)
    sources = []
    for name, budget in (("web", 3_000), ("code", 700)):
        path = write_shards(tmp_path / name, random.integers(1, 60, 60).tolist(), name, max_tokens_per_shard=500)
        store = TokenStore.open(str(path))
        sources.append(PlannedSource(f"../{name}", store.inputs[0].digest, (budget,)))
    (tmp_path / "mix").mkdir()
    plan = Plan(tuple(sources), 5, store.tokenizer.digest)
    (tmp_path / "mix" / "plan.toml").write_text(plan_text(plan))
    return tmp_path / "mix"


def test_a_plan_is_followed(planned: Path) -> None:
    """Property: every span is the slice of the documents put one behind the other; ids, sources and epochs go with them."""
    ordered = OrderedTokens.open(str(planned))
    flat = np.concatenate([ordered.document(i) for i in range(ordered.documents)])
    assert ordered.tokens == len(flat) and abs(ordered.tokens - 3_700) <= 60
    assert np.array_equal(np.diff(ordered.offsets), [len(ordered.document(i)) for i in range(ordered.documents)])
    for start, stop in np.sort(np.random.default_rng(1).integers(0, len(flat) + 1, (200, 2)), axis=1).tolist():
        assert np.array_equal(ordered.span(start, stop), flat[start:stop])
    seen: dict[str, int] = {}
    for i in range(ordered.documents):
        name = ordered.id(i)
        assert name.startswith(ordered.source(i)) and ordered.epoch(i) == seen.get(name, 0)
        seen[name] = ordered.epoch(i) + 1
    assert max(seen.values()) == 2
    with pytest.raises(IndexError):
        ordered.span(0, len(flat) + 1)
    with pytest.raises(IndexError):
        ordered.id(-1)


def test_a_plan_may_move(planned: Path, tmp_path: Path) -> None:
    """Behaviour: shards are found at their path or beside the plan; the plan's digest does not depend on where they lie."""
    before = OrderedTokens.open(str(planned))
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for name in ("web", "code"):
        shutil.move(tmp_path / name, moved / name)
    text = (planned / "plan.toml").read_text()
    (moved / "my.toml").write_text(text)
    after = OrderedTokens.open(str(moved / "my.toml"))
    assert np.array_equal(after.span(0, after.tokens), before.span(0, before.tokens))
    (moved / "deep.toml").write_text(text.replace("../", "a/b/"))
    digests = {digest_path(planned), digest_path(moved / "my.toml"), digest_path(moved / "deep.toml")}
    assert len(digests) == 1 and after.inputs[0].digest in digests
    (moved / "other.toml").write_text(text.replace("seed = 5", "seed = 6"))
    assert digest_path(moved / "other.toml") not in digests


def test_bad_plans(planned: Path, tmp_path: Path, write_shards: Write) -> None:
    """Behaviour: what is not a plan, or no longer fits its shards, is refused by name."""
    text = (planned / "plan.toml").read_text()
    cases = {
        "x = ": "invalid TOML",
        'seed = 1\n[train]\nmodel = "tiny"\n': "no mix plan of version 2",
        text.replace("version = 2", "version = 1"): "no mix plan of version 2",
        text.split("[[source]]")[0]: r"no \[\[source\]\]",
        text.replace("tokens = [700]", "tokens = [-1]"): "source 2: field 'tokens'",
        text.replace("seed = 5", 'seed = "5"'): "field 'seed'",
        text.replace("seed = 5", f"seed = 0x{'f' * 4_000}"): "field 'seed'",
        text.replace("[[source]]", f"sequence_length = {1 << 63}\n[[source]]", 1): "field 'sequence_length'",
        text.replace("../code", "../gone"): "its source ../gone is not there",
        text.replace("../code", "/dev/zero"): "its source /dev/zero is not there",
        text.replace('tokenizer = "xxh3:', 'tokenizer = "xxh3:0'): "another tokenizer",
    }
    for content, message in cases.items():
        (planned / "plan.toml").write_text(content)
        with pytest.raises(LlmkitError, match=message) as caught:
            OrderedTokens.open(str(planned))
        assert "plan.toml" in caught.value.message
    (planned / "plan.toml").write_text(text)
    shutil.rmtree(tmp_path / "code")
    write_shards(tmp_path / "code", [5] * 60, "code")
    with pytest.raises(LlmkitError, match="not the shards that the plan was made for"):
        OrderedTokens.open(str(planned))


def test_shards_keep_their_order(tmp_path: Path, write_shards: Write) -> None:
    """Behaviour: without a plan the stored order is the training order."""
    path = write_shards(tmp_path / "a.arrow", [5, 0, 9])
    ordered = OrderedTokens.open(str(path))
    assert [ordered.id(i) for i in range(3)] == ["web-0", "web-1", "web-2"] and ordered.epoch(2) == 0

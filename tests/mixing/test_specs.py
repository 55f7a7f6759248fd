"""Specs and token budgets."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.errors import LlmkitError, UsageError
from llmkit.io.documents import Chunk, ReadOptions
from llmkit.mixing.document_pool import DocumentPool, estimate_tokens, measure_chunk
from llmkit.mixing.order import copies_by_count, pack_order, resolve_order
from llmkit.mixing.plan import SHUFFLES, Plan, PlannedSource
from llmkit.mixing.specs import SourceSpec, parse_fraction, parse_spec, parse_weight_map, source_budgets
from llmkit.mixing.stages import MixStage, read_stages, stage_budgets

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def specs(*texts: str) -> list[SourceSpec]:
    return [parse_spec(text) for text in texts]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("web/", SourceSpec("web/")),
        ("web/:0.6", SourceSpec("web/", "weight", 0.6, ":0.6")),
        ("web:3", SourceSpec("web", "weight", 3.0, ":3")),
        ("web:.5", SourceSpec("web", "weight", 0.5, ":.5")),
        ("web:1e-3", SourceSpec("web", "weight", 1e-3, ":1e-3")),
        ("a.arrow:x6", SourceSpec("a.arrow", "times", 6.0, ":x6")),
        ("web:x0.25", SourceSpec("web", "times", 0.25, ":x0.25")),
        ("web:2B", SourceSpec("web", "tokens", 2e9, ":2B")),
        ("web:1.5k", SourceSpec("web", "tokens", 1500.0, ":1.5k")),
        ("/dev/stdin:0.5", SourceSpec("-", "weight", 0.5, ":0.5")),
        ("/dev/stdin", SourceSpec("-")),
        ("a:b:0.5", SourceSpec("a:b", "weight", 0.5, ":0.5")),
        ("s3://bucket/web", SourceSpec("s3://bucket/web")),
    ],
)
def test_specs(text: str, expected: SourceSpec) -> None:
    """Behaviour: the three kinds of amount, and a bare path."""
    assert parse_spec(text) == expected


@pytest.mark.parametrize(
    "amount",
    [
        "0",
        "0.0",
        "x0",
        "0k",
        "-1",
        "nan",
        "inf",
        "x",
        "k",
        "",
        "1e999",
        "0.5x",
        "x2k",
        "x-1",
        "abc",
        "0.0001k",
        "1e-31",
        "x1e305",
        "9e29T",
    ],
)
def test_amounts_that_are_none(amount: str) -> None:
    """Behaviour: the error has the text as typed and the valid forms."""
    with pytest.raises(UsageError) as caught:
        parse_spec(f"web:{amount}")
    assert repr(amount) in caught.value.message and caught.value.hint


def test_an_existing_path_is_not_cut(tmp_path: Path) -> None:
    """Behaviour: an existing file whose name ends like an amount is a file."""
    (tmp_path / "run:0.5").touch()
    assert parse_spec(str(tmp_path / "run:0.5")) == SourceSpec(str(tmp_path / "run:0.5"))


def test_budgets() -> None:
    """Behaviour: the table of the module, case by case."""
    assert source_budgets(specs("a:0.7", "b:0.2", "c:x6"), [900, 900, 10], 960) == [700, 200, 60]
    assert source_budgets(specs("a:3", "b:1k"), [900, 900], 1_900) == [900, 1_000]
    assert source_budgets(specs("a", "b"), [300, 100], 40) == [30, 10]
    assert source_budgets(specs("a", "b:x2"), [300, 100], None) == [300, 200]
    assert source_budgets(specs("a:1", "b:9"), [1_000, 90], None) == [10, 90]
    assert source_budgets(specs("a:1", "b:9"), [5, 900], None) == [5, 45]
    assert source_budgets(specs("a:x2", "b:1k"), [50, 10], None) == [100, 1_000]
    assert source_budgets(specs("a:x2"), [50], 100) == [100]


@pytest.mark.parametrize(
    ("given_specs", "total", "message"),
    [
        (["a", "b:0.5"], 100, "a: no weight, but other sources have one"),
        (["a:x2", "b:0.5"], 150, "the multipliers and budgets total 200"),
        (["a:x2", "b:0.5"], 200, "total 200"),
        (["a:x2", "b:x1"], 1_000, "total 300"),
    ],
)
def test_contradictions(given_specs: list[str], total: int, message: str) -> None:
    """Behaviour: contradictory specs are a usage error."""
    with pytest.raises(UsageError, match=message):
        source_budgets(specs(*given_specs), [100, 100], total)


def test_a_source_without_tokens() -> None:
    """Behaviour: refused by name rather than silently skipped."""
    with pytest.raises(LlmkitError, match="b: no tokens in this source"):
        source_budgets(specs("a", "b"), [10, 0], None)


def test_planning_specs_is_cheap() -> None:
    """Behaviour: specs, stages and requests load neither torch nor pyarrow nor numba, so planning can use them."""
    program = "import sys, llmkit.mixing.request; print({'torch', 'pyarrow', 'numba', 'numpy'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


SOURCES = st.lists(
    st.tuples(st.lists(st.integers(1, 400), min_size=1, max_size=60), st.floats(0.01, 100)), min_size=2, max_size=5
)


@given(SOURCES, st.integers(1_000, 10_000_000), st.integers(0, 99), st.sampled_from(SHUFFLES), st.booleans())
@settings(max_examples=60, deadline=None)
def test_realised_shares(
    sources: list[tuple[list[int], float]], total: int, seed: int, shuffle: str, packed: bool
) -> None:
    """Property: each source's tokens are within 0.01 % of its weighted share of the total, or within one of its
    documents, in each of two stages with opposite weights, for any shuffle and packing."""
    total = min(total, 100 * sum(sum(sizes) for sizes, _ in sources))
    lengths = [np.array(sizes, np.int64) for sizes, _ in sources]
    weights = [[weight for _, weight in sources], [1 / weight for _, weight in sources]]
    stages = [
        MixStage(f"{n}", total, {i: SourceSpec(f"s{i}", "weight", weight) for i, weight in enumerate(row)})
        for n, row in enumerate(weights)
    ]
    wanted = stage_budgets(stages, [int(sizes.sum()) for sizes in lengths])
    if max(sum(budget) / sizes.sum() for budget, sizes in zip(wanted, lengths, strict=True)) > 1_000:
        return
    plan = Plan(tuple(PlannedSource(f"s{i}", f"d{i}", budget) for i, budget in enumerate(wanted)), seed, "", shuffle)
    order = resolve_order(plan, lengths)
    if packed:
        order = pack_order(order, 50)
    for first, end, row in zip([0, *order.ends], order.ends, weights, strict=False):
        for s, (sizes, weight) in enumerate(zip(lengths, row, strict=True)):
            got = int(order.size[first:end][order.source[first:end] == s].sum())
            assert abs(got - total * weight / sum(row)) <= max(1e-4 * total, int(sizes.max()))


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("0.5%", 0.005),
        ("0.005", 0.005),
        ("50 %", 0.5),
        ("0", 0),
        ("100%", 0),
        ("nan", 0),
        ("inf", 0),
        ("-1%", 0),
        ("x%", 0),
        ("", 0),
    ],
)
def test_shares(text: str, share: float) -> None:
    """Behaviour: a percentage or a fraction between 0 and 1, and nothing else."""
    if share:
        assert parse_fraction(text) == share
    else:
        with pytest.raises(UsageError, match="not a fraction between 0 and 1"):
            parse_fraction(text)


def test_weight_map() -> None:
    """Behaviour: a count outside all ranges uses the range below it, or the first range where there is none."""
    ranges = parse_weight_map("2-5:2, 8:4,10-100:3")
    assert copies_by_count(ranges, np.array([1, 2, 5, 6, 8, 9, 10, 10**9])).tolist() == [2, 2, 2, 2, 4, 4, 3, 3]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1",
        "1:",
        "1:0",
        "1:-1",
        "0:1",
        "5-2:1",
        "1-5:1,5:2",
        "2:1,1:1",
        "1:1001",
        "1:x2",
        "a:1",
        "1:1,,2:2",
        "1:1.5",
    ],
)
def test_weight_maps_that_are_none(text: str) -> None:
    """Behaviour: the error names the invalid part."""
    with pytest.raises(UsageError, match="is not a range with a number of copies"):
        parse_weight_map(text)


CURRICULUM = """
[sources]
web = "shards/web/"
wiki = "/data/wiki"
[[stage]]
name = "main"
tokens = "2k"
mix = { wiki = "x2", web = 3 }
[[stage]]
mix = { web = "1.5k" }
"""


def test_stages(tmp_path: Path) -> None:
    """Behaviour: names, paths relative to the file, amounts as on the command line; given paths replace those
    in the file.
    """
    file = tmp_path / "c.toml"
    file.write_text(CURRICULUM)
    paths, stages = read_stages(file, [])
    web, wiki = f"{tmp_path}/shards/web", "/data/wiki"
    assert paths == [web, wiki]
    assert stages == [
        MixStage("main", 2_000, {0: SourceSpec(web, "weight", 3.0), 1: SourceSpec(wiki, "times", 2.0)}),
        MixStage("stage 2", None, {0: SourceSpec(web, "tokens", 1500.0)}),
    ]
    assert stage_budgets(stages, [5_000, 300]) == [(1_400, 1_500), (600, 0)]
    with pytest.raises(UsageError, match="main: --tokens 2,000, but the multipliers and budgets total 2,200"):
        stage_budgets(stages, [5_000, 1_100])
    assert read_stages(file, ["a", "b"])[1][0].specs[1].path == "b"
    assert read_stages(file, ["/dev/stdin", "b"])[0] == ["-", "b"]
    file.write_text(CURRICULUM.replace("shards/web/", "-"))
    assert read_stages(file, [])[0] == ["-", wiki]
    assert len(read_stages(EXAMPLES / "k2.toml", [])[0]) == 14


@pytest.mark.parametrize(
    ("old", "new", "message", "hint"),
    [
        ("[sources]", "[source]", "unknown key 'source'", "'sources'"),
        ("[[stage]]", "[[stages]]", "unknown key 'stages'", "'stage'"),
        ("tokens =", "token =", "main: unknown key 'token'", "'tokens'"),
        ("wiki = \"x2\"", "wikki = 1", "main: unknown key 'wikki'", "'wiki'"),
        ("wiki = \"x2\"", "wiki = -1", "main: wiki: '-1' is not an amount", "PATH:x6"),
        ("wiki = \"x2\"", "wiki = nan", "'nan' is not an amount", ""),
        ("wiki = \"x2\"", "wiki = inf", "'inf' is not an amount", ""),
        ("wiki = \"x2\"", f"wiki = 0x{'f' * 4_000}", "'inf' is not an amount", ""),
        ("wiki = \"x2\"", "wiki = true", "'' is not an amount", ""),
        ("wiki = \"x2\"", "wiki = \"x-1\"", "'x-1' is not an amount", ""),
        ("wiki = \"x2\"", "wiki = 0.0", "'0.0' is not above zero", ""),
        ("wiki = \"x2\"", "wiki = [1]", "'' is not an amount", ""),
        ("{ web = \"1.5k\" }", "{}", "stage 2: takes nothing from any source", ""),
        ("mix = { web = \"1.5k\" }", "", "stage 2: takes nothing from any source", ""),
        ("mix = { web = \"1.5k\" }", "mix = 3", "stage 2: takes nothing from any source", ""),
        ("\"2k\"", "0", "main: tokens: '0' is not above zero", ""),
        ("\"2k\"", "\"x2\"", "main: tokens: 'x2' is not a count", ""),
        ("\"2k\"", "2.5", "main: tokens: 2.5 is not a count", ""),
        ("\"/data/wiki\"", "7", r"\[sources\] does not give names and paths", ""),
        ("[sources]", "[sources", "invalid TOML", ""),
        ('"main"', "3", "3: a name must be a string", ""),
        ("[sources]", "stage = 1\n[sources]", "invalid TOML", ""),
        (CURRICULUM, "", r"\[sources\] does not", ""),
        (CURRICULUM, "[sources]\na = \"a\"", r"no \[\[stage\]\]", ""),
    ],
)  # fmt: skip
def test_bad_stages(tmp_path: Path, old: str, new: str, message: str, hint: str) -> None:
    """Behaviour: the error names the file and the stage, and suggests a key for an unknown one."""
    file = tmp_path / "c.toml"
    assert old in CURRICULUM
    file.write_text(CURRICULUM.replace(old, new))
    with pytest.raises(UsageError, match=message) as caught:
        read_stages(file, [])
    assert caught.value.message.startswith(f"{file}: ") and hint in caught.value.hint


@given(
    st.lists(
        st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=9), max_size=8), min_size=1, max_size=3
    )
)
@settings(max_examples=40, deadline=None)
def test_pool_gives_back_every_line(sources: list[list[str]]) -> None:
    """Property: lines are returned unchanged in the requested order; lengths are a quarter of the text's bytes,
    rounded up.
    """
    import orjson

    pool, options = DocumentPool(), ReadOptions()
    lines = [[orjson.dumps({"text": text}) + b"\n" for text in texts] for texts in sources]
    lengths = [pool.add([measure_chunk(Chunk("x", 1, b"".join(part)), options, estimate_tokens)]) for part in lines]
    assert [sizes.tolist() for sizes in lengths] == [[-(-len(t.encode()) // 4) for t in texts] for texts in sources]
    plan = Plan(tuple(PlannedSource(f"s{i}", f"d{i}", (int(sizes.sum()),)) for i, sizes in enumerate(lengths)), 0)
    if not sum(source.tokens[0] for source in plan.sources):
        return
    order = resolve_order(plan, lengths)
    expected = [lines[s][d] for s, d in zip(order.source.tolist(), order.document.tolist(), strict=True)]
    blocks = list(pool.blocks(order))
    assert b"".join(block for block, _ in blocks) == b"".join(expected)
    assert sum(number for _, number in blocks) == len(expected)

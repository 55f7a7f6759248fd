"""Sources of rows with amounts: what each epoch takes, and how it is recorded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmkit.alignment.sources import row_specs, taken_rows
from llmkit.errors import LlmkitError, UsageError
from llmkit.lineage.formats import read_lineage

Call = Callable[..., object]


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=40),
    st.floats(0.05, 3.5),
    st.integers(1, 6),
    st.integers(0, 2**64 - 1),
)
def test_epochs_take_the_budget_and_every_row_in_turn(sizes: list[int], amount: float, epochs: int, seed: int) -> None:
    """Property: an epoch has the budget to within a row, all epochs together to within half a row; no row is taken twice
    more than another, in any epoch or in all of them."""
    lengths = np.array(sizes)
    budget = max(1, round(amount * lengths.sum()))
    taken = taken_rows(lengths, budget, seed, epochs)
    counts = [np.bincount(rows, minlength=len(sizes)) for rows in taken]
    for epoch, count in enumerate(counts):
        assert abs((count * lengths).sum() - budget) <= lengths.max()
        so_far = sum(counts[: epoch + 1])
        assert count.max() - count.min() <= 1 and so_far.max() - so_far.min() <= 1
        assert 2 * abs((so_far * lengths).sum() - budget * (epoch + 1)) <= lengths.max()
    assert [rows.tolist() for rows in taken_rows(lengths, budget, seed, epochs)] == [rows.tolist() for rows in taken]


def test_another_seed_takes_other_rows() -> None:
    """Behaviour: the subset depends on the seed, and is spread over the source; a whole pass takes every row once."""
    lengths = np.full(1000, 7)
    first, second = (taken_rows(lengths, 700, seed, 1)[0] for seed in (1, 2))
    assert len(first) == len(second) == 100 and len(np.intersect1d(first, second)) < 40
    assert 300 < first.mean() < 700
    assert taken_rows(lengths, 7000, 1, 2)[1].tolist() == list(range(1000))
    with pytest.raises(LlmkitError, match="passes over 1,000 rows in each of 1 epochs"):
        taken_rows(lengths, 7000 << 20, 1, 1)


def test_specs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behaviour: without amounts there are no specs; an existing path is not split; patterns and a second stdin are refused."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a:0.5").touch()
    assert row_specs(["a:0.5", "b.jsonl", "-"]) == []
    kinds = [
        (spec.path, spec.kind, spec.value) for spec in row_specs(["a:0.5", "b:x2.5", "c:2k", "d:0.3", "/dev/stdin:1"])
    ]
    assert kinds == [
        ("a:0.5", "times", 1),
        ("b", "times", 2.5),
        ("c", "tokens", 2000),
        ("d", "weight", 0.3),
        ("-", "weight", 1),
    ]
    for named, message in (
        (["*.jsonl:2"], "a pattern"),
        (["-", "/dev/stdin:1"], "more than once"),
        (["b:zero"], "amount"),
    ):
        with pytest.raises(UsageError, match=message):
            row_specs(named)


def counts_of(done: object) -> dict[str, object]:
    return json.loads(done.stderr.splitlines()[-1])  # type: ignore[attr-defined, no-any-return]


@pytest.fixture
def sources(directory: Path) -> Path:
    """`a.jsonl` and `b.jsonl` with 30 rows of chat.jsonl each, likewise `p.jsonl` and `q.jsonl` of pairs.jsonl."""
    for name, halves in (("chat.jsonl", ("a.jsonl", "b.jsonl")), ("pairs.jsonl", ("p.jsonl", "q.jsonl"))):
        lines = (directory / name).read_bytes().splitlines(keepends=True)
        for half, part in zip(halves, (lines[::2], lines[1::2]), strict=True):
            (directory / half).write_bytes(b"".join(part))
    return directory


def test_whole_sources_are_the_rows_as_they_are(sources: Path, llmkit_here: Call) -> None:
    """Property: every source once gives the weights of the same files without amounts, whose record has none."""
    digests = []
    for output, named in (("plain", ("a.jsonl", "b.jsonl")), ("once", ("a.jsonl:x1", "b.jsonl"))):
        done = llmkit_here("sft", "base", *named, "--lr", "1e-3", "-o", output, cwd=sources)
        assert done.returncode == 0, done.stderr
        tensors = (sources / output / "final" / "model.safetensors").read_bytes()
        digests.append(tensors[8 + int.from_bytes(tensors[:8], "little") :])
    assert digests[0] == digests[1]
    record = read_lineage(sources / "plain")
    assert record is not None and "specs" not in record["options"]


@pytest.mark.parametrize(("command", "first", "second"), [("sft", "a.jsonl", "b.jsonl"), ("dpo", "p.jsonl", "q.jsonl")])
def test_amounts(sources: Path, llmkit_here: Call, command: str, first: str, second: str) -> None:
    """Behaviour: weights stop at the first source that is exhausted; multipliers and budgets count in each epoch; rows,
    tokens, shares and passes are reported; rows on stdin are a source; the record has the amounts, and another amount
    does not resume the run."""
    call = (command, "base", f"{first}:0.8", f"{second}:0.2", "--epochs", "2", "--batch-size", "4")
    done = llmkit_here(*call, "--json", "-o", "weighted", cwd=sources)
    assert done.returncode == 0, done.stderr
    counts = counts_of(done)
    big, small = counts["sources"]
    assert (big["source"], big["passes"], big["rows"]) == (first, 2.0, 60 if command == "sft" else 40)
    assert 0.4 < small["passes"] < 0.6 and 0.18 < small["share"] < 0.22
    assert counts["rows"] == (60 if command == "sft" else 40)  # as they were read
    rows = 2 if command == "dpo" else 1
    taken = sum(
        item["tokens"] - rows * item["rows"] for item in counts["sources"]
    )  # a row's last token is only a target
    assert counts["tokens"] == taken
    record = read_lineage(sources / "weighted")
    assert record is not None and record["options"]["specs"] == ["", ":0.8", ":0.2"]
    if command == "dpo":
        return
    assert llmkit_here(*call, "-o", "weighted", "--resume", cwd=sources).returncode == 0
    other = llmkit_here(*call[:3], f"{second}:0.3", *call[4:], "-o", "weighted", "--resume", cwd=sources)
    assert other.returncode == 1 and b"specs" in other.stderr
    done = llmkit_here(command, "base", f"{first}:x2", f"{second}:0.2k", "--json", "-o", "x", cwd=sources)
    whole, budget = counts_of(done)["sources"]
    assert whole["passes"] == 2.0 and abs(budget["tokens"] - 200) < 60
    piped = llmkit_here(
        command, "base", "/dev/stdin:x2", f"{second}:0.2k", "--json", "-o", "y",
        stdin=(sources / first).read_bytes(), cwd=sources,
    )  # fmt: skip
    assert counts_of(piped)["sources"][1] == budget and counts_of(piped)["loss"] == counts_of(done)["loss"]


def test_refusals(sources: Path, llmkit_here: Call) -> None:
    """Behaviour: one line for a source named twice, without rows, or of which too little is asked; nothing is left behind."""
    (sources / "copy.jsonl").write_bytes((sources / "a.jsonl").read_bytes())
    (sources / "empty.jsonl").write_bytes(b"")
    (sources / "long.jsonl").write_bytes(orjson.dumps({"prompt": "a", "completion": "is " * 200}) + b"\n")
    for named, message in (
        (("a.jsonl:x2", "copy.jsonl"), "a.jsonl and copy.jsonl hold the same"),
        (("a.jsonl:1", "empty.jsonl:1"), "empty.jsonl: no rows to train on"),
        (("a.jsonl:1", "long.jsonl:1"), "long.jsonl: no rows to train on"),
        (("a.jsonl", "b.jsonl:x0.001"), "b.jsonl:x0.001: 1 tokens are less than half a row"),
        (("a.jsonl:0", "b.jsonl"), "is not above zero"),
        (("nowhere.jsonl:2",), "nowhere.jsonl: no such file"),
    ):
        done = llmkit_here("sft", "base", *named, "-o", "x", cwd=sources)
        assert done.returncode in (1, 2) and message in done.stderr.decode(), done.stderr
        assert len([line for line in done.stderr.splitlines() if b"error" in line]) == 1
        assert not (sources / "x").exists()


def test_inspection_and_lists_ignore_amounts(sources: Path, llmkit_here: Call) -> None:
    """Behaviour: --check reads every file; amounts in --files-from are those of the command line; held-out files have none."""
    done = llmkit_here("sft", "base", "a.jsonl:x3", "b.jsonl", "--check", cwd=sources)
    assert [report["rows"] for report in json.loads(done.stdout).values()] == [30, 30]
    (sources / "list").write_text("a.jsonl:x3\nb.jsonl\n")
    done = llmkit_here("sft", "base", "--files-from", "list", "--check", cwd=sources)
    assert list(json.loads(done.stdout)) == ["a.jsonl", "b.jsonl"]
    done = llmkit_here("sft", "base", "--files-from", "list", "--json", "-o", "x", cwd=sources)
    assert [row["passes"] for row in counts_of(done)["sources"]] == [3.0, 1.0]
    done = llmkit_here("sft", "base", "a.jsonl", "--heldout", "b.jsonl:0.5", "-o", "y", cwd=sources)
    assert done.returncode == 1 and b"b.jsonl:0.5: no such file" in done.stderr


def test_a_directory_is_one_source(sources: Path, llmkit_here: Call) -> None:
    """Behaviour: its files share one amount, and the record has it as one input."""
    (sources / "both").mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        (sources / name).rename(sources / "both" / name)
    done = llmkit_here("sft", "base", "both:x0.5", "--json", "-o", "x", cwd=sources)
    (source,) = counts_of(done)["sources"]
    assert source["source"] == "both" and 0.48 < source["passes"] < 0.52
    record = read_lineage(sources / "x")
    assert record is not None and [item["name"] for item in record["inputs"]] == ["base", "both"]
    done = llmkit_here("lineage", "x", "--check", cwd=sources)
    assert done.returncode == 0, done.stderr
    script = llmkit_here("lineage", "x", "--script", cwd=sources).stdout.decode()
    assert '"$IN"/both:x0.5' in script


def test_one_row_per_sequence(sources: Path, llmkit_here: Call) -> None:
    """Behaviour: --no-pack counts rows; --group-by-length is recorded, reported with the padding, and refused for packed rows."""
    call = ("sft", "base", "a.jsonl", "--batch-size", "4", "-v")
    done = llmkit_here(*call, "--no-pack", "--group-by-length", "-o", "x", cwd=sources)
    assert done.returncode == 0 and b"of the positions are padding" in done.stderr and b"8 steps" in done.stderr
    record = read_lineage(sources / "x")
    assert record is not None and (record["options"]["pack"], record["options"]["group_by_length"]) == (False, True)
    assert (
        b"--group-by-length needs --no-pack" in llmkit_here(*call, "--group-by-length", "-o", "y", cwd=sources).stderr
    )

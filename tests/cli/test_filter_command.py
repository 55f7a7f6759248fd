"""`llmkit filter` on the real command line."""

from __future__ import annotations

import json
import random
from pathlib import Path

import orjson
import pytest
import zstandard

from llmkit.io.lineage import read_lineage

VOCABULARY = """the of and to with that river garden market harbour school meadow station library orchard bridge letter window winter
found carried painted opened followed remembered repaired measured described borrowed yellow narrow quiet ancient distant""".split()


def good(i: int) -> str:
    """Words without repeated phrases that pass the Gopher and C4 rules."""
    random_ = random.Random(i)
    return "\n".join(" ".join(random_.sample(VOCABULARY, 14)).capitalize() + "." for _ in range(6))


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    rows = [{"id": f"g{i}", "text": good(i)} for i in range(30)]
    rows[10:10] = [{"id": "short", "text": "Too short."}, {"id": "same", "text": "spam and the " * 100}]
    lines = [orjson.dumps(row) for row in rows]
    lines[0] = lines[0].replace(b'"id":', b'"id" :  ')  # spacing that a rewrite would lose
    (tmp_path / "docs.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return tmp_path


def rows_of(path: Path) -> list[dict[str, object]]:
    data = path.read_bytes()
    if path.suffix == ".zst":
        data = zstandard.ZstdDecompressor().stream_reader(data, read_across_frames=True).read()
    return [orjson.loads(line) for line in data.splitlines()]


def test_drops_explains_and_counts(llmkit, docs: Path) -> None:
    """Behaviour: kept lines byte for byte, rejects with reason and value, counts by reason in --json and in the lineage."""
    done = llmkit("filter", "docs.jsonl", "-o", "out.jsonl", "--rejects", "no.jsonl.zst", "--json", cwd=docs)
    assert done.returncode == 0 and done.stdout == b""
    lines = (docs / "docs.jsonl").read_bytes().splitlines(keepends=True)
    assert (docs / "out.jsonl").read_bytes() == b"".join(lines[:10] + lines[12:])
    rejects = rows_of(docs / "no.jsonl.zst")
    assert [(row["id"], row["filter"], row["reason"]) for row in rejects] == [
        ("short", "gopher_repetition", "top_2_gram"),
        ("same", "gopher_repetition", "top_2_gram"),
    ]
    assert all(isinstance(row["value"], float) for row in rejects)
    counts = json.loads(done.stderr.splitlines()[-1])
    assert (counts["documents"], counts["kept"], counts["dropped"]) == (32, 30, 2)
    assert counts["reasons"] == {"gopher_repetition.top_2_gram": 2}


def test_table_of_reasons(llmkit, docs: Path) -> None:
    """Behaviour: people see which rule dropped how many, on stderr."""
    done = llmkit("filter", "docs.jsonl", "-o", "out.jsonl", cwd=docs)
    assert b"gopher_repetition.top_2_gram" in done.stderr and b"kept 30 of 32 documents (93.8 %)" in done.stderr
    assert llmkit("filter", "docs.jsonl", "-qo", "q.jsonl", cwd=docs).stderr == b""


def test_presets_filters_and_rules_combine(llmkit, docs: Path) -> None:
    """Behaviour: a single filter, an overridden threshold, several presets; the C4 edit is written."""

    def kept(*arguments: str) -> list[dict[str, object]]:
        done = llmkit("filter", "docs.jsonl", "--plain", "-q", *arguments, cwd=docs)
        assert done.returncode == 0, done.stderr
        return [orjson.loads(line) for line in done.stdout.splitlines()]

    assert len(kept("--filter", "gopher_quality")) == 31
    assert len(kept("--filter", "gopher_quality", "--rule", "gopher_quality.min_doc_words=1000")) == 0
    assert len(kept("--preset", "gopher", "--preset", "c4")) == 30
    edited = {
        row["id"]: row["text"]
        for row in kept("--preset", "c4", "--rule", "c4.min_num_sentences=off", "--rule", "c4.min_words_per_line=2")
    }
    assert edited["short"] == "Too short." and edited["same"] == "" and edited["g3"] == good(3)


def test_jobs_decide_nothing(llmkit, docs: Path) -> None:
    """Property: the same bytes for -j 1 and -j 2, rejects too (several chunks)."""
    (docs / "many.jsonl").write_bytes((docs / "docs.jsonl").read_bytes() * 150)
    for jobs in "12":
        done = llmkit(
            "filter", "many.jsonl", "-j", jobs, "-o", f"o{jobs}.jsonl.zst", "--rejects", f"r{jobs}.jsonl.zst", cwd=docs
        )
        assert done.returncode == 0
    for kind in "or":
        assert (docs / f"{kind}1.jsonl.zst").read_bytes() == (docs / f"{kind}2.jsonl.zst").read_bytes()
    assert (docs / "many.jsonl").stat().st_size > 2 << 20


def test_print_preset_is_a_preset(llmkit, docs: Path) -> None:
    """Behaviour: what is printed can be edited and given back; the lineage then holds the rules, not the file's name."""
    printed = llmkit("filter", "--preset", "fineweb", "--print-preset", cwd=docs)
    assert printed.returncode == 0 and printed.stdout.startswith(b"# FineWeb")
    (docs / "my.toml").write_bytes(printed.stdout.replace(b"min_doc_words = 50", b"min_doc_words = 2"))
    resolved = llmkit("filter", "--preset", "my.toml", "--rule", "c4.min_num_sentences=2", "--print-preset", cwd=docs)
    assert b"min_num_sentences = 2" in resolved.stdout and b"min_doc_words = 2" in resolved.stdout
    assert llmkit("filter", "docs.jsonl", "--preset", "my.toml", "-o", "out.jsonl.zst", cwd=docs).returncode == 0
    record = read_lineage(docs / "out.jsonl.zst")
    assert record is not None and "preset" not in record["options"]
    assert record["options"]["filter"] == ["gopher_repetition", "gopher_quality", "c4", "fineweb"]
    assert sorted(record["options"]["rule"]) == ["c4.require_end_mark=false", "gopher_quality.min_doc_words=2"]
    script = llmkit("lineage", "out.jsonl.zst", "--script", cwd=docs).stdout.decode()
    assert "--rule gopher_quality.min_doc_words=2" in script


def test_default_preset_is_recorded(llmkit, docs: Path) -> None:
    """Behaviour: the lineage names the preset even where the user did not."""
    llmkit("filter", "docs.jsonl", "-o", "out.jsonl.zst", cwd=docs)
    record = read_lineage(docs / "out.jsonl.zst")
    assert record is not None and record["options"]["preset"] == ["gopher"]
    assert record["counts"]["kept"] == 30


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "gofer"], "gopher"),
        (["--filter", "c5"], "c4"),
        (["--words", "unicorn"], "unicode"),
        (["--rule", "gopher_quality.min_doc_word=1"], "gopher_quality.min_doc_words"),
        (["--rejects", "out.jsonl"], "kept documents go"),
        (["--rejects", "out.csv"], ".jsonl"),
    ],
)
def test_usage_errors(llmkit, docs: Path, arguments: list[str], message: str) -> None:
    """Behaviour: exit 2, one error line, a hint with the nearest name, no output."""
    done = llmkit("filter", "docs.jsonl", "-o", "out.jsonl", *arguments, cwd=docs)
    assert done.returncode == 2 and message in done.stderr.decode()
    assert sorted(path.name for path in docs.iterdir()) == ["docs.jsonl"]


def test_dry_run_counts_and_writes_nothing(llmkit, docs: Path) -> None:
    """Behaviour: -n says what would be dropped."""
    done = llmkit("filter", "docs.jsonl", "-n", "-o", "out.jsonl", "--rejects", "r.jsonl", cwd=docs)
    assert done.returncode == 0 and b"kept 30 of 32" in done.stderr
    assert [path.name for path in docs.iterdir()] == ["docs.jsonl"]


def test_stdin_to_stdout(llmkit, docs: Path) -> None:
    """Behaviour: `llmkit filter < docs` with nothing else."""
    done = llmkit("filter", stdin=zstandard.compress((docs / "docs.jsonl").read_bytes()), cwd=docs)
    assert done.returncode == 0
    out = zstandard.ZstdDecompressor().stream_reader(done.stdout, read_across_frames=True).read()
    assert out.count(b"\n") == 30


def test_error_leaves_no_rejects_either(llmkit, docs: Path) -> None:
    """Behaviour: a bad line in the middle: neither of the two outputs appears."""
    with open(docs / "docs.jsonl", "ab") as file:
        file.write(b"{broken\n")
    done = llmkit("filter", "docs.jsonl", "-o", "out.jsonl", "--rejects", "r.jsonl", cwd=docs)
    assert done.returncode == 1 and b"docs.jsonl:33: invalid JSON" in done.stderr
    assert [path.name for path in docs.iterdir()] == ["docs.jsonl"]
    done = llmkit("filter", "docs.jsonl", "-o", "out.jsonl", "--on-bad-line", "skip", cwd=docs)
    assert done.returncode == 0 and b"1 bad lines passed over" in done.stderr


def test_repeated_with_rejects_does_nothing(llmkit, docs: Path) -> None:
    """Behaviour: a finished call with --rejects, repeated, is up to date, but not when the rejects are gone or of another call."""
    command = ("filter", "docs.jsonl", "-o", "out.jsonl.zst", "--rejects", "r.jsonl.zst")
    assert llmkit(*command, cwd=docs).returncode == 0
    again = llmkit(*command, cwd=docs)
    assert again.returncode == 0 and b"up to date" in again.stderr
    rejects = (docs / "r.jsonl.zst").read_bytes()
    (docs / "r.jsonl.zst").unlink()
    assert llmkit(*command, cwd=docs).returncode == 1
    other = ("filter", "docs.jsonl", "--preset", "c4", "-o", "c4.jsonl.zst", "--rejects", "r.jsonl.zst")
    assert llmkit(*other, cwd=docs).returncode == 0
    assert llmkit(*command, cwd=docs).returncode == 1 and (docs / "r.jsonl.zst").read_bytes() != rejects

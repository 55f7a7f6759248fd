"""One bad file or record never ends a job: --on-bad-file, documents at which a stage fails, repeated commands."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import zstandard

from llmkit.errors import LlmkitError
from llmkit.lineage.formats import read_lineage

ROWS = [f'{{"id":"{i}","text":"document number {i} of some words","n":1.10}}\n'.encode() for i in range(400)]


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """Intact files, a truncated one of which 200 documents were flushed, garbage, and a link to a file that is gone."""
    (tmp_path / "a.jsonl").write_bytes(b"".join(ROWS[:100]))
    frame = zstandard.ZstdCompressor().compressobj()
    flushed = frame.compress(b"".join(ROWS[100:300]) + ROWS[300][:20]) + frame.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    (tmp_path / "b.jsonl.zst").write_bytes(flushed)
    (tmp_path / "c.parquet").write_bytes(b"PAR1 not at all")
    (tmp_path / "d.jsonl").symlink_to("gone.jsonl")
    (tmp_path / "e.jsonl").write_bytes(b"".join(ROWS[300:]))
    return tmp_path


FILES = ("a.jsonl", "b.jsonl.zst", "c.parquet", "d.jsonl", "e.jsonl")
COMMAND = ("filter", *FILES, "--filter", "length")


def test_bad_files_are_quarantined(llmkit_here, inputs: Path) -> None:
    """Behaviour: what is intact is kept, the rest is named, counted and quarantined; the same for any -j, and again."""
    stopped = llmkit_here(*COMMAND[:4], *COMMAND[6:], "-o", "x.jsonl", cwd=inputs)
    assert stopped.returncode == 1 and b"b.jsonl.zst: truncated zstd stream" in stopped.stderr
    outputs = []
    for jobs in ("1", "3"):
        extra = ("--on-bad-file", "quarantine=q.jsonl", "-o", "o.jsonl.zst", "--summary", "s.json", "-j", jobs, "-f")
        done = llmkit_here(*COMMAND, *extra, cwd=inputs)
        assert done.returncode == 0, done.stderr
        outputs.append([(inputs / name).read_bytes() for name in ("o.jsonl.zst", "q.jsonl")])
    assert outputs[0] == outputs[1]
    for name in FILES[1:4]:
        assert f"warning: {name}: ".encode() in done.stderr
    output = zstandard.ZstdDecompressor().stream_reader(outputs[0][0], read_across_frames=True).read()
    assert output == b"".join(ROWS[:300] + ROWS[300:])
    summary = json.loads((inputs / "s.json").read_bytes())
    assert (summary["documents"], summary["bad_files"]) == (400, 3)
    record = read_lineage(inputs / "o.jsonl.zst")
    assert record["counts"]["bad_files"] == 3 and record["options"]["on_bad_file"] == "skip"
    script = llmkit_here("lineage", "o.jsonl.zst", "--script", cwd=inputs).stdout
    assert b" --on-bad-file skip " in script  # it could not run without
    rows = [json.loads(line) for line in (inputs / "q.jsonl").read_bytes().splitlines()]
    assert [(row["file"], row["line"]) for row in rows] == [("b.jsonl.zst", 201), ("c.parquet", 1), ("d.jsonl", 1)]
    assert rows[0]["raw"] == ROWS[300][:20].decode()
    (inputs / "q.jsonl").unlink()
    again = llmkit_here(
        *COMMAND, "--on-bad-file", "skip", "-o", "o.jsonl.zst", "--summary", "s.json", "--fail-on-bad-file", cwd=inputs
    )
    assert again.returncode == 0 and b"up to date" in again.stderr
    repeated = json.loads((inputs / "s.json").read_bytes())
    assert repeated == summary | {"up_to_date": True, "seconds": repeated["seconds"]}


def test_fail_on_bad_file(llmkit_here, inputs: Path) -> None:
    """Behaviour: with --fail-on-bad-file the output is complete and the exit code 1."""
    done = llmkit_here(*COMMAND, "--on-bad-file", "skip", "--fail-on-bad-file", "-o", "o.jsonl", cwd=inputs)
    assert done.returncode == 1 and b"3 files could not be read" in done.stderr
    assert len((inputs / "o.jsonl").read_bytes().splitlines()) == 400


def test_one_output_per_input(llmkit_here, inputs: Path) -> None:
    """Behaviour: with -o DIR/ a bad file costs its own output only, which --resume makes once the file is repaired."""
    extra = ("--on-bad-file", "skip", "-o", "out/", "--summary", "s.json", "--resume")
    for _ in range(2):
        done = llmkit_here(*COMMAND, *extra, cwd=inputs)
        assert done.returncode == 0, done.stderr
        assert sorted(os.listdir(inputs / "out")) == ["a.jsonl.zst", "e.jsonl.zst"]
    (inputs / "d.jsonl").write_bytes(ROWS[0])
    assert llmkit_here(*COMMAND, *extra, cwd=inputs).returncode == 0
    summary = json.loads((inputs / "s.json").read_bytes())
    assert (summary["files"], summary["up_to_date"], summary["bad_files"]) == (1, 2, 2)


@pytest.mark.parametrize(
    "command", [("dedup", "--method", "exact"), ("dedup", "--method", "lines"), ("mix", "--tokens", "10")]
)
def test_other_commands(llmkit_here, inputs: Path, command: tuple[str, ...]) -> None:
    """Behaviour: every command that reads documents can skip bad files."""
    sources = [f"{name}:1" for name in FILES[:2]] if command[0] == "mix" else FILES
    done = llmkit_here(command[0], *sources, *command[1:], "--on-bad-file", "skip", "-o", "o.jsonl", cwd=inputs)
    assert done.returncode == 0 and b"warning: b.jsonl.zst: truncated" in done.stderr, done.stderr


RULE = """
def fails(page):
    if "7 " in page.text: raise RecursionError("too deep")
    if "8 " in page.text: page.note(x="\\ud800")
    return True
"""


def test_a_failing_document_is_a_bad_line(llmkit_here, inputs: Path) -> None:
    """Behaviour: an exception at one document is its fault, whatever it is; --debug shows where it was raised."""
    (inputs / "rule.py").write_text(RULE)
    command = ("filter", "a.jsonl", "--rule", "rule.py:fails")
    with pytest.raises(LlmkitError, match="a.jsonl:8: .*RecursionError: too deep") as stopped:
        llmkit_here(*command, "-o", "o.jsonl", "--debug", cwd=inputs)
    assert "rule.py" in str(stopped.value.__cause__)
    outputs = []
    for jobs in ("1", "2"):
        extra = ("--on-bad-line", "quarantine=q.jsonl", "-o", "o.jsonl", "-f", "-j", jobs, "--json")
        done = llmkit_here(*command, *extra, cwd=inputs)
        assert done.returncode == 0, done.stderr
        outputs.append([(inputs / name).read_bytes() for name in ("o.jsonl", "q.jsonl")])
    assert outputs[0] == outputs[1]
    bad = [i for i in range(100) if i % 10 in (7, 8)]
    assert outputs[0][0] == b"".join(row for i, row in enumerate(ROWS[:100]) if i not in bad)
    rows = [json.loads(line) for line in outputs[0][1].splitlines()]
    assert [(row["file"], row["line"], row["raw"]) for row in rows] == [
        ("a.jsonl", i + 1, ROWS[i][:-1].decode()) for i in bad
    ]
    assert "RecursionError: too deep" in rows[0]["reason"] and "surrogates" in rows[1]["reason"]


def test_deep_fields_and_parquet_from_stdin(llmkit_here, inputs: Path) -> None:
    """Behaviour: deep fields and huge numbers pass through a stage that edits, and Parquet is read from stdin."""
    deep = b'{"id":"d","text":"deep","x":' + b"[" * 300 + b"]" * 300 + b',"n":18446744073709551616}\n'
    (inputs / "deep.jsonl").write_bytes(deep)
    done = llmkit_here("filter", "deep.jsonl", "--filter", "length", "--annotate", "-o", "o.jsonl", cwd=inputs)
    assert done.returncode == 0 and (inputs / "o.jsonl").read_bytes().startswith(deep[:-2]), done.stderr
    assert llmkit_here("filter", "a.jsonl", "--filter", "length", "-o", "a.parquet", cwd=inputs).returncode == 0
    data = (inputs / "a.parquet").read_bytes()
    done = llmkit_here("filter", "--filter", "length", "-o", "b.parquet", cwd=inputs, stdin=data)
    assert done.returncode == 0, done.stderr
    assert pq.read_table(inputs / "b.parquet").equals(pq.read_table(inputs / "a.parquet"))

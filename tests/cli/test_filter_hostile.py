"""`llmkit filter` on hostile input: bounded memory and time, one clear line, nothing lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import orjson
import pytest

MEASURE = """
import resource, sys
from llmkit.cli.main import run_command
code = run_command("filter", sys.argv[1:])
print(int(code), next(int(line.split()[1]) // 1024 for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def peak(cwd: Path, *arguments: str) -> tuple[int, int]:
    """(exit code, peak memory in MB) of one call."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *arguments],
        cwd=cwd,
        capture_output=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=True,
    )
    code, megabytes = done.stdout.split()[-2:]
    return int(code), int(megabytes)


def test_memory_is_bounded_by_the_longest_line(tmp_path: Path) -> None:
    """Property: many documents take no more than few; the longest line that is read takes at most 60 times its size, whatever it holds."""
    line = orjson.dumps({"text": " ".join(f"w{i}" for i in range(400)) + "."}) + b"\n"
    (tmp_path / "few.jsonl").write_bytes(line * 100)
    (tmp_path / "many.jsonl").write_bytes(line * 12_000)  # 25 MB
    (tmp_path / "long.jsonl").write_bytes(orjson.dumps({"text": "?!" * 2_000_000}) + b"\n")  # every character a word
    call = ("--preset", "fineweb", "-q", "-o", "/dev/null")
    (_, few), (_, many) = peak(tmp_path, "few.jsonl", *call), peak(tmp_path, "many.jsonl", *call)
    assert many < few + 40
    code, long = peak(tmp_path, "long.jsonl", *call, "--annotate")
    assert code == 0 and long < few + 60 * 4


def test_a_line_over_the_limit(llmkit, tmp_path: Path) -> None:
    """Behaviour: a line of 100 MB is named, not held; with --on-bad-line skip the documents around it come through."""
    with open(tmp_path / "d.jsonl", "wb") as file:
        file.write(b'{"text":"first"}\n{"text":"')
        for _ in range(100):
            file.write(b"x" * (1 << 20))
        file.write(b'"}\n{"text":"last"}\n')
    code, megabytes = peak(
        tmp_path,
        "d.jsonl",
        "--rule",
        "length.min_characters=1",
        "--filter",
        "length",
        "-q",
        "-o",
        "out.jsonl",
        "--on-bad-line",
        "skip",
    )
    assert code == 0 and megabytes < 350
    assert (tmp_path / "out.jsonl").read_bytes() == b'{"text":"first"}\n{"text":"last"}\n'
    failed = llmkit("filter", "d.jsonl", "-o", "no.jsonl", cwd=tmp_path)
    assert failed.returncode == 1 and b"d.jsonl:2: line of over 16777216 bytes" in failed.stderr
    assert not (tmp_path / "no.jsonl").exists()


@pytest.mark.parametrize(
    ("text", "kept"),
    [(b'"a\\u0000b \\u0000"', True), (b'"\\ud83d\\ude00"', True), (b'"lone \\ud800 surrogate"', False), (b'"bad \xff byte"', False)],
    ids=["NUL", "pair", "lone", "utf-8"],
)  # fmt: skip
def test_odd_characters(llmkit, tmp_path: Path, text: bytes, kept: bool) -> None:
    """Behaviour: NUL characters pass; a lone surrogate and invalid UTF-8 are bad lines, named and put aside."""
    (tmp_path / "d.jsonl").write_bytes(b'{"text":' + text + b"}\n")
    call = (
        "filter",
        "d.jsonl",
        "--preset",
        "fineweb",
        "--annotate",
        "--on-bad-line",
        "quarantine=bad.jsonl",
        "-o",
        "out.jsonl",
    )
    done = llmkit(*call, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert ((tmp_path / "out.jsonl").stat().st_size > 0) == kept and (tmp_path / "bad.jsonl").exists() == (not kept)
    assert kept or json.loads((tmp_path / "bad.jsonl").read_bytes())["line"] == 1


def test_time_is_linear_in_a_document(llmkit_here, tmp_path: Path) -> None:
    """Property: ten times the text takes about ten times as long (28 times at most, for the noise), for one document of 8 MB."""
    words = " ".join(f"word{i % 977} of{i % 53} the{i}." for i in range(40_000))
    seconds = []
    for size in (800_000, 8_000_000):
        (tmp_path / "d.jsonl").write_bytes(orjson.dumps({"text": (words * 8)[:size]}) + b"\n")
        start = time.process_time()
        assert (
            llmkit_here(
                "filter", "d.jsonl", "--preset", "fineweb", "--annotate", "-q", "-o", "/dev/null", cwd=tmp_path
            ).returncode
            == 0
        )
        seconds.append(time.process_time() - start)
    assert seconds[1] < 28 * max(seconds[0], 0.2)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("nofilter.x=1", "unknown filter 'nofilter'"),
        ("gopher_quality.min_doc_words=ten", "not a number"),
        ("gopher_quality.nothing=1", "unknown rule"),
        ("regex.pattern=(", "regex.pattern"),
    ],
)
def test_wrong_rules(llmkit_here, tmp_path: Path, rule: str, message: str) -> None:
    """Behaviour: exit 2, one line that names the rule, no output."""
    (tmp_path / "d.jsonl").write_bytes(b'{"text":"a"}\n')
    chosen = ("--filter", "regex") if rule.startswith("regex") else ("--preset", "gopher")
    done = llmkit_here("filter", "d.jsonl", *chosen, "--rule", rule, "-o", "out.jsonl", cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr.decode() and b"Traceback" not in done.stderr
    assert not (tmp_path / "out.jsonl").exists()


def test_catastrophic_pattern_takes_linear_time(llmkit_here, tmp_path: Path) -> None:
    """Behaviour: a pattern that would take for ever in a backtracking engine answers on 1 MB."""
    (tmp_path / "d.jsonl").write_bytes(orjson.dumps({"text": "a" * 1_000_000 + "!"}) + b"\n")
    start = time.process_time()
    done = llmkit_here(
        "filter", "d.jsonl", "--filter", "regex", "--rule", "regex.pattern=^(a+)+$", "--plain", cwd=tmp_path
    )
    assert done.returncode == 0 and len(done.stdout) > 1_000_000
    assert time.process_time() - start < 20

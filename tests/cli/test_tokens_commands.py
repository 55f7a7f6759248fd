"""`vocab` and `tokenize` from the command line."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from llmkit.cli.main import run_command
from llmkit.io.lineage import read_lineage
from llmkit.io.shards import TokenStore

Command = Callable[..., subprocess.CompletedProcess[bytes]]


def rows(count: int = 120) -> list[dict[str, str]]:
    return [
        {"id": f"d{i}", "text": f"Document {i} says <|endoftext|>, then {'some more words ' * (i % 9)}and ends.\n"}
        for i in range(count)
    ]


def store_rows(path: Path, items: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(item) + "\n" for item in items))


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """What a command in this process does with SIGTERM ends with it."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vocabulary: Path) -> Path:
    """An empty working directory with docs.jsonl and tok/."""
    monkeypatch.chdir(tmp_path)
    store_rows(tmp_path / "docs.jsonl", rows())
    (tmp_path / "tok").symlink_to(vocabulary)
    return tmp_path


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer directory of 320 tokens."""
    directory = tmp_path_factory.mktemp("vocabulary")
    store_rows(directory / "docs.jsonl", rows())
    assert (
        run_command("vocab", [str(directory / "docs.jsonl"), "--size", "320", "-q", "-o", str(directory / "tok")]) == 0
    )
    return directory / "tok"


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_vocab_is_the_same_for_any_number_of_jobs_and_order(place: Path, llmkit: Command) -> None:
    """Behaviour: equal bytes for -j 1 and -j 2; the same tokenizer for the same documents in another order, cut into other files."""
    items = rows()
    random.Random(2).shuffle(items)
    store_rows(place / "a.jsonl", items[:50])
    store_rows(place / "b.jsonl", items[50:])
    for jobs in ("1", "2"):
        assert llmkit("vocab", "docs.jsonl", "--size", "320", "-j", jobs, "-o", f"tok{jobs}", cwd=place).returncode == 0
    assert files(place / "tok1") == files(place / "tok2")
    assert run_command("vocab", ["a.jsonl", "b.jsonl", "--size", "320", "-q", "-o", "tok3"]) == 0
    assert (place / "tok3" / "tokenizer.json").read_bytes() == (place / "tok1" / "tokenizer.json").read_bytes()
    assert run_command("vocab", ["docs.jsonl", "--size", "320", "-o", "tok1"]) == 0  # up to date


def test_vocab_digits_sample_and_special(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Behaviour: --digits names a pattern, and the lineage has it; --sample takes the same documents for any -j; --special gives ids behind ours."""
    call = ["docs.jsonl", "--size", "320", "--digits", "single", "--sample", "0.5", "--special", "<think>", "--json"]
    for jobs in ("1", "2"):
        assert run_command("vocab", [*call, "-j", jobs, "-o", f"tok{jobs}"]) == 0
    assert files(place / "tok1") == files(place / "tok2")
    counts = json.loads(capfd.readouterr().err.splitlines()[-1])
    assert counts["documents"] == 120 and 30 < counts["taken"] < 90
    record = read_lineage(place / "tok1")
    assert (
        record is not None and record["options"]["pattern"] == "qwen2" and record["counts"]["taken"] == counts["taken"]
    )
    assert json.loads((place / "tok1" / "tokenizer.json").read_text())["model"]["vocab"]["<think>"] == 11
    for digits, name in (("three", "llama-bpe"), ("single", "smollm")):
        assert run_command("vocab", ["docs.jsonl", "-q", "--digits", digits, "-p", name, "--dry-run", "-o", "new"]) == 0


def test_vocab_says_what_it_made(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Behaviour: rounding and a shortage of merges are said; the lineage stands in the directory."""
    assert run_command("vocab", ["docs.jsonl", "--size", "5000", "-p", "qwen2", "--json", "-o", "new"]) == 0
    said = capfd.readouterr().err
    assert "5,000 rounded up to 5,056" in said and "warning: the texts hold" in said
    counts = json.loads(said.splitlines()[-1])
    assert counts["size"] % 64 == 0 and counts["size"] < 5056 and counts["documents"] == 120
    record = read_lineage(place / "new")
    assert record is not None and record["command"] == "vocab" and record["options"]["pattern"] == "qwen2"
    assert [item["name"] for item in record["inputs"]] == ["docs.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["vocab", "docs.jsonl"], 2, "no output"),
        (["vocab", "docs.jsonl", "-o", "x", "--size", "100"], 2, "cannot hold"),
        (["vocab", "docs.jsonl", "-o", "x", "--size", "0"], 2, "cannot hold"),
        (["vocab", "docs.jsonl", "-o", "x", "--size", "many"], 2, "is not a count"),
        (["vocab", "docs.jsonl", "-o", "x", "--size", "1T"], 2, "the largest is"),
        (["vocab", "docs.jsonl", "-o", "x", "--pattern", "lama-bpe"], 2, "did you mean 'llama-bpe'"),
        (["vocab", "docs.jsonl", "-o", "x", "--digits", "two"], 2, "unknown --digits"),
        (["vocab", "docs.jsonl", "-o", "x", "--digits", "single", "-p", "llama-bpe"], 2, "contradict each other"),
        (["vocab", "docs.jsonl", "-o", "x", "--digits", "three", "-p", "gpt-2"], 2, "contradict each other"),
        (["vocab", "docs.jsonl", "-o", "x", "--special", "word"], 2, "a special token 'word'"),
        (["vocab", "docs.jsonl", "-o", "x", "--sample", "0"], 2, "--sample 0"),
        (["vocab", "docs.jsonl", "-o", "x", "--sample", "nan"], 2, "--sample nan"),
        (["vocab", "docs.jsonl", "-o", "x", "--sample", "1e-9"], 1, "takes none of 120 documents"),
        (["vocab", "docs.jsonl", "-o", "x", "--min-frequency", "0"], 2, "min-frequency"),
        (["vocab", "empty.jsonl", "-o", "x"], 1, "no text to train on"),
        (["vocab", "bad.jsonl", "-o", "x"], 1, "bad.jsonl:2: invalid JSON"),
        (["vocab", "docs.jsonl", "-o", "there"], 1, "there exists"),
        (["tokenize", "docs.jsonl", "-o", "x"], 2, "no tokenizer"),
        (["tokenize", "docs.jsonl", "-t", "nowhere", "-o", "x"], 1, "no such tokenizer"),
        (["tokenize", "docs.jsonl", "-t", "there", "-o", "x"], 1, "no tokenizer.json"),
        (["tokenize", "docs.jsonl", "-t", "broken", "-o", "x"], 1, "broken: tokenizer.json is not valid JSON"),
        (["tokenize", "docs.jsonl", "-t", "tok", "-o", "there"], 1, "there exists"),
        (["tokenize", "docs.jsonl", "-t", "tok", "-o", "there/x/y"], 1, "is not a directory"),
        (["tokenize", "there", "-t", "tok", "-o", "x"], 1, "no input files in this directory"),
        (["tokenize", "bad.jsonl", "-t", "tok", "-o", "x"], 1, "bad.jsonl:2: invalid JSON"),
        (["tokenize", "docs.jsonl", "-t", "tok", "-o", "x", "--max-tokens-per-shard", "0"], 2, "at least one token"),
        (["tokenize", "--decode", "docs.jsonl", "-o", "x.jsonl"], 1, "no token shard"),
        (["tokenize", "--decode", "empty.jsonl", "-o", "x.jsonl"], 1, "empty file"),
    ],
)
def test_bad_calls(
    place: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str
) -> None:
    """Behaviour: exit code, one clear line, a hint, and nothing left behind."""
    (place / "there").mkdir()
    (place / "broken").mkdir()
    (place / "broken" / "tokenizer.json").write_text('{"model": ')
    (place / "empty.jsonl").write_text("")
    (place / "bad.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    before = sorted(path.name for path in place.iterdir())
    assert run_command(arguments[0], arguments[1:]) == code
    error = capfd.readouterr().err
    assert message in error and "hint: " in error and "Traceback" not in error
    assert sorted(path.name for path in place.iterdir()) == before


def test_tokenize_is_the_same_for_any_number_of_jobs(place: Path, llmkit: Command) -> None:
    """Behaviour: equal bytes for -j 1 and -j 2, over several chunks and parts."""
    store_rows(place / "big.jsonl", rows(9000))
    for jobs in ("1", "2"):
        done = llmkit(
            "tokenize",
            "big.jsonl",
            "-t",
            "tok",
            "-j",
            jobs,
            "-o",
            f"s{jobs}",
            "--max-tokens-per-shard",
            "60k",
            cwd=place,
        )
        assert done.returncode == 0, done.stderr
    assert files(place / "s1") == files(place / "s2")
    assert len(list((place / "s1").glob("part-*.arrow"))) > 2
    assert TokenStore.open("s1").documents == 9000


def test_directory_file_and_stream_hold_the_same(place: Path, llmkit: Command) -> None:
    """Behaviour: the three outputs differ in form alone; each carries its tokenizer, and gives it on; decoding gives the texts back."""
    assert run_command("tokenize", ["docs.jsonl", "-t", "tok", "-q", "-o", "shards"]) == 0
    assert run_command("tokenize", ["docs.jsonl", "-t", "shards", "-q", "-o", "one.arrow"]) == 0
    piped = llmkit(
        "tokenize", "-t", "one.arrow", "--source", "docs", stdin=(place / "docs.jsonl").read_bytes(), cwd=place
    )
    (place / "piped.arrow").write_bytes(piped.stdout)
    stores = [TokenStore.open(name) for name in ("shards", "one.arrow", "piped.arrow")]
    assert len({store.inputs[0].digest for store in stores}) == 1
    assert all(
        store.tokenizer.files["tokenizer.json"] == (place / "tok/tokenizer.json").read_text() for store in stores
    )
    assert all(store.document(i)[-1] == 0 and 0 not in store.document(i)[:-1] for store in stores for i in range(120))
    assert stores[0].sources == ["docs"]
    assert stores[2].inputs[0].lineage["inputs"][1]["name"] == "-"
    decoded = llmkit("tokenize", "--decode", "--plain", stdin=piped.stdout, cwd=place)
    assert [json.loads(line) for line in decoded.stdout.splitlines()] == [row | {"source": "docs"} for row in rows()]
    assert run_command("tokenize", ["--decode", "shards", "-q", "-o", "back.jsonl"]) == 0
    assert (place / "back.jsonl").read_bytes() == decoded.stdout


def test_allow_special(place: Path) -> None:
    """Behaviour: with --allow-special a special token's name in a text is that token."""
    assert run_command("tokenize", ["docs.jsonl", "-t", "tok", "-q", "--allow-special", "-o", "s.arrow"]) == 0
    store = TokenStore.open("s.arrow")
    assert all(np.count_nonzero(store.document(i) == 0) == 2 for i in range(store.documents))


def test_repeated_runs(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Behaviour: a finished run repeated does nothing; with other options it is refused; -f replaces; -n writes nothing."""
    assert run_command("tokenize", ["docs.jsonl", "-t", "tok", "-o", "s"]) == 0
    made = files(place / "s")
    assert run_command("tokenize", ["docs.jsonl", "-t", "tok", "-o", "s"]) == 0
    assert "up to date" in capfd.readouterr().err
    assert run_command("tokenize", ["docs.jsonl", "-t", "tok", "-o", "s", "--source", "x"]) == 1
    assert "s exists" in capfd.readouterr().err
    assert run_command("tokenize", ["docs.jsonl", "-t", "tok", "-f", "-o", "s", "--source", "x", "-n"]) == 0
    assert files(place / "s") == made
    assert run_command("tokenize", ["docs.jsonl", "-t", "tok", "-f", "-o", "s", "--source", "x"]) == 0
    assert TokenStore.open("s").sources == ["x"]


def test_inputs_listed_on_stdin(place: Path, llmkit: Command) -> None:
    """Behaviour: --files-from - reads the names of inputs from stdin, once, though they are asked for twice."""
    done = llmkit("tokenize", "--files-from", "-", "-t", "tok", "-o", "s", stdin=b"docs.jsonl\n", cwd=place)
    assert done.returncode == 0, done.stderr
    assert TokenStore.open(str(place / "s")).documents == 120


def test_nothing_in(place: Path, llmkit: Command) -> None:
    """Behaviour: no documents give valid shards without rows, and a warning; bad lines can be passed over and are counted."""
    done = llmkit("tokenize", "-t", "tok", "-q", "-o", "none.arrow", stdin=b"\n", cwd=place)
    assert done.returncode == 0 and b"warning: no documents were read" in done.stderr
    assert TokenStore.open(str(place / "none.arrow")).documents == 0
    done = llmkit(
        "tokenize",
        "-t",
        "tok",
        "--json",
        "--on-bad-line",
        "skip",
        "-o",
        "some.arrow",
        stdin=b'{"text": "a"}\n{\n{"text": " "}\n',
        cwd=place,
    )
    counts = json.loads(done.stderr.splitlines()[-1])
    assert (counts["documents"], counts["empty"], counts["bad_lines"]) == (2, 1, 1)


def test_closed_pipe_and_terminal(place: Path) -> None:
    """Behaviour: a reader that goes away ends it quietly with 141; tokens are not written to a terminal."""
    store_rows(place / "big.jsonl", rows(3000))
    command = [sys.executable, "-m", "llmkit", "tokenize", "big.jsonl", "-t", "tok"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(10)
    process.stdout.close()
    assert (process.wait(), process.stderr.read()) == (141, b"")
    process.stderr.close()
    ours, theirs = os.openpty()
    done = subprocess.run(command, stdout=theirs, stderr=subprocess.PIPE)
    os.close(theirs)
    os.close(ours)
    assert done.returncode == 2 and b"not written to a terminal" in done.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted(place: Path, number: signal.Signals, code: int) -> None:
    """Behaviour: stopped in the middle, its exit code says by what, and nothing stands under the final name."""
    process = subprocess.Popen(
        [sys.executable, "-m", "llmkit", "tokenize", "-t", "tok", "-o", "s"], stdin=subprocess.PIPE
    )
    assert process.stdin is not None
    process.stdin.write(b"".join(json.dumps(row).encode() + b"\n" for row in rows()))
    process.stdin.flush()
    deadline = time.monotonic() + 60
    while not (place / ".s.partial").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(timeout=60) == code
    process.stdin.close()
    assert not (place / "s").exists() and not (place / ".s.partial").exists()


def test_full_disk(place: Path, llmkit: Command) -> None:
    """Behaviour: a full disk is one line with a hint and exit code 1."""
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    store_rows(place / "big.jsonl", rows(3000))
    done = llmkit("tokenize", "big.jsonl", "-t", "tok", "-o", "/dev/full", cwd=place)
    assert done.returncode == 1 and b"No space left" in done.stderr and b"Traceback" not in done.stderr

"""Conventions of every command, checked on the real command line."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import orjson
import pytest
import zstandard
from waiting import wait_until

from llmkit.cli.main import run_command
from llmkit.cli.shared.table import COMMANDS

PROSE = "The quick brown fox jumps over the lazy dog, and then it rests with the others that have been there before. "
LINES = b"".join(
    orjson.dumps({"id": str(i), "text": f"{PROSE * 3} Number {i} of the series. {PROSE}"}) + b"\n" for i in range(300)
)
# Drops exact repeats only: the simplest document stage.
STAGE = ("dedup", "--method", "exact", "--no-counts")
STAGE_WORDS = " ".join(STAGE)


@pytest.fixture
def llmkit(llmkit_anew):
    """A fresh process per call, since the start is tested here too."""
    return llmkit_anew


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    (tmp_path / "docs.jsonl").write_bytes(LINES)
    return tmp_path


def start(*arguments: str, cwd: Path, **options: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "llmkit", *arguments], cwd=cwd, stderr=subprocess.PIPE, **options)  # type: ignore[call-overload,no-any-return]


def error_of(result: subprocess.CompletedProcess[bytes]) -> str:
    """stderr of a failed call; checks that it has exactly one error line and no traceback."""
    text = result.stderr.decode()
    lines = [line for line in text.splitlines() if ": error: " in line]
    assert len(lines) == 1 and "Traceback" not in text, text
    return text


def test_unknown_names_get_a_suggestion(llmkit, docs: Path) -> None:
    """Behaviour: exit code 2, and a hint with the nearest command, option, preset or method."""
    for arguments, nearest in [
        (["fliter"], "filter"),
        (["filter", "trian"], "train"),
        (["filter", "--presett", "gopher", "docs.jsonl"], "--preset"),
        (["filter", "--preset", "gofer", "docs.jsonl"], "gopher"),
        (["dedup", "--method", "minhsh", "docs.jsonl"], "minhash"),
    ]:
        result = llmkit(*arguments, cwd=docs)
        assert result.returncode == 2
        assert nearest in error_of(result)


@pytest.mark.parametrize("command", list(COMMANDS))
def test_every_command_has_the_shared_options_and_examples(llmkit, command: str) -> None:
    """Property: every command has the shared options and at least two examples; --help shows some of its own options."""
    text = llmkit(command, "--help-all").stdout.decode()
    for flag in ("-o,", "-f,", "-n,", "-q,", "-v,", "-j,", "-c,", "--seed", "--json", "--summary", "-h,", "-V,"):
        assert flag in text, flag
    assert text.count(f"  llmkit {command}") >= 2
    assert ("\nOptions:\n" in llmkit(command, "--help").stdout.decode()) == ("\nOptions:\n" in text)


def test_version(llmkit) -> None:
    """Behaviour: -V and --version, with and without a command."""
    for arguments in (["-V"], ["--version"], ["filter", "-V"]):
        assert llmkit(*arguments).stdout.decode().startswith("llmkit ")


def test_stdin_terminal_without_input_is_a_usage_error(tmp_path: Path) -> None:
    """Behaviour: exit code 2 at once, instead of waiting for typed documents."""
    import pty

    master, slave = pty.openpty()
    result = subprocess.run([sys.executable, "-m", "llmkit", *STAGE], stdin=slave, capture_output=True, timeout=60)
    os.close(master)
    os.close(slave)
    assert result.returncode == 2 and "terminal" in error_of(result)


def test_stdout_is_zstd_in_a_pipe_and_plain_on_request(llmkit, docs: Path) -> None:
    """Behaviour: a pipe carries one zstd stream, --plain carries lines, messages go to stderr only."""
    piped = llmkit(*STAGE, "docs.jsonl", cwd=docs)
    assert zstandard.ZstdDecompressor().stream_reader(piped.stdout, read_across_frames=True).read() == LINES
    assert llmkit(*STAGE, "docs.jsonl", "--plain", cwd=docs).stdout == LINES
    assert llmkit(*STAGE, cwd=docs, stdin=piped.stdout).returncode == 0


def test_quiet_and_json(llmkit, docs: Path) -> None:
    """Behaviour: -q is silent on success; --json prints one JSON line on stderr in place of the summary; --summary writes it."""
    assert llmkit(*STAGE, "docs.jsonl", "-q", "-o", "a.jsonl", cwd=docs).stderr == b""
    result = llmkit(*STAGE, "docs.jsonl", "-q", "--json", "-o", "b.jsonl", "--summary", "s.json", cwd=docs)
    assert json.loads(result.stderr)["documents"] == json.loads((docs / "s.json").read_bytes())["documents"] == 300
    result = llmkit(*STAGE, "docs.jsonl", "--json", "-o", "c.jsonl", cwd=docs)
    assert json.loads(result.stderr)["documents"] == 300


def test_no_clobber_and_force(llmkit, docs: Path) -> None:
    """Behaviour: an existing output is kept, and the message names it; -f replaces it."""
    (docs / "out.jsonl.zst").write_text("precious")
    result = llmkit(*STAGE, "docs.jsonl", "-o", "out.jsonl.zst", cwd=docs)
    assert result.returncode == 1 and "out.jsonl.zst exists" in error_of(result)
    assert (docs / "out.jsonl.zst").read_text() == "precious"
    assert llmkit(*STAGE, "docs.jsonl", "-o", "out.jsonl.zst", "-f", cwd=docs).returncode == 0


def test_finished_run_repeated_does_nothing(llmkit, docs: Path) -> None:
    """Behaviour: the inputs and options in its record decide whether an output is up to date, not its existence."""
    command = (*STAGE, "docs.jsonl", "-o", "out.jsonl.zst")
    assert llmkit(*command, cwd=docs).returncode == 0
    before = (docs / "out.jsonl.zst").stat().st_mtime_ns
    again = llmkit(*command, cwd=docs)
    assert again.returncode == 0 and b"up to date" in again.stderr
    assert (docs / "out.jsonl.zst").stat().st_mtime_ns == before
    (docs / "docs.jsonl").write_bytes(LINES + LINES[:100_000])
    assert llmkit(*command, cwd=docs).returncode == 1


def test_dry_run_writes_nothing(llmkit, docs: Path) -> None:
    """Behaviour: -n checks the inputs and leaves no file."""
    assert llmkit(*STAGE, "docs.jsonl", "-n", "-o", "out.jsonl", cwd=docs).returncode == 0
    assert [p.name for p in docs.iterdir()] == ["docs.jsonl"]


def test_printed_configuration_is_read_back(llmkit, docs: Path) -> None:
    """Behaviour: the output of --print-config is a valid configuration, even for a command with an option of the same name."""
    for command in ("filter", "dedup"):
        printed = llmkit(command, "docs.jsonl", "--print-config", cwd=docs)
        (docs / "p.toml").write_bytes(printed.stdout)
        result = llmkit(command, "docs.jsonl", "-c", "p.toml", "-o", f"{command}.jsonl", cwd=docs)
        assert result.returncode == 0, result.stderr.decode()


def test_precedence_flag_environment_config_default(llmkit, docs: Path) -> None:
    """Behaviour: flag > environment > --config > default, as --print-config shows."""
    (docs / "c.toml").write_text('seed = 3\n[dedup]\nmethod = "exact"\n[train]\nseed = 9\n')

    def resolved(*arguments: str, **env: str) -> str:
        return llmkit("dedup", *arguments, "--print-config", cwd=docs, env=env).stdout.decode()

    assert "seed = 0" in resolved()
    config = resolved("-c", "c.toml")
    assert "seed = 3  # config file" in config and 'method = "exact"' in config
    assert "seed = 4" in resolved("-c", "c.toml", LLMKIT_DEDUP_SEED="4")
    assert "seed = 5" in resolved("-c", "c.toml", "--seed", "5", LLMKIT_DEDUP_SEED="4")
    (docs / "r.toml").write_text(config)
    assert "seed = 3" in resolved("-c", "r.toml")


def test_config_with_an_unknown_option_is_refused(llmkit, docs: Path) -> None:
    """Behaviour: exit code 2; the message names the file and the nearest key."""
    (docs / "c.toml").write_text("sed = 3\n")
    result = llmkit(*STAGE, "-c", "c.toml", "docs.jsonl", cwd=docs)
    assert result.returncode == 2 and "c.toml" in error_of(result) and "seed" in error_of(result)


def test_bad_inputs_are_named(llmkit, docs: Path) -> None:
    """Behaviour: exit code 1, one message that names the file (and line), and no output under the final name."""
    packed = zstandard.compress(LINES)
    files = {
        "cut.jsonl.zst": (packed[: len(packed) // 2], "truncated"),
        "json.jsonl": (LINES + b"{broken\n", "json.jsonl:301: invalid JSON"),
        "utf8.jsonl": (b'{"text":"\xff"}\n', "utf8.jsonl:1: invalid UTF-8"),
        "field.jsonl": (b'{"body":"x"}\n', "field.jsonl:1: no field 'text'"),
    }
    for name, (data, message) in files.items():
        (docs / name).write_bytes(data)
        result = llmkit(*STAGE, name, "-o", "out.jsonl.zst", cwd=docs)
        assert result.returncode == 1 and message in error_of(result)
        assert not (docs / "out.jsonl.zst").exists()
    (docs / "empty").mkdir()
    for name, message in (
        ("empty", "no input files"),
        ("nowhere.jsonl", "no such file"),
        ("*.nothing", "nothing matches"),
    ):
        result = llmkit(*STAGE, name, cwd=docs)
        assert result.returncode == 1 and message in error_of(result)
    (docs / "zero.jsonl").write_bytes(b"")
    result = llmkit(*STAGE, "zero.jsonl", "--plain", cwd=docs)
    assert result.returncode == 0 and result.stdout == b"" and b"no documents" in result.stderr
    result = llmkit(*STAGE, "-o", "out.jsonl", stdin=b"", cwd=docs)  # as after a failed command in a pipe
    assert result.returncode == 1 and b"stdin is empty" in result.stderr and not (docs / "out.jsonl").exists()


def test_broken_pipe_is_quiet(docs: Path) -> None:
    """Behaviour: `llmkit ... | head -1` exits with code 141 and without a message."""
    (docs / "many.jsonl").write_bytes(b"".join(orjson.dumps({"text": f"{i} {PROSE}"}) + b"\n" for i in range(30_000)))
    script = f"{sys.executable} -m llmkit dedup --method exact -q many.jsonl --plain | head -1 > first; echo ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", script], cwd=docs, capture_output=True, text=True)
    assert result.stdout.strip() == "141" and result.stderr == ""
    assert orjson.loads((docs / "first").read_bytes())["text"].startswith("0 ")


@pytest.mark.parametrize(
    ("number", "code", "jobs"),
    [
        (signal.SIGINT, 130, "1"),
        (signal.SIGINT, 130, "2"),
        (signal.SIGTERM, 143, "1"),
        (signal.SIGTERM, 143, "2"),
        (signal.SIGHUP, 129, "2"),
    ],
)
def test_signals_leave_nothing_half_written(docs: Path, number: int, code: int, jobs: str) -> None:
    """Behaviour: Ctrl-C, SIGTERM and SIGHUP during a run give their exit codes, and leave no output under any name."""
    process = start(*STAGE, "-j", jobs, "-o", "out.jsonl.zst", cwd=docs, stdin=subprocess.PIPE)
    assert process.stdin and process.stderr
    process.stdin.write(LINES * 20)
    process.stdin.flush()
    wait_until((docs / ".out.jsonl.zst.partial").exists, process)
    process.send_signal(number)
    assert process.wait(60) == code
    assert b"Traceback" not in process.stderr.read()
    assert [p.name for p in docs.iterdir()] == ["docs.jsonl"]


@pytest.mark.parametrize("swallowed", ["changed", "dropped", "caught", "caught at the end"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_libraries_cannot_hide_a_signal(
    monkeypatch: pytest.MonkeyPatch, number: int, code: int, swallowed: str
) -> None:
    """Behaviour: a signal ends a command with its exit code, also where a library makes another error of it (DuckDB), or
    goes on, and where Python drops the error (in a finalizer). What cleans up is not disturbed."""
    cleaned = []

    class Finalized:
        def __del__(self) -> None:
            signal.raise_signal(number)

    def command(arguments: list[str]) -> None:
        if swallowed == "dropped":
            Finalized()
            time.sleep(20)
        try:
            signal.raise_signal(number)
        except BaseException:
            time.sleep(1)
            cleaned.append(True)
            if swallowed == "changed":
                raise RuntimeError("Query interrupted") from None
        time.sleep(20 if swallowed == "caught" else 0)

    monkeypatch.setattr("llmkit.cli.shared.options.build", lambda *_: command)
    began, handler = time.monotonic(), signal.getsignal(number)
    assert run_command("dedup", []) == code and time.monotonic() - began < 10
    assert cleaned or swallowed == "dropped"
    assert signal.getsignal(number) is handler


def test_signal_before_and_after_a_command() -> None:
    """Behaviour: Ctrl-C while the process starts, or when its command has ended, ends it without a traceback."""
    for place in ("_use_utf8", "run_command"):
        code = (
            "import atexit, os, signal, sys, llmkit.cli.main as m\n"
            f"m.{place} = lambda *_: os.kill(os.getpid(), signal.SIGINT) if {place == '_use_utf8'} else 0\n"
            "sys.argv = ['llmkit', 'dedup', 'x']\n"
            "atexit.register(os.kill, os.getpid(), signal.SIGINT)\n"
            "m.main()"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


@pytest.mark.parametrize("fault", ["full disk", "no reader"])
def test_lost_messages_do_not_fail_a_command(docs: Path, fault: str) -> None:
    """Behaviour: where stderr is on a full disk, or its reader has gone, the output is made, with exit code 0."""
    reading, writing = os.pipe()
    os.close(reading)
    stderr = os.open("/dev/full", os.O_WRONLY) if fault == "full disk" else writing
    command = [sys.executable, "-m", "llmkit", *STAGE, "docs.jsonl", "--json", "-o", "out.jsonl"]
    assert subprocess.run(command, cwd=docs, stderr=stderr).returncode == 0
    assert (docs / "out.jsonl").read_bytes() == LINES
    os.close(writing)


def test_second_run_on_one_output_is_locked_out(docs: Path, llmkit) -> None:
    """Behaviour: exit code 75 while another run writes the same output."""
    process = start(*STAGE, "-o", "out.jsonl.zst", cwd=docs, stdin=subprocess.PIPE)
    wait_until((docs / ".out.jsonl.zst.partial").exists, process)
    result = llmkit(*STAGE, "docs.jsonl", "-o", "out.jsonl.zst", cwd=docs)
    assert result.returncode == 75 and "another run" in error_of(result)
    process.communicate(LINES)
    assert process.returncode == 0 and (docs / "out.jsonl.zst").exists()


def test_full_disk(llmkit, docs: Path) -> None:
    """Behaviour: ENOSPC gives one line with a hint and exit code 1 (/dev/full stands in for a full disk)."""
    with open("/dev/full", "wb") as full:
        result = subprocess.run(
            [sys.executable, "-m", "llmkit", *STAGE, "docs.jsonl"], cwd=docs, stdout=full, stderr=subprocess.PIPE
        )
    assert result.returncode == 1 and b"No space left" in result.stderr and b"Traceback" not in result.stderr


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory, write_shards, make_model) -> Path:
    """Inputs of every command that writes: documents that do not compress, shards, models."""
    place = tmp_path_factory.mktemp("sources")
    rows = [{"text": f"{os.urandom(80).hex()} of text"} for _ in range(400)]
    (place / "big.jsonl").write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    write_shards(place / "shards", [2000] * 20)
    make_model(place / "a"), make_model(place / "b", seed=1)
    return place


@pytest.mark.parametrize(
    ("command", "output"),
    [
        (f"{STAGE_WORDS} big.jsonl", "out.jsonl"),
        (f"{STAGE_WORDS} big.jsonl", "out.jsonl.zst"),
        (f"{STAGE_WORDS} big.jsonl", "out.jsonl.gz"),
        (f"{STAGE_WORDS} big.jsonl", "out.parquet"),
        ("tokenize big.jsonl -t a", "out"),
        ("tokenize big.jsonl -t a", "out.arrow"),
        ("tokenize shards --to nanogpt --lossy", "out.bin"),
        ("tokenize shards --to megatron --lossy", "out.idx"),
        ("mix shards", "out"),
        ("vocab big.jsonl --size 2000", "out"),
        ("average a b", "out"),
        ("quantize a --to int8", "out"),
        ("train shards -m a/config.json --tokens 512", "out"),
    ],
)
def test_a_full_disk_is_named(sources: Path, tmp_path: Path, llmkit_here, command: str, output: str) -> None:
    """Property: whatever a command writes, a file that cannot grow is an error with the name of the output and a hint, and
    leaves nothing incomplete (a limit on the size of files stands in for a full disk)."""
    name, *arguments = command.split()
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, hard))
    try:
        done = llmkit_here(name, *arguments, "-q", "-o", str(tmp_path / output), cwd=sources)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    message = done.stderr.decode()
    assert done.returncode == 1 and f"{tmp_path}/out" in message, message
    assert "File too large" in message and "free some space" in message and "Traceback" not in message
    assert name == "train" or list(tmp_path.iterdir()) == []  # a run can be resumed


def test_one_is_singular(llmkit_here, tmp_path: Path) -> None:
    """Behaviour: summaries count one bad line and one bad file as such."""
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{broken\n')
    (tmp_path / "b.jsonl.gz").write_bytes(b"\x1f\x8b")
    skip = ("--on-bad-line", "skip", "--on-bad-file", "skip")
    done = llmkit_here(*STAGE, "a.jsonl", "b.jsonl.gz", *skip, "-o", "out.jsonl", cwd=tmp_path)
    assert b"kept 1 of 1 document (100.0 %), removed 0, 1 bad line skipped, 1 bad file skipped" in done.stderr


def test_names_cannot_drive_the_terminal(llmkit, docs: Path) -> None:
    """Behaviour: control characters in a file name are escaped, not sent to the terminal."""
    result = llmkit(*STAGE, "no\x1b[31msuch", cwd=docs)
    assert b"\x1b" not in result.stderr and b"\\x1b" in result.stderr


def test_lineage_of_a_pipe(docs: Path, llmkit) -> None:
    """Behaviour: the tree names every stage; the script reproduces the same bytes; --check finds a changed input."""
    script = f"{sys.executable} -m llmkit dedup --method exact docs.jsonl -q | {sys.executable} -m llmkit dedup --method exact -q -o out.jsonl.zst"
    subprocess.run(["bash", "-euo", "pipefail", "-c", script], cwd=docs, check=True)
    tree = llmkit("lineage", "out.jsonl.zst", cwd=docs).stdout.decode()
    assert tree.count("<- dedup") == 2 and "docs.jsonl" in tree
    (docs / "again.sh").write_bytes(llmkit("lineage", "out.jsonl.zst", "--script", cwd=docs).stdout)
    path = f"{docs / 'bin'}:{os.environ['PATH']}"
    (docs / "bin").mkdir()
    (docs / "bin" / "llmkit").write_text(f'#!/bin/sh\nexec {sys.executable} -m llmkit "$@"\n')
    (docs / "bin" / "llmkit").chmod(0o755)
    subprocess.run(
        ["bash", "again.sh", ".", "rebuilt"], cwd=docs, check=True, env=os.environ | {"PATH": path}, capture_output=True
    )
    assert (docs / "rebuilt" / "out.jsonl.zst").read_bytes() == (docs / "out.jsonl.zst").read_bytes()
    assert llmkit("lineage", "out.jsonl.zst", "--check", cwd=docs).returncode == 0
    (docs / "docs.jsonl").write_bytes(LINES[:-200])
    result = llmkit("lineage", "out.jsonl.zst", "--check", cwd=docs)
    assert result.returncode == 1 and "docs.jsonl" in error_of(result)


def test_closed_streams(tmp_path: Path) -> None:
    """Behaviour: a command with -o needs neither stdout nor stderr; without it a closed stdout is an error."""
    (tmp_path / "a.jsonl").write_text('{"text":"some words"}\n')
    command = f"{sys.executable} -P -m llmkit filter a.jsonl --annotate"
    for end in ("-o b.jsonl.zst >&-", "-o c.jsonl.zst <&- 2>&-"):
        done = subprocess.run(["bash", "-c", f"{command} {end}"], cwd=tmp_path, capture_output=True)
        assert done.returncode == 0 and not done.stdout and b"Traceback" not in done.stderr
    assert len({(tmp_path / f"{name}.jsonl.zst").read_bytes() for name in "bc"}) == 1
    done = subprocess.run(["bash", "-c", f"{command} --plain >&-"], cwd=tmp_path, capture_output=True)
    assert done.returncode == 1 and done.stderr.count(b"\n") <= 2 and b"Traceback" not in done.stderr

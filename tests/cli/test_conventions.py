"""The conventions that hold for every command, checked on the real command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import orjson
import pytest
import zstandard
from waiting import wait_until

from llmkit.cli.shared.table import COMMANDS

PROSE = "The quick brown fox jumps over the lazy dog, and then it rests with the others that have been there before. "
LINES = b"".join(
    orjson.dumps({"id": str(i), "text": f"{PROSE * 3} Number {i} of the series. {PROSE}"}) + b"\n" for i in range(300)
)
# A pass that keeps everything but exact repeats: the plainest document stage.
STAGE = ("dedup", "--method", "exact", "--no-counts")


@pytest.fixture
def llmkit(llmkit_anew):
    """The start is a part of what is tested here."""
    return llmkit_anew


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    (tmp_path / "docs.jsonl").write_bytes(LINES)
    return tmp_path


def start(*arguments: str, cwd: Path, **options: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "llmkit", *arguments], cwd=cwd, stderr=subprocess.PIPE, **options)  # type: ignore[call-overload,no-any-return]


def error_of(done: subprocess.CompletedProcess[bytes]) -> str:
    """stderr of a failed call, which must be one error line, perhaps a hint, and no traceback."""
    text = done.stderr.decode()
    lines = [line for line in text.splitlines() if ": error: " in line]
    assert len(lines) == 1 and "Traceback" not in text, text
    return text


def test_unknown_names_get_a_suggestion(llmkit, docs: Path) -> None:
    """Behaviour: exit 2 and the nearest name for commands, options, presets and methods."""
    for arguments, near in [
        (["fliter"], "filter"),
        (["filter", "trian"], "train"),
        (["filter", "--presett", "gopher", "docs.jsonl"], "--preset"),
        (["filter", "--preset", "gofer", "docs.jsonl"], "gopher"),
        (["dedup", "--method", "minhsh", "docs.jsonl"], "minhash"),
    ]:
        done = llmkit(*arguments, cwd=docs)
        assert done.returncode == 2
        assert near in error_of(done)


@pytest.mark.parametrize("command", list(COMMANDS))
def test_every_command_has_the_shared_options_and_examples(llmkit, command: str) -> None:
    """Property: one name, one meaning, everywhere; two or three examples."""
    text = llmkit(command, "-h").stdout.decode()
    for flag in ("-o,", "-f,", "-n,", "-q,", "-v,", "-j,", "-c,", "--seed", "--json", "--summary", "-h,", "-V,"):
        assert flag in text, flag
    assert text.count(f"  llmkit {command}") >= 2


def test_version(llmkit) -> None:
    """Behaviour: -V and --version, with and without a command."""
    for arguments in (["-V"], ["--version"], ["filter", "-V"]):
        assert llmkit(*arguments).stdout.decode().startswith("llmkit ")


def test_stdin_terminal_without_input_is_a_usage_error(tmp_path: Path) -> None:
    """Behaviour: exit 2 at once instead of waiting for the user to type documents."""
    import pty

    master, slave = pty.openpty()
    done = subprocess.run([sys.executable, "-m", "llmkit", *STAGE], stdin=slave, capture_output=True, timeout=60)
    os.close(master)
    os.close(slave)
    assert done.returncode == 2 and "terminal" in error_of(done)


def test_stdout_is_zstd_in_a_pipe_and_plain_on_request(llmkit, docs: Path) -> None:
    """Behaviour: a pipe carries one zstd stream, --plain carries lines, messages go to stderr alone."""
    piped = llmkit(*STAGE, "docs.jsonl", cwd=docs)
    assert zstandard.ZstdDecompressor().stream_reader(piped.stdout, read_across_frames=True).read() == LINES
    assert llmkit(*STAGE, "docs.jsonl", "--plain", cwd=docs).stdout == LINES
    assert llmkit(*STAGE, cwd=docs, stdin=piped.stdout).returncode == 0


def test_quiet_and_json(llmkit, docs: Path) -> None:
    """Behaviour: -q is silent on success; --json is one JSON line on stderr, in the place of the summary for people; --summary writes it."""
    assert llmkit(*STAGE, "docs.jsonl", "-q", "-o", "a.jsonl", cwd=docs).stderr == b""
    done = llmkit(*STAGE, "docs.jsonl", "-q", "--json", "-o", "b.jsonl", "--summary", "s.json", cwd=docs)
    assert json.loads(done.stderr)["documents"] == json.loads((docs / "s.json").read_bytes())["documents"] == 300
    done = llmkit(*STAGE, "docs.jsonl", "--json", "-o", "c.jsonl", cwd=docs)
    assert json.loads(done.stderr)["documents"] == 300


def test_no_clobber_and_force(llmkit, docs: Path) -> None:
    """Behaviour: an existing output that is not ours is kept and named; -f replaces it."""
    (docs / "out.jsonl.zst").write_text("precious")
    done = llmkit(*STAGE, "docs.jsonl", "-o", "out.jsonl.zst", cwd=docs)
    assert done.returncode == 1 and "out.jsonl.zst exists" in error_of(done)
    assert (docs / "out.jsonl.zst").read_text() == "precious"
    assert llmkit(*STAGE, "docs.jsonl", "-o", "out.jsonl.zst", "-f", cwd=docs).returncode == 0


def test_finished_run_repeated_does_nothing(llmkit, docs: Path) -> None:
    """Behaviour: decided by the inputs and options that the output records, not by its existence."""
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
    """Behaviour: what --print-config prints is a configuration, for the command that has an option of its own name too."""
    for command in ("filter", "dedup"):
        printed = llmkit(command, "docs.jsonl", "--print-config", cwd=docs)
        (docs / "p.toml").write_bytes(printed.stdout)
        done = llmkit(command, "docs.jsonl", "-c", "p.toml", "-o", f"{command}.jsonl", cwd=docs)
        assert done.returncode == 0, done.stderr.decode()


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
    """Behaviour: exit 2, file and key named."""
    (docs / "c.toml").write_text("sed = 3\n")
    done = llmkit(*STAGE, "-c", "c.toml", "docs.jsonl", cwd=docs)
    assert done.returncode == 2 and "c.toml" in error_of(done) and "seed" in error_of(done)


def test_bad_inputs_are_named(llmkit, docs: Path) -> None:
    """Behaviour: one line naming file (and line), exit 1, nothing under the final name."""
    packed = zstandard.compress(LINES)
    files = {
        "cut.jsonl.zst": (packed[: len(packed) // 2], "truncated"),
        "json.jsonl": (LINES + b"{broken\n", "json.jsonl:301: invalid JSON"),
        "utf8.jsonl": (b'{"text":"\xff"}\n', "utf8.jsonl:1: invalid UTF-8"),
        "field.jsonl": (b'{"body":"x"}\n', "field.jsonl:1: no field 'text'"),
    }
    for name, (data, message) in files.items():
        (docs / name).write_bytes(data)
        done = llmkit(*STAGE, name, "-o", "out.jsonl.zst", cwd=docs)
        assert done.returncode == 1 and message in error_of(done)
        assert not (docs / "out.jsonl.zst").exists()
    (docs / "empty").mkdir()
    for name, message in (
        ("empty", "no input files"),
        ("nowhere.jsonl", "no such file"),
        ("*.nothing", "nothing matches"),
    ):
        done = llmkit(*STAGE, name, cwd=docs)
        assert done.returncode == 1 and message in error_of(done)
    (docs / "zero.jsonl").write_bytes(b"")
    done = llmkit(*STAGE, "zero.jsonl", "--plain", cwd=docs)
    assert done.returncode == 0 and done.stdout == b"" and b"no documents" in done.stderr
    done = llmkit(*STAGE, "-o", "out.jsonl", stdin=b"", cwd=docs)  # what a failed command leaves to the next one
    assert done.returncode == 1 and b"stdin is empty" in done.stderr and not (docs / "out.jsonl").exists()


def test_broken_pipe_is_quiet(docs: Path) -> None:
    """Behaviour: `llmkit ... | head -1` ends with 141 and no message of its own."""
    (docs / "many.jsonl").write_bytes(b"".join(orjson.dumps({"text": f"{i} {PROSE}"}) + b"\n" for i in range(30_000)))
    script = f"{sys.executable} -m llmkit dedup --method exact -q many.jsonl --plain | head -1 > first; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], cwd=docs, capture_output=True, text=True)
    assert done.stdout.strip() == "141" and done.stderr == ""
    assert orjson.loads((docs / "first").read_bytes())["text"].startswith("0 ")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("jobs", ["1", "2"])
def test_signals_leave_nothing_half_written(docs: Path, number: int, code: int, jobs: str) -> None:
    """Behaviour: Ctrl-C and SIGTERM in the middle: their exit codes, and no output under its final name or any other."""
    process = start(*STAGE, "-j", jobs, "-o", "out.jsonl.zst", cwd=docs, stdin=subprocess.PIPE)
    assert process.stdin and process.stderr
    process.stdin.write(LINES * 20)
    process.stdin.flush()
    wait_until((docs / ".out.jsonl.zst.partial").exists, process)
    process.send_signal(number)
    assert process.wait(60) == code
    assert b"Traceback" not in process.stderr.read()
    assert [p.name for p in docs.iterdir()] == ["docs.jsonl"]


def test_second_run_on_one_output_is_locked_out(docs: Path, llmkit) -> None:
    """Behaviour: exit 75 while another run writes the same output."""
    process = start(*STAGE, "-o", "out.jsonl.zst", cwd=docs, stdin=subprocess.PIPE)
    wait_until((docs / ".out.jsonl.zst.partial").exists, process)
    done = llmkit(*STAGE, "docs.jsonl", "-o", "out.jsonl.zst", cwd=docs)
    assert done.returncode == 75 and "another run" in error_of(done)
    process.communicate(LINES)
    assert process.returncode == 0 and (docs / "out.jsonl.zst").exists()


def test_full_disk(llmkit, docs: Path) -> None:
    """Behaviour: ENOSPC is one line with a hint and exit 1 (/dev/full stands in for the disk)."""
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "llmkit", *STAGE, "docs.jsonl"], cwd=docs, stdout=full, stderr=subprocess.PIPE
        )
    assert done.returncode == 1 and b"No space left" in done.stderr and b"Traceback" not in done.stderr


def test_names_cannot_drive_the_terminal(llmkit, docs: Path) -> None:
    """Behaviour: control characters of a file name are shown, not sent to the terminal."""
    done = llmkit(*STAGE, "no\x1b[31msuch", cwd=docs)
    assert b"\x1b" not in done.stderr and b"\\x1b" in done.stderr


def test_lineage_of_a_pipe(docs: Path, llmkit) -> None:
    """Behaviour: the tree names every stage; the script makes the same bytes again; --check finds a changed input."""
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
    done = llmkit("lineage", "out.jsonl.zst", "--check", cwd=docs)
    assert done.returncode == 1 and "docs.jsonl" in error_of(done)

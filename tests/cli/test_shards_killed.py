"""`tokenize` and `mix` killed, and on a full disk: nothing half-written is seen, and the next run gives the bytes of an undisturbed one."""

from __future__ import annotations

import json
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llmkit.io.record import Lineage
from llmkit.shards.arrow import as_arrow, encode_sources
from llmkit.shards.tokenizer_info import parse_tokenizer
from llmkit.shards.writer import ShardWriter

Command = Callable[..., subprocess.CompletedProcess[bytes]]
MIX = ("mix", "web:2", "code:1", "--tokens", "10M", "-q")
OUTPUTS = ("out", "out.arrow")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory, small_tokenizer: dict[str, str]) -> Path:
    """web and code, 60,000 documents each."""
    place = tmp_path_factory.mktemp("sources")
    info = parse_tokenizer(small_tokenizer, "small")
    numbers = np.random.default_rng(0)
    for name in ("web", "code"):
        lengths = numbers.integers(1, 120, 60_000)
        tokens = numbers.integers(0, info.vocab_size, int(lengths.sum()), dtype=np.uint16)
        with ShardWriter(str(place / name), info, Lineage("tokenize")) as writer:
            ids = as_arrow([f"{name}-{i}" for i in range(len(lengths))])
            writer.extend(tokens, lengths, ids, encode_sources([name] * len(lengths)))
            writer.finish({}, [])
    return place


def content(path: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in path.iterdir()} if path.is_dir() else {"": path.read_bytes()}


def written(path: Path) -> int:
    """Bytes under the temporary name of an output."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        return sum(p.stat().st_size for p in (partial.iterdir() if partial.is_dir() else [partial]))
    except FileNotFoundError:
        return 0


@pytest.mark.parametrize("output", OUTPUTS)
def test_mix_killed(llmkit: Command, sources: Path, tmp_path: Path, output: str) -> None:
    """Property: kill -9 at random moments of the writing leaves nothing under the final name; rerun, the bytes are the same."""
    (tmp_path / "whole").mkdir()
    assert llmkit(*MIX, "-o", tmp_path / "whole" / output, cwd=sources).returncode == 0
    whole = content(tmp_path / "whole" / output)
    size, final = sum(map(len, whole.values())), tmp_path / output
    killed = 0
    for moment in (0.0, random.random() * 0.5):
        process = subprocess.Popen([sys.executable, "-m", "llmkit", *MIX, "-f", "-o", final], cwd=sources)
        while process.poll() is None and written(final) <= moment * size:
            time.sleep(0.0005)
        process.send_signal(signal.SIGKILL)
        if process.wait() == -signal.SIGKILL and not final.exists():
            killed += 1
    assert killed, "the run was over before it could be killed"
    assert llmkit(*MIX, "-f", "-o", final, cwd=sources).returncode == 0
    assert content(final) == whole and sorted(p.name for p in tmp_path.iterdir()) == sorted([output, "whole"])


@pytest.mark.parametrize("output", OUTPUTS)
def test_tokenize_killed(llmkit: Command, tmp_path: Path, small_tokenizer: dict[str, str], output: str) -> None:
    """Property: the same of tokenize, killed while it waits for more of its input."""
    (tmp_path / "tok").mkdir()
    for name, text in small_tokenizer.items():
        (tmp_path / "tok" / name).write_text(text)
    rows = [json.dumps({"id": str(i), "text": f"{i} of many " * (i % 90)}) + "\n" for i in range(4_000)]
    data = "".join(rows).encode()
    call = ("tokenize", "-t", "tok", "--max-tokens-per-shard", "300k", "-q")
    (tmp_path / "whole").mkdir()
    assert llmkit(*call, "-o", f"whole/{output}", stdin=data, cwd=tmp_path).returncode == 0
    command = [sys.executable, "-m", "llmkit", *call, "-o", output]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, cwd=tmp_path)
    assert process.stdin is not None
    process.stdin.write(data[: int(len(data) * random.uniform(0.6, 0.95))])
    process.kill()
    process.stdin.close()
    assert process.wait() == -signal.SIGKILL and not (tmp_path / output).exists()
    assert llmkit(*call, "-o", output, stdin=data, cwd=tmp_path).returncode == 0
    assert content(tmp_path / output) == content(tmp_path / "whole" / output)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([output, "tok", "whole"])


@pytest.mark.parametrize("output", OUTPUTS)
def test_disk_full_in_the_middle(sources: Path, tmp_path: Path, output: str) -> None:
    """Behaviour: a write that fails (a limit on the size of files stands in for the disk) is one line that names the output; nothing is left."""

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (9 << 20, 9 << 20))

    command = [sys.executable, "-m", "llmkit", *MIX, "-o", tmp_path / output]
    done = subprocess.run(command, cwd=sources, stderr=subprocess.PIPE, preexec_fn=limited)
    said = done.stderr.decode().splitlines()
    errors = [line for line in said if "error:" in line]
    assert done.returncode == 1 and errors == [f"llmkit mix: error: {tmp_path / output}: File too large"], said
    assert "Traceback" not in done.stderr.decode() and list(tmp_path.iterdir()) == []

"""A working directory that was downloaded: its modules and settings are not used, here or in child processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

RULE = """
import subprocess, sys
import llmkit.kernels, numba

def children():
    yield subprocess.run([sys.executable, "-c", "import xxhash"], capture_output=True).stderr
    yield subprocess.run([sys.executable, "-m", "json.tool", "-h"], capture_output=True).stderr
    yield str(numba.config.CACHE_DIR).encode()

def rule(document):
    assert not any(b"evil" in text for text in children())
    return True
"""


def test_nothing_in_the_working_directory_runs(
    tmp_path: Path, llmkit_anew: Callable[..., subprocess.CompletedProcess[bytes]]
) -> None:
    """Behaviour: `python -m llmkit`, where a download has modules of the names of libraries and settings of numba, uses
    neither, nor do child processes, also those that libraries start."""
    for name in (
        "torch",
        "numpy",
        "orjson",
        "typer",
        "json",
        "numba",
        "yaml",
        "zstandard",
        "xxhash",
        "multiprocessing",
    ):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('evil')")
    (tmp_path / ".numba_config.yaml").write_text("cache_dir: evil\n")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/rule.py").write_text(RULE)
    (tmp_path / "docs.jsonl").write_text('{"text": "a b c"}\n')
    done = llmkit_anew("filter", "docs.jsonl", "--rule", "mine/rule.py:rule", "--plain", cwd=tmp_path)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout == b'{"text": "a b c"}\n'


def test_a_checkout_is_its_own_working_directory(tmp_path: Path) -> None:
    """Behaviour: `python -m llmkit` where llmkit is in the working directory lets child processes find it there."""
    rule = "import subprocess, sys\ndef rule(document): return subprocess.call([sys.executable, '-m', 'llmkit', '-V']) == 0"
    (tmp_path / "rule.py").write_text(rule)
    command = [sys.executable, "-m", "llmkit", "filter", "--rule", f"{tmp_path}/rule.py:rule", "--plain", "-q"]
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    root = Path(__file__).parents[2]
    done = subprocess.run(command, input=b'{"text": "a"}\n', cwd=root, env=environment, capture_output=True)
    assert done.stdout.endswith(b'{"text": "a"}\n'), done.stderr


def test_workers_of_ray_do_not_search_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behaviour: Ray starts in another directory, since it adds the one it starts in to the workers' search path."""
    ray = pytest.importorskip("ray")
    from llmkit.engine import cluster

    seen: list[str] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **_: seen.append(os.getcwd()))
    cluster._connect()
    assert seen == ["/"] and os.getcwd() == str(tmp_path)

"""Fixtures that the whole suite shares."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Directory of real test data beside the checkout; tests that need it are skipped where it is absent."""
    path = ROOT.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip("the shared test data is not beside this checkout")
    return path


def run_llmkit(
    *arguments: str, stdin: bytes | None = None, cwd: Path | None = None, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[bytes]:
    """One call of `python -m llmkit`, as a process of its own, with stdout and stderr captured."""
    return subprocess.run(
        [sys.executable, "-m", "llmkit", *arguments],
        input=stdin if stdin is not None else b"",
        capture_output=True,
        cwd=cwd,
        env=os.environ | (env or {}),
        timeout=300,
    )


@pytest.fixture(scope="session")
def llmkit() -> Callable[..., subprocess.CompletedProcess[bytes]]:
    """The command line as a function: `llmkit("filter", "docs.jsonl", cwd=tmp_path)`."""
    return run_llmkit

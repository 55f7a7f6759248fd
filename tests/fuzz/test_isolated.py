"""The harness itself: it reports every way in which a reader may fail, and makes the case smaller."""

from __future__ import annotations

import ctypes
import mmap
import subprocess
from collections.abc import Callable
from pathlib import Path

import isolated
import pytest
from readers import Target

from llmkit.errors import LlmkitError


def swell() -> None:
    with mmap.mmap(-1, 1 << 30) as memory:  # never memory that an earlier test has freed
        for start in range(0, len(memory), 1 << 20):
            memory[start : start + (1 << 20)] = b"x" * (1 << 20)


def hang() -> None:
    while True:
        pass


def refuse() -> None:
    raise LlmkitError("named")


FAILURES: dict[str, Callable[[], object]] = {
    "ZeroDivisionError": lambda: 1 / 0,
    "SystemExit": lambda: exit(1),
    "signal 11": lambda: ctypes.string_at(1),
    "time": hang,
    "memory": swell,
    "forbidden": lambda: subprocess.run(["true"]),
    "forbidden ": lambda: Path("escaped").write_bytes(b""),
    "refused": refuse,
}


@pytest.mark.parametrize("kind", FAILURES)
def test_failures_are_reported(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behaviour: a case of 3,000 bytes that holds the word is a finding of this kind, and is reduced to the word."""
    monkeypatch.setattr(isolated, "SECONDS", 1 if kind == "time" else 10)
    monkeypatch.setattr(isolated, "seeds_of", lambda target: [("intact.txt", b"nothing")])
    monkeypatch.setattr(isolated, "case", lambda *_: ("case.txt", b"x" * 2000 + b"word" + b"y" * 996))

    def read(path: Path) -> None:
        if b"word" in path.read_bytes():
            FAILURES[kind]()

    target = Target("harness", read)
    result = isolated.run(target, 0, 0, 1)
    if kind == "refused":
        assert not result.findings and result.counts["refused"] == 1
        return
    (finding,) = result.findings.values()
    assert finding.kind == kind.strip()
    if kind not in ("time", "memory"):
        assert isolated.shrunk(target, finding).data == b"word"

"""The tokenizer, templates and model of `chat_fixtures`, and a directory to work in."""

from __future__ import annotations

import random
from pathlib import Path

import orjson
import pytest
from chat_fixtures import base, files, templates  # noqa: F401  (fixtures)

WORDS = ["what", "is", "the", "weather", "like", "sunny", "today"]


@pytest.fixture
def directory(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: F811
    """A working directory with the model `base`, `chat.jsonl` (60 rows) and `pairs.jsonl` (40 pairs)."""
    (tmp_path / "base").symlink_to(base)
    draw = random.Random(0)

    def some(n: int) -> str:
        return " ".join(draw.choices(WORDS, k=n))

    rows = [{"prompt": some(4), "completion": "it is sunny"} for _ in range(60)]
    pairs = [{"prompt": some(3), "chosen": "it is sunny", "rejected": some(2) + " to"} for _ in range(40)]
    for name, content in (("chat.jsonl", rows), ("pairs.jsonl", pairs)):
        (tmp_path / name).write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in content))
    monkeypatch.chdir(tmp_path)
    return tmp_path

"""The commands that take a model, each on some of the families: tests/bench/families.py runs all of them on all."""

from __future__ import annotations

from pathlib import Path

import pytest
from open_model_commands import COMMANDS, prepare, run
from open_models import MODELS

FAMILIES = [name for name in MODELS if name not in ("llama", "qwen3", "olmo2")]  # which the other tests use


@pytest.mark.parametrize("number", range(len(FAMILIES)))
def test_command(number: int, small_tokenizer: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behaviour: a command, `generate` from its output and `lineage --check` of it end well."""
    monkeypatch.chdir(tmp_path)
    prepare(tmp_path, FAMILIES[number], small_tokenizer)
    assert run(list(COMMANDS)[number % len(COMMANDS)]) == []

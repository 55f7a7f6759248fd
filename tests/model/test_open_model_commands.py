"""The commands that take a model, each on some of the families: tests/bench/families.py runs all of them on all."""

from __future__ import annotations

from pathlib import Path

import pytest
from open_model_commands import COMMANDS, prepare, run
from open_models import MODELS

from llmkit.cli.main import run_command

FAMILIES = [name for name in MODELS if name not in ("llama", "qwen3", "olmo2")]  # which the other tests use


@pytest.mark.parametrize("number", range(len(FAMILIES)))
def test_command(number: int, small_tokenizer: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behaviour: a command, `generate` from its output and `lineage --check` of it end well."""
    monkeypatch.chdir(tmp_path)
    prepare(tmp_path, FAMILIES[number], small_tokenizer)
    assert run(list(COMMANDS)[number % len(COMMANDS)]) == []


def test_model_without_tokenizer(
    small_tokenizer: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Behaviour: commands that need no tokenizer work; the others say that tokenizer.json is missing, not damaged."""
    monkeypatch.chdir(tmp_path)
    prepare(tmp_path, "qwen2", small_tokenizer)
    Path("model/tokenizer.json").unlink()
    refused = []
    for name, call in COMMANDS.items():
        capfd.readouterr()
        code = run_command(call[0], [*call[1:-1], f"{call[-1]} {name}" if call[-2] == "-o" else call[-1], "-q"])
        if code != 0:
            line = f"llmkit {call[0]}: error: model: no tokenizer.json"
            assert (code, capfd.readouterr().err.splitlines()[0]) == (1, line)
            refused.append(name)
    assert refused == ["generate", "train", "sft", "dpo", "eval"]

"""Completion scripts: up to date, and working in the installed shells."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from llmkit.cli.shared.completions import scripts

DIRECTORY = Path(__file__).resolve().parents[2] / "completions"


@pytest.fixture(scope="module")
def generated() -> dict[str, str]:
    return scripts()


def test_no_drift(generated: dict[str, str]) -> None:
    """Property: the stored scripts equal the output of `python -m llmkit.cli.shared.completions`."""
    stale = [name for name, text in generated.items() if (DIRECTORY / name).read_text() != text]
    assert not stale, f"run: python -m llmkit.cli.shared.completions completions  ({stale})"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["llmkit", "fi"], {"filter"}),
        (["llmkit", "filter", "tra"], {"train"}),
        (["llmkit", "filter", "train", "--fol"], {"--folds"}),
        (["llmkit", "vocab", "report", "--by"], {"--by"}),
        (["llmkit", "tok"], {"tokenize"}),
        (["llmkit", "filter", "--rej"], {"--rejects"}),
        (["llmkit", "train", "--tok"], {"--tokens"}),
    ],
)
def test_bash_completes(words: list[str], expected: set[str]) -> None:
    """Behaviour: bash loads the script and offers subcommands and options."""
    script = f"""
source {DIRECTORY / "llmkit.bash"}
COMP_WORDS=({" ".join(words)}); COMP_CWORD={len(words) - 1}
_llmkit
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    result = subprocess.run(["bash", "-euc", script], capture_output=True, text=True, check=True)
    assert set(result.stdout.split()) == expected


@pytest.mark.parametrize(("shell", "name"), [("zsh", "_llmkit"), ("fish", "llmkit.fish")])
def test_other_shells_parse_their_script(shell: str, name: str) -> None:
    """Behaviour: zsh and fish find no syntax error; if a shell is not installed, only the quotes are checked."""
    text = (DIRECTORY / name).read_text()
    if shutil.which(shell):
        subprocess.run(
            [shell, "--no-execute" if shell == "fish" else "-n", str(DIRECTORY / name)], check=True, capture_output=True
        )
    assert all(line.count("'") % 2 == 0 for line in text.splitlines() if "\\'" not in line)

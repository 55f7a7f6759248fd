"""Completion scripts: generated, up to date, and working in the shells that are here."""

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
    """Property: the stored scripts are what `python -m llmkit.cli.shared.completions` writes now."""
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
    done = subprocess.run(["bash", "-euc", script], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == expected


@pytest.mark.parametrize(("shell", "name"), [("zsh", "_llmkit"), ("fish", "llmkit.fish")])
def test_other_shells_parse_their_script(shell: str, name: str) -> None:
    """Behaviour: zsh and fish find no syntax error; where a shell is not installed the balance of quotes is checked."""
    text = (DIRECTORY / name).read_text()
    if shutil.which(shell):
        subprocess.run(
            [shell, "--no-execute" if shell == "fish" else "-n", str(DIRECTORY / name)], check=True, capture_output=True
        )
    assert all(line.count("'") % 2 == 0 for line in text.splitlines() if "\\'" not in line)

"""Output directories that replace an earlier artefact."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmkit.errors import LlmkitError
from llmkit.lineage.outputs import artefact_directory


def test_an_artefact_is_replaced_with_force(tmp_path: Path) -> None:
    """Behaviour: a directory with a lineage record stays as it is without force, and is replaced as a whole with it."""
    for text in ("one", "two"):
        with artefact_directory(tmp_path / "dir", force=True) as directory:
            (directory / text).write_text(text)
            (directory / "tokenizer_config.json").write_text('{"llmkit": {"command": "vocab"}}')
    assert sorted(path.name for path in (tmp_path / "dir").iterdir()) == ["tokenizer_config.json", "two"]
    with pytest.raises(LlmkitError, match="exists"), artefact_directory(tmp_path / "dir"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dir"]


def test_force_never_replaces_what_is_not_ours(tmp_path: Path) -> None:
    """Behaviour: a directory that holds anything that no command has made stays, -f or not; an empty one is no loss."""
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("years of work")
    with (
        pytest.raises(LlmkitError, match="what llmkit did not make"),
        artefact_directory(tmp_path / "thesis", force=True),
    ):
        pass
    assert (tmp_path / "thesis" / "thesis.tex").exists()
    (tmp_path / "empty").mkdir()
    with artefact_directory(tmp_path / "empty", force=True) as partial:
        (partial / "a").write_text("a")
    assert (tmp_path / "empty" / "a").exists()


def test_force_never_replaces_hidden_files(tmp_path: Path) -> None:
    """Behaviour: a directory that holds nothing but a hidden file is not empty."""
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / ".git").write_text("gitdir: elsewhere")
    with (
        pytest.raises(LlmkitError, match="what llmkit did not make"),
        artefact_directory(tmp_path / "project", force=True),
    ):
        pass
    assert (tmp_path / "project" / ".git").exists()

"""Output directories that replace an earlier artefact."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmkit.errors import LlmkitError
from llmkit.lineage.outputs import artefact_directory


def test_an_artefact_is_replaced_with_force(tmp_path: Path) -> None:
    """Behaviour: a directory with a lineage record stays as it is without force, and is replaced as a whole with it."""
    for text in ("chat_template.jinja", "special_tokens_map.json"):
        with artefact_directory(tmp_path / "dir", force=True) as directory:
            (directory / text).write_text(text)
            (directory / "tokenizer_config.json").write_text('{"llmkit": {"command": "vocab"}}')
    assert sorted(path.name for path in (tmp_path / "dir").iterdir()) == [
        "special_tokens_map.json",
        "tokenizer_config.json",
    ]
    with pytest.raises(LlmkitError, match="exists"), artefact_directory(tmp_path / "dir"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dir"]


def test_force_replaces_no_directory_of_others(tmp_path: Path) -> None:
    """Behaviour: a directory without a lineage record is never replaced, except an empty one."""
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


def test_force_replaces_no_files_beside_an_artefact(tmp_path: Path) -> None:
    """Behaviour: a tokenizer in a directory with files of others is not replaced, and the first of these is named."""
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "tokenizer_config.json").write_text('{"llmkit": {"command": "vocab"}}')
    (tmp_path / "project" / "thesis.tex").write_text("years of work")
    with (
        pytest.raises(LlmkitError, match="holds thesis.tex, which llmkit did not make"),
        artefact_directory(tmp_path / "project", force=True),
    ):
        pass
    assert (tmp_path / "project" / "thesis.tex").exists()


@pytest.mark.parametrize(
    ("names", "head", "refused"),
    [
        (["config.toml"], "[tool]\n", "config.toml is not of a run"),
        (["config.toml", "data"], "[tool]\n", "config.toml is not of a run"),
        (["config.toml", "checkpoints", "thesis.tex"], "# llmkit train ...\n", "holds thesis.tex, which is of no run"),
        (["config.toml", ".lock", "src"], "# llmkit train ...\n", "holds src, which is of no run"),
        (["config.toml", "metrics.jsonl", ".latest.partial"], "# llmkit train ...\n", ""),
        (["config.toml", "checkpoints", ".lock"], "", ""),
    ],
)
def test_force_replaces_only_runs(tmp_path: Path, names: list[str], head: str, refused: str) -> None:
    """Behaviour: a directory with any config.toml is no run; one with other files beside a run is not replaced."""
    from llmkit.training.checkpoint.run_directory import check_run

    for name in names:
        (tmp_path / name).write_text(head)
    if not refused:
        check_run(str(tmp_path), resume=False, force=True)
        return
    with pytest.raises(LlmkitError, match=refused):
        check_run(str(tmp_path), resume=False, force=True)


def test_emptied_lists_of_digests(tmp_path: Path) -> None:
    """Behaviour: a list that misses a file of a checkpoint or a run is a difference; one that is gone is unchecked."""
    import json

    from llmkit.io.digest import digest_stored
    from llmkit.lineage.check import check

    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000002"
    (checkpoint / "state").mkdir(parents=True)
    (tmp_path / "run" / "final").symlink_to(checkpoint)
    for path in (checkpoint / "config.json", checkpoint / "state" / "trainer.json", tmp_path / "run" / "config.toml"):
        path.write_text("{}")
    digest = digest_stored(str(checkpoint / "config.json"))
    lists = {
        checkpoint / "state" / "digests.json": {"config.json": digest, "state/trainer.json": digest},
        tmp_path / "run" / "digests.json": {"config.toml": digest},
    }

    def states() -> list[str]:
        found = check({"command": "train"}, str(tmp_path / "run"), [])
        return [result.state for result in found][1:]

    for path, digests in lists.items():
        path.write_text(json.dumps(digests, indent=1))
    assert states() == ["ok", "ok"]
    for number, (path, digests) in enumerate(lists.items()):
        for fewer in ({}, dict(list(digests.items())[1:])):
            path.write_text(json.dumps(fewer, indent=1))
            assert states()[number] == "DIFFERS"
        path.unlink()
        assert states()[number] == "unchecked"
        path.write_text(json.dumps(digests, indent=1))

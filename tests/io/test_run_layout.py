"""Names in a run directory and what a path stands for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import llmkit
from llmkit.errors import LlmkitError
from llmkit.io import run_layout
from llmkit.io.run_layout import (
    checkpoint_name,
    final_model,
    find_checkpoints,
    member,
    parse_step,
    resolve_model,
    step_of,
)


def test_names_and_steps() -> None:
    """Property: a name gives back its step; users may leave out zeros and the prefix."""
    for step in (0, 1, 500, 99_999_999, 123_456_789):
        assert step_of(Path("run") / checkpoint_name(step)) == parse_step(checkpoint_name(step)) == step
    assert parse_step("500") == parse_step("step-500") == 500
    for text in ("", "step-", "last", "-1", "5.0", "٣", "9" * 30):
        assert parse_step(text) is None


def test_resolution(tmp_path: Path) -> None:
    """Behaviour: a model directory is itself, a run its final model, and an unfinished one an error that says what to name."""
    run = tmp_path / "run"
    for step in (10, 9, 123_456_789):
        (run / "checkpoints" / checkpoint_name(step)).mkdir(parents=True)
    for name in (".step-00000011.partial", "damaged-step-00000009", "step-9"):
        (run / "checkpoints" / name).mkdir()
    assert [step_of(path) for path in find_checkpoints(run)] == [9, 10, 123_456_789]
    assert find_checkpoints(tmp_path) == []
    with pytest.raises(LlmkitError, match="no final model yet") as caught:
        resolve_model(run)
    assert f"{run}/latest" in caught.value.hint
    (run / "final").symlink_to("checkpoints/step-00000010")
    assert resolve_model(run) == final_model(run) == run / "final"
    (run / "final" / "config.json").touch()
    assert resolve_model(run / "final") == run / "final" == final_model(run)
    for path, message in ((tmp_path / "none", "no such file"), (tmp_path, "not a model directory")):
        with pytest.raises(LlmkitError, match=message):
            resolve_model(path)


def test_no_other_module_spells_these_names() -> None:
    """Property: renaming a directory of a run touches one file (in paths: "checkpoints" is a group of options, too)."""
    names = "|".join((run_layout.FINAL, run_layout.LATEST, run_layout.CHECKPOINTS, run_layout.STATE))
    pattern = re.compile(rf"""/ ["']({names})["']|\}}/({names})\b|["']({names})["'] /|["']{run_layout.STEP_PREFIX}""")
    package = Path(llmkit.__file__).parent
    spelled = {str(path.relative_to(package)) for path in package.rglob("*.py") if pattern.search(path.read_text())}
    assert spelled == {"io/run_layout.py"}


def test_links_out_of_a_model_directory_are_refused(tmp_path: Path) -> None:
    """Behaviour: a link within the directory, or into the blobs of the cache that it is a snapshot of, is followed; any
    other is an error that names it, also where it goes there by way of a blob."""
    (tmp_path / "secret").write_text("secret")
    blobs, snapshot = tmp_path / "models--a--b/blobs", tmp_path / "models--a--b/snapshots/0"
    for directory in (blobs, snapshot):
        directory.mkdir(parents=True)
    (blobs / "1").write_text("{}")
    (blobs / "2").symlink_to(tmp_path / "secret")
    for name, target in (("a", "../../blobs/1"), ("b", "../../blobs/2"), ("c", "a"), ("d", tmp_path / "secret")):
        (snapshot / name).symlink_to(target)
    (tmp_path / "link").symlink_to(snapshot)
    for directory in (snapshot, tmp_path / "link"):
        for name, allowed in (("a", True), ("b", False), ("c", True), ("d", False), ("none", True)):
            if allowed:
                assert member(directory, name) == directory / name
            else:
                with pytest.raises(LlmkitError, match=f"{name}: a symbolic link out of its directory"):
                    member(directory, name)


def test_links_into_a_cache_are_followed(tmp_path: Path) -> None:
    """Behaviour: folders of a snapshot, blobs that were moved elsewhere, and a --local-dir of older versions link into a
    cache; what is reached by a link that somebody else may have made must have the name of a blob."""
    digest = "0123456789abcdef" * 4
    cache, moved, local = tmp_path / "hub/models--a--b", tmp_path / "hub/models--a--c", tmp_path / "local"
    for directory in (cache / "blobs", cache / "snapshots/0/sub", moved / "snapshots/0", tmp_path / "scratch", local):
        directory.mkdir(parents=True)
    (moved / "blobs").symlink_to(tmp_path / "scratch")
    for name in (digest, "id_rsa"):
        (cache / "blobs" / name).write_text("{}")
        (tmp_path / "scratch" / name).write_text("{}")
        (moved / "snapshots/0" / name).symlink_to(f"../../blobs/{name}")
        (local / name).symlink_to(cache / "blobs" / name)
        (cache / "snapshots/0/sub" / name).symlink_to(f"../../../blobs/{name}")
    assert member(cache / "snapshots/0/sub", "id_rsa").read_text() == "{}"
    for directory in (cache / "snapshots/0/sub", moved / "snapshots/0", local):
        assert member(directory, digest).read_text() == "{}"
    for directory in (moved / "snapshots/0", local):
        with pytest.raises(LlmkitError, match="a symbolic link out of its directory"):
            member(directory, "id_rsa")

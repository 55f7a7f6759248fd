"""Runs that somebody else made, with links to the files of the user: to be resumed, replaced, or checked."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmkit.errors import LlmkitError
from llmkit.io.run_layout import CHECKPOINTS, DIGESTS, FINAL, LATEST, checkpoint_name
from llmkit.training.checkpoint.run_directory import RunDirectory, check_run, open_run
from llmkit.training.metrics.log import MetricsLog
from llmkit.training.trace import Trace

Train = Callable[..., dict[str, Any]]
DIRECTORIES = (CHECKPOINTS, "data", "trace", "tracker", f"{CHECKPOINTS}/{checkpoint_name(4)}")
FILES = (".lock", "config.toml", "metrics.jsonl", "events.jsonl", "samples.jsonl", "reference.safetensors", DIGESTS)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The directory of a run with one checkpoint of one file."""
    checkpoint = tmp_path / "run" / CHECKPOINTS / checkpoint_name(2)
    checkpoint.mkdir(parents=True)
    (checkpoint / "model.safetensors").touch()
    (tmp_path / "run" / "config.toml").write_text("seed = 0\n")
    return tmp_path / "run"


@pytest.fixture
def precious(tmp_path: Path) -> Path:
    """A directory of the user with a hidden directory, as a partial checkpoint is."""
    (tmp_path / "home" / ".ssh").mkdir(parents=True)
    (tmp_path / "home" / ".ssh" / "key").write_text("key")
    return tmp_path / "home"


@pytest.mark.parametrize("how", [{"resume": True, "force": False}, {"resume": False, "force": True}])
@pytest.mark.parametrize("name", [*DIRECTORIES, *FILES, LATEST, FINAL])
def test_a_run_leads_nowhere_else(run: Path, precious: Path, name: str, how: dict[str, bool]) -> None:
    """Behaviour: a run of which a member is a link out of it is neither resumed nor replaced, and nothing is lost."""
    if (run / name).is_dir():
        shutil.rmtree(run / name)
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(precious / ".ssh/key" if name in FILES else precious)
    before = sorted(precious.rglob("*"))
    if name != "config.toml":  # the first file that a run is known by
        (run / "config.toml").touch()
    with pytest.raises(LlmkitError, match=rf"run/{name}: a symbolic link") as caught, open_run(str(run), **how):
        pass
    assert "\n" not in caught.value.message and sorted(precious.rglob("*")) == before
    with pytest.raises(LlmkitError, match="symbolic link"):  # a dry run tells too
        check_run(str(run), **how)


def test_a_run_that_did_not_start_leads_nowhere_else(tmp_path: Path, precious: Path) -> None:
    """Behaviour: likewise without --resume, where only what a killed run leaves behind is there."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").touch()
    (tmp_path / "run" / CHECKPOINTS).symlink_to(precious)
    with pytest.raises(LlmkitError, match="symbolic link"), open_run(str(tmp_path / "run"), resume=False, force=False):
        pass
    assert (precious / ".ssh" / "key").exists()


def test_an_output_may_be_a_link(run: Path, tmp_path: Path) -> None:
    """Behaviour: the directory that the user named may be a link, and its links to its own checkpoints stay."""
    (run / LATEST).symlink_to(f"{CHECKPOINTS}/{checkpoint_name(2)}")
    (run / CHECKPOINTS / ".left").mkdir()
    (tmp_path / "link").symlink_to(run)
    with open_run(str(tmp_path / "link"), resume=True, force=False):
        assert not (run / CHECKPOINTS / ".left").exists() and (run / LATEST).exists()


@pytest.mark.parametrize("name", [*DIRECTORIES, *FILES])
def test_special_files_do_not_hang(run: Path, name: str) -> None:
    """Behaviour: a pipe in the place of a member is refused before it is opened."""
    if (run / name).is_dir():
        shutil.rmtree(run / name)
    (run / name).unlink(missing_ok=True)
    os.mkfifo(run / name)
    with pytest.raises(LlmkitError, match=f"run/{name}: "), open_run(str(run), resume=True, force=False):
        pass


def test_a_trace_that_is_a_pipe(run: Path) -> None:
    """Behaviour: llmkit trace does not wait for it."""
    (run / "trace").mkdir()
    os.mkfifo(run / "trace" / "trace.json")
    with pytest.raises(LlmkitError, match="not a regular file"):
        Trace(run)


def test_other_names_of_a_log_keep_their_content(tmp_path: Path) -> None:
    """Behaviour: a log that is also a file of the user is copied before lines are added or removed."""
    lines = b'{"step": 1}\n{"step": 2}\n{"step": 3}\n'
    for name in ("metrics.jsonl", "events.jsonl"):
        (tmp_path / f"my-{name}").write_bytes(lines)
        os.link(tmp_path / f"my-{name}", tmp_path / name)
    log = MetricsLog(tmp_path / "metrics.jsonl", after_step=2)
    log.write({"step": 3, "loss": 1.0})
    log.close()
    RunDirectory(tmp_path).event("resume")
    assert (tmp_path / "metrics.jsonl").read_bytes().splitlines()[2:] == [b'{"step": 3, "loss": 1.0}']
    assert (tmp_path / "events.jsonl").read_bytes().startswith(lines + b'{"event": "resume"')
    for name in ("metrics.jsonl", "events.jsonl"):
        assert (tmp_path / f"my-{name}").read_bytes() == lines


def test_a_backup_of_hard_links_is_not_changed(train: Train, tmp_path: Path) -> None:
    """Property: resuming a run changes no file of a copy made with `cp -al`."""

    def stop(record: dict[str, Any]) -> None:
        if record["step"] == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", report=stop)
    shutil.copytree(tmp_path / "run", tmp_path / "backup", symlinks=True, copy_function=os.link)
    before = {path: path.read_bytes() for path in (tmp_path / "backup").rglob("*") if path.is_file()}
    train(tmp_path / "run", resume=True)
    assert {path: path.read_bytes() for path in before} == before
    lines = (tmp_path / "run" / "metrics.jsonl").read_bytes().splitlines()
    assert len(lines) == 16 and len(before) > 5

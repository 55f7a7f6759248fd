"""Atomic outputs and locks."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from llmkit.errors import LlmkitError, LockedError
from llmkit.io import atomic
from llmkit.io.atomic import atomic_directory, atomic_file, lock


def names(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir())


def test_file_appears_only_when_complete(tmp_path: Path) -> None:
    """Behaviour: the file is absent while it is written and present afterwards, with nothing else in the directory."""
    with atomic_file(tmp_path / "out") as sink:
        sink.write(b"data")
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out").read_bytes() == b"data"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
def test_nothing_is_left_after_an_exception(tmp_path: Path, error: type[BaseException]) -> None:
    """Behaviour: neither a file nor a directory remains, under any name."""
    with pytest.raises(error), atomic_file(tmp_path / "out") as sink:
        sink.write(b"data")
        raise error
    with pytest.raises(error), atomic_directory(tmp_path / "dir") as directory:
        (directory / "a").write_text("x")
        raise error
    assert names(tmp_path) == []


def test_existing_output_needs_force(tmp_path: Path) -> None:
    """Behaviour: an existing file or directory stays as it is without force, and is replaced as a whole with it."""
    (tmp_path / "out").write_text("old")
    with pytest.raises(LlmkitError, match="exists"), atomic_file(tmp_path / "out"):
        pass
    assert (tmp_path / "out").read_text() == "old"
    with atomic_file(tmp_path / "out", force=True) as sink:
        sink.write(b"new")
    assert (tmp_path / "out").read_text() == "new"
    for text in ("one", "two"):
        with atomic_directory(tmp_path / "dir", force=True) as directory:
            (directory / text).write_text(text)
    assert names(tmp_path / "dir") == ["two"]
    assert names(tmp_path) == ["dir", "out"]


def _replace_and_die(path: Path, swaps: bool, at: int) -> None:
    """Replace a directory, and be killed before the at-th change of names."""
    count = 0

    def dying(original: Any) -> Any:
        def rename(*names: Any) -> Any:
            nonlocal count
            count += 1
            if count == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*names)

        return rename

    os.rename = dying(os.rename)
    if hasattr(atomic, "exchange"):
        atomic.exchange = dying(atomic.exchange) if swaps else lambda *_: False
    with atomic_directory(path, force=True) as directory:
        (directory / "a").write_text("new")


@pytest.mark.parametrize("swaps", [True, False])
def test_a_killed_replacement_loses_nothing(tmp_path: Path, swaps: bool) -> None:
    """Property: killed at any change of names, the old or the new directory is there, at the latest when the next run
    starts, where the file system cannot exchange names; and that leaves nothing else."""
    path, codes = tmp_path / "out", []
    while 0 not in codes:
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        (path / "a").write_text("old")
        other = multiprocessing.get_context("fork").Process(target=_replace_and_die, args=(path, swaps, len(codes) + 1))
        other.start()
        other.join()
        codes.append(other.exitcode)
        assert path.exists() or not swaps
        with pytest.raises((RuntimeError, LlmkitError)), atomic_directory(path):
            raise RuntimeError
        assert (path / "a").read_text() in ("old", "new")[codes[-1] == 0 :]
        with atomic_directory(path, force=True) as directory:
            (directory / "a").write_text("newer")
        assert names(tmp_path) == ["out"]
    assert len(codes) > 1


def test_failed_replacement_restores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behaviour: where the second of two renames fails, the old directory has its name again."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").write_text("old")
    rename = os.rename

    def failing(first: Path, second: Path) -> None:
        if Path(first).name == ".out.partial":
            raise OSError(28, "No space left on device")
        rename(first, second)

    monkeypatch.setattr(os, "rename", failing)
    monkeypatch.setattr(atomic, "exchange", lambda *_: False, raising=False)
    with pytest.raises(OSError), atomic_directory(tmp_path / "out", force=True) as directory:
        (directory / "a").write_text("new")
    assert names(tmp_path) == ["out"] and (tmp_path / "out" / "a").read_text() == "old"


def test_symbolic_link_stays_a_link(tmp_path: Path) -> None:
    """Behaviour: writing through a link replaces its target."""
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to("target")
    with atomic_file(tmp_path / "link", force=True) as sink:
        sink.write(b"new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_text() == "new"


@pytest.mark.parametrize("plant", ["symbolic", "hard", "dangling"])
def test_planted_links_are_not_written_to(tmp_path: Path, plant: str) -> None:
    """Behaviour: a link with the name of a partial file or directory is replaced; what it leads to stays as it is."""
    precious, directory = tmp_path / "precious", tmp_path / "directory"
    directory.mkdir()
    for path in (precious, directory / "file"):
        path.write_text("precious")
    (tmp_path / "outputs/d").mkdir(parents=True)
    partial, partial_directory, old = (tmp_path / "outputs" / name for name in (".f.partial", ".d.partial", ".d.old"))
    if plant == "hard":
        partial.hardlink_to(precious)
    else:
        partial.symlink_to(precious if plant == "symbolic" else tmp_path / "nowhere")
    for link in (partial_directory, old):
        link.symlink_to(directory if plant == "symbolic" else tmp_path / "nowhere")
    with atomic_file(tmp_path / "outputs/f", force=True) as sink:
        sink.write(b"new")
    with atomic_directory(tmp_path / "outputs/d", force=True) as new:
        (new / "a").write_text("new")
    assert names(tmp_path) == ["directory", "outputs", "precious"] and names(tmp_path / "outputs") == ["d", "f"]
    assert precious.read_text() == (directory / "file").read_text() == "precious"
    assert (tmp_path / "outputs/f").read_text() == "new" and names(tmp_path / "outputs/d") == ["a"]


def test_partial_file_of_another_user_is_not_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behaviour: what another user left under that name is replaced, so that they cannot change the output later."""
    user = os.geteuid()
    for create in (Path.touch, Path.mkdir):
        create(tmp_path / ".out.partial")
        held = os.open(tmp_path / ".out.partial", os.O_RDONLY)  # so that its inode is not used again
        monkeypatch.setattr(os, "geteuid", lambda: user + 1)
        if create is Path.touch:
            with atomic_file(tmp_path / "out", force=True) as sink:
                sink.write(b"new")
        else:
            (tmp_path / "out").unlink()
            (tmp_path / ".out.partial" / "theirs").touch()
            with atomic_directory(tmp_path / "out") as directory:
                (directory / "ours").touch()
            assert names(tmp_path / "out") == ["ours"]
        monkeypatch.undo()
        assert names(tmp_path) == ["out"] and not os.path.samestat(os.fstat(held), os.stat(tmp_path / "out"))
        os.close(held)


def test_replaced_output_keeps_its_mode(tmp_path: Path) -> None:
    """Behaviour: a private file or directory is private while and after it is replaced."""
    out, directory = tmp_path / "out", tmp_path / "dir"
    out.touch(0o600)
    directory.mkdir(0o700)
    with atomic_file(out, force=True) as sink, atomic_directory(directory, force=True) as new:
        sink.write(b"x")
        assert (tmp_path / ".out.partial").stat().st_mode & 0o777 == 0o600 and new.stat().st_mode & 0o777 == 0o700
    assert out.stat().st_mode & 0o777 == 0o600 and directory.stat().st_mode & 0o777 == 0o700


def test_links_inside_a_directory_are_replaced(tmp_path: Path) -> None:
    """Behaviour: without `follow` the link is replaced; a lock is never made through a link."""
    (tmp_path / "target").write_text("old")
    for name, target in (("link", "target"), (".lock", "new")):
        (tmp_path / name).symlink_to(target)
    with atomic_file(tmp_path / "link", force=True, follow=False) as sink:
        sink.write(b"new")
    assert not (tmp_path / "link").is_symlink() and (tmp_path / "target").read_text() == "old"
    with pytest.raises(OSError), lock(tmp_path / ".lock"):
        pass
    assert not (tmp_path / "new").exists()


def test_device_is_written_to_directly() -> None:
    """Behaviour: -o /dev/null is neither renamed nor refused."""
    with atomic_file("/dev/null") as sink:
        sink.write(b"x")
    assert not os.path.isfile("/dev/null")


def _hold(path: str, ready: multiprocessing.synchronize.Event) -> None:
    with atomic_file(path):
        ready.set()
        time.sleep(60)


def test_second_writer_is_locked_out_and_a_killed_one_is_not(tmp_path: Path) -> None:
    """Behaviour: exit code 75 while another run writes; after its kill -9 the next run takes over and cleans up."""
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    other = context.Process(target=_hold, args=(str(tmp_path / "out"), ready))
    other.start()
    assert ready.wait(10)
    with pytest.raises(LockedError), atomic_file(tmp_path / "out"):
        pass
    other.kill()
    other.join()
    with atomic_file(tmp_path / "out") as sink:
        sink.write(b"mine")
    assert names(tmp_path) == ["out"]


def test_lock_excludes_another_process(tmp_path: Path) -> None:
    """Behaviour: a second process gets LockedError; after release it gets the lock."""
    code = f"from llmkit.io.atomic import lock\nwith lock({str(tmp_path / 'l')!r}): pass"
    with lock(tmp_path / "l"):
        assert b"LockedError" in subprocess.run([sys.executable, "-c", code], capture_output=True).stderr
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_missing_parent_is_named(tmp_path: Path) -> None:
    """Behaviour: the message names the missing directory."""
    with pytest.raises(LlmkitError, match="not a directory"), atomic_file(tmp_path / "no" / "out"):
        pass


def test_failed_commit_is_discarded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behaviour: where a URL's storage fails at the very end, the error names the URL and the temporary copy is removed."""
    from fsspec.implementations.local import LocalFileOpener

    def refuse(self: LocalFileOpener) -> None:
        raise OSError("quota exceeded")

    monkeypatch.setattr(LocalFileOpener, "commit", refuse)
    with (
        pytest.raises(LlmkitError, match=r"out\.bin: quota exceeded"),
        atomic_file(f"local://{tmp_path}/out.bin") as sink,
    ):
        sink.write(b"data")
    assert not os.path.exists(sink.temp) and names(tmp_path) == []


def test_urls_appear_only_when_complete(tmp_path: Path) -> None:
    """Behaviour: through fsspec too, a file appears when it is complete, in a directory created for it, and is not overwritten."""
    url = f"local://{tmp_path}/new/out.bin"
    with pytest.raises(RuntimeError), atomic_file(url) as sink:
        sink.write(b"half")
        raise RuntimeError
    assert not list(tmp_path.rglob("*.bin"))
    with atomic_file(url) as sink:
        sink.write(b"data")
        assert not (tmp_path / "new" / "out.bin").exists()
    assert (tmp_path / "new" / "out.bin").read_bytes() == b"data"
    with pytest.raises(LlmkitError, match="exists"), atomic_file(url):
        pass
    with atomic_file(url, force=True) as sink:
        sink.write(b"more")
    assert (tmp_path / "new" / "out.bin").read_bytes() == b"more"
    with pytest.raises(LlmkitError, match="Protocol not known: nowhere"), atomic_file("nowhere://a/b"):
        pass


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behaviour: where no lock can be had, nothing is written, and the error names the output."""
    from llmkit.io import atomic

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(atomic.fcntl, "flock", no_locks)
    with pytest.raises(LlmkitError, match="out: cannot be locked") as error, atomic_file(tmp_path / "out"):
        pass
    assert "NFS" in error.value.hint and not (tmp_path / "out").exists()
    with pytest.raises(LlmkitError, match="lock: cannot be locked"), atomic.lock(tmp_path / "lock"):
        pass

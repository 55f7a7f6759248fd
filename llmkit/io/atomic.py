"""Outputs that appear under their final name only when they are complete, and locks between runs.

A file is written as `.NAME.partial` in the same directory, fsynced, and renamed; a directory likewise, file by
file. The partial file is also the lock: it is held with flock(2) while it is written, so a second run on the
same output stops at once (exit code 75), and the next run takes over the partial file of a killed one. A link of that
name, or a file of another user, is replaced, never written to. An output that is replaced keeps its mode. A directory
is replaced by exchanging the names of both, so that one of them is there at any time.

    with atomic_file("clean.jsonl.zst", force=False) as sink:
        sink.write(data)

A URL is written through fsspec and committed at the end: object stores show an object when it is complete. URLs
have no locks.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import io
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from llmkit.errors import LlmkitError, LockedError
from llmkit.io.inputs import exists, is_remote, redacted, remote_path

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
HINT_EXISTS = "choose another output, or give -f to replace it"
# Protocols of storage with directories, which must exist before a file is written.
DIRECTORY_PROTOCOLS = {"file", "sftp", "smb", "hdfs", "webhdfs"}


def check_output(path: str | Path, force: bool) -> None:
    """LlmkitError where `path` exists and not `force`, or where its directory does not exist."""
    if exists(str(path)) and not force and not is_special(Path(path)):
        raise LlmkitError(f"{redacted(str(path))} exists", HINT_EXISTS)
    if is_remote(str(path)):
        return
    parent = Path(os.path.realpath(path)).parent
    if not parent.is_dir():
        raise LlmkitError(f"{parent} is not a directory", f"create it first: mkdir -p {parent}")


def is_special(path: Path) -> bool:
    """Whether `path` is a device, a pipe or a socket, which are written directly."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


@contextmanager
def atomic_file(path: str | Path, force: bool = False, follow: bool = True) -> Iterator[BinaryIO]:
    """Binary file that appears as `path` only when the block ends without an exception.

    Where `path` is a symbolic link, the file that it leads to is replaced; without `follow`, the link is. That is for
    names that the user did not give, in a directory that somebody else may have made.
    Raises LlmkitError where `path` exists and not `force`, LockedError where another run is writing it.
    """
    check_output(path, force)
    if is_remote(str(path)):
        with remote_path(str(path)) as (system, name):
            if DIRECTORY_PROTOCOLS & set([system.protocol] if isinstance(system.protocol, str) else system.protocol):
                system.makedirs(system._parent(name), exist_ok=True)
            sink = system.open(name, "wb", autocommit=False)
        try:
            yield sink
            with remote_path(str(path)):
                sink.close()
                sink.commit()
        except BaseException:
            for clean_up in (sink.close, sink.discard):
                with suppress(Exception):  # the first error is the one to report
                    clean_up()
            raise
        return
    if follow and is_special(Path(path)):
        with _NamedFile.open(os.open(path, os.O_WRONLY), path) as sink:
            yield sink
        return
    final = Path(os.path.realpath(path)) if follow else Path(path)
    if final.is_dir():
        raise LlmkitError(f"{path} is a directory", "give the name of a file")
    partial = final.with_name(f".{final.name}.partial")
    descriptor = _open_locked(partial, str(path))
    try:
        _keep_mode(descriptor, final)
        os.ftruncate(descriptor, 0)
        with _NamedFile.open(descriptor, path) as sink:
            yield sink
            sink.flush()
            with full_disk_names(path):
                os.fsync(sink.fileno())
            check_output(path, force)  # it may have been created meanwhile
            os.replace(partial, final)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_directory(final.parent)


@contextmanager
def atomic_directory(
    path: str | Path, force: bool = False, check_replaced: Callable[[Path], None] | None = None
) -> Iterator[Path]:
    """Empty directory to fill, which becomes `path` only when the block ends without an exception.

    Raises LlmkitError where `path` exists and not `force`, LockedError where another run is writing it.
    `check_replaced` is called with the resolved path before anything is written, and raises to keep the
    directory that is there; see lineage/outputs.py.
    """
    if is_remote(str(path)):
        raise LlmkitError(
            f"{redacted(str(path))}: directories are not written to URLs", "write it to a local path, and copy it"
        )
    check_output(path, force)
    final = Path(os.path.realpath(path))
    if final.exists() and not final.is_dir():
        raise LlmkitError(f"{path} is not a directory", "choose another output")
    if check_replaced:
        check_replaced(final)
    partial = final.with_name(f".{final.name}.partial")
    descriptor = _open_locked(partial, str(path), directory=True)
    try:
        if _restore(final):
            check_output(path, force)
        _keep_mode(descriptor, final)
        _empty(partial)
        with full_disk_names(path):
            yield partial
            for directory, _, files in os.walk(partial):
                for name in files:
                    _sync(os.path.join(directory, name))
                sync_directory(directory)
        check_output(path, force)
        if final.exists():
            _replace_directory(partial, final, str(path))
        else:
            os.rename(partial, final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        os.close(descriptor)
    sync_directory(final.parent)


@contextmanager
def full_disk_names(path: str | Path) -> Iterator[None]:
    """Errors of a full disk or quota, or of a limit on the size of files, name this output unless they name a file."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL and not error.filename:
            error.filename = str(path)
        raise


class _NamedFile(io.FileIO):
    """A file that is written under another name than that of the output, which is the one that its errors give."""

    output: str | Path

    @classmethod
    def open(cls, descriptor: int, output: str | Path) -> BinaryIO:
        file = cls(descriptor, "wb")
        file.output = output
        return io.BufferedWriter(file)

    def write(self, data: Any, /) -> int:
        with full_disk_names(self.output):
            return super().write(data)


def _replace_directory(partial: Path, final: Path, name: str) -> None:
    """Give `partial` the name of `final`, and remove what that was; its lock keeps other runs from taking it over."""
    descriptor = os.open(final, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _lock(descriptor, name)
        old = final.with_name(f".{final.name}.old")
        if old.is_symlink():
            old.unlink()
        shutil.rmtree(old, ignore_errors=True)
        if exchange(partial, final):
            shutil.rmtree(partial, ignore_errors=True)
            return
        try:
            os.rename(final, old)
            os.rename(partial, final)
        except BaseException:
            _restore(final)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        os.close(descriptor)


def exchange(first: Path, second: Path) -> bool:
    """Exchange the names of two directories in one step; False where the system or the file system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    here = -100  # AT_FDCWD, which absolute paths do not use; the last argument is RENAME_EXCHANGE
    return not rename(here, os.fsencode(first), here, os.fsencode(second), 2)


def _restore(final: Path) -> bool:
    """Undo the first of two renames, where a run was stopped between them. Returns whether it was."""
    old = final.with_name(f".{final.name}.old")
    if os.path.lexists(final) or not old.is_dir() or old.is_symlink() or not _is_own(old.stat()):
        return False
    os.rename(old, final)
    return True


def _open_locked(partial: Path, name: str, directory: bool = False) -> int:
    """Create `partial`, or open what a killed run left of it, and lock it.

    The run that held it may rename it between open and flock: then the lock is on the finished output, and the
    next attempt starts afresh.
    """
    flags = (os.O_RDONLY | os.O_DIRECTORY) if directory else (os.O_RDWR | os.O_NONBLOCK)
    while True:
        created = True
        try:
            if directory:
                partial.mkdir()
            else:
                os.close(os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666))
        except FileExistsError:
            created = False
        try:
            descriptor = os.open(partial, flags | os.O_NOFOLLOW)
        except FileNotFoundError:  # its writer renamed it just now
            continue
        except OSError:
            if not partial.is_symlink():
                raise
            partial.unlink()
            continue
        try:
            _lock(descriptor, name)
        except LlmkitError:
            os.close(descriptor)
            raise
        status = os.fstat(descriptor)
        with suppress(FileNotFoundError):
            if os.path.samestat(status, os.lstat(partial)):
                if created or _is_own(status):
                    return descriptor
                if directory:
                    shutil.rmtree(partial)
                else:
                    partial.unlink()
        os.close(descriptor)


def _lock(descriptor: int, name: str) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise _not_locked(error, name, f"{name} is being written by another run") from error


def _not_locked(error: OSError, name: str, message: str) -> LlmkitError:
    """The error for a file that cannot be locked: another run has the lock, or the file system has none."""
    if isinstance(error, BlockingIOError):
        return LockedError(message, "wait for it to end, or choose another output")
    return LlmkitError(
        f"{name}: cannot be locked ({error.strerror})", "does its file system have locks (NFS)? write to another one"
    )


def _is_own(status: os.stat_result) -> bool:
    """Whether a partial file may be one that a run of this user left: nobody else can reach it under another name."""
    if status.st_uid != os.geteuid():
        return False
    return stat.S_ISDIR(status.st_mode) or (stat.S_ISREG(status.st_mode) and status.st_nlink == 1)


def _keep_mode(descriptor: int, final: Path) -> None:
    """Give a partial file or directory the mode of the output that it will replace, before anything is written."""
    with suppress(OSError):  # there is none, or the file system has no modes
        mode = stat.S_IMODE(final.stat().st_mode)
        os.fchmod(descriptor, (mode | stat.S_IRWXU if final.is_dir() else mode) & 0o777)


def no_follow(path: str, flags: int) -> int:
    """Opener for `open` that refuses a symbolic link, for files inside a directory that somebody else may have made."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)


def own_file(path: str, flags: int) -> int:
    """`no_follow` for a file that is changed in place. One that has another name too, which may be a file of the user
    or belong to a backup made with `cp -al`, is replaced by a copy first, and only the copy is changed.
    """
    descriptor = no_follow(path, flags)
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode) and status.st_nlink == 1:
        return descriptor
    os.close(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise LlmkitError(f"{path}: not a regular file", "remove it")
    with open(path, "rb", opener=no_follow) as source, atomic_file(path, force=True, follow=False) as sink:
        shutil.copyfileobj(source, sink, 1 << 20)
    return no_follow(path, flags)


def _empty(directory: Path) -> None:
    for entry in directory.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(path: str | Path) -> None:
    """Make the directory entries of `path` durable."""
    _sync(str(path))


@contextmanager
def lock(path: str | Path) -> Iterator[None]:
    """Hold the lock file `path` (created if missing), which the kernel releases even after kill -9.

    LockedError (exit code 75) where another run holds it.
    """
    descriptor = no_follow(str(path), os.O_RDWR | os.O_CREAT)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise _not_locked(error, str(path), f"{path} is locked by another run") from error
        yield
    finally:
        os.close(descriptor)

"""Which inputs a command reads: paths, globs, directories, lists of files, remote URLs, or stdin (`-` or nothing)."""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from llmkit.errors import LlmkitError, UsageError

STDIN = "-"
STDIN_PATH = "/dev/stdin"
COMPRESSIONS = ("", ".zst", ".gz", ".xz", ".bz2")
DOCUMENT_SUFFIXES = tuple(kind + packed for kind in (".jsonl", ".ndjson", ".json") for packed in COMPRESSIONS) + (
    ".parquet",
)

# Errors that libraries have no words for.
REASONS = {FileNotFoundError: "no such file", NotImplementedError: "nothing can be written there"}


def expand(
    inputs: Iterable[str] | None, suffixes: tuple[str, ...] = DOCUMENT_SUFFIXES, files_from: str | None = None
) -> list[str]:
    """Every input file in order: arguments as given, the files of a directory or glob sorted by name.

    A directory (as a URL: what ends in "/") gives the files below it that end in one of `suffixes`; hidden ones are left out. `files_from` names a file with one
    input a line (`-`: stdin). Raises UsageError where there is nothing to read, LlmkitError where an input is missing or a directory
    holds no such file.
    """
    given = list(inputs or [])
    if files_from is not None:
        given += read_list(files_from)
        if not given:
            return []
    if not given:
        if sys.stdin is None or sys.stdin.isatty():
            raise UsageError("no input: stdin is a terminal", "name input files, or pipe documents in")
        return [STDIN]
    found: list[str] = []
    for item in given:
        if item == STDIN:
            found.append(item)
        elif is_remote(item):
            found += _remote(item, suffixes)
        elif os.path.isdir(item):
            inside = sorted(
                str(p)
                for p in Path(item).rglob("*")
                if p.name.endswith(suffixes) and p.is_file() and not _hidden(p, item)
            )
            if not inside:
                raise LlmkitError(f"{item}: no input files in this directory", "looked for " + " ".join(suffixes))
            found += inside
        elif os.path.exists(item):
            found.append(item)
        elif glob.has_magic(item):
            matched = sorted(glob.glob(item, recursive=True))
            if not matched:
                raise LlmkitError(f"{item}: nothing matches this pattern", "quote it only if llmkit is to expand it")
            found += matched
        else:
            raise LlmkitError(f"{item}: no such file or directory", "check the path")
    if found.count(STDIN) > 1:
        raise UsageError("stdin ('-') is named more than once", "it can be read only once")
    return found


def _remote(url: str, suffixes: tuple[str, ...]) -> list[str]:
    """The files that a URL stands for: a pattern, a directory, or itself."""
    if not (url.endswith("/") or glob.has_magic(url)):
        return [url]
    with reaching(url) as (system, path):
        directory, place = url.endswith("/"), url.rfind(path)
        inside = sorted(system.find(path) if directory else system.glob(path))
    if directory:
        inside = [name for name in inside if name.endswith(suffixes) and "/." not in name[len(path) :]]
    if not inside or place < 0:
        raise LlmkitError(f"{shown(url)}: no input files there", "looked for " + " ".join(suffixes))
    return [url[:place] + name for name in inside]


@contextmanager
def reaching(url: str) -> Iterator[tuple[Any, str]]:
    """(fsspec file system, path in it) of a URL; a block in which errors of any library name the URL."""
    import fsspec

    name = shown(url)
    if "::" in url:
        raise LlmkitError(f"{name}: chained URLs are not read", "unpack it first")
    try:
        yield fsspec.url_to_fs(url)
    except (LlmkitError, BrokenPipeError):
        raise
    except ImportError as error:
        raise LlmkitError(f"{name}: {error}", "install what reads such URLs") from error
    except Exception as error:  # of the libraries for each kind of storage
        said = str(error).strip().splitlines() or [type(error).__name__]
        reason = REASONS.get(type(error)) or said[0].replace(url, name)
        raise LlmkitError(f"{name}: {reason}", "check the URL and your rights") from error


def exists(path: str) -> bool:
    """Whether there is something at a path or URL."""
    if not is_remote(path):
        return os.path.exists(path)
    with reaching(path) as (system, name):
        return bool(system.exists(name))


def _hidden(path: Path, root: str) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def read_list(path: str) -> list[str]:
    """The lines of a --files-from list (`-`: stdin) that are not blank."""
    try:
        text = sys.stdin.read() if path == STDIN else Path(path).read_text()
    except OSError as error:
        raise LlmkitError(f"{path}: cannot read the list of files ({error.strerror})", "see --files-from") from error
    return [line for line in text.splitlines() if line.strip()]


def is_remote(path: str) -> bool:
    """Whether `path` is a URL for fsspec, such as s3://bucket/key."""
    return "://" in path


def open_raw(path: str) -> BinaryIO:
    """Bytes of one input as they are stored; stdin for `-`, fsspec for URLs."""
    if path == STDIN:
        # Unbuffered: BufferedReader.read loops in C, where a signal that arrives between two reads waits for a third that may never return.
        raw = cast(BinaryIO, getattr(sys.stdin.buffer, "raw", sys.stdin.buffer))
        return cast(BinaryIO, _Resumed(raw)) if _ahead else raw
    if is_remote(path):
        with reaching(path) as (system, name):
            return cast(BinaryIO, system.open(name, "rb"))
    try:
        return open(path, "rb")
    except IsADirectoryError:
        raise LlmkitError(f"{path} is a directory", "name a file") from None
    except OSError as error:
        raise LlmkitError(f"{path}: {error.strerror}", "check the path and its permissions") from error


_ahead = bytearray()  # bytes of stdin that were looked at and are still to be read


def peek_stdin() -> bytes:
    """The first byte of stdin (empty at its end), which the next `open_raw("-")` still gives. UsageError where stdin is a terminal."""
    if sys.stdin is None or sys.stdin.isatty():
        raise UsageError("no input: stdin is a terminal", "name input files, or pipe them in")
    if not _ahead:
        _ahead.extend(open_raw(STDIN).read(1))
    return bytes(_ahead)


class _Resumed:
    """stdin from its first byte, after `peek_stdin`."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw

    def read(self, size: int = -1) -> bytes:
        if _ahead and size:
            first = bytes(_ahead)
            _ahead.clear()
            return first
        return self._raw.read(size)

    def __enter__(self) -> _Resumed:
        return self

    def __exit__(self, *_: object) -> None:
        self._raw.close()


def display_name(path: str) -> str:
    """How messages call an input."""
    return "<stdin>" if path == STDIN else shown(path)


def shown(path: str) -> str:
    """A path, or a URL without what may be secret in it: user, password, query."""
    if not is_remote(path):
        return path
    scheme, _, rest = path.partition("://")
    host, slash, name = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{name.partition('?')[0] if scheme.startswith('http') else name}"

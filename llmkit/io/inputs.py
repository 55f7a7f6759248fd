"""The inputs of a command: paths, globs, directories, lists of files, remote URLs, or stdin (`-` or no argument)."""

from __future__ import annotations

import glob
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from llmkit.errors import LlmkitError, UsageError

STDIN = "-"
UTF8_BOM = b"\xef\xbb\xbf"
STDIN_PATH = "/dev/stdin"
DESCRIPTORS = ("/dev/fd/", "/proc/self/fd/")
COMPRESSIONS = ("", ".zst", ".gz", ".xz", ".bz2")
DOCUMENT_SUFFIXES = tuple(kind + packed for kind in (".jsonl", ".ndjson", ".json") for packed in COMPRESSIONS) + (
    ".parquet",
)

# Exceptions for which libraries give no message.
REASONS = {FileNotFoundError: "no such file", NotImplementedError: "cannot be written"}


def expand(
    inputs: Iterable[str] | None,
    suffixes: tuple[str, ...] = DOCUMENT_SUFFIXES,
    files_from: str | None = None,
    missing_ok: bool = False,
    on_empty: Callable[[str, str], object] | None = None,
    left_out: Counter[str] | None = None,
) -> list[str]:
    """Every input file: arguments in the given order, the files of a directory or glob sorted by name.

    A directory (a URL that ends in "/") stands for the files below it that end in one of `suffixes`, hidden
    ones excepted. `files_from` names a file with one input per line (`-`: stdin). Raises UsageError where there
    is nothing to read, LlmkitError where an input is missing (unless `missing_ok`: its reader reports it) or a
    directory holds no such file; with `on_empty`, that is called with the name of such a directory or pattern and the
    reason, as long as there is another input. `left_out` counts the other files of directories by suffix.
    """
    arguments = list(inputs or [])
    if files_from is not None:
        arguments += read_list(files_from)
        if not arguments:
            return []
    if not arguments:
        if sys.stdin is None or sys.stdin.isatty():
            raise UsageError("no input: stdin is a terminal", "name input files, or pipe documents in")
        return [STDIN]
    files: list[str] = []
    empty: list[tuple[str, LlmkitError]] = []
    for item in arguments:
        try:
            files += _files_of(item, suffixes, missing_ok, left_out)
        except EmptyInput as error:
            empty.append((item, error))
    if empty and (on_empty is None or not files):
        raise empty[0][1]
    for item, reason in empty:
        assert on_empty
        on_empty(redacted(item), reason.message.removeprefix(f"{redacted(item)}: "))
    if files.count(STDIN) > 1:
        raise UsageError("stdin ('-') is given more than once", "it can be read only once")
    return files


class EmptyInput(LlmkitError):
    """A directory without a file to read, or a pattern that nothing matches."""


def _files_of(item: str, suffixes: tuple[str, ...], missing_ok: bool, left_out: Counter[str] | None) -> list[str]:
    """The files that an argument stands for."""
    if item == STDIN:
        return [item]
    if is_remote(item):
        return _remote(item, suffixes, left_out)
    if os.path.isdir(item):
        contents = sorted(str(p) for p in Path(item).rglob("*") if p.is_file() and not _hidden(p, item))
        selected = _selected(contents, suffixes, left_out)
        if not selected:
            raise EmptyInput(f"{item}: no input files in this directory", _looked_for(suffixes))
        return selected
    if os.path.exists(item):
        return [item]
    if glob.has_magic(item):
        matched = sorted(glob.glob(item, recursive=True))
        if not matched:
            raise EmptyInput(f"{item}: nothing matches this pattern", "quote it only if llmkit is to expand it")
        return matched
    if missing_ok:
        return [item]
    raise LlmkitError(f"{item}: no such file or directory", "check the path")


def _looked_for(suffixes: tuple[str, ...]) -> str:
    plain = [suffix for suffix in suffixes if not suffix.endswith(COMPRESSIONS[1:])]
    return f"looked for {' '.join(plain or suffixes)}{', compressed or not' if plain != list(suffixes) else ''}"


def _selected(names: list[str], suffixes: tuple[str, ...], left_out: Counter[str] | None) -> list[str]:
    """The names that end in one of `suffixes`; the others are counted."""
    selected = []
    for name in names:
        if has_suffix(name, suffixes):
            selected.append(name)
        elif left_out is not None:
            stem, suffix = os.path.splitext(os.path.basename(name))
            left_out[os.path.splitext(stem)[1] + suffix if suffix.lower() in COMPRESSIONS else suffix] += 1
    return selected


def _remote(url: str, suffixes: tuple[str, ...], left_out: Counter[str] | None) -> list[str]:
    """The files of a URL: those that match a pattern, those below a directory, or the URL itself."""
    if not (url.endswith("/") or glob.has_magic(url)):
        return [url]
    with remote_path(url) as (system, path):
        directory, prefix_length = url.endswith("/"), url.rfind(path)
        names = sorted(system.find(path) if directory else system.glob(path))
    if directory:
        names = _selected([name for name in names if "/." not in name[len(path) :]], suffixes, left_out)
    if not names or prefix_length < 0:
        raise EmptyInput(f"{redacted(url)}: no input files there", _looked_for(suffixes))
    return [url[:prefix_length] + name for name in names]


@contextmanager
def remote_path(url: str) -> Iterator[tuple[Any, str]]:
    """fsspec file system and path of a URL. In the block, errors of any library become LlmkitErrors that name it."""
    import fsspec

    name = redacted(url)
    if "::" in url:
        raise LlmkitError(f"{name}: chained URLs are not supported", "unpack it first")
    try:
        yield fsspec.url_to_fs(url)
    except (LlmkitError, BrokenPipeError):
        raise
    except ImportError as error:
        raise LlmkitError(f"{name}: {error}", "install the package for this kind of URL") from error
    except Exception as error:  # each library for a kind of storage has its own
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = REASONS.get(type(error)) or lines[0].replace(url, name)
        raise LlmkitError(f"{name}: {reason}", "check the URL and your permissions") from error


def exists(path: str) -> bool:
    """Whether a path or URL exists."""
    if not is_remote(path):
        return os.path.exists(path)
    with remote_path(path) as (system, name):
        return bool(system.exists(name))


def _hidden(path: Path, root: str) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def read_list(path: str) -> list[str]:
    """The names in a --files-from list (`-`: stdin): bytes, each ended by a newline, or by a zero byte if any is there.

    Blank lines do not count, nor does the carriage return before a newline.
    """
    try:
        data = sys.stdin.buffer.read() if path == STDIN else Path(path).read_bytes()
    except OSError as error:
        raise LlmkitError(f"{path}: cannot read the list of files ({error.strerror})", "see --files-from") from error
    if b"\0" in data:
        return [os.fsdecode(name) for name in data.split(b"\0") if name]
    return [os.fsdecode(name.removesuffix(b"\r")) for name in data.split(b"\n") if name.strip()]


def has_suffix(name: str, suffixes: str | tuple[str, ...]) -> bool:
    """Whether a name ends in one of the suffixes, in upper or lower case: `.JSONL.GZ` is `.jsonl.gz`."""
    return name.lower().endswith(suffixes)


def is_remote(path: str) -> bool:
    """Whether `path` is a URL for fsspec, such as s3://bucket/key."""
    return "://" in path


def is_pipe(path: str) -> bool:
    """Whether `path` is stdin or a process substitution such as `/dev/fd/63`, whose number is not a name."""
    return path in (STDIN, STDIN_PATH) or path.startswith(DESCRIPTORS)


def open_raw(path: str) -> BinaryIO:
    """Bytes of one input as they are stored; stdin for `-`, fsspec for URLs."""
    if path == STDIN:
        # Unbuffered: BufferedReader.read loops in C, where a signal that arrives between two reads waits for a third
        # read that may never return.
        raw = cast(BinaryIO, getattr(sys.stdin.buffer, "raw", sys.stdin.buffer))
        return cast(BinaryIO, _AfterPeek(raw)) if _peeked else raw
    if is_remote(path):
        with remote_path(path) as (system, name):
            return cast(BinaryIO, system.open(name, "rb"))
    try:
        return open(path, "rb")
    except IsADirectoryError:
        raise LlmkitError(f"{path} is a directory", "name a file") from None
    except OSError as error:
        raise LlmkitError(f"{path}: {error.strerror}", "check the path and its permissions") from error


_peeked = bytearray()  # bytes of stdin that are still to be read


def peek_stdin() -> bytes:
    """The first byte of stdin (empty at its end); the next `open_raw("-")` starts with it.

    UsageError where stdin is a terminal.
    """
    if sys.stdin is None or sys.stdin.isatty():
        raise UsageError("no input: stdin is a terminal", "name input files, or pipe them in")
    if not _peeked:
        _peeked.extend(open_raw(STDIN).read(1))
    return bytes(_peeked)


class _AfterPeek:
    """stdin from its first byte on, after `peek_stdin`."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw

    def read(self, size: int = -1) -> bytes:
        if _peeked and size:
            first = bytes(_peeked)
            _peeked.clear()
            return first
        return self._raw.read(size)

    def __enter__(self) -> _AfterPeek:
        return self

    def __exit__(self, *_: object) -> None:
        self._raw.close()


HINT_TABLES = "Tables (CSV, TSV) have to become JSON lines or Parquet, with a name for each column"


def refuse_archive(beginning: bytes, name: str) -> None:
    """Raise LlmkitError for an archive: of the web (WARC, WET, ARC), tar or zip. Its files are not documents yet."""
    if beginning[257:262] == b"ustar" or beginning.startswith(b"PK\x03\x04"):
        kind, unpack = ("tar", "tar -xf") if beginning[257:262] == b"ustar" else ("zip", "unzip")
        raise LlmkitError(
            f"{name}: this is a {kind} archive, not documents", f"unpack it first ({unpack} FILE). {HINT_TABLES}"
        )
    if beginning.lstrip(b"\r\n" + UTF8_BOM).startswith((b"WARC/", b"filedesc:")):
        raise LlmkitError(
            f"{name}: this is a web archive, not documents", "extract its pages first: llmkit extract FILE | llmkit ..."
        )


HINT_IDS = "token ids of other trainers become shards by: llmkit tokenize FILE --from FORMAT -t TOKENIZER -o shards/"


def holds_ids(name: str) -> bool:
    """Whether a file is named like those of token ids that nanoGPT and Megatron-LM write."""
    return has_suffix(name, (".bin", ".idx"))


def line_hint(name: str, number: int, line: bytes) -> str:
    """What to do about a line that is not a document: how the file becomes documents if it does not begin like JSON."""
    if number == 1 and holds_ids(name):
        return HINT_IDS
    if number == 1 and has_suffix(name, (".tsv", ".csv")):
        return HINT_TABLES
    if number == 1 and line.lstrip()[:1] not in b"{[":
        return "text files and pages become documents by: llmkit extract FILE"
    return "--on-bad-line skip ignores such lines, --on-bad-line quarantine=FILE stores them in a file"


def display_name(path: str) -> str:
    """The name of an input in messages, and as the source of documents."""
    return "<stdin>" if is_pipe(path) else redacted(path)


def redacted(path: str) -> str:
    """A path, or a URL without the parts that may be secret: user, password, query."""
    if not is_remote(path):
        return path
    scheme, _, address = path.partition("://")
    host, slash, name = address.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{name.partition('?')[0] if scheme.startswith('http') else name}"

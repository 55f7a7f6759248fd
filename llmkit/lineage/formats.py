"""Which formats carry a lineage record, and who reads it: one row of FORMATS per format.

| format | slot of the record |
|---|---|
| .jsonl.zst, pipes | skippable frames: header (command) before, trailer (counts, digest, inputs) after the content |
| .jsonl.gz | extra fields of empty members, likewise |
| .parquet | file metadata key `llmkit` |
| token shards (.arrow) | schema metadata `llmkit.lineage`, trailer in the custom metadata of the last batch |
| model.safetensors | `__metadata__["llmkit"]` |
| mix plan (.toml) | key `llmkit` |
| tokenizer directory | key `llmkit` of tokenizer_config.json |
| plain .jsonl | none |

A new format brings functions in its own module, named in its row as "module:function" and imported when a file of
that format is met: one that reads the slot of a file; where the digest is not simply that of the stored bytes, one
that computes the content digest; one that computes the digest of what the content digest does not cover; and where
that is known only when all files are written, one that enters it into the record. `parts` are the paths inside a
directory that other commands may read by themselves.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any

from llmkit.errors import LlmkitError, UnreadableRecordError
from llmkit.io.digest import digest_bytes, digest_content, digest_stored
from llmkit.io.inputs import exists, has_suffix, is_remote
from llmkit.io.names import escape_name
from llmkit.io.record import Input, base_name, parse_record, record_or_warning
from llmkit.io.run_layout import (
    ADAPTER_CONFIG,
    CHECKPOINTS,
    FINAL,
    LATEST,
    MAX_DIGITS,
    RUN_COMMANDS,
    STATE,
    checkpoint_name,
    final_model,
    is_run,
    regular,
)
from llmkit.lineage.fields import counts_of

# Digests of these cover the bytes as they are stored: a damaged archive needs one too.
STORED = (
    ".arrow",
    ".parquet",
    ".safetensors",
    ".bin",
    ".idx",
    *(f".{kind}.{packed}" for kind in ("warc", "wet", "arc") for packed in ("gz", "zst")),
)

DOCUMENT_ARCHIVES = (".zst", ".gz")
MAX_PART_DEPTH = 3  # RUN/checkpoints/STEP/tokenizer.json


@dataclass(frozen=True, slots=True)
class Format:
    """A format, recognised by the suffix of a file or by the files in a directory."""

    name: str
    suffix: str | None  # "": any; None: directories only
    files: tuple[str, ...]  # patterns
    record: str  # "module:function": path of the file -> text or table in its slot, None where it is empty
    digest: str = ""  # "module:function": path of the file or directory -> content digest, None: not of this format
    beside: str = ""  # "module:function": path of the file or directory -> digest of the rest
    verify: str = ""  # "module:function": path of the file or directory -> None; LlmkitError where it is damaged
    seal: str = ""  # "module:function": directory -> None; enters the digest of its files into the record
    parts: tuple[str, ...] = ()  # patterns

    def file(self, path: Path) -> Path | None:
        """The file that holds the record of `path`; None where `path` is not of this format.

        LlmkitError for a special file in a directory.
        """
        if not path.is_dir():
            return path if self.suffix in ("", path.suffix.lower()) else None
        for pattern in self.files:
            matches = sorted(path.glob(pattern))
            if matches:
                return regular(matches[-1])  # the last of several shards holds the counts of all
        return None


TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
HELD_OUT = ("heldout", "heldout/part-*.arrow")
RUN_PARTS = tuple(f"{name}{end}" for name in (f"{CHECKPOINTS}/*", FINAL, LATEST) for end in ("", "/*"))

# The first row that matches counts.
FORMATS = (
    Format(
        "model",
        ".safetensors",
        ("model.safetensors", "model-00001-of-*.safetensors", "adapter_model.safetensors"),
        "llmkit.model.pretrained.header:read_record",
        beside="llmkit.model.pretrained.content:files_digest",
        verify="llmkit.model.pretrained.content:verify",
        seal="llmkit.model.pretrained.content:seal",
        parts=("config.json", ADAPTER_CONFIG, *TOKENIZER_FILES),
    ),
    Format(
        "mix plan",
        ".toml",
        ("plan.toml",),
        "llmkit.mixing.plan:read_record",
        "llmkit.mixing.plan:plan_digest",
        verify="llmkit.mixing.plan:verify",
        parts=("plan.toml", *HELD_OUT),
    ),
    Format(
        "token shards",
        ".arrow",
        ("*.arrow",),
        "llmkit.shards.lineage:read_record",
        "llmkit.shards.lineage:shard_digest",
        beside="llmkit.shards.lineage:files_digest",
        verify="llmkit.shards.lineage:verify",
        parts=("part-*.arrow", *TOKENIZER_FILES, *HELD_OUT),
    ),
    Format(
        "tokenizer",
        None,
        ("tokenizer_config.json",),
        "llmkit.shards.tokenizer_info:read_record",
        beside="llmkit.shards.tokenizer_files:files_digest",
        verify="llmkit.shards.tokenizer_files:verify",
        seal="llmkit.shards.tokenizer_files:seal",
        parts=TOKENIZER_FILES,
    ),
    Format("Parquet", ".parquet", (), "llmkit.io.parquet:read_record", beside="llmkit.io.parquet:files_digest"),
    Format("documents", "", (), "llmkit.lineage.documents:read_record"),  # whatever is no other format
)


def find_format(path: Path) -> tuple[Format, Path] | None:
    """The format of a file or directory, and the file that holds its record."""
    for format in FORMATS:
        if file := format.file(path):
            return format, file
    return None


def file_of_record(path: Path) -> Path | None:
    """The local file that holds the record of a file or directory."""
    found = None if is_remote(str(path)) else find_format(path)
    return found[1] if found else None


def read_lineage(path: str | Path) -> dict[str, Any] | None:
    """The record that `path` (file, model or tokenizer directory, shard directory, run) carries, or None.

    Raises UnreadableRecordError for one that is there but cannot be read.
    """
    name = str(path)
    if not exists(name):
        raise LlmkitError(f"{name}: no such file or directory", "check the path")
    artefact = final_model(Path(path))
    if (found := find_format(artefact)) is None:
        return None
    format, file = found
    holder = str(file) if artefact.is_dir() else name
    return parse_record(_function(format.record)(holder), holder)


def digest_path(path: str | Path, known: Mapping[Path, str] = MappingProxyType({})) -> str:
    """Digest of a file's content, decompressed except for STORED formats, or of a directory's names and files.

    Hidden files, links and a checkpoint's `state/` do not count: they do not change what a reader of the
    directory gets. A run stands for its final model. Token shards have a digest of their documents, mix plans
    one of what decides the order and not of the location of the shards. `known` holds digests of files of the
    directory that were computed while they were read.
    """
    if is_remote(str(path)):
        return _file_digest(str(path))
    path = final_model(Path(path))
    return _format_digest(path) or (_directory_digest(path, known) if path.is_dir() else _file_digest(str(path)))


def content_digest(path: str | Path) -> str | None:
    """Digest of an artefact's content as its writer computed it; None for formats without one."""
    path = Path(path)
    digest = _format_digest(path)
    if digest is None and path.is_file() and has_suffix(path.name, DOCUMENT_ARCHIVES):
        return digest_path(path)
    return digest


def files_digest(path: str | Path) -> str | None:
    """Digest of what the content digest of an artefact does not cover; None for formats that have none."""
    path = final_model(Path(path))
    found = find_format(path)
    return _function(found[0].beside)(path) if found and found[0].beside else None


def verify(path: str | Path) -> None:
    """Raise LlmkitError where a file of a format that has a check beyond digests is damaged."""
    path = final_model(Path(path))
    found = find_format(path)
    if found and found[0].verify:
        _function(found[0].verify)(path)


def own_digest(path: str) -> str:
    """The digest by which a script compares what it made: of the content, of all files, or of a file of others."""
    try:
        record = read_lineage(path)
    except UnreadableRecordError:
        record = None
    if record is None:
        return digest_path(path)
    return content_digest(final_model(Path(path))) or files_digest(path) or digest_path(path)


def seal(directory: Path) -> None:
    """Enter the digest of the files of a directory, which are all written, into its record."""
    found = find_format(directory)
    if found and found[0].seal:
        _function(found[0].seal)(directory)


def locate(path: str | Path) -> tuple[Path, str] | None:
    """(directory, path inside it) where `path` is a part of an artefact with a record, by the parts of its format."""
    absolute = Path(os.path.abspath(path))
    for depth in range(min(MAX_PART_DEPTH, len(absolute.parents) - 1), 0, -1):
        directory = absolute.parents[depth - 1]
        part = absolute.relative_to(directory).as_posix()
        if _is_part(directory, part):
            return directory, part
    return None


def _is_part(directory: Path, part: str) -> bool:
    def matches(patterns: tuple[str, ...]) -> bool:
        return any(part.count("/") == pattern.count("/") and fnmatchcase(part, pattern) for pattern in patterns)

    try:
        if is_run(directory):
            return matches(RUN_PARTS)
        if not any(matches(format.parts) for format in FORMATS):  # before the directory is searched
            return False
        found = find_format(directory)
        return found is not None and matches(found[0].parts) and _has_record(directory)
    except (OSError, LlmkitError):
        return False


def _has_record(path: str | Path) -> bool:
    """Whether there is a record, readable or not."""
    try:
        return read_lineage(path) is not None
    except UnreadableRecordError:
        return True


def describe_input(path: str | Path, role: str = "input", digest: str = "", name: str | Path = "") -> Input:
    """Name, digest, own record of a file or directory, and which part of an artefact it is.

    `digest` is that of the content where it is known; `name` the path that was given where it stood for `path`.
    """
    digest = digest or digest_path(path)
    own = record_or_warning(read_lineage, path)
    found = locate(name or path)
    if found and not (own and "counts" in own and "inputs" in own):
        own = record_or_warning(_record_around, found[0])
    return Input(role, base_name(name or path), digest, own, describe_part(name or path, own) if own else "")


def describe_part(path: str | Path, record: dict[str, Any]) -> str:
    """Name of the artefact and path inside it, where `path` with this record is a part of one; otherwise ""."""
    if found := locate(path):
        return escape_name(f"{found[0].name}/{found[1]}")
    return "" if is_run(Path(path)) else moved_part(record)


def moved_part(record: dict[str, Any]) -> str:
    """The part of an artefact whose record this is, under a name for the artefact: of a copy that lies elsewhere."""
    command, inside, steps = record.get("command"), record.get("part"), counts_of(record).get("steps")
    if isinstance(inside, str) and inside:
        return f"{str(command).partition(' ')[0]}/{inside}"
    if command in RUN_COMMANDS and type(steps) is int and 0 <= steps < 10**MAX_DIGITS:
        return f"run/{CHECKPOINTS}/{checkpoint_name(steps)}"
    return ""


def _record_around(directory: Path) -> dict[str, Any] | None:
    """The record of an artefact; of a run that is not finished, that of its last checkpoint."""
    record = read_lineage(directory)
    if record is None and (directory / LATEST).is_dir():
        return read_lineage(directory / LATEST)
    return record


def _function(name: str) -> Any:
    """The function that a row names as "module:function"."""
    module, _, function = name.partition(":")
    return getattr(import_module(module), function)


def _format_digest(path: Path) -> str | None:
    """The digest that the format of `path` defines; None where it defines none."""
    for format in FORMATS:
        if format.digest and format.file(path):
            digest: str | None = _function(format.digest)(path)
            if digest:
                return digest
    return None


def _file_digest(path: str) -> str:
    return digest_stored(path) if has_suffix(path, STORED) else digest_content(path)


def _directory_digest(directory: Path, known: Mapping[Path, str]) -> str:
    def entries() -> Iterator[bytes]:
        for file in sorted(directory.rglob("*")):
            parts = file.relative_to(directory).parts
            hidden = any(part.startswith(".") for part in parts)
            if file.is_file() and not file.is_symlink() and parts[0] != STATE and not hidden:
                yield os.fsencode(f"{'/'.join(parts)}\0{known.get(file) or digest_stored(str(file))}\n")

    return digest_bytes(entries())

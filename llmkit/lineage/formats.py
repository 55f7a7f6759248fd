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

A new format brings two functions in its own module, named in its row as "module:function" and imported when a
file of that format is met: one that reads the slot of a file, and, where the digest is not simply that of the
stored bytes, one that computes the content digest.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any

from llmkit.errors import LlmkitError
from llmkit.io.digest import digest_bytes, digest_content, digest_stored
from llmkit.io.inputs import exists, is_remote
from llmkit.io.record import Input, base_name, parse_record
from llmkit.io.run_layout import STATE, final_model

# Digests of these cover the bytes as they are stored: a damaged archive needs one too.
STORED = (
    ".arrow",
    ".parquet",
    ".safetensors",
    ".bin",
    ".idx",
    *(f".{kind}.{packed}" for kind in ("warc", "wet", "arc") for packed in ("gz", "zst")),
)


@dataclass(frozen=True, slots=True)
class Format:
    """A format, recognised by the suffix of a file or by the files in a directory."""

    name: str
    suffix: str | None  # "": any; None: directories only
    files: tuple[str, ...]  # patterns
    record: str  # "module:function": path of the file -> text or table in its slot, None where it is empty
    digest: str = ""  # "module:function": path of the file or directory -> content digest, None: not of this format

    def file(self, path: Path) -> Path | None:
        """The file that holds the record of `path`; None where `path` is not of this format."""
        if not path.is_dir():
            return path if self.suffix in ("", path.suffix) else None
        for pattern in self.files:
            matches = sorted(path.glob(pattern))
            if matches:
                return matches[-1]  # the last of several shards holds the counts of all
        return None


# The first row that matches counts.
FORMATS = (
    Format(
        "model",
        ".safetensors",
        ("model.safetensors", "model-00001-of-*.safetensors"),
        "llmkit.model.pretrained.header:read_record",
    ),
    Format(
        "mix plan",
        ".toml",
        ("plan.toml",),
        "llmkit.mixing.plan:read_record",
        "llmkit.mixing.plan:plan_digest",
    ),
    Format(
        "token shards",
        ".arrow",
        ("*.arrow",),
        "llmkit.shards.lineage:read_record",
        "llmkit.shards.lineage:shard_digest",
    ),
    Format("tokenizer", None, ("tokenizer_config.json",), "llmkit.shards.tokenizer_info:read_record"),
    Format("Parquet", ".parquet", (), "llmkit.io.parquet:read_record"),
    Format("documents", "", (), "llmkit.io.documents:read_record"),
)


def read_lineage(path: str | Path) -> dict[str, Any] | None:
    """The record that `path` (file, model or tokenizer directory, shard directory, run) carries, or None."""
    name = str(path)
    if not exists(name):
        raise LlmkitError(f"{name}: no such file or directory", "check the path")
    artefact = final_model(Path(path))
    for format in FORMATS:
        file = format.file(artefact)
        if file:
            return parse_record(_function(format.record)(str(file) if artefact.is_dir() else name))
    return None


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
    if digest is None and path.is_file() and path.suffix in (".zst", ".gz"):
        return digest_path(path)
    return digest


def describe_input(path: str | Path, role: str = "input") -> Input:
    """Name, digest and own record of a file or directory."""
    return Input(role, base_name(path), digest_path(path), read_lineage(path))


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
    return digest_stored(path) if path.endswith(STORED) else digest_content(path)


def _directory_digest(directory: Path, known: Mapping[Path, str]) -> str:
    def entries() -> Iterator[bytes]:
        for file in sorted(directory.rglob("*")):
            parts = file.relative_to(directory).parts
            hidden = any(part.startswith(".") for part in parts)
            if file.is_file() and not file.is_symlink() and parts[0] != STATE and not hidden:
                yield os.fsencode(f"{'/'.join(parts)}\0{known.get(file) or digest_stored(str(file))}\n")

    return digest_bytes(entries())

"""How an artefact was made: one small record, in the metadata slot that its format already has.

A record names the command, the options that decide the content, the version, the inputs by base name and digest with their own records, and
what came out (counts and a digest of the content). It holds no time, host, absolute path, number of workers or output name, so equal inputs,
options and seed give equal bytes. Where each format keeps it:

| format | slot |
|---|---|
| .jsonl.zst, pipes | skippable frames: header (command) before, trailer (counts, digest, inputs) after the content |
| .jsonl.gz | extra fields of empty members, likewise |
| .parquet | file metadata key `llmkit` |
| token shards (.arrow) | schema metadata `llmkit.lineage`, trailer in the custom metadata of the last batch |
| model.safetensors | `__metadata__["llmkit"]` |
| tokenizer directory | key `llmkit` of tokenizer_config.json |
| plain .jsonl | none |
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from llmkit import __version__
from llmkit.errors import LlmkitError
from llmkit.io.compression import BLOCK, Notes, decompress, digest_bytes
from llmkit.io.inputs import STDIN, display_name, exists, is_remote, open_raw, shown
from llmkit.io.run_layout import STATE, final_model

# Digests of these are of the bytes as they are stored: a damaged archive has to have one too.
STORED = (
    ".arrow",
    ".parquet",
    ".safetensors",
    ".bin",
    ".idx",
    *(f".{kind}.{packed}" for kind in ("warc", "wet", "arc") for packed in ("gz", "zst")),
)
MAX_HEADER_BYTES = 100 << 20  # safetensors' own limit


@dataclass(slots=True)
class Input:
    """One thing that was read: its role, base name (`-` for a pipe), digest, own record.

    The role is "input", the option that named it, or that option and its value with a star for the path: "rule url.domains=*".
    """

    role: str
    name: str
    digest: str
    lineage: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        record: dict[str, Any] = {"role": self.role, "name": self.name, "digest": self.digest}
        return record | ({"lineage": self.lineage} if self.lineage else {})


@dataclass(slots=True)
class Lineage:
    """The record of one artefact. `header` is known before the work, `trailer` after it."""

    command: str
    options: dict[str, Any] = field(default_factory=dict)
    inputs: list[Input] = field(default_factory=list)
    counts: dict[str, Any] = field(default_factory=dict)
    digest: str | None = None

    def header(self) -> dict[str, Any]:
        """What is known before any input is read."""
        return {"llmkit": __version__, "command": self.command, "options": self.options}

    def trailer(self) -> dict[str, Any]:
        """What is known when the content is complete."""
        record: dict[str, Any] = {"inputs": [item.to_dict() for item in self.inputs], "counts": self.counts}
        return record | ({"digest": self.digest} if self.digest else {})

    def to_dict(self) -> dict[str, Any]:
        return self.header() | self.trailer()

    def to_json(self) -> str:
        """The whole record; equal records give equal text."""
        return json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def base_name(path: str | Path) -> str:
    """How the record calls an input: its last path component, `-` for stdin."""
    text = str(path)
    if text == STDIN:
        return STDIN
    return os.path.basename(shown(text).rstrip("/") if is_remote(text) else os.path.abspath(text))


def digest_path(path: str | Path, known: Mapping[Path, str] = MappingProxyType({})) -> str:
    """Digest of a file's content (decompressed where it is compressed, web archives apart) or of a directory (names and digests of its files, sorted).

    Hidden files, links and a checkpoint's `state/` do not count: they do not decide what a reader of the directory gets. A run stands for its
    final model. Token shards and mix plans have digests of their own (shards/writer.py, mixing/plan.py): of the documents, and of what decides
    the order, not of where the shards lie. `known` holds digests of files of the directory that were taken while they were read.
    """
    if is_remote(str(path)):
        return _digest_file(str(path))
    path = Path(path)
    path = final_model(path)
    if path.suffix == ".toml" or (path / "plan.toml").is_file():
        from llmkit.mixing.plan import plan_digest

        found = plan_digest(path)
        if found:
            return found
    if path.suffix == ".arrow" or (path.is_dir() and any(path.glob("*.arrow"))):
        from llmkit.shards.writer import shard_digest

        return shard_digest(path)
    if path.is_dir():
        return digest_bytes(_directory_entries(path, known))
    return _digest_file(str(path))


def _digest_file(path: str) -> str:
    if path.endswith(STORED):
        return digest_bytes(_file_blocks(path))
    with open_raw(path) as raw:
        return digest_bytes(decompress(raw, display_name(path), Notes()))


def _directory_entries(directory: Path, known: Mapping[Path, str]) -> Iterator[bytes]:
    for file in sorted(directory.rglob("*")):
        parts = file.relative_to(directory).parts
        if file.is_symlink() or not file.is_file() or parts[0] == STATE or any(part.startswith(".") for part in parts):
            continue
        yield f"{'/'.join(parts)}\0{known.get(file) or digest_bytes(_file_blocks(file))}\n".encode()


def _file_blocks(path: Path | str) -> Iterator[bytes]:
    with open_raw(str(path)) as raw:
        while block := raw.read(BLOCK):
            yield block


def describe_input(path: str | Path, role: str = "input") -> Input:
    """Name, digest and own record of a file or directory."""
    return Input(role, base_name(path), digest_path(path), read_lineage(path))


def join_notes(found: list[tuple[str, dict[str, Any]]]) -> dict[str, Any] | None:
    """The record in a stream's notes; for concatenated streams one of command `cat` whose inputs are the parts."""
    headers = [content for kind, content in found if kind == "header"]
    trailers = [content for kind, content in found if kind == "trailer"]
    records = [header | (trailers[i] if i < len(trailers) else {}) for i, header in enumerate(headers)]
    if len(records) < 2:
        return records[0] if records else None
    parts = [Input("input", f"part-{i}", str(record.get("digest", "")), record) for i, record in enumerate(records)]
    return Lineage("cat", {}, parts).to_dict()


def read_lineage(path: str | Path) -> dict[str, Any] | None:
    """The record that `path` (file, model or tokenizer directory, shard directory, run) carries, or None."""
    name = str(path)
    if not exists(name):
        raise LlmkitError(f"{name}: no such file or directory", "check the path")
    path = Path(path)
    if path.is_dir():
        return _read_directory(path)
    if path.suffix == ".safetensors":
        return _parse(read_safetensors_metadata(path).get("llmkit"))
    if path.suffix == ".arrow":
        from llmkit.shards.writer import read_shard_lineage

        return _parse(read_shard_lineage(path))
    if path.suffix == ".parquet":
        from llmkit.io.parquet import read_record

        with open_raw(name) as raw:
            return _parse(read_record(raw, display_name(name)))
    if path.suffix == ".toml":
        return _read_plan(path)
    notes = Notes()
    with open_raw(name) as raw:
        for _ in decompress(raw, display_name(name), notes):
            pass
    return join_notes(notes.found)


def _read_directory(path: Path) -> dict[str, Any] | None:
    """A run's final model, a model, a tokenizer, a mix plan, or shards: the first of these that is there."""
    path = final_model(path)
    for file in (path / "model.safetensors", *sorted(path.glob("model-00001-of-*.safetensors"))):
        if file.is_file():
            return read_lineage(file)
    if (path / "plan.toml").is_file():
        return _read_plan(path / "plan.toml")
    shards = sorted(path.glob("*.arrow"))
    if shards:
        return read_lineage(shards[-1])  # the last one holds the counts of all
    config = path / "tokenizer_config.json"
    if config.is_file():
        try:
            return _parse(json.loads(config.read_bytes()).get("llmkit"))
        except (ValueError, AttributeError):
            return None
    return None


def _read_plan(path: Path) -> dict[str, Any] | None:
    import tomllib

    try:
        return _parse(tomllib.loads(path.read_text()).get("llmkit"))
    except (OSError, ValueError):
        return None


def _parse(value: Any) -> dict[str, Any] | None:
    """A record from the text or table that a slot holds; None where it is something else."""
    if isinstance(value, (str, bytes)):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    return value if isinstance(value, dict) and "command" in value else None


def read_safetensors_metadata(path: str | Path) -> dict[str, str]:
    """`__metadata__` of a safetensors file, from its header alone; LlmkitError where the header is not one."""
    try:
        with open(path, "rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            if size > MAX_HEADER_BYTES:
                raise ValueError("its header is larger than the format allows")
            metadata = json.loads(file.read(size)).get("__metadata__") or {}
    except (OSError, ValueError, struct.error, AttributeError, RecursionError) as error:
        raise LlmkitError(
            f"{path}: not a readable safetensors file ({error})", "the file is damaged or incomplete"
        ) from error
    return metadata if isinstance(metadata, dict) else {}

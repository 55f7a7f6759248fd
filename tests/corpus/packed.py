"""Reading Zstandard-compressed files of documents into memory."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import orjson
import zstandard


def decompress(path: Path) -> bytes:
    return zstandard.ZstdDecompressor().stream_reader(path.read_bytes(), read_across_frames=True).read()


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL.zst."""
    return [orjson.loads(line) for line in decompress(path).splitlines()]


def files_of(path: Path) -> dict[str, bytes]:
    """The files in a .tar.zst by path."""
    with tarfile.open(fileobj=io.BytesIO(decompress(path))) as packed:
        return {member.name: packed.extractfile(member).read() for member in packed if member.isfile()}  # type: ignore[union-attr]

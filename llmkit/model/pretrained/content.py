"""The digest of all files of a model directory, which the record in the header of its weights holds as `files`.

It covers weights, configuration, generation settings and tokenizer, and leaves out the record itself, state/ and
hidden files, and notes for people such as README.md. The weights are written after their header, and the digest is
known only after them: it is entered in the place of a placeholder. Cost: one read of the files, mostly from the cache.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from llmkit.errors import LlmkitError
from llmkit.io.digest import digest_bytes, digest_stored
from llmkit.io.record import parse_record, record_text, sealed
from llmkit.io.run_layout import regular
from llmkit.io.sealed_file import PENDING
from llmkit.model.pretrained.header import MAX_HEADER_BYTES, parse_header

COVERED = (".safetensors", ".json", ".jinja", ".model", ".txt")
BLOCK = 1 << 20


def files_digest(directory: Path) -> str | None:
    """Digest of a model directory; None for anything else."""
    if not directory.is_dir():
        return None

    def entries() -> Iterator[bytes]:
        for file in sorted(directory.iterdir()):
            if file.is_file() and file.suffix in COVERED and not file.name.startswith("."):
                digest = _weights_digest(file) if file.suffix == ".safetensors" else digest_stored(str(file))
                yield f"{file.name}\0{digest}\n".encode()

    return digest_bytes(entries())


def weights_digest(files: Iterable[Path]) -> str:
    """Digest of files of weights by name, without lineage records: that of the base to which an adapter belongs."""
    return digest_bytes(f"{file.name}\0{_weights_digest(file)}\n".encode() for file in files)


def seal(directory: Path) -> None:
    """Enter the digest of the files in the record, where it holds the placeholder."""
    for file in sorted(directory.glob("*.safetensors")):
        with open(file, "r+b") as stored:
            length, header = _read_header(stored, file)
            metadata = header.get("__metadata__")
            record = parse_record(metadata.get("llmkit"), str(file)) if isinstance(metadata, dict) else None
            if not isinstance(metadata, dict) or record is None or record.get("files") != PENDING:
                continue
            metadata["llmkit"] = record_text(sealed(record, files_digest(directory) or ""))
            encoded = _encoded(header, length)
            assert len(encoded) == length, "a digest is as long as its placeholder"
            stored.seek(8)
            stored.write(encoded)


def verify(path: Path) -> None:
    """Raise LlmkitError where the header of weights with a digest has another form than the one that was written."""
    for file in map(regular, sorted(path.glob("*.safetensors")) if path.is_dir() else [path]):
        with open(file, "rb") as stored:
            length, header = _read_header(stored, file)
            stored.seek(8)
            metadata = header.get("__metadata__")
            record = parse_record(metadata.get("llmkit"), str(file)) if isinstance(metadata, dict) else None
            if record and "files" in record and stored.read(length) != _encoded(header, length):
                raise LlmkitError(f"{file}: the header is not what was written", "the file is damaged")


def _encoded(header: dict[str, Any], length: int) -> bytes:
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False)
    return text.encode(errors="surrogatepass").ljust(length)  # a damaged header may name half a surrogate pair


def _weights_digest(file: Path) -> str:
    """Digest of a safetensors file without its lineage record."""

    def blocks(stored: BinaryIO) -> Iterator[bytes]:
        _, header = _read_header(stored, file)
        if isinstance(metadata := header.get("__metadata__"), dict):
            metadata.pop("llmkit", None)
        yield json.dumps(header, sort_keys=True).encode()
        yield from iter(lambda: stored.read(BLOCK), b"")

    with open(file, "rb") as stored:
        return digest_bytes(blocks(stored))


def _read_header(stored: BinaryIO, file: Path) -> tuple[int, dict[str, Any]]:
    """Length of the header in bytes, and its content; the file is then at the first byte of the tensors."""
    try:
        (length,) = struct.unpack("<Q", stored.read(8))
        header = parse_header(stored, length, str(file)) if length <= MAX_HEADER_BYTES else None
    except (ValueError, struct.error, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise LlmkitError(f"{file}: not a readable safetensors file", "the file is damaged or incomplete")
    return length, header

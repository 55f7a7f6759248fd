"""The lineage record of a stream of documents.

The notes of a zstd stream lie between frames, whose length is in the headers of their blocks (RFC 8878, section 3.1.1):
the content is stepped over, since 2 MB may hold 64 GB. `lineage --check` reads it. gzip has no such headers, so its
content is decompressed, at most a thousand bytes for each of the file, and dropped.
"""

from __future__ import annotations

import struct
from typing import Any, BinaryIO

from llmkit.errors import LlmkitError
from llmkit.io.compression import BLOCK, MAX_NOTE_BYTES, NOTE_MAGIC, ZSTD_MAGIC, Notes, decompress, is_zstd
from llmkit.io.inputs import display_name, open_raw
from llmkit.io.record import join_notes

CHECKSUM, SINGLE_SEGMENT = 0x04, 0x20  # bits of a frame's descriptor
RLE, RESERVED = 1, 3  # types of blocks


def read_record(path: str) -> dict[str, Any] | None:
    """The lineage record in a stream of documents, which is read to its end."""
    notes, name = Notes(), display_name(path)
    with open_raw(path) as raw:
        if hasattr(raw, "peek") and is_zstd(raw.peek(4)[:4]):
            _read_notes(raw, name, notes)
        else:
            for _ in decompress(raw, name, notes):
                pass
    return join_notes(notes.entries, name)


def _read_notes(raw: BinaryIO, name: str, notes: Notes) -> None:
    """The notes in a zstd stream. LlmkitError where it is truncated, or something else follows a frame."""

    def take(size: int) -> bytes:
        data = raw.read(size)
        if len(data) < size:
            raise LlmkitError(f"{name}: truncated zstd stream", "the file is incomplete; fetch or make it again")
        return data

    while magic := raw.read(4):
        if magic == ZSTD_MAGIC:
            _skip_frame(take, name)
            continue
        if not is_zstd(magic):
            raise LlmkitError(
                f"{name}: bytes that are not zstd follow a zstd frame", "was something else appended to the file?"
            )
        (size,) = struct.unpack("<I", take(4))
        if magic == NOTE_MAGIC and size <= MAX_NOTE_BYTES:
            notes.add(take(size))
            continue
        for start in range(0, size, BLOCK):
            take(min(BLOCK, size - start))
    if not notes.complete():
        raise LlmkitError(
            f"{name}: the stream ends before its trailer", "the command that wrote it did not finish; run it again"
        )


def _skip_frame(take: Any, name: str) -> None:
    """Step over a frame after its magic number."""
    (descriptor,) = take(1)
    single = bool(descriptor & SINGLE_SEGMENT)
    take((not single) + (0, 1, 2, 4)[descriptor & 3] + (int(single), 2, 4, 8)[descriptor >> 6])  # window, sizes
    last = 0
    while not last:
        header = int.from_bytes(take(3), "little")
        last, kind, size = header & 1, header >> 1 & 3, header >> 3
        if kind == RESERVED:
            raise LlmkitError(f"{name}: corrupt zstd data (reserved block)", "check the file with: zstd -t")
        take(1 if kind == RLE else size)
    take(4 if descriptor & CHECKSUM else 0)

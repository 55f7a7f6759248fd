"""The header of a safetensors file: validated when read, and written so that equal tensors give equal bytes. No torch.

The format: a u64 header length, a JSON header (name -> dtype, shape, offsets; `__metadata__` of strings) and
the raw tensors, little-endian.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from operator import index
from pathlib import Path
from typing import Any, BinaryIO

from llmkit.errors import LlmkitError
from llmkit.io.run_layout import regular
from llmkit.memory import limited

MAX_HEADER_BYTES = 100 << 20  # the format's own limit
# A tensor takes about 12 values, so 4 Mi are 350,000 tensors, several times those of the largest mixtures of experts,
# whose many files share them. As objects of Python they take 250 MB at most.
MAX_VALUES = 4 << 20
MAX_DIMENSIONS = 64  # as in torch
# Bytes per element, by the format's name for the type.
SIZES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of a file: type, shape, and the offset of its first byte in the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int = 0

    @property
    def count(self) -> int:
        return math.prod(self.shape)


def read_header(path: Path) -> dict[str, Stored]:
    """Every tensor of a file by name; LlmkitError if the header is inconsistent or the file truncated."""
    try:
        size = regular(path).stat().st_size
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(MAX_HEADER_BYTES, size - 8):
                raise ValueError("the header is longer than the file or the format allows")
            header = parse_header(file, length, str(path))
        if not isinstance(header, dict):
            raise ValueError("its header is not a JSON object")
        header.pop("__metadata__", None)
        tensors = {}
        for name, entry in header.items():
            start, stop = map(index, entry["data_offsets"])
            shape = tuple(int(side) for side in entry["shape"])
            count = _bytes_of(shape, SIZES[entry["dtype"]], size)
            if stop - start != count or start < 0:
                raise ValueError(f"tensor {name} has {stop - start} bytes where its shape needs {count}")
            if stop > size - 8 - length:
                raise ValueError(f"truncated: tensor {name} ends after the file")
            tensors[name] = Stored(entry["dtype"], shape, 8 + length + start)
        ends = sorted((entry.offset, entry.offset + entry.count * SIZES[entry.dtype]) for entry in tensors.values())
        if any(stop > start for (_, stop), (start, _) in pairwise(ends)):
            raise ValueError("tensors overlap")
        return tensors
    except OSError as error:
        raise LlmkitError(f"{path}: {error.strerror}", "check the path") from error
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, struct.error, RecursionError) as error:
        raise LlmkitError(
            f"{path}: not a readable safetensors file ({error!s:.200})",
            "the file is damaged or incomplete; download or create it again",
        ) from error


def parse_header(file: BinaryIO, length: int, name: str) -> Any:
    """The next `length` bytes of a file, as JSON. Raises ValueError, RecursionError, and MemoryLimitError."""
    with limited(name):
        data = file.read(length)
        if sum(map(data.count, (b",", b"[", b"{"))) > MAX_VALUES:
            raise ValueError(f"the header holds more than {MAX_VALUES:,} values")
        return json.loads(data)


def _bytes_of(shape: tuple[int, ...], count: int, most: int) -> int:
    """The size of a tensor with `count` bytes per element; ValueError where it is above `most`, before it is huge."""
    if len(shape) > MAX_DIMENSIONS or min(shape, default=0) < 0:
        raise ValueError("a tensor with an impossible shape")
    for side in shape if all(shape) else (0,):
        count *= side
        if count > most:
            raise ValueError("its shape needs more bytes than the file has")
    return count


def read_record(path: str) -> str | None:
    """The lineage record in `__metadata__`, from the header alone; LlmkitError where the header is malformed."""
    return read_metadata(path).get("llmkit")


def read_metadata(path: str) -> dict[str, Any]:
    """The `__metadata__` of a file, from the header alone; LlmkitError where the header is malformed."""
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > MAX_HEADER_BYTES:
                raise ValueError("its header is larger than the format allows")
            metadata = parse_header(file, length, path).get("__metadata__") or {}
    except (OSError, ValueError, struct.error, AttributeError, RecursionError) as error:
        raise LlmkitError(
            f"{path}: not a readable safetensors file ({error})", "the file is damaged or incomplete"
        ) from error
    return metadata if isinstance(metadata, dict) else {}


def file_order(layout: Mapping[str, Stored]) -> list[str]:
    """The order of tensors in files that we write, as in the safetensors library: widest types first, then by name."""
    return sorted(layout, key=lambda name: (-SIZES[layout[name].dtype], name))


def encode_header(layout: Mapping[str, Stored], metadata: Mapping[str, str]) -> bytes:
    """The bytes before the tensors of a file that stores `layout` in `file_order`.

    The library's own writer orders `__metadata__` by a hash that differs between processes, so the file of a
    resumed run would differ from that of an uninterrupted one.
    """
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    for name in file_order(layout):
        entry = layout[name]
        size = SIZES[entry.dtype] * entry.count
        header[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [offset, offset + size]}
        offset += size
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    return struct.pack("<Q", len(encoded)) + encoded

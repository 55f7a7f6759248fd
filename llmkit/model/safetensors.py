"""Safetensors files: read without trusting them, written so that equal tensors give equal bytes.

The format is a u64 header length, a JSON header (name -> dtype, shape, offsets; `__metadata__` of strings) and the raw tensors. The library's
own writer orders `__metadata__` by a hash that differs from process to process, which would make a resumed run's file differ from the
uninterrupted one's; hence ours, which also takes one tensor at a time. Reading goes through the library, after the header was checked.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmkit.errors import LlmkitError
from llmkit.io.lineage import MAX_HEADER_BYTES

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


def write_safetensors(path: Path, layout: Layout, tensor: Callable[[str], Tensor], metadata: dict[str, str]) -> None:
    """Write the tensors that `layout` announces, asking `tensor` for one at a time, widest types first and then by name."""
    names = sorted(layout, key=lambda name: (-layout[name][0].itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    for name in names:
        dtype, shape = layout[name]
        size = dtype.itemsize
        for side in shape:
            size *= side
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as sink:
        sink.write(struct.pack("<Q", len(encoded)) + encoded)
        for name in names:
            value = tensor(name).detach()
            assert (value.dtype, tuple(value.shape)) == (layout[name][0], tuple(layout[name][1])), name
            sink.write(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def layout_of(tensors: Mapping[str, Tensor]) -> Layout:
    """The layout of tensors that are in memory."""
    return {name: (value.dtype, tuple(value.shape)) for name, value in tensors.items()}


def read_layout(path: Path) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Type and shape of every tensor, from the header alone; LlmkitError where the header lies or the file is cut."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(MAX_HEADER_BYTES, size - 8):
                raise ValueError("the header is longer than the file or the format allows")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        found = {}
        for name, entry in header.items():
            start, stop = entry["data_offsets"]
            shape = tuple(int(side) for side in entry["shape"])
            count = DTYPES[entry["dtype"]].itemsize
            for side in shape:
                count *= side
            if stop - start != count or min((start, *shape), default=0) < 0:
                raise ValueError(f"tensor {name} has {stop - start} bytes where its shape needs {count}")
            if stop > size - 8 - length:
                raise ValueError(f"truncated: tensor {name} ends after the file")
            found[name] = (DTYPES[entry["dtype"]], shape)
        return found
    except OSError as error:
        raise LlmkitError(f"{path}: {error.strerror}", "check the path") from error
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, struct.error, RecursionError) as error:
        raise LlmkitError(
            f"{path}: not a readable safetensors file ({error})",
            "the file is damaged or incomplete; fetch or make it again",
        ) from error

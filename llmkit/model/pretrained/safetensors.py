"""Safetensors files of torch tensors: headers with torch types, and reading and writing of one tensor at a time.

The format and the order of tensors are in header.py, which validates headers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from llmkit.errors import LlmkitError
from llmkit.model.pretrained.header import Stored, encode_header, file_order, read_header

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
CHUNK = 16 << 20  # bytes per read
DAMAGED = "the file is damaged or incomplete; fetch or make it again"
NAMES = {dtype: name for name, dtype in DTYPES.items()}

Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


def write_safetensors(path: Path, layout: Layout, tensor: Callable[[str], Tensor], metadata: dict[str, str]) -> None:
    """Write the tensors of `layout`, calling `tensor` for one at a time, widest types first and then by name."""
    stored = {name: Stored(NAMES[dtype], tuple(shape)) for name, (dtype, shape) in layout.items()}
    with open(path, "wb") as sink:
        sink.write(encode_header(stored, metadata))
        for name in file_order(stored):
            value = tensor(name).detach()
            assert (value.dtype, tuple(value.shape)) == (layout[name][0], tuple(layout[name][1])), name
            sink.write(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def read_tensor(stream: BinaryIO, entry: Stored, name: str) -> Tensor:
    """A tensor of a file whose header is known, read straight into its memory; `name` is for messages."""
    tensor = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
    view = tensor.reshape(-1).view(torch.uint8).numpy().data
    try:
        stream.seek(entry.offset)
        while len(view):
            if not (count := stream.readinto(view[:CHUNK])):  # type: ignore[attr-defined]
                raise LlmkitError(f"{name} ends after the file", DAMAGED)
            view = view[count:]
    except OSError as error:
        raise LlmkitError(f"{name}: {error.strerror}", DAMAGED) from error
    return tensor


def layout_of(tensors: Mapping[str, Tensor]) -> Layout:
    """The layout of tensors in memory."""
    return {name: (value.dtype, tuple(value.shape)) for name, value in tensors.items()}


def read_layout(path: Path) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Type and shape of every tensor, from the header alone; LlmkitError if it is inconsistent or the file
    truncated."""
    return {name: (DTYPES[entry.dtype], entry.shape) for name, entry in read_header(path).items()}

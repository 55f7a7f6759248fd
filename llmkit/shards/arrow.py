"""Arrow arrays as NumPy arrays and back, without a copy.

`Array.to_numpy` and `pa.array` are avoided: they import pandas where that is installed (0.4 s).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llmkit.errors import LlmkitError

if TYPE_CHECKING:
    import pyarrow as pa

Tokens = NDArray[Any]  # uint16 or uint32
JSON_ID, JSON_SOURCE = 1, 2  # bits of a document's mark: its id, its source is not text, and stored as JSON
SourceCodes = tuple[NDArray[np.int32], list[str]]  # index of each document's source [n], and the sources


def as_numpy(array: pa.Array) -> NDArray[Any]:
    """View of an array of numbers without nulls."""
    dtype = np.dtype(str(array.type))
    buffer = array.buffers()[1]
    if buffer is None or not len(array):
        return np.zeros(0, dtype)
    return np.frombuffer(buffer, dtype, len(array), array.offset * dtype.itemsize)


def string_data(strings: pa.StringArray) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
    """Offsets int32 [n + 1] of the strings, and the bytes that they point into; both are views."""
    _, starts, content = strings.buffers()
    n = len(strings)
    offsets = np.frombuffer(starts, np.int32, n + 1, strings.offset * 4) if n else np.zeros(1, np.int32)
    return offsets, np.frombuffer(content or b"", np.uint8)


def zero_terminated(strings: pa.StringArray) -> NDArray[np.uint8]:
    """The bytes of all strings, each followed by a zero byte."""
    starts, content = string_data(strings)
    size = int(starts[-1] - starts[0])
    terminated, ends = np.zeros(size + len(strings), np.uint8), np.zeros(size + len(strings), np.bool_)
    ends[starts[1:] - starts[0] + np.arange(len(strings))] = True
    terminated[~ends] = content[starts[0] : starts[-1]]
    return terminated


def encode_sources(sources: Sequence[str]) -> SourceCodes:
    """The source of each document as an index into the distinct ones, which are in order of appearance."""
    table: dict[str, int] = {}
    codes = [table.setdefault(source, len(table)) for source in sources]
    return np.array(codes, np.int32), list(table)


def as_arrow(values: NDArray[Any] | Sequence[str]) -> pa.Array:
    """Numbers (without a copy) or strings as an Arrow array."""
    import pyarrow as pa

    if not isinstance(values, np.ndarray):
        encoded = [value.encode() for value in values]
        return string_array(np.fromiter(map(len, encoded), np.int64, len(encoded)), b"".join(encoded))
    buffers = [None, pa.py_buffer(np.ascontiguousarray(values))]
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), buffers)


def string_array(lengths: NDArray[Any], content: bytes) -> pa.StringArray:
    """Strings of `lengths` [n] bytes that are stored one after another in `content`."""
    import pyarrow as pa

    if len(content) >= 1 << 31:
        raise LlmkitError("over 2 GiB of ids in one batch", "give the documents shorter ids")
    ends = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=ends[1:])
    return pa.StringArray.from_buffers(len(lengths), pa.py_buffer(ends), pa.py_buffer(content))

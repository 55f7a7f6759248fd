"""Columns of numbers and of byte strings in unnamed temporary files, for data about each document of a corpus.

    column = Column(np.uint64, temporary)
    column.append(np.arange(3, dtype=np.uint64))
    column.array()                                # read-only and mapped: the kernel caches the pages in use

Memory: constant. A full disk raises LlmkitError from the `append` that hits it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import zstandard
from numpy.typing import DTypeLike, NDArray

from llmkit.errors import LlmkitError

LEVEL = -50  # zstd level of spilled lines: fast, with little compression


def pack(lines: Iterable[bytes]) -> bytes:
    """Compress the lines of a chunk."""
    return zstandard.ZstdCompressor(level=LEVEL).compress(b"".join(lines))


def unpack(packed: bytes) -> bytes:
    """Decompress the lines of a chunk."""
    return zstandard.ZstdDecompressor().decompress(packed)


@contextmanager
def _disk_errors(directory: str | None) -> Iterator[None]:
    """Turn an OSError, such as a full disk or a missing directory, into a LlmkitError that names the directory."""
    try:
        yield
    except OSError as error:
        raise LlmkitError(
            f"{directory or tempfile.gettempdir()}: {error.strerror}", "use a directory with more space: --temp-dir DIR"
        ) from error


class Column:
    """A growing array of numbers of one type."""

    def __init__(self, dtype: DTypeLike, directory: str | None = None) -> None:
        self.dtype = np.dtype(dtype)
        self._directory = directory
        with _disk_errors(directory):
            self._file = tempfile.TemporaryFile(dir=directory)
        self._size = 0

    def append(self, values: NDArray[Any]) -> None:
        """Append values."""
        with _disk_errors(self._directory):
            self._file.write(np.ascontiguousarray(values, self.dtype).data)
        self._size += len(values)

    def __len__(self) -> int:
        return self._size

    def array(self) -> NDArray[Any]:
        """All values so far, read-only."""
        with _disk_errors(self._directory):
            self._file.flush()
        if not self._size:
            return np.empty(0, self.dtype)
        return np.asarray(np.memmap(self._file, self.dtype, "r", shape=(self._size,)))

    def close(self) -> None:
        with suppress(OSError):  # a full disk has already been reported
            self._file.close()


class Blobs:
    """A growing array of byte strings."""

    def __init__(self, directory: str | None = None) -> None:
        self._directory = directory
        with _disk_errors(directory):
            self._file = tempfile.TemporaryFile(dir=directory)
        self._ends = Column(np.int64, directory)
        self._end = 0

    def append(self, blobs: Sequence[bytes]) -> None:
        """Append byte strings."""
        with _disk_errors(self._directory):
            self._file.writelines(blobs)
        ends = np.cumsum([len(blob) for blob in blobs], dtype=np.int64) + self._end
        self._ends.append(ends)
        self._end = int(ends[-1]) if len(ends) else self._end

    def __len__(self) -> int:
        return len(self._ends)

    def read(self) -> _BlobReader:
        """A sequence of the byte strings, for any order of access. Nothing may be appended after this call."""
        with _disk_errors(self._directory):
            self._file.flush()
        return _BlobReader(self._file, self._ends.array())

    def close(self) -> None:
        with suppress(OSError):
            self._file.close()
        self._ends.close()


class _BlobReader:
    def __init__(self, file: Any, ends: NDArray[np.int64]) -> None:
        self._file, self._ends = file, ends

    def __getitem__(self, number: int) -> bytes:
        start = int(self._ends[number - 1]) if number else 0
        self._file.seek(start)
        blob: bytes = self._file.read(int(self._ends[number]) - start)
        return blob

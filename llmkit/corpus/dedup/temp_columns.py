"""Columns of numbers and of bytes in unnamed temporary files: what is known of each document, while all of them are read.

    column = Column(np.uint64, temporary)
    column.append(np.arange(3, dtype=np.uint64))
    column.array()                                # read-only, mapped: the kernel holds what is used

Memory: none that grows. The files need no room that is not there: a full disk is a LlmkitError of the `append` that meets it.
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

LEVEL = -50  # of the lines that wait: nearly as they are


def pack(lines: Iterable[bytes]) -> bytes:
    """The lines of a chunk that is to wait."""
    return zstandard.ZstdCompressor(level=LEVEL).compress(b"".join(lines))


def unpack(packed: bytes) -> bytes:
    """Those lines."""
    return zstandard.ZstdDecompressor().decompress(packed)


@contextmanager
def _spilling(directory: str | None) -> Iterator[None]:
    """LlmkitError that names the directory where it has no room, or is not there."""
    try:
        yield
    except OSError as error:
        place = directory or tempfile.gettempdir()
        raise LlmkitError(f"{place}: {error.strerror}", "name a directory with more room: --temp-dir DIR") from error


class Column:
    """Numbers of one type, by place."""

    def __init__(self, dtype: DTypeLike, directory: str | None = None) -> None:
        self.dtype = np.dtype(dtype)
        self._directory = directory
        with _spilling(directory):
            self._file = tempfile.TemporaryFile(dir=directory)
        self._size = 0

    def append(self, values: NDArray[Any]) -> None:
        """Add values at the end."""
        with _spilling(self._directory):
            self._file.write(np.ascontiguousarray(values, self.dtype).data)
        self._size += len(values)

    def __len__(self) -> int:
        return self._size

    def array(self) -> NDArray[Any]:
        """All values so far, read-only."""
        with _spilling(self._directory):
            self._file.flush()
        if not self._size:
            return np.empty(0, self.dtype)
        return np.asarray(np.memmap(self._file, self.dtype, "r", shape=(self._size,)))

    def close(self) -> None:
        with suppress(OSError):  # a disk that is full has been told of
            self._file.close()


class Blobs:
    """Byte strings, by place; in order or at random."""

    def __init__(self, directory: str | None = None) -> None:
        self._directory = directory
        with _spilling(directory):
            self._file = tempfile.TemporaryFile(dir=directory)
        self._ends = Column(np.int64, directory)
        self._end = 0

    def append(self, blobs: Sequence[bytes]) -> None:
        """Add byte strings at the end."""
        with _spilling(self._directory):
            self._file.writelines(blobs)
        ends = np.cumsum([len(blob) for blob in blobs], dtype=np.int64) + self._end
        self._ends.append(ends)
        self._end = int(ends[-1]) if len(ends) else self._end

    def __len__(self) -> int:
        return len(self._ends)

    def read(self) -> _Reader:
        """What gives each of them by its number; nothing may be added any more."""
        with _spilling(self._directory):
            self._file.flush()
        return _Reader(self._file, self._ends.array())

    def close(self) -> None:
        with suppress(OSError):
            self._file.close()
        self._ends.close()


class _Reader:
    def __init__(self, file: Any, ends: NDArray[np.int64]) -> None:
        self._file, self._ends = file, ends

    def __getitem__(self, number: int) -> bytes:
        start = int(self._ends[number - 1]) if number else 0
        self._file.seek(start)
        blob: bytes = self._file.read(int(self._ends[number]) - start)
        return blob

"""Weights of a model directory as float32 numbers, one block at a time, without torch. `llmkit average` reads
models this way.

    weights = StreamedWeights(load_info("model/"))
    weights.layout["model.norm.weight"]                 # Stored("BF16", (1024,))
    weights.read("model.norm.weight", 0, out)           # elements [0, len(out)) into float32 `out`
    weights.digests()                                   # {model/model.safetensors: "xxh3:..."}

Files are read, not mapped: mapped pages count as the process's memory. Bytes that are read in file order are
digested on the way, so that recording the inputs takes no second pass; other bytes are read again for the
digest. Cost: every byte once, and 32 KiB to 1 MiB of memory per model. Quantised directories and adapters go through
`weights.Weights` (torch), one whole tensor at a time.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType

import numpy as np
import xxhash

from llmkit.errors import LlmkitError
from llmkit.io.digest import digest_text
from llmkit.model.family import model_names
from llmkit.model.pretrained.directory import LoadedModel, weight_files
from llmkit.model.pretrained.header import SIZES, Stored, read_header

FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}  # numpy's types for weights
GAP = 1 << 20  # bytes between two reads that are still read for the digest: headers above all


class _File:
    """A file with random access that is digested as far as it is read in order."""

    def __init__(self, path: Path, digesting: bool) -> None:
        self.path = path
        self.descriptor = os.open(path, os.O_RDONLY)
        self._digest = xxhash.xxh3_128() if digesting else None
        self._digested = 0
        os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)

    def read(self, offset: int, into: memoryview) -> None:
        """Fill `into` with the bytes from `offset`."""
        done = 0
        while done < len(into):
            count = os.preadv(self.descriptor, [into[done:]], offset + done)
            if not count:
                raise LlmkitError(f"{self.path}: unexpected end of file", "another process is changing it")
            done += count
        if self._digest is not None and self._digested <= offset <= self._digested + GAP:
            self._catch_up(offset)
            self._digest.update(into)
            self._digested = offset + len(into)

    def digest(self) -> str:
        """Digest of the whole file, including what has not been read yet; requires `digesting`."""
        assert self._digest is not None
        self._catch_up(os.fstat(self.descriptor).st_size)
        return digest_text(self._digest)

    def _catch_up(self, stop: int) -> None:
        assert self._digest is not None
        while self._digested < stop:
            block = os.pread(self.descriptor, min(GAP, stop - self._digested), self._digested)
            if not block:
                raise LlmkitError(f"{self.path}: unexpected end of file", "another process is changing it")
            self._digest.update(block)
            self._digested += len(block)


class StreamedWeights:
    """Types, shapes and elements of the tensors of a model directory; a context manager, which closes its files."""

    def __init__(self, info: LoadedModel, digesting: bool = True) -> None:
        self.path = info.path
        self.layout: dict[str, Stored] = {}
        self._digesting = digesting
        self._files: list[_File] = []
        self._file_of: dict[str, _File] = {}
        self._buffer = np.empty(0, np.uint8)
        self._dequantized: tuple[str, np.ndarray] = ("", self._buffer)  # name and elements of the last tensor
        self._quantized = None
        if info.quantization is not None or info.adapter is not None:
            from llmkit.model.pretrained.checkpoint import open_weights
            from llmkit.model.pretrained.safetensors import NAMES

            self._quantized = open_weights(info)
            self.layout = {name: Stored(NAMES[kind], shape) for name, (kind, shape) in self._quantized.layout.items()}
            return
        headers = {path: read_header(path) for path in weight_files(info.path)}
        names = model_names((name for header in headers.values() for name in header), info.config)
        for path, header in headers.items():
            tensors = {names[name]: entry for name, entry in header.items()}
            self._files.append(_File(path, digesting))
            self.layout |= tensors
            self._file_of |= dict.fromkeys(tensors, self._files[-1])
        for name, entry in self.layout.items():
            if entry.dtype not in FLOATS:
                raise LlmkitError(
                    f"{info.path}: tensor {name} has type {entry.dtype}",
                    "quantised weights need a quantization_config in config.json",
                )

    def __enter__(self) -> StreamedWeights:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files:
            os.close(file.descriptor)

    def read(self, name: str, start: int, out: np.ndarray) -> None:
        """Read elements [start, start + len(out)) of a tensor, in row-major order, into float32 `out`;
        LlmkitError if one is not finite."""
        if self._quantized is not None:
            if self._dequantized[0] != name:
                self._dequantized = (name, self._quantized[name].float().flatten().numpy())
            np.copyto(out, self._dequantized[1][start : start + len(out)])
        else:
            entry = self.layout[name]
            size = SIZES[entry.dtype]
            kind = np.dtype(FLOATS[entry.dtype])
            if len(self._buffer) < len(out) * size:
                self._buffer = np.empty(len(out) * size, np.uint8)
            stored = out if entry.dtype == "F32" else self._buffer[: len(out) * size].view(kind)
            self._file_of[name].read(entry.offset + start * size, stored.view(np.uint8).data)
            to_float32(stored, entry.dtype, out)
        # Comparisons with NaN are false. (The minimum and maximum of a block cost less than a test of each element.)
        if len(out) and not (out.max() < np.inf and out.min() > -np.inf):
            first = int(np.argmin(np.isfinite(out)))
            raise LlmkitError(
                f"{self.path}: tensor {name} contains {out[first]} (element {start + first:,})",
                "its training failed, or the file is damaged; leave the model out",
            )

    def digests(self) -> dict[Path, str]:
        """Digest of each file; empty for a quantised directory and for adapters."""
        return {file.path: file.digest() for file in self._files} if self._digesting else {}


def to_float32(stored: np.ndarray, dtype: str, out: np.ndarray) -> None:
    """Convert elements of the format's type `dtype`, in numpy's type for it (FLOATS), into float32 `out`;
    `stored` may be `out`."""
    if dtype == "BF16":  # the upper half of a float32
        np.left_shift(stored, 16, out=out.view(np.uint32), dtype=np.uint32)
    elif stored is not out:
        np.copyto(out, stored, casting="same_kind")


def from_float32(values: np.ndarray, dtype: str) -> np.ndarray:
    """Finite float32 `values` rounded to nearest even in the format's type `dtype`; `values` may be overwritten."""
    if dtype == "BF16":
        bits = values.view(np.uint32)
        odd = bits >> 16
        odd &= 1
        odd += 0x7FFF
        bits += odd
        bits >>= 16
        return bits.astype("<u2")
    with np.errstate(over="ignore"):  # values beyond float16 become infinite, as in torch
        return values.astype(FLOATS[dtype], copy=False)

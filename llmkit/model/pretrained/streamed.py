"""Weights of a model directory as float32 numbers, a block at a time, without torch: what averages are made of.

    weights = StreamedWeights(load_info("model/"))
    weights.layout["model.norm.weight"]                 # Stored("BF16", (1024,))
    weights.read("model.norm.weight", 0, out)           # elements [0, len(out)) into float32 `out`
    weights.digests()                                   # {model/model.safetensors: "xxh3:..."}

Files are read, not mapped: pages of a mapping count as memory of the process. What is read in the order in which it is stored goes into the
file's digest on the way, so that a record of the inputs costs no second pass; what is not, is read again for it. Cost: every byte once, and
32 KiB to 1 MiB a model. Quantised directories go through `weights.Weights` (torch), a whole tensor at a time.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType

import numpy as np
import xxhash

from llmkit.errors import LlmkitError
from llmkit.io.digest import digest_text
from llmkit.model.pretrained.directory import LoadedModel, weight_files
from llmkit.model.pretrained.header import SIZES, Stored, read_header

FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}  # how numpy reads the types that weights come in
GAP = 1 << 20  # bytes: what is skipped between two reads, headers above all, and still digested in passing


class _File:
    """A file that is read anywhere, and digested as far as that happens in order."""

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
                raise LlmkitError(f"{self.path}: ends while it is read", "another process changes it")
            done += count
        if self._digest is not None and self._digested <= offset <= self._digested + GAP:
            self._catch_up(offset)
            self._digest.update(into)
            self._digested = offset + len(into)

    def digest(self) -> str:
        """Digest of the whole file, what was not read yet included; it must be `digesting`."""
        assert self._digest is not None
        self._catch_up(os.fstat(self.descriptor).st_size)
        return digest_text(self._digest)

    def _catch_up(self, stop: int) -> None:
        assert self._digest is not None
        while self._digested < stop:
            block = os.pread(self.descriptor, min(GAP, stop - self._digested), self._digested)
            if not block:
                raise LlmkitError(f"{self.path}: ends while it is read", "another process changes it")
            self._digest.update(block)
            self._digested += len(block)


class StreamedWeights:
    """Type, shape and numbers of every tensor of a model directory; a context manager, which closes its files."""

    def __init__(self, info: LoadedModel, digesting: bool = True) -> None:
        self.path = info.path
        self.layout: dict[str, Stored] = {}
        self._digesting = digesting
        self._files: list[_File] = []
        self._file_of: dict[str, _File] = {}
        self._room = np.empty(0, np.uint8)
        self._whole: tuple[str, np.ndarray] = ("", self._room)
        self._quantised = None
        if info.quantization is not None:
            from llmkit.model.pretrained.checkpoint import open_weights
            from llmkit.model.pretrained.safetensors import NAMES

            self._quantised = open_weights(info)
            self.layout = {name: Stored(NAMES[kind], shape) for name, (kind, shape) in self._quantised.layout.items()}
            return
        for path in weight_files(info.path):
            found = read_header(path)
            self._files.append(_File(path, digesting))
            self.layout |= found
            self._file_of |= dict.fromkeys(found, self._files[-1])
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
        """Elements [start, start + len(out)) of a tensor, counted row by row, into float32 `out`; LlmkitError where one is not finite."""
        if self._quantised is not None:
            if self._whole[0] != name:
                self._whole = (name, self._quantised[name].float().flatten().numpy())
            np.copyto(out, self._whole[1][start : start + len(out)])
        else:
            entry = self.layout[name]
            size = SIZES[entry.dtype]
            kind = np.dtype(FLOATS[entry.dtype])
            if len(self._room) < len(out) * size:
                self._room = np.empty(len(out) * size, np.uint8)
            stored = out if entry.dtype == "F32" else self._room[: len(out) * size].view(kind)
            self._file_of[name].read(entry.offset + start * size, stored.view(np.uint8).data)
            to_float32(stored, entry.dtype, out)
        # Comparisons with NaN are false. (The least and the greatest of a block cost less than looking at each.)
        if len(out) and not (out.max() < np.inf and out.min() > -np.inf):
            at = start + int(np.argmin(np.isfinite(out)))
            raise LlmkitError(
                f"{self.path}: tensor {name} holds {out[at - start]} (element {at:,})",
                "its training failed, or the file is damaged; leave the model out",
            )

    def digests(self) -> dict[Path, str]:
        """Digest of each file; none of a quantised directory."""
        return {file.path: file.digest() for file in self._files} if self._digesting else {}


def to_float32(stored: np.ndarray, dtype: str, out: np.ndarray) -> None:
    """Numbers of the format's type `dtype`, as `FLOATS` reads it, into float32 `out`; `stored` may be `out`."""
    if dtype == "BF16":  # the upper half of a float32
        np.left_shift(stored, 16, out=out.view(np.uint32), dtype=np.uint32)
    elif stored is not out:
        np.copyto(out, stored, casting="same_kind")


def from_float32(values: np.ndarray, dtype: str) -> np.ndarray:
    """The finite numbers of float32 `values`, which may be overwritten, as bytes of a tensor of type `dtype`, rounded to nearest even."""
    if dtype == "BF16":
        bits = values.view(np.uint32)
        odd = bits >> 16
        odd &= 1
        odd += 0x7FFF
        bits += odd
        bits >>= 16
        return bits.astype("<u2")
    with np.errstate(over="ignore"):  # what float16 cannot hold is infinite there, as torch has it
        return values.astype(FLOATS[dtype], copy=False)

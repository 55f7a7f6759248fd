"""Weights of a model directory by name, one at a time: plain, sharded, or quantised in the compressed-tensors layout.

    weights = Weights(load_info(directory))
    weights.layout["model.norm.weight"]       # (torch.bfloat16, (1024,)), from the headers alone
    weights["model.norm.weight"]              # the tensor

Each tensor is read on its own, straight into its memory, so only requested tensors take any. Quantised tensors
appear under their original names and shapes, in the type of their scales: q · scale, as in transformers and vLLM.
Supported formats: `pack-quantized` (2, 4 or 8 bits in int32 words, offset binary, least significant first along the
inputs), `int-quantized` and `float-quantized`, all symmetric, with scales [out, groups].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmkit.errors import LlmkitError
from llmkit.model.family import model_names
from llmkit.model.pretrained.directory import LoadedModel, weight_files
from llmkit.model.pretrained.header import Stored, read_header
from llmkit.model.pretrained.safetensors import DAMAGED, DTYPES, read_tensor

PACKED, SCALE, SHAPE = "_packed", "_scale", "_shape"  # suffixes of the weight's name
BITS = (2, 4, 8)  # of packed weights
STRATEGIES = (None, "channel", "group")
UNSUPPORTED = ("_zero_point", "_g_idx")

Entry = tuple[torch.dtype, tuple[int, ...]]


class Weights(Mapping[str, Tensor]):
    """Name -> tensor, read on access. `layout` has the type and shape of each, `stored_bytes` is the total size
    of the files."""

    def __init__(self, info: LoadedModel) -> None:
        self.directory = directory = info.path
        self.layout: dict[str, Entry] = {}
        self.stored_bytes = 0
        self._stored: dict[str, Entry] = {}
        self._files: dict[str, Path] = {}
        self._headers: dict[Path, dict[str, Stored]] = {}
        self._opened: tuple[Path, Any] | None = None  # the last file that was read, and its stream
        self._headers = {file: read_header(file) for file in weight_files(directory)}
        names = model_names((name for header in self._headers.values() for name in header), info.config)
        self._name_in_file = {name: stored for stored, name in names.items()}
        for file, header in self._headers.items():
            for stored, entry in header.items():
                name = names[stored]
                self._stored[name], self._files[name] = (DTYPES[entry.dtype], entry.shape), file
            self.stored_bytes += file.stat().st_size
        if info.quantization is None:
            self.layout = dict(self._stored)
        else:
            self._bits = declared_bits(info.quantization, directory / "config.json")
            self._describe_quantised()

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.layout:
            raise KeyError(name)
        quantized = self.quantized(name)
        return self._read(name) if quantized is None else quantized.dense()

    def quantized(self, name: str) -> Quantized | None:
        """A quantised tensor as it is stored; None for one that is not quantised."""
        if name + PACKED in self._stored:
            width, words = self.layout[name][1][1], self._read(name + PACKED)
            return Quantized(words, self._read(name + SCALE), self._bits_of(name, width, words.shape[1]), width)
        return Quantized(self._read(name), self._read(name + SCALE)) if name + SCALE in self._stored else None

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self.layout))

    def __len__(self) -> int:
        return len(self.layout)

    def _read(self, name: str) -> Tensor:
        file = self._files[name]
        entry = self._headers[file][self._name_in_file[name]]
        try:
            if self._opened is None or self._opened[0] != file:
                self._opened = (file, open(file, "rb", buffering=0))
        except OSError as error:
            raise LlmkitError(f"{file}: {error.strerror}", DAMAGED) from error
        return read_tensor(self._opened[1], entry, f"{file}: tensor {name}")

    def _describe_quantised(self) -> None:
        """Fill `layout` with the original weights, checking each quantised one against its parts."""
        for name, (dtype, shape) in self._stored.items():
            if name.endswith(UNSUPPORTED):
                raise LlmkitError(
                    f"{self.directory}: tensor {name}: asymmetric or reordered quantisation is not supported",
                    "only symmetric compressed-tensors weights can be loaded",
                )
            if name.endswith(PACKED):
                name = name.removesuffix(PACKED)
                size = self._stored.get(name + SHAPE, (dtype, ()))
                scale = self._scale_of(name)
                if size != (torch.int64, (2,)) or dtype != torch.int32 or len(shape) != 2:
                    raise self._mismatch(name)
                rows, width = map(int, self._read(name + SHAPE).tolist())
                if rows != shape[0] or width < 1:
                    raise self._mismatch(name)
                self._bits_of(name, width, shape[1])
                self._check_groups(name, (rows, width), scale[1])
                self.layout[name] = (scale[0], (rows, width))
            elif name.endswith((SCALE, SHAPE)):
                continue
            elif name + SCALE in self._stored:
                scale = self._scale_of(name)
                self._check_groups(name, shape, scale[1])
                self.layout[name] = (scale[0], shape)
            else:
                self.layout[name] = (dtype, shape)

    def _scale_of(self, name: str) -> Entry:
        scale = self._stored.get(name + SCALE)
        if scale is None or not scale[0].is_floating_point:
            raise LlmkitError(
                f"{self.directory}: missing tensor {name}{SCALE}", "the quantised directory is incomplete"
            )
        return scale

    def _check_groups(self, name: str, shape: tuple[int, ...], scale: tuple[int, ...]) -> None:
        if len(shape) != 2 or len(scale) != 2 or scale[0] != shape[0] or not scale[1] or shape[1] % scale[1]:
            raise LlmkitError(
                f"{self.directory}: tensor {name}{SCALE} has shape {list(scale)}, which does not fit {list(shape)}",
                DAMAGED,
            )

    def _bits_of(self, name: str, width: int, words: int) -> int:
        fitting = [bits for bits in self._bits if -(-width * bits // 32) == words]
        if not fitting:
            raise self._mismatch(name)
        return fitting[0]

    def _mismatch(self, name: str) -> LlmkitError:
        return LlmkitError(f"{self.directory}: tensor {name}{PACKED} does not fit its {name}{SHAPE}", DAMAGED)


@dataclass(frozen=True, slots=True)
class Quantized:
    """A quantised matrix [out, width]: values, or int32 words of `bits` bits per value, and scales [out, groups]."""

    values: Tensor
    scale: Tensor
    bits: int = 0
    width: int = 0

    def dense(self) -> Tensor:
        """The matrix in the type of the scales."""
        values = unpack(self.values, self.bits, self.width) if self.bits else self.values
        return dequantize(values, self.scale)

    def apply(self, change: Callable[[Tensor], Tensor]) -> Quantized:
        """With its tensors changed, as by a move to another device."""
        return replace(self, values=change(self.values), scale=change(self.scale))


def declared_bits(quantization: Any, where: Path) -> list[int]:
    """Bits of the packed weights that a quantization_config declares, ascending; LlmkitError for another method."""
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method != "compressed-tensors":
        raise LlmkitError(
            f"{where}: quantisation method {method!r} is not supported",
            "only compressed-tensors is; start from the original model",
        )
    groups = quantization.get("config_groups")
    schemes = (
        [group.get("weights") for group in groups.values() if isinstance(group, dict)]
        if isinstance(groups, dict)
        else []
    )
    bits = [scheme.get("num_bits") for scheme in schemes if isinstance(scheme, dict)]
    if not bits or any(width not in BITS for width in bits):
        raise LlmkitError(
            f"{where}: weights of {', '.join(map(str, bits)) or 'unknown'} bits are not supported",
            "supported: " + ", ".join(map(str, BITS)),
        )
    for scheme in schemes:
        if isinstance(scheme, dict) and scheme.get("strategy") not in STRATEGIES:
            raise LlmkitError(
                f"{where}: weights with a scale for each {scheme['strategy']!s:.40} are not supported",
                "supported: a scale for each row (channel) or group of a row; start from the original model",
            )
    return [width for width in BITS if width in bits]


def unpack(words: Tensor, bits: int, width: int) -> Tensor:
    """int8 [out, width] from int32 words [out, ceil(width · bits / 32)]."""
    count = 32 // bits
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
    values = (words[:, :, None] >> shifts) & ((1 << bits) - 1)
    return (values.view(words.shape[0], words.shape[1] * count)[:, :width] - (1 << (bits - 1))).to(torch.int8)


def dequantize(values: Tensor, scale: Tensor) -> Tensor:
    """values [out, in] · scale [out, groups], one scale per in/groups neighbours, in the type of the scales."""
    rows, width = values.shape
    return (values.to(scale.dtype).view(rows, scale.shape[1], -1) * scale[:, :, None]).view(rows, width)

"""Quantised model directories in the compressed-tensors layout, which transformers, vLLM and our own decoder load.

Every weight of a linear layer in the decoder's layers becomes `weight_packed` (int32 words [out, ceil(in · bits / 32)], offset binary, least
significant first along the inputs), `weight_scale` [out, groups] in the model's type, and `weight_shape`. Embeddings, norms and the output
layer stay as they are. Activations are not quantised: the weights are turned back when they are used.

    report = write_quantised(info, SCHEMES["int4"], Path("out"))

One tensor at a time: memory is a few times the largest matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmkit.errors import LlmkitError, UsageError
from llmkit.model.family import EMBEDDING, is_ignored, linear_weights
from llmkit.model.pretrained.checkpoint import DTYPE_NAMES, LoadedModel, open_weights, save_description
from llmkit.model.pretrained.directory import WEIGHTS
from llmkit.model.pretrained.safetensors import write_safetensors
from llmkit.model.pretrained.weights import PACKED, SCALE, SHAPE, dequantise
from llmkit.quantization.round_to_nearest import quantise

GROUPS = (128, 64, 32)


@dataclass(frozen=True, slots=True)
class Scheme:
    """How weights are stored: `bits`, weights a scale (`group`; None is a whole row), whether scales are searched."""

    bits: int
    group: int | None
    search: bool

    def __str__(self) -> str:
        return f"{self.bits} bits, one scale " + (f"for {self.group} weights" if self.group else "a row")


SCHEMES = {"int8": Scheme(8, None, search=False), "int4": Scheme(4, GROUPS[0], search=True)}


@dataclass(slots=True)
class Report:
    """What came of it. `error` is the root of Σ(w − q·scale)² / Σw² over all quantised weights."""

    matrices: int = 0
    weights: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    error: float = 0.0


def linear_names(info: LoadedModel) -> list[str]:
    """Names of the weights that are quantised: the matrices of the layers, and neither embeddings nor the output layer."""
    open_weights(info)  # which checks that they are there
    return linear_weights(info.config)


def fit_scheme(info: LoadedModel, scheme: Scheme, group: int | None = None) -> Scheme:
    """The scheme for this model: its group, else the largest of 128, 64, 32 that divides every width, else a scale a row.

    A group asked for that does not divide every width is refused.
    """
    layout = open_weights(info).layout
    widths = {layout[name][1][1] for name in linear_names(info)}
    if group is not None:
        unfit = [width for width in sorted(widths) if width % group]
        if unfit:
            raise UsageError(
                f"groups of {group} do not divide rows of {unfit[0]} weights", "choose another --group-size"
            )
        return replace(scheme, group=group)
    if scheme.group is None:
        return scheme
    fitting = [size for size in GROUPS if size <= scheme.group and not any(width % size for width in widths)]
    return replace(scheme, group=fitting[0] if fitting else None)


def write_quantised(
    info: LoadedModel,
    scheme: Scheme,
    directory: Path,
    lineage_json: str | None = None,
    advance: Callable[[int], None] | None = None,
) -> Report:
    """Fill `directory` (it exists; the caller makes it atomic) with the quantised model; `advance` hears of each tensor's weights.

    Raises LlmkitError where the model is quantised already.
    """
    if info.quantization is not None:
        raise LlmkitError(f"{info.path} is quantised already", "start from the model as it was before")
    weights = open_weights(info)
    linear = set(linear_names(info))
    report = Report(len(linear), bytes_before=weights.stored_bytes)
    layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name, (dtype, shape) in weights.layout.items():
        if name in linear:
            groups = shape[1] // (scheme.group or shape[1])
            layout[name + PACKED] = (torch.int32, (shape[0], -(-shape[1] * scheme.bits // 32)))
            layout[name + SCALE] = (dtype, (shape[0], groups))
            layout[name + SHAPE] = (torch.int64, (2,))
        elif not is_ignored(name, info.config):
            layout[name] = (dtype, shape)
    squares, wrong = 0.0, 0.0
    scales: dict[str, Tensor] = {}  # of matrices whose scales come later in the file

    def part(name: str) -> Tensor:
        nonlocal squares, wrong
        if name in weights:
            value = weights[name]
        elif name.endswith(SHAPE):
            return torch.tensor(weights.layout[name.removesuffix(SHAPE)][1], dtype=torch.int64)
        elif name.endswith(SCALE):
            return scales.pop(name.removesuffix(SCALE))
        else:
            source = name.removesuffix(PACKED)
            value = weights[source]
            if not torch.isfinite(value).all():
                raise LlmkitError(
                    f"{info.path}: tensor {source} holds numbers that are not finite", "the training diverged"
                )
            q, scale = quantise(value, scheme.bits, scheme.group, search=scheme.search, dtype=value.dtype)
            squares += float(value.double().square().sum())
            wrong += float((dequantise(q, scale).double() - value).square().sum())
            scales[source] = scale
            report.weights += value.numel()
            if advance:
                advance(value.numel())
            return pack(q, scheme.bits)
        if advance:
            advance(value.numel())
        return value

    metadata = {"format": "pt"} | ({"llmkit": lineage_json} if lineage_json else {})
    write_safetensors(directory / WEIGHTS, layout, part, metadata)
    assert not scales
    report.bytes_after = (directory / WEIGHTS).stat().st_size
    report.error = math.sqrt(wrong / squares) if squares else 0.0
    config = info.config.to_hf(DTYPE_NAMES[weights.layout[EMBEDDING][0]])
    save_description(
        directory, config | {"quantization_config": description(scheme)}, info.tokenizer_files, info.stop_ids
    )
    return report


def description(scheme: Scheme) -> dict[str, Any]:
    """`quantization_config` of config.json. No `sparsity_config`: vLLM refuses it."""
    weights = {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group" if scheme.group else "channel",
        "group_size": scheme.group,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }
    group = {"targets": ["Linear"], "input_activations": None, "output_activations": None, "weights": weights}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }


def pack(values: Tensor, bits: int) -> Tensor:
    """int32 words [out, ceil(in · bits / 32)] of signed values [out, in]; the inverse of `model.weights.unpack`."""
    rows, width = values.shape
    count = 32 // bits
    unsigned = values.to(torch.int32) + (1 << (bits - 1))
    unsigned = torch.nn.functional.pad(unsigned, (0, -width % count)).view(rows, -1, count)
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return (unsigned << shifts).sum(-1, dtype=torch.int32)

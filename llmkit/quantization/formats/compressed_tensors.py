"""Writer of quantised model directories in the compressed-tensors layout, which transformers, vLLM and our own
decoder load.

Each matrix of a layer becomes `weight_packed` (int32 words [out, ceil(in · bits / 32)], offset binary, least
significant first along the inputs), `weight_scale` [out, groups] in the model's type, and `weight_shape`.
Embeddings, norms and the output layer are copied. Activations are not quantised: weights are dequantised when
they are used.

    method = fit_model(info, METHODS["int4"])
    report = write_quantized(info, method, Path("out"))

Tensors are processed one at a time: memory is a few times the largest matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmkit.errors import LlmkitError
from llmkit.model.family import is_ignored, linear_weights
from llmkit.model.pretrained.checkpoint import DTYPE_NAMES, LoadedModel, open_weights, save_description
from llmkit.model.pretrained.directory import WEIGHTS
from llmkit.model.pretrained.safetensors import write_safetensors
from llmkit.model.pretrained.weights import PACKED, SCALE, SHAPE, dequantize
from llmkit.quantization.methods import QuantizationMethod, fit_method


@dataclass(slots=True)
class Report:
    """Counts of the result. `error` is √(Σ(w − q·scale)² / Σw²) over all quantised weights."""

    matrices: int = 0
    weights: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    error: float = 0.0


def fit_model(info: LoadedModel, method: QuantizationMethod, group: int | None = None) -> QuantizationMethod:
    """The method with a group that fits the model's matrices (methods.fit_method)."""
    layout = open_weights(info).layout
    return fit_method(method, [layout[name][1][1] for name in linear_weights(info.config)], group)


def write_quantized(
    info: LoadedModel,
    method: QuantizationMethod,
    directory: Path,
    lineage_json: str | None = None,
    advance: Callable[[int], None] | None = None,
) -> Report:
    """Fill `directory` (it exists; the caller makes it atomic) with the quantised model.

    `advance` is called with each tensor's number of weights. Raises LlmkitError if the model is quantised already.
    """
    if info.quantization is not None:
        raise LlmkitError(f"{info.path} is quantised already", "start from the original model")
    weights = open_weights(info)
    linear = set(linear_weights(info.config))
    report = Report(len(linear), bytes_before=weights.stored_bytes)
    layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name, (dtype, shape) in weights.layout.items():
        if name in linear:
            groups = shape[1] // (method.group or shape[1])
            layout[name + PACKED] = (torch.int32, (shape[0], -(-shape[1] * method.bits // 32)))
            layout[name + SCALE] = (dtype, (shape[0], groups))
            layout[name + SHAPE] = (torch.int64, (2,))
        elif not is_ignored(name, info.config):
            layout[name] = (dtype, shape)
    squares, squared_error = 0.0, 0.0
    scales: dict[str, Tensor] = {}  # of matrices whose scales come later in the file

    def tensor(name: str) -> Tensor:
        nonlocal squares, squared_error
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
                raise LlmkitError(f"{info.path}: tensor {source} contains non-finite weights", "the training diverged")
            q, scale = method.quantize(value, method, value.dtype)
            squares += float(value.double().square().sum())
            squared_error += float((dequantize(q, scale).double() - value).square().sum())
            scales[source] = scale
            report.weights += value.numel()
            if advance:
                advance(value.numel())
            return pack(q, method.bits)
        if advance:
            advance(value.numel())
        return value

    metadata = {"format": "pt"} | ({"llmkit": lineage_json} if lineage_json else {})
    write_safetensors(directory / WEIGHTS, layout, tensor, metadata)
    assert not scales
    report.bytes_after = (directory / WEIGHTS).stat().st_size
    report.error = math.sqrt(squared_error / squares) if squares else 0.0
    config = info.config.to_hf(DTYPE_NAMES[weights.layout[info.config.family.embedding][0]])
    save_description(
        directory,
        config | {"quantization_config": quantization_config(method, info.config.family.names.head)},
        info.tokenizer_files,
        info.stop_ids,
        info.generation,
    )
    return report


def quantization_config(method: QuantizationMethod, head: str) -> dict[str, Any]:
    """`quantization_config` of config.json, for a model whose output layer is called `head`, and lm_head in
    transformers' modules whatever checkpoints call it. Without `sparsity_config`, which vLLM rejects."""
    weights = {
        "num_bits": method.bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group" if method.group else "channel",
        "group_size": method.group,
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
        "ignore": sorted({head, "lm_head"}),
        "config_groups": {"group_0": group},
    }


def pack(values: Tensor, bits: int) -> Tensor:
    """int32 words [out, ceil(in · bits / 32)] of signed values [out, in]; the inverse of `weights.unpack`."""
    rows, width = values.shape
    count = 32 // bits
    unsigned = values.to(torch.int32) + (1 << (bits - 1))
    unsigned = torch.nn.functional.pad(unsigned, (0, -width % count)).view(rows, -1, count)
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return (unsigned << shifts).sum(-1, dtype=torch.int32)

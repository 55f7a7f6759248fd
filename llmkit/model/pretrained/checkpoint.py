"""Loading and saving decoders as Hugging Face directories. Everything but the weights is directory.py's.

Only safetensors are read, and sizes are checked against the configuration before memory is allocated. Weights
are read once, straight into their memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmkit.errors import LlmkitError, unknown_name
from llmkit.model.config import ModelConfig
from llmkit.model.decoder import Decoder
from llmkit.model.family import expected_tensors, is_ignored
from llmkit.model.pretrained.adapted import AdaptedWeights
from llmkit.model.pretrained.directory import (
    WEIGHTS,
    LoadedModel,
    check_vocabulary,
    load_info,
    load_tokenizer,
    save_description,
)
from llmkit.model.pretrained.safetensors import layout_of, write_safetensors
from llmkit.model.pretrained.weights import Weights

__all__ = [
    "DTYPE_NAMES",
    "LoadedModel",
    "check_layout",
    "check_vocabulary",
    "load_for_inference",
    "load_info",
    "load_model",
    "load_tokenizer",
    "open_model",
    "open_weights",
    "save_description",
    "save_model",
]

# What torch.compile, DistributedDataParallel and PEFT put before the names of a model's weights.
WRAPPERS = ("_orig_mod.", "module.", "base_model.model.")
DTYPE_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float64: "float64"}


def load_model(
    path: str | Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> tuple[Decoder, LoadedModel]:
    """The decoder of a model directory or run, in eval mode, and the rest of the directory.

    `dtype=None` keeps the stored type (for quantised weights, that of their scales). Raises LlmkitError naming
    the first tensor that is missing, unexpected or of the wrong shape. Memory: the weights once, plus one
    tensor.
    """
    model, weights, info = open_model(path)
    state = {name: weights[name].to(device=device, dtype=dtype) for name in model.state_dict()}
    model.load_state_dict(state, assign=True)
    model.requires_grad_(True)
    return model.eval(), info


def open_model(path: str | Path) -> tuple[Decoder, Weights, LoadedModel]:
    """A decoder without values, and the weights and the rest of a model directory or run, all of them checked."""
    info = load_info(path)
    weights = open_weights(info)
    with torch.device("meta"):
        model = Decoder(info.config)
    if "tokenizer.json" in info.tokenizer_files:
        check_vocabulary(load_tokenizer(info.tokenizer_files, info.path), info.config.vocab_size, info.path)
    return model, weights, info


def load_for_inference(path: str | Path, dtype: str = "", device: str = "") -> tuple[Decoder, LoadedModel]:
    """`load_model` with a command's --dtype (fp32, bf16, fp16) and --device.

    By default the GPU if there is one, in the stored type of the embeddings; otherwise the CPU in float32, the
    fastest type there.
    """
    kinds = {"": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if dtype not in kinds:
        raise unknown_name("--dtype", dtype, [name for name in kinds if name])
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        model, info = load_model(path, kinds[dtype] or (torch.float32 if device == "cpu" else None), device)
        # One type, where norms are stored in another than matrices: products of two types are errors.
        return model.to(model.get_parameter(info.config.family.embedding).dtype), info
    except (RuntimeError, AssertionError) as error:  # the device does not exist or is out of memory
        raise LlmkitError(f"device {device!r}: {str(error).splitlines()[0]}", "see --device") from error


def open_weights(info: LoadedModel) -> Weights:
    """The weights of a model directory, not yet read, with names and shapes checked against its configuration.

    Those of adapters are merged with their model's, in its type.
    """
    if info.adapter is not None:
        open_weights(info.adapter.base)
        return AdaptedWeights(info, info.adapter)
    weights = Weights(info)
    # Before a model is built even on the meta device: a configuration may claim a billion layers.
    if info.config.parameters() > 2 * weights.stored_bytes:
        raise LlmkitError(
            f"{info.path}: config.json describes {info.config.parameters():,} weights,"
            f" the files have {weights.stored_bytes:,} bytes",
            "the directory is incomplete, or its config.json belongs to another model",
        )
    expected = expected_tensors(info.config)
    check_layout({name: shape for name, (_, shape) in weights.layout.items()}, expected, info)
    for name in expected:
        if not weights.layout[name][0].is_floating_point or weights.layout[name][0].itemsize < 2:
            raise LlmkitError(
                f"{info.path}: tensor {name} has type {weights.layout[name][0]}",
                "quantised weights need a quantization_config in config.json",
            )
    return weights


def check_layout(
    actual: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], info: LoadedModel
) -> None:
    """LlmkitError naming the tensor if the shapes of the weights do not fit the configuration."""

    def summary(names: list[str]) -> str:
        return names[0] + (f" and {len(names) - 1} more" if names[1:] else "")

    if missing := sorted(expected.keys() - actual.keys()):
        names = [name.removeprefix(f"{info.config.family.names.body}.") for name in actual]
        wrapped = next((prefix for prefix in WRAPPERS if any(name.startswith(prefix) for name in names)), "")
        hint = f"its names begin with {wrapped}: save the module inside (or merge the adapter) with its own tool"
        raise LlmkitError(
            f"{info.path}: missing tensor {summary(missing)}",
            hint if wrapped else "the directory is incomplete, or its config.json belongs to another model",
        )
    if extra := sorted(name for name in actual.keys() - expected.keys() if not is_ignored(name, info.config)):
        raise LlmkitError(
            f"{info.path}: unexpected tensor {summary(extra)}",
            f"config.json describes a {info.config.architecture} without it",
        )
    for name, shape in expected.items():
        if actual[name] != shape:
            raise LlmkitError(
                f"{info.path}: tensor {name} has shape {list(actual[name])} where config.json implies {list(shape)}",
                "the files of the directory belong to different models",
            )


def save_model(
    directory: Path,
    state_dict: Mapping[str, Tensor],
    config: ModelConfig,
    tokenizer_files: Mapping[str, str],
    lineage_json: str | None = None,
    dtype: torch.dtype | None = None,
    stop_ids: list[int] | None = None,
    generation: Mapping[str, Any] | None = None,
) -> None:
    """Write a model into `directory` (it exists; the caller makes it atomic). `dtype=None` keeps the tensors' types.

    `stop_ids` are written to generation_config.json; by default they are the configuration's eos_token_id.
    `generation` are other settings for it.
    """
    tied = config.tie_word_embeddings and config.family.head
    tensors = {name: value for name, value in state_dict.items() if name != tied}
    layout = {name: (dtype or value.dtype, tuple(value.shape)) for name, value in tensors.items()}
    metadata = {"format": "pt"} | ({"llmkit": lineage_json} if lineage_json else {})
    write_safetensors(directory / WEIGHTS, layout, lambda name: tensors[name].to(layout[name][0]), metadata)
    stored = dtype or next(iter(layout_of(tensors).values()))[0]
    save_description(directory, config.to_hf(DTYPE_NAMES[stored]), tokenizer_files, stop_ids, generation)

"""Models from and into Hugging Face directories: the decoder with its weights, and what directory.py makes of the rest.

Only safetensors are read, and sizes are checked against the configuration before memory is taken. Weights are loaded from memory-mapped files,
one copy in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from llmkit.errors import LlmkitError, unknown_name
from llmkit.model.config import ModelConfig
from llmkit.model.decoder import Decoder
from llmkit.model.family import HEAD, expected_tensors, is_ignored
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
    "open_weights",
    "save_description",
    "save_model",
]

DTYPE_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float64: "float64"}


def load_model(
    path: str | Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> tuple[Decoder, LoadedModel]:
    """The decoder of a model directory or run, in eval mode, and what the directory says beside.

    `dtype=None` keeps the stored type (of quantised weights: that of their scales). Raises LlmkitError naming the first tensor that is
    missing, unexpected or of another shape. Memory: the weights once, and one tensor more.
    """
    info = load_info(path)
    weights = open_weights(info)
    with torch.device("meta"):
        model = Decoder(info.config)
    if "tokenizer.json" in info.tokenizer_files:
        check_vocabulary(load_tokenizer(info.tokenizer_files, info.path), info.config.vocab_size, info.path)
    found = {name: weights[name].to(device=device, dtype=dtype, copy=True) for name in model.state_dict()}
    model.load_state_dict(found, assign=True)
    model.requires_grad_(True)
    return model.eval(), info


def load_for_inference(path: str | Path, dtype: str = "", device: str = "") -> tuple[Decoder, LoadedModel]:
    """`load_model` as a command's --dtype (fp32, bf16, fp16) and --device name it.

    By default on the GPU, where there is one, in the stored type; else on the CPU in float32, which is the fastest there.
    """
    kinds = {"": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if dtype not in kinds:
        raise unknown_name("--dtype", dtype, [name for name in kinds if name])
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return load_model(path, kinds[dtype] or (torch.float32 if place == "cpu" else None), place)
    except (RuntimeError, AssertionError) as error:  # what torch says of a device that is not there or is full
        raise LlmkitError(f"device {place!r}: {str(error).splitlines()[0]}", "see --device") from error


def open_weights(info: LoadedModel) -> Weights:
    """The weights of a model directory, checked by name and shape against its configuration, none read yet."""
    weights = Weights(info.path, info.quantization)
    # Before a model is built even on the meta device: a configuration may claim a billion layers.
    if info.config.parameters() > 2 * weights.stored_bytes:
        raise LlmkitError(
            f"{info.path}: config.json means {info.config.parameters():,} weights, the files hold {weights.stored_bytes:,} bytes",
            "the directory is incomplete, or its config.json is another model's",
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
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], info: LoadedModel
) -> None:
    """Refuse weights that do not fit the configuration, naming the tensor."""

    def some(names: list[str]) -> str:
        return names[0] + (f" and {len(names) - 1} more" if names[1:] else "")

    if missing := sorted(expected.keys() - found.keys()):
        raise LlmkitError(
            f"{info.path}: missing tensor {some(missing)}",
            "the directory is incomplete, or its config.json is another model's",
        )
    if extra := sorted(name for name in found.keys() - expected.keys() if not is_ignored(name, info.config)):
        raise LlmkitError(
            f"{info.path}: unexpected tensor {some(extra)}",
            f"config.json describes a {info.config.architecture} without it",
        )
    for name, shape in expected.items():
        if found[name] != shape:
            raise LlmkitError(
                f"{info.path}: tensor {name} has shape {list(found[name])} where config.json means {list(shape)}",
                "the directory's parts belong to different models",
            )


def save_model(
    directory: Path,
    state_dict: Mapping[str, Tensor],
    config: ModelConfig,
    tokenizer_files: Mapping[str, str],
    lineage_json: str | None = None,
    dtype: torch.dtype | None = None,
    stop_ids: list[int] | None = None,
) -> None:
    """Fill `directory` (it exists; the caller makes it atomic) with a model; `dtype=None` keeps the tensors' type.

    `stop_ids` go into generation_config.json; they default to the configuration's eos_token_id.
    """
    kept = {name: value for name, value in state_dict.items() if not (name == HEAD and config.tie_word_embeddings)}
    layout = {name: (dtype or value.dtype, tuple(value.shape)) for name, value in kept.items()}
    metadata = {"format": "pt"} | ({"llmkit": lineage_json} if lineage_json else {})
    write_safetensors(directory / WEIGHTS, layout, lambda name: kept[name].to(layout[name][0]), metadata)
    stored = dtype or next(iter(layout_of(kept).values()))[0]
    save_description(directory, config.to_hf(DTYPE_NAMES[stored]), tokenizer_files, stop_ids)

"""Models with trained adapters: made from a model directory, and written as PEFT's directories of adapters.

    model = load_for_adapting("base/", LoraConfig(8, 16.0, ("q_proj", "v_proj")), seed=0)
    save_adapter(directory, model.trained_state(), model.config, model.adapter, tokenizer_files)

A directory has adapter_config.json, adapter_model.safetensors (float32), the tokenizer, generation_config.json, and in
state/ where the base was, which decides nothing: the base is known by the digest of its weights.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmkit.errors import LlmkitError
from llmkit.io.record import base_name
from llmkit.io.run_layout import ADAPTER_CONFIG
from llmkit.model.config import ModelConfig
from llmkit.model.decoder import Decoder
from llmkit.model.family import linear_weights
from llmkit.model.lora.config import ADAPTER_WEIGHTS, PREFIX, LoraConfig
from llmkit.model.lora.layers import adapt
from llmkit.model.pretrained.checkpoint import open_model
from llmkit.model.pretrained.content import weights_digest
from llmkit.model.pretrained.directory import (
    BASE_DIGEST,
    BASE_PATH,
    LoadedModel,
    save_companions,
    weight_files,
    write_json,
)
from llmkit.model.pretrained.safetensors import layout_of, write_safetensors
from llmkit.model.resize import NewTokens


def load_for_adapting(path: str | Path, lora: LoraConfig, seed: int, new: NewTokens | None = None) -> Decoder:
    """The decoder of a model directory or run with new adapters, in eval mode; only these are trained.

    `new` are the tokens for which it gets rows; by default those of the adapters that it has none for. The matrices of
    its layers keep the type that they are stored in, and quantised ones stay packed; everything else is float32. Raises
    the errors of `load_model`, and LlmkitError for a directory of adapters.
    """
    model, weights, info = open_model(path)
    refuse_adapter(info, path)
    rows = info.config.vocab_size
    new = new or NewTokens(rows, [[]] * (lora.adapted(info.config, str(path)).vocab_size - rows))
    config = new.config(info.config)
    if config != info.config:
        with torch.device("meta"):
            model = Decoder(config)
    matrices = {name: weights.quantized(name) for name in linear_weights(info.config)}
    packed = {name: value for name, value in matrices.items() if value is not None}
    state = {
        name: weights[name] if name in matrices else new.tensor(name, weights[name].float(), config)
        for name in model.state_dict()
        if name not in packed
    }
    model.load_state_dict(state, assign=True, strict=not packed)
    digest = weights_digest(weight_files(info.path))
    named = replace(lora, base=base_name(str(path)), base_digest=digest, base_path=os.path.abspath(path))
    adapt(model, named, seed, packed)
    return model.eval()


def refuse_adapter(info: LoadedModel, path: str | Path) -> None:
    """Raise LlmkitError for adapters, where they would have to be trained together with their model."""
    if info.adapter is not None:
        raise LlmkitError(
            f"{path} holds adapters", "merge them into their model: llmkit average ADAPTER --merge-adapter -o MODEL"
        )


def save_adapter(
    directory: Path,
    tensors: Mapping[str, Tensor],
    config: ModelConfig,
    lora: LoraConfig,
    tokenizer_files: Mapping[str, str],
    lineage_json: str | None = None,
    stop_ids: list[int] | None = None,
    generation: Mapping[str, Any] | None = None,
) -> None:
    """Write adapters into `directory` (it exists; the caller makes it atomic).

    `tensors` are those of Decoder.trained_state().
    """
    stored = {PREFIX + name: value for name, value in tensors.items()}
    metadata = {"format": "pt", BASE_DIGEST: lora.base_digest} | ({"llmkit": lineage_json} if lineage_json else {})
    write_safetensors(directory / ADAPTER_WEIGHTS, layout_of(stored), stored.__getitem__, metadata)
    write_json(directory / ADAPTER_CONFIG, lora.to_peft(config.family.transposed(config)))
    save_companions(directory, config.to_hf(), tokenizer_files, stop_ids, generation)
    (directory / BASE_PATH).parent.mkdir(exist_ok=True)
    write_json(directory / BASE_PATH, {"path": lora.base_path})

"""Averages of models with the same architecture: uniform, weighted, exponential.

Checkpoints of one run, or models fine-tuned from one start, lie close together, and a point between them is often a little better than each
(model soups, arXiv:2203.05482; LAWA, arXiv:2306.03241). Whether it is so here, `llmkit eval` says.

Each method is a list of shares: mean ← mean + share · (θ − mean) over the models in order. With shares 1/1, 1/2, 1/3, ... that is the mean; with
wₖ / (w₁ + ... + wₖ) the weighted mean; with 1 − d after the first the exponential moving average θ̄ ← d·θ̄ + (1 − d)·θ, which favours the last.
Computed in float32, so the average of equal models is that model to the bit. Cost: every model is read once, one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from llmkit.errors import LlmkitError, UsageError, unknown_name
from llmkit.model.checkpoint import DTYPE_NAMES, LoadedModel, open_weights, save_description
from llmkit.model.decoder import expected_tensors
from llmkit.model.safetensors import write_safetensors
from llmkit.model.weights import WEIGHTS

METHODS = ("uniform", "weighted", "exponential")
# What may differ between models that are averaged: it does not change what a weight means.
FREE = ("max_position_embeddings", "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id")


def shares(method: str, count: int, weights: Sequence[float] = (), decay: float = 0.9) -> list[float]:
    """How far the running mean moves towards each of `count` models; the first share is 1 (of models with weight 0 before it, 0)."""
    if method == "uniform":
        return [1 / k for k in range(1, count + 1)]
    if method == "exponential":
        if not 0 <= decay < 1:
            raise UsageError(f"--decay {decay} is not between 0 and 1", "0.9 is usual")
        return [1.0] + [1 - decay] * (count - 1)
    if method != "weighted":
        raise unknown_name("method", method, METHODS)
    if len(weights) != count:
        raise UsageError(f"{len(weights)} weights for {count} models", "give one weight a model: --weights 1,1,2")
    total, result = 0.0, []
    for weight in weights:
        if not 0 <= weight < float("inf"):
            raise UsageError(f"weight {weight} is not a number from 0 up", "weights are relative: 1,1,2")
        total += weight
        result.append(weight / total if total else 0.0)
    if not total:
        raise UsageError("all weights are 0", "weights are relative: 1,1,2")
    return result


def check_alike(models: Sequence[LoadedModel]) -> None:
    """Refuse models whose weights do not mean the same: another architecture or size, another tokenizer. Names the first difference."""
    first = models[0]
    for other in models[1:]:
        before, now = asdict(first.config), asdict(other.config)
        for field in before:
            if field not in FREE and before[field] != now[field]:
                raise LlmkitError(
                    f"{other.path}: {field} is {now[field]!r}, in {first.path} it is {before[field]!r}",
                    "only models of one architecture and size can be averaged",
                )
        texts = [model.tokenizer_files.get("tokenizer.json") for model in (first, other)]
        if None not in texts and texts[0] != texts[1]:
            raise LlmkitError(
                f"{other.path}: another tokenizer than in {first.path}", "their embeddings do not correspond"
            )


def write_average(
    models: Sequence[LoadedModel],
    parts: Sequence[float],
    directory: Path,
    lineage_json: str | None = None,
    advance: Callable[[int], None] | None = None,
) -> None:
    """Fill `directory` (it exists; the caller makes it atomic) with the average; `parts` are the `shares`.

    Configuration, tokenizer and type of the weights are the first model's. `advance` hears of each tensor's number of weights.
    """
    check_alike(models)
    assert len(parts) == len(models)
    opened = [open_weights(model) for model in models]
    layout = {name: opened[0].layout[name] for name in expected_tensors(models[0].config)}

    def mean(name: str) -> torch.Tensor:
        result = torch.zeros(layout[name][1])
        for weights, share in zip(opened, parts, strict=True):
            result.lerp_(weights[name].float(), share)
        if advance:
            advance(result.numel())
        return result.to(layout[name][0])

    metadata = {"format": "pt"} | ({"llmkit": lineage_json} if lineage_json else {})
    write_safetensors(directory / WEIGHTS, layout, mean, metadata)
    dtype = DTYPE_NAMES[layout["model.embed_tokens.weight"][0]]
    save_description(directory, models[0].config.to_hf(dtype), models[0].tokenizer_files, models[0].stop_ids)

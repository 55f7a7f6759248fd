"""Rows for new tokens: a model directory with a larger vocabulary, written tensor by tensor.

The row of a new token, in the embedding and in the output layer, is the mean of the rows of the old tokens that it stands for (Gee et al., EMNLP
2022 industry track, "Fast Vocabulary Transfer"), computed in float32 and stored in the model's type; a reserved token without pieces gets the mean of
all rows, with which it takes little probability from the others (Hewitt 2021). Old rows are copied, so that for the same ids the logits of the old ids
are the same. The vocabulary never shrinks: rows that a model has beyond its tokenizer are used first.

    llmkit vocab extend tok/ domain.jsonl.zst --add 1k --model base/ -o bigger/

Memory: the two largest tensors, old and new.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from llmkit.errors import LlmkitError
from llmkit.model.family import EMBEDDING, HEAD, expected_tensors
from llmkit.model.pretrained.checkpoint import DTYPE_NAMES, LoadedModel, open_weights, save_description
from llmkit.model.pretrained.directory import WEIGHTS
from llmkit.model.pretrained.safetensors import write_safetensors
from llmkit.shards.tokenizer_info import TokenizerInfo, parse_tokenizer


def check_match(info: LoadedModel, tokenizer: TokenizerInfo, name: str) -> None:
    """Refuse a model whose rows do not mean this tokenizer's ids, and quantised weights, whose rows cannot be averaged."""
    if info.quantization is not None:
        raise LlmkitError(f"{info.path}: its weights are quantised", "extend the model as it was before")
    if tokenizer.vocab_size > info.config.vocab_size:
        raise LlmkitError(
            f"{name} has {tokenizer.vocab_size:,} tokens, {info.path} only {info.config.vocab_size:,} rows",
            "they belong to different models",
        )
    if "tokenizer.json" in info.tokenizer_files:
        own = parse_tokenizer(info.tokenizer_files, str(info.path))
        if own.digest != tokenizer.digest:
            raise LlmkitError(
                f"{name}: not the tokenizer of {info.path}", f"name the model's own: llmkit vocab extend {info.path}"
            )


def rows_for(old: Tensor, first: int, pieces: Sequence[Sequence[int]], rows: int) -> Tensor:
    """[rows, D] from `old` [R, D]: the id `first + i` gets the mean of the rows `pieces[i]`, of all below `first` where it has none."""
    new = torch.empty(rows, old.shape[1], dtype=old.dtype)
    mean = old[:first].float().mean(0)
    new[:] = mean
    new[: len(old)] = old
    for i, ids in enumerate(pieces, first):
        new[i] = old[list(ids)].float().mean(0) if ids else mean
    return new


def write_resized(
    info: LoadedModel,
    first: int,
    pieces: Sequence[Sequence[int]],
    directory: Path,
    tokenizer_files: Mapping[str, str],
    lineage_json: str | None = None,
    advance: Callable[[int], None] | None = None,
) -> int:
    """Fill `directory` (it exists; the caller makes it atomic) with the model for ids up to `first + len(pieces)`; returns its rows."""
    weights = open_weights(info)
    rows = max(info.config.vocab_size, first + len(pieces))
    config = info.config.with_vocabulary(rows)
    layout = {name: (weights.layout[name][0], shape) for name, shape in expected_tensors(config).items()}

    def tensor(name: str) -> Tensor:
        value = weights[name]
        if name in (EMBEDDING, HEAD):
            value = rows_for(value, first, pieces, rows)
        if advance:
            advance(value.numel())
        return value

    metadata = {"format": "pt"} | ({"llmkit": lineage_json} if lineage_json else {})
    write_safetensors(directory / WEIGHTS, layout, tensor, metadata)
    save_description(directory, config.to_hf(DTYPE_NAMES[layout[EMBEDDING][0]]), tokenizer_files, info.stop_ids)
    return rows

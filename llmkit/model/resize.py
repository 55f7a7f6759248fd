"""A larger vocabulary for a model: a copy of its directory with rows for new tokens, written tensor by tensor.

In the embedding and the output layer, the row of a new token is the mean of the rows of the old tokens that
spell it (Gee et al., EMNLP 2022 industry track, "Fast Vocabulary Transfer"), computed in float32 and stored in
the model's type. A reserved token, which has no pieces, gets the mean of all rows, so that it takes little
probability from the others (Hewitt 2021). Old rows are copied, so the logits of old ids do not change for texts
of old ids. The vocabulary never shrinks: rows beyond the tokenizer's size are used first.

    llmkit vocab extend tok/ domain.jsonl.zst --add 1k --model base/ -o bigger/

Memory: the largest tensor, old and new.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from llmkit.errors import LlmkitError
from llmkit.model.family import expected_tensors
from llmkit.model.pretrained.checkpoint import DTYPE_NAMES, LoadedModel, open_weights, save_description
from llmkit.model.pretrained.directory import WEIGHTS
from llmkit.model.pretrained.safetensors import write_safetensors
from llmkit.shards.tokenizer_info import TokenizerInfo, parse_tokenizer


def check_match(info: LoadedModel, tokenizer: TokenizerInfo, name: str) -> None:
    """LlmkitError if the model belongs to another tokenizer, or has quantised weights, whose rows cannot be
    averaged."""
    if info.quantization is not None:
        raise LlmkitError(f"{info.path}: its weights are quantised", "extend the original model")
    if tokenizer.vocab_size > info.config.vocab_size:
        raise LlmkitError(
            f"{name} has {tokenizer.vocab_size:,} tokens, {info.path} has only {info.config.vocab_size:,} rows",
            "they belong to different models",
        )
    files = info.tokenizer_files
    if "tokenizer.json" in files and parse_tokenizer(files, str(info.path)).digest != tokenizer.digest:
        raise LlmkitError(
            f"{name}: not the tokenizer of {info.path}", f"use the model's own: llmkit vocab extend {info.path}"
        )


def rows_for(old: Tensor, first: int, pieces: Sequence[Sequence[int]], rows: int) -> Tensor:
    """[rows, D] from `old` [R, D]: row `first + i` is the mean of the rows `pieces[i]`, or of all rows below
    `first` if it has no pieces."""
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
    """Write the model for ids below `first + len(pieces)` into `directory` (it exists; the caller makes it
    atomic); returns its number of rows."""
    weights = open_weights(info)
    rows = max(info.config.vocab_size, first + len(pieces))
    config = info.config.with_vocabulary(rows)
    layout = {name: (weights.layout[name][0], shape) for name, shape in expected_tensors(config).items()}

    def tensor(name: str) -> Tensor:
        value = weights[name]
        if name in (config.family.embedding, config.family.head):
            value = rows_for(value, first, pieces, rows)
        if advance:
            advance(value.numel())
        return value

    metadata = {"format": "pt"} | ({"llmkit": lineage_json} if lineage_json else {})
    write_safetensors(directory / WEIGHTS, layout, tensor, metadata)
    dtype = DTYPE_NAMES[layout[config.family.embedding][0]]
    save_description(directory, config.to_hf(dtype), tokenizer_files, info.stop_ids, info.generation)
    return rows

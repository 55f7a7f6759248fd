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
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llmkit.errors import LlmkitError
from llmkit.model.config import ModelConfig
from llmkit.model.decoder import Decoder
from llmkit.model.family import expected_tensors
from llmkit.model.pretrained.checkpoint import DTYPE_NAMES, LoadedModel, load_model, open_weights, save_description
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


@dataclass(frozen=True, slots=True)
class NewTokens:
    """Tokens for which a model gets rows: ids from `first` on, and for each the ids of the old tokens that spell it."""

    first: int
    pieces: Sequence[Sequence[int]] = ()

    @classmethod
    def of(cls, rows: int, first: int, pieces: Sequence[Sequence[int]]) -> NewTokens:
        """For a model of so many rows; tokens that had none already, before `first`, get the mean of all rows."""
        return cls(min(rows, first), [[]] * (first - rows) + [*pieces])

    @property
    def ids(self) -> range:
        return range(self.first, self.first + len(self.pieces))

    def config(self, config: ModelConfig) -> ModelConfig:
        """The configuration with rows for all tokens."""
        return config.with_vocabulary(max(config.vocab_size, self.ids.stop if self.pieces else 0))

    def tensor(self, name: str, old: Tensor, config: ModelConfig) -> Tensor:
        """A tensor of the model as that of `config` has it: with other rows if it is the embedding or output layer."""
        if not self.pieces or name not in (config.family.embedding, config.family.head):
            return old
        return rows_for(old, self.first, self.pieces, config.vocab_size)


def load_resized(path: str | Path, new: NewTokens) -> Decoder:
    """The decoder of a model directory in float32 with rows for new tokens, in eval mode. Raises as load_model does."""
    model, info = load_model(path, torch.float32)
    if not new.pieces:
        return model
    config = new.config(info.config)
    state = {name: new.tensor(name, tensor, config) for name, tensor in model.state_dict().items()}
    with torch.device("meta"):
        model = Decoder(config)
    model.load_state_dict(state, assign=True)
    model.requires_grad_(True)
    return model.eval()


def rows_for(old: Tensor, first: int, pieces: Sequence[Sequence[int]], rows: int) -> Tensor:
    """[rows, D] from `old` [R, D]: row `first + i` is the mean of the rows `pieces[i]`, or of all rows below
    `first` if it has no pieces, or one that has no row itself."""
    new = torch.empty(rows, old.shape[1], dtype=old.dtype)
    mean = old[:first].float().mean(0)
    new[:] = mean
    new[: len(old)] = old
    for i, ids in enumerate(pieces, first):
        new[i] = old[list(ids)].float().mean(0) if ids and max(ids) < len(old) else mean
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

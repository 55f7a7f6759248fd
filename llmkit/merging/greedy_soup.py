"""Greedy soup: select the models to average by held-out loss (Wortsman et al., arXiv:2203.05482, recipe 1).

The models are tried from best to worst by their own held-out loss. Each joins the uniform average of those
selected before, unless that makes the average worse. So on the held-out data the result is never worse than the
best single model; that data is no longer a test set.

Cost: k single models and up to k − 1 averages are evaluated, each built from the files in their stored
precision. Memory: one float32 model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from llmkit.errors import LlmkitError, UsageError
from llmkit.merging.methods import merged_blocks, resolve_merge
from llmkit.merging.streams import ModelSet
from llmkit.model.decoder import Decoder
from llmkit.model.pretrained.checkpoint import open_weights
from llmkit.model.pretrained.directory import LoadedModel
from llmkit.model.pretrained.streamed import from_float32, to_float32
from llmkit.training.data import Source
from llmkit.training.objectives import next_token

MAX_SEQUENCE = 2048  # tokens per sequence of held-out shards: a model may claim a context of a million


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether model `index` was kept, given its own loss and that of the average with it."""

    index: int
    loss: float
    average_loss: float
    kept: bool


def greedy_soup(count: int, loss: Callable[[list[int]], float]) -> list[Decision]:
    """Decisions in the order in which the models are tried. `loss` is the held-out loss of the uniform average
    of some models.

    Models of equal loss are tried in their given order.
    """
    alone = [loss([i]) for i in range(count)]
    selected: list[int] = []
    best, decisions = math.inf, []
    for index in sorted(range(count), key=lambda i: alone[i]):
        average_loss = loss([*selected, index]) if selected else alone[index]
        kept = average_loss <= best
        decisions.append(Decision(index, alone[index], average_loss, kept))
        if kept:
            selected.append(index)
            best = average_loss
    return decisions


def are_shards(paths: Sequence[str]) -> bool:
    """Whether held-out paths are token shards; if not, they are documents. UsageError if they are mixed."""
    shards = [Path(path).suffix == ".arrow" or any(Path(path).glob("*.arrow")) for path in paths]
    if any(shards) and not all(shards):
        raise UsageError("--heldout names shards and documents", "give one kind")
    return all(shards)


def average_loss(models: Sequence[LoadedModel], evaluate: Callable[[Decoder], float]) -> float:
    """The loss of the uniform average of `models`, on a GPU if there is one; `evaluate` computes it for a
    decoder.
    """
    return evaluate(averaged_decoder(models, torch.device("cuda" if torch.cuda.is_available() else "cpu")))


def averaged_decoder(models: Sequence[LoadedModel], device: torch.device) -> Decoder:
    """The uniform average of models as a float32 decoder, rounded as it would be if stored."""
    open_weights(models[0])  # reports weights that do not fit the configuration
    with torch.device("meta"):
        decoder = Decoder(models[0].config)
    merge, state = resolve_merge("uniform", len(models)), {}
    with ModelSet(models, digesting=False) as opened:
        for name, value in decoder.state_dict().items():
            flat, position = np.empty(value.numel(), np.float32), 0
            for block in merged_blocks(opened, name, merge):
                dtype = opened.layout[name].dtype
                to_float32(from_float32(block, dtype), dtype, flat[position : position + len(block)])
                position += len(block)
            state[name] = torch.from_numpy(flat).view(value.shape)
    decoder.load_state_dict(state, assign=True)
    return decoder.to(device).eval()


def heldout_loss(model: Decoder, source: Source, rows: int = 8) -> float:
    """Mean loss over a held-out source, `rows` rows per batch; LlmkitError if it is not finite."""
    scale, total, count = 1.0 / max(source.weight(0), 1e-9), 0.0, source.rows(0)
    device = next(model.parameters()).device
    with torch.no_grad():
        for start in range(0, count, rows):
            batch = source.batch(0, start, min(start + rows, count)).to(device)
            total += float(next_token(model, batch, scale)[0])
    if not math.isfinite(total):
        raise LlmkitError(f"a held-out loss is {total}", "leave out the model whose training failed")
    return total

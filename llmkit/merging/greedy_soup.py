"""Greedy soup: which of several models to average, by held-out loss (Wortsman et al., arXiv:2203.05482, recipe 1).

The models are taken from the best to the worst by their own held-out loss; each joins the uniform average of those chosen before if that does
not get worse by it. So the result is never worse on the held-out data than the best single model; they are not a test set any more.

Cost: k models alone and k − 1 averages are evaluated, each built from the files in their stored precision; memory is one model in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from llmkit.errors import LlmkitError
from llmkit.merging.average import Opened, choose
from llmkit.model.decoder import Decoder
from llmkit.model.pretrained.checkpoint import open_weights
from llmkit.model.pretrained.directory import LoadedModel
from llmkit.model.pretrained.streamed import from_float32, to_float32
from llmkit.training.data import Source
from llmkit.training.objectives import next_token


@dataclass(frozen=True, slots=True)
class Decision:
    """What became of model `index`: its own loss, that of the average with it, and whether it stayed."""

    index: int
    loss: float
    together: float
    kept: bool


def greedy_soup(count: int, loss: Callable[[list[int]], float]) -> list[Decision]:
    """Decisions in the order in which they fall. `loss` is the held-out loss of the uniform average of some models; equal ones keep their order."""
    alone = [loss([i]) for i in range(count)]
    chosen: list[int] = []
    best, decisions = math.inf, []
    for index in sorted(range(count), key=lambda i: alone[i]):
        together = loss([*chosen, index]) if chosen else alone[index]
        kept = together <= best
        decisions.append(Decision(index, alone[index], together, kept))
        if kept:
            chosen.append(index)
            best = together
    return decisions


def averaged_decoder(models: Sequence[LoadedModel], device: torch.device) -> Decoder:
    """The uniform average of models as a decoder in float32, with the rounding that storing it has."""
    open_weights(models[0])  # which names what does not fit the configuration
    with torch.device("meta"):
        decoder = Decoder(models[0].config)
    merge, state = choose("uniform", len(models)), {}
    with Opened(models, digesting=False) as opened:
        for name, value in decoder.state_dict().items():
            flat, at = np.empty(value.numel(), np.float32), 0
            for block in opened.blocks(name, merge):
                kind = opened.layout[name].dtype
                to_float32(from_float32(block, kind), kind, flat[at : at + len(block)])
                at += len(block)
            state[name] = torch.from_numpy(flat).view(value.shape)
    decoder.load_state_dict(state, assign=True)
    return decoder.to(device).eval()


def heldout_loss(model: Decoder, source: Source, rows: int = 8) -> float:
    """Mean loss over a held-out source, so many rows at once; LlmkitError where it is not finite."""
    scale, total, count = 1.0 / max(source.weight(0), 1e-9), 0.0, source.rows(0)
    device = next(model.parameters()).device
    with torch.no_grad():
        for start in range(0, count, rows):
            batch = source.batch(0, start, min(start + rows, count)).to(device)
            total += float(next_token(model, batch, scale)[0])
    if not math.isfinite(total):
        raise LlmkitError(f"a held-out loss is {total}", "leave out the model whose training failed")
    return total

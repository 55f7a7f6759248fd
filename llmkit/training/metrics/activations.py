"""Activation statistics: one forward pass over a few tokens of the step's batch, without gradients and separate
from the training.

    activation_statistics(model, source, step, processes)
    # {"activation_max": 41.2, "activation_max_layer": 3, "entropy": 2.9, ...}

It reads the first row, cut to 256 tokens and to a sixteenth of the step, so that it costs less than 2 % of
one step. Queries and keys are recomputed from each layer's input, in a block of at most heads × tokens ×
tokens. Every process reads the same tokens, since a sharded model needs all of them to take part.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llmkit.model.modules import Attention
from llmkit.model.rope import Rotation
from llmkit.training.data import Source
from llmkit.training.distributed.processes import Processes

MAX_TOKENS = 256
MIN_TOKENS = 16
LOGIT_ROWS = 32  # rows of logits in memory at once


@torch.no_grad()
def activation_statistics(model: Any, source: Source, step: int, processes: Processes) -> dict[str, float]:
    """Maxima of residual stream and attention logits over the layers, entropy and accuracy of the prediction
    (see curves.py)."""
    batch = source.batch(step, 0, 1)
    rows, length = source.rows(step), batch.input_ids.shape[1]
    length = min(length, MAX_TOKENS, max(MIN_TOKENS, rows * length // 16))

    def cut(tensor: Tensor) -> Tensor:
        return tensor[:1, :length].to(processes.device)

    ids, targets, weights = cut(batch.input_ids), cut(batch.targets), cut(batch.weights)
    documents = None if batch.document_ids is None else cut(batch.document_ids)
    masked = torch.ones(length, length, dtype=torch.bool, device=ids.device).triu(1)
    if documents is not None:
        masked = masked | (documents[0][:, None] != documents[0][None, :])

    activations: list[Tensor] = []
    logits: list[Tensor] = []

    def record_activation(module: Any, arguments: Any, out: Tensor) -> None:
        activations.append(out.abs().amax().float())

    def record_logit(module: Any, arguments: Any, *, masked: Tensor) -> None:
        logits.append(attention_logit_max(module, arguments[0], arguments[1].rotation, masked))

    hooks = [layer.register_forward_hook(record_activation) for layer in model.layers]
    hooks += [
        module.register_forward_pre_hook(partial(record_logit, masked=masked))
        for layer in model.layers
        for module in layer.modules()
        if isinstance(module, Attention)
    ]
    try:
        with processes.accelerator.autocast(), eager_mode():
            hidden = model.hidden(ids, document_ids=documents)
            index = weights.flatten().nonzero().squeeze(1)
            entropy, correct = torch.zeros(2, dtype=torch.float64, device=ids.device)
            for chunk in index.split(LOGIT_ROWS):
                log_p = torch.log_softmax(model.logits(hidden.flatten(0, 1)[chunk]).float(), 1)
                entropy -= (log_p.exp() * log_p).sum()
                correct += (log_p.argmax(1) == targets.flatten()[chunk]).sum()
    finally:
        for hook in hooks:
            hook.remove()
        processes.layout.reshard(model)
    metrics: dict[str, float] = {}
    for name, maxima in (("activation_max", activations), ("attention_logit_max", logits)):
        if maxima:
            by_layer = torch.stack(maxima)
            metrics |= {name: float(by_layer.max()), f"{name}_layer": int(by_layer.argmax())}
    if len(index):
        metrics |= {"entropy": float(entropy / len(index)), "token_accuracy": float(correct / len(index))}
    return metrics


def attention_logit_max(attention: Attention, x_BTD: Tensor, rotation: Rotation | None, masked_TT: Tensor) -> Tensor:
    """The largest scaled q·k, before a soft cap, of an attention layer with input `x_BTD`, over the pairs that are not
    masked."""
    q_BTHK, k_BTGK, _ = attention.heads(x_BTD, rotation)
    k_BTHK = k_BTGK.repeat_interleave(q_BTHK.shape[2] // k_BTGK.shape[2], 2)
    logits_BHTT = torch.einsum("bthk,bshk->bhts", q_BTHK, k_BTHK).float() * attention.scale
    return logits_BHTT.masked_fill(masked_TT, -torch.inf).amax()


def eager_mode() -> AbstractContextManager[Any]:
    """For passes beside the training: compiled blocks would be recompiled for their shapes, and would ignore hooks."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()

"""A look inside the model: one forward pass over a few tokens of the step's batch, without gradients and beside the training.

    probe(model, source, step, processes)  ->  {"activation_max": 41.2, "activation_max_layer": 3, "entropy": 2.9, ...}

It reads the first row, cut to 256 tokens and to a sixteenth of the step, so that its cost stays below 2 % of one step. Queries and keys are
computed again from each layer's input, a block of heads × tokens × tokens at most. Every process looks at the same tokens, as a sharded model
needs all of them to take part.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llmkit.model.modules import Attention
from llmkit.training.data import Source
from llmkit.training.distributed.processes import Processes

TOKENS = 256
FEWEST = 16
LOGIT_ROWS = 32  # rows of logits held at once


@torch.no_grad()
def probe(model: Any, source: Source, step: int, processes: Processes) -> dict[str, float]:
    """Maxima of residual stream and attention logits over the layers, entropy and accuracy of the prediction (see curves.py)."""
    batch = source.batch(step, 0, 1)
    rows, length = source.rows(step), batch.input_ids.shape[1]
    length = min(length, TOKENS, max(FEWEST, rows * length // 16))

    def cut(tensor: Tensor) -> Tensor:
        return tensor[:1, :length].to(processes.device)

    ids, targets, weights = cut(batch.input_ids), cut(batch.targets), cut(batch.weights)
    documents = None if batch.document_ids is None else cut(batch.document_ids)
    apart = torch.ones(length, length, dtype=torch.bool, device=ids.device).triu(1)
    if documents is not None:
        apart = apart | (documents[0][:, None] != documents[0][None, :])

    activations: list[Tensor] = []
    logits: list[Tensor] = []

    def stream(module: Any, arguments: Any, out: Tensor) -> None:
        activations.append(out.abs().amax().float())

    def attention(module: Any, arguments: Any, *, apart: Tensor) -> None:
        # What the layers of a pass share: the rotation, alone or with more.
        logits.append(attention_logit_max(module, arguments[0], getattr(arguments[1], "rotation", arguments[1]), apart))

    hooks = [layer.register_forward_hook(stream) for layer in model.model.layers]
    hooks += [
        module.register_forward_pre_hook(partial(attention, apart=apart))
        for layer in model.model.layers
        for module in layer.modules()
        if isinstance(module, Attention)
    ]
    try:
        with processes.accelerator.autocast(), eagerly():
            hidden = model.hidden(ids, document_ids=documents)
            index = weights.flatten().nonzero().squeeze(1)
            entropy, right = torch.zeros(2, dtype=torch.float64, device=ids.device)
            for part in index.split(LOGIT_ROWS):
                log_p = torch.log_softmax(model.logits(hidden.flatten(0, 1)[part]).float(), 1)
                entropy -= (log_p.exp() * log_p).sum()
                right += (log_p.argmax(1) == targets.flatten()[part]).sum()
    finally:
        for hook in hooks:
            hook.remove()
        processes.layout.reshard(model)
    figures: dict[str, float] = {}
    for name, found in (("activation_max", activations), ("attention_logit_max", logits)):
        if found:
            values = torch.stack(found)
            figures |= {name: float(values.max()), f"{name}_layer": int(values.argmax())}
    if len(index):
        figures |= {"entropy": float(entropy / len(index)), "token_accuracy": float(right / len(index))}
    return figures


def attention_logit_max(
    attention: Attention, x_BTD: Tensor, rotation: tuple[Tensor, Tensor], apart_TT: Tensor
) -> Tensor:
    """The largest q·k / √d of an attention layer with input `x_BTD`, over the pairs that may see each other (not `apart_TT`)."""
    q_BTHK, k_BTGK = attention.rotated_heads(attention.q_proj(x_BTD), attention.k_proj(x_BTD), rotation)
    k_BTHK = k_BTGK.repeat_interleave(q_BTHK.shape[2] // k_BTGK.shape[2], 2)
    logits_BHTT = torch.einsum("bthk,bshk->bhts", q_BTHK, k_BTHK).float() / attention.head_dim**0.5
    return logits_BHTT.masked_fill(apart_TT, -torch.inf).amax()


def eagerly() -> AbstractContextManager[Any]:
    """For passes beside the training: compiled blocks would be compiled once more for their shapes, and ignore hooks."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()

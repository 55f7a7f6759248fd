"""Products of one input with several frozen matrices and their adapters, forward and backward, on the CPU.

One product with all matrices A, products with B added in place, and no gradient of a frozen matrix: 2 + 2 products of
the size of a layer's in both passes together, beside those with rank r. Kept for the backward pass are the input, its
products with A, and with DoRA the outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from llmkit.model.lora.layers import FrozenLinear


class _Products(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layers: Sequence[FrozenLinear], *adapters: Tensor | None) -> tuple[Tensor, ...]:
        flat = x.detach().reshape(-1, x.shape[-1])
        down = [a for a in adapters[::3] if a is not None]
        low = flat @ torch.cat(down).T if down else flat.new_empty(0)
        outputs, kept, start = [], [], 0
        for layer, a, b, factors in zip(layers, adapters[::3], adapters[1::3], adapters[2::3], strict=True):
            weight = layer.dense(flat.dtype).T
            plain = layer.bias is None or factors is not None
            y = flat @ weight if plain else torch.addmm(layer.bias, flat, weight)
            if a is not None and b is not None:
                y.addmm_(low[:, start : start + len(a)], b.T, alpha=layer.scale)
                start += len(a)
            if factors is not None:
                kept.append(y)
                y = y * factors if layer.bias is None else torch.addcmul(layer.bias, y, factors)
            outputs.append(y.view(*x.shape[:-1], -1))
        ctx.layers = layers
        ctx.save_for_backward(flat if down else None, low, *adapters, *kept)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (flat, low, *rest), count = ctx.saved_tensors, 3 * len(ctx.layers)
        adapters, kept = rest[:count], iter(rest[count:])
        dx: Tensor | None = None
        dlow, start = torch.empty_like(low), 0
        found: list[Tensor | None] = []
        for layer, grad, a, b, factors in zip(
            ctx.layers, grads, adapters[::3], adapters[1::3], adapters[2::3], strict=True
        ):
            g, db, dfactors = grad.reshape(-1, grad.shape[-1]), None, None
            if factors is not None:
                dfactors = (g * next(kept)).sum(0)
                g = g * factors
            if ctx.needs_input_grad[0]:
                weight = layer.dense(g.dtype)
                dx = g @ weight if dx is None else dx.addmm_(g, weight)
            if a is not None:
                part = slice(start, start + len(a))
                torch.mul(g @ b, layer.scale, out=dlow[:, part])
                db = (g.T @ low[:, part]).mul_(layer.scale)
                start += len(a)
            found += [None, db, dfactors]
        if start:
            down = [a for a in adapters[::3] if a is not None]
            da = iter((dlow.T @ flat).split([len(a) for a in down]))
            found[::3] = [None if a is None else next(da) for a in adapters[::3]]
            if dx is not None:
                dx.addmm_(dlow, torch.cat(down))
        return None if dx is None else dx.view(*grads[0].shape[:-1], -1), None, *found


def products(x: Tensor, layers: Sequence[FrozenLinear]) -> Sequence[Tensor]:
    """[..., out] of x float32 [..., in] for each layer."""
    adapters: list[Tensor | None] = []
    for layer in layers:
        if layer.has_adapter:
            factors = layer.factors(layer.dense(x.dtype)) if layer.has_magnitude else None
            adapters += [layer.lora_A["weight"], layer.lora_B["weight"], factors]
        else:
            adapters += [None, None, None]
    outputs: Sequence[Tensor] = _Products.apply(x, tuple(layers), *adapters)
    return outputs

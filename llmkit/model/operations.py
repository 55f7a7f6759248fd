"""The operations of a decoder other than its matrix products, in plain torch: norms, rotary embedding,
attention, activations.

Faster implementations of the same interface replace them where they apply: model/fused.py on the CPU,
model/runtime.py on a GPU. Norms and the angles of the rotary embedding are computed in float32, as in the
reference implementation. Shape suffixes are those of decoder.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmkit.model.kv_cache import KeyValueCache
from llmkit.model.rope import Rotation

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


class Operations:
    """Plain implementations, which work on every device, in every type and with every mask."""

    def prepare(
        self, x_BTD: Tensor, document_ids: Tensor | None, cache: KeyValueCache | None, window: int | None
    ) -> tuple[Operations, Any]:
        """The operations to use in this forward pass, and the `mask` for their `attend`; called once for all layers
        of one window. `document_ids` [B, S] are those of cached tokens too."""
        return PLAIN, attention_mask(x_BTD, document_ids, cache.length if cache is not None else 0, window)

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """RMSNorm: x / rms(x) · weight over the last dimension (arXiv:1910.07467)."""
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
        return weight * x32.to(x.dtype)

    def project(self, x: Tensor, matrices: Sequence[nn.Module]) -> Sequence[Tensor]:
        """The product of x with the matrix of each linear layer, an nn.Linear or lora.layers.FrozenLinear."""
        return [matrix(x) for matrix in matrices]

    def rotate(self, x_BTHK: Tensor, rotation: Rotation) -> Tensor:
        """The rotary embedding of the first dimensions of each head (arXiv:2104.09864)."""
        cos, sin = rotation.cos.unsqueeze(-2), rotation.sin.unsqueeze(-2)
        x, rest = x_BTHK[..., : cos.shape[-1]], x_BTHK[..., cos.shape[-1] :]
        if rotation.adjacent:
            half = cos.shape[-1] // 2
            first, second = x[..., ::2], x[..., 1::2]
            cos, sin = cos[..., :half], sin[..., :half]
            turned = torch.stack([first * cos - second * sin, second * cos + first * sin], -1).flatten(-2)
        else:
            first, second = x.chunk(2, -1)
            turned = x * cos + torch.cat([-second, first], -1) * sin
        turned = turned.to(x_BTHK.dtype)
        return torch.cat([turned, rest], -1) if rest.shape[-1] else turned

    def attend(
        self, q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, mask: Any, scale: float, softcap: float | None
    ) -> Tensor:
        """softmax(scale · q · kᵀ) · v over the keys that the mask allows, [B, T, H, K]; with a `softcap` c the scores
        are c · tanh(score / c)."""
        allowed, causal = mask
        q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BSGK, v_BSGK))
        share = q.shape[1] // k.shape[1]
        if share > 1 and (softcap or (allowed is not None and q.is_cuda)):  # fused kernels with a mask know no groups
            k, v, share = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1), 1
        if softcap:
            if allowed is None and causal:
                allowed = q.new_ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
            scores = torch.tanh(q @ k.transpose(2, 3) * scale / softcap) * softcap
            if allowed is not None:
                scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
            out = torch.softmax(scores, -1, dtype=torch.float32).to(v.dtype) @ v
        else:
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=allowed, is_causal=causal, scale=scale, enable_gqa=share > 1
            )
        return out.transpose(1, 2)

    def activate(self, activation: str, x: Tensor) -> Tensor:
        """activation(x)."""
        return ACTIVATIONS[activation](x)

    def gated(self, activation: str, gate: Tensor, up: Tensor) -> Tensor:
        """activation(gate) · up (arXiv:2002.05202)."""
        return ACTIVATIONS[activation](gate) * up


PLAIN = Operations()


def attention_mask(
    x_BTD: Tensor, document_ids: Tensor | None, past: int, window: int | None
) -> tuple[Tensor | None, bool]:
    """(mask [B, 1, T, S] or [T, S] or None, whether attention is plainly causal) for a forward pass over x."""
    t = x_BTD.shape[1]
    slides = window is not None and past + t > window
    if document_ids is None and not slides:
        if past == 0:
            return None, t > 1
        if t == 1:
            return None, False
    order = torch.arange(past + t, device=x_BTD.device)
    mask_TS = order[past:, None] >= order[None, :]
    if slides:
        assert window is not None
        mask_TS &= order[past:, None] - order[None, :] < window
    if document_ids is None:
        return mask_TS, False
    same_BTS = document_ids[:, past:, None] == document_ids[:, None, :]
    return (same_BTS & mask_TS)[:, None], False

"""The operations of a decoder other than its matrix products, in plain torch: norms, rotary embedding,
attention, SwiGLU.

Faster implementations of the same interface replace them where they apply: model/fused.py on the CPU,
model/runtime.py on a GPU. Norms and the angles of the rotary embedding are computed in float32, as in the
reference implementation. Shape suffixes are those of decoder.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmkit.model.config import ModelConfig
from llmkit.model.kv_cache import KeyValueCache


class Operations:
    """Plain implementations, which work on every device, in every type and with every mask."""

    def prepare(
        self, x_BTD: Tensor, document_ids: Tensor | None, cache: KeyValueCache | None
    ) -> tuple[Operations, Any]:
        """The operations to use in this forward pass, and the `mask` for their `attend`; called once for all layers."""
        return PLAIN, attention_mask(x_BTD, document_ids, cache)

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """RMSNorm: x / rms(x) · weight over the last dimension (arXiv:1910.07467)."""
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
        return weight * x32.to(x.dtype)

    def project(self, x: Tensor, matrices: Sequence[nn.Linear]) -> Sequence[Tensor]:
        """The product of x with each matrix."""
        return [matrix(x) for matrix in matrices]

    def rotate(self, x_BTHK: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """Rotary embedding; dimension i is paired with i + K/2 (Hugging Face's convention; arXiv:2104.09864)."""
        cos, sin = (part.unsqueeze(-2) for part in rotation)
        first, second = x_BTHK.chunk(2, -1)
        return (x_BTHK * cos + torch.cat([-second, first], -1) * sin).to(x_BTHK.dtype)

    def attend(self, q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, mask: Any) -> Tensor:
        """softmax(q · kᵀ / √K) · v over the keys that the mask allows, [B, T, H, K]."""
        allowed, causal = mask
        q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BSGK, v_BSGK))
        share = q.shape[1] // k.shape[1]
        if share > 1 and allowed is not None and q.is_cuda:  # fused kernels with a mask do not support groups
            k, v, share = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1), 1
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, is_causal=causal, enable_gqa=share > 1)
        return out.transpose(1, 2)

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        """silu(gate) · up (arXiv:2002.05202)."""
        return F.silu(gate) * up


PLAIN = Operations()


def attention_mask(
    x_BTD: Tensor, document_ids: Tensor | None, cache: KeyValueCache | None
) -> tuple[Tensor | None, bool]:
    """(mask [B, 1, T, S] or [T, S] or None, whether attention is plainly causal) for a forward pass over x."""
    t, past = x_BTD.shape[1], cache.length if cache is not None else 0
    if cache is not None and document_ids is not None:
        if cache.document_ids is not None:
            document_ids = torch.cat([cache.document_ids, document_ids], 1)
        cache.document_ids = document_ids
    if document_ids is None:
        if past == 0:
            return None, t > 1
        if t == 1:
            return None, False
    order = torch.arange(past + t, device=x_BTD.device)
    mask_TS = order[past:, None] >= order[None, :]
    if document_ids is None:
        return mask_TS, False
    same_BTS = document_ids[:, past:, None] == document_ids[:, None, :]
    return (same_BTS & mask_TS)[:, None], False


def rotation_angles(config: ModelConfig, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotary embedding, [T, K] or [B, T, K], at `positions` [T] or [B, T]."""
    frequencies = inverse_frequencies(config).to(positions.device)
    angles = positions.float()[..., None] * frequencies
    angles = torch.cat([angles, angles], -1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """Rotary frequencies [K/2], float32, in radians per token, with `rope_scaling` applied.

    Computed in float32 in the reference implementation's order of operations: one unit in the last place here
    is 1e-4 rad at token 2,000.
    """
    base = 1.0 / (
        config.rope_theta ** (torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim)
    )
    scaling = config.rope_scaling
    if scaling is None:
        return base
    factor = float(scaling["factor"])
    if scaling["rope_type"] == "linear":
        return base / factor
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    old = float(scaling["original_max_position_embeddings"])
    # Llama 3.1: short wavelengths are kept, long ones stretched, those in between interpolated.
    wavelength = 2 * math.pi / base
    smooth = ((old / wavelength - low) / (high - low)).clamp(0, 1)
    return (1 - smooth) * base / factor + smooth * base

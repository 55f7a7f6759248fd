"""Torch modules of the decoder's layers, with parameters named as in Hugging Face's checkpoints.
model/blocks.py describes and builds them.

Shape suffixes are those of decoder.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmkit.model.config import ModelConfig
from llmkit.model.kv_cache import KeyValueCache
from llmkit.model.operations import PLAIN, Operations


class RMSNorm(nn.Module):
    """RMSNorm with gains. With `float32_gain` they are applied before the result is cast back to the type of `x`."""

    def __init__(self, width: int, eps: float, float32_gain: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps, self.float32_gain = eps, float32_gain

    def forward(self, x: Tensor, operations: Operations = PLAIN) -> Tensor:
        if self.float32_gain:
            return operations.norm(x.float(), self.weight.float(), self.eps).to(x.dtype)
        return operations.norm(x, self.weight, self.eps)


@dataclass(slots=True)
class Pass:
    """What all layers of one forward pass share."""

    operations: Operations
    rotation: tuple[Tensor, Tensor]  # cos and sin, [T, K] or [B, T, K]
    mask: Any
    cache: KeyValueCache | None


class Attention(nn.Module):
    """Grouped-query attention with rotary positions. `norms` normalise queries and keys before the rotation:
    each "head", or the full "width" of all heads, as `qk_norm` says."""

    def __init__(
        self,
        width: int,
        heads: int,
        key_value_heads: int,
        head_dim: int,
        bias: bool,
        qk_norm: str | None,
        norms: Sequence[nn.Module],
    ) -> None:
        super().__init__()
        self.head_dim, self.qk_norm = head_dim, qk_norm
        self.q_proj = nn.Linear(width, heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(width, key_value_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(width, key_value_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(heads * head_dim, width, bias=bias)
        if qk_norm:
            self.q_norm, self.k_norm = norms

    def forward(self, x_BTD: Tensor, shared: Pass, layer: int) -> Tensor:
        b, t, _ = x_BTD.shape
        operations = shared.operations
        q, k, v = operations.project(x_BTD, (self.q_proj, self.k_proj, self.v_proj))
        q_BTHK, k_BTGK = self.rotated_heads(q, k, shared.rotation, operations)
        v_BTGK = v.view(b, t, -1, self.head_dim)
        if shared.cache is not None:
            k_BTGK, v_BTGK = shared.cache.extend(layer, k_BTGK, v_BTGK)
        return self.o_proj(operations.attend(q_BTHK, k_BTGK, v_BTGK, shared.mask).reshape(b, t, -1))

    def rotated_heads(
        self, q: Tensor, k: Tensor, rotation: tuple[Tensor, Tensor], operations: Operations = PLAIN
    ) -> tuple[Tensor, Tensor]:
        """Queries [B, T, H, K] and keys [B, T, G, K] as attention compares them, from the projections [B, T,
        H·K] and [B, T, G·K]."""
        if self.qk_norm == "width":
            q, k = self.q_norm(q, operations), self.k_norm(k, operations)
        q_BTHK, k_BTGK = (x.view(*x.shape[:2], -1, self.head_dim) for x in (q, k))
        if self.qk_norm == "head":
            q_BTHK, k_BTGK = self.q_norm(q_BTHK, operations), self.k_norm(k_BTGK, operations)
        return operations.rotate(q_BTHK, rotation), operations.rotate(k_BTGK, rotation)


class MLP(nn.Module):
    """SwiGLU between matrices: down(silu(gate(x)) · up(x))."""

    def __init__(self, width: int, hidden: int, *, bias: bool) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=bias)
        self.up_proj = nn.Linear(width, hidden, bias=bias)
        self.down_proj = nn.Linear(hidden, width, bias=bias)

    def forward(self, x_BTD: Tensor, operations: Operations) -> Tensor:
        return self.down_proj(operations.swiglu(*operations.project(x_BTD, (self.gate_proj, self.up_proj))))


class Layer(nn.Module):
    """The parts of the architecture's block as torch modules, combined by its `forward`."""

    def __init__(self, config: ModelConfig, number: int) -> None:
        super().__init__()
        block = config.family.block
        for name, part in block.parts(config, number).items():
            self.add_module(name, part.build())
        self._combine = block.forward

    def forward(self, x_BTD: Tensor, shared: Pass, layer: int) -> Tensor:
        output: Tensor = self._combine(self, x_BTD, shared, layer)
        return output

"""Torch modules of the decoder's layers, with parameters named as in Hugging Face's checkpoints.
model/blocks.py describes and builds them.

Shape suffixes are those of decoder.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmkit.model.config import ModelConfig
from llmkit.model.kv_cache import KeyValueCache
from llmkit.model.operations import PLAIN, Operations
from llmkit.model.rope import Rotation


class RMSNorm(nn.Module):
    """RMSNorm with gains. With `float32_gain` they are applied before the result is cast back to the type of `x`;
    with `offset` they are added to 1."""

    def __init__(self, width: int, eps: float, float32_gain: bool = False, offset: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width) if offset else torch.ones(width))
        self.eps, self.float32_gain, self.offset = eps, float32_gain, offset

    def forward(self, x: Tensor, operations: Operations = PLAIN) -> Tensor:
        if self.float32_gain:
            gain = self.weight.float()
            return operations.norm(x.float(), 1 + gain if self.offset else gain, self.eps).to(x.dtype)
        return operations.norm(x, 1 + self.weight if self.offset else self.weight, self.eps)


class LayerNorm(nn.Module):
    """LayerNorm with gains and, optionally, a bias, in float32."""

    def __init__(self, width: int, eps: float, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None
        self.eps = eps

    def forward(self, x: Tensor, operations: Operations = PLAIN) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        return F.layer_norm(x.float(), self.weight.shape, self.weight.float(), bias, self.eps).to(x.dtype)


class TransposedLinear(nn.Linear):
    """A linear layer whose matrix is stored [in, out], as in GPT-2's checkpoints."""

    def __init__(self, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__(inputs, outputs, bias)
        self.weight = nn.Parameter(self.weight.detach().T.contiguous())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.T, self.bias)


@dataclass(slots=True)
class Pass:
    """What layers of one kind share in one forward pass: those with the same rotary embedding and window."""

    operations: Operations
    rotation: Rotation | None
    mask: Any
    cache: KeyValueCache | None
    residual_scale: float = 1.0
    parallel: bool = False


class Attention(nn.Module):
    """What an AttentionSpec (model/blocks.py) describes."""

    def __init__(self, spec: Any) -> None:
        super().__init__()
        self.head_dim, self.qk_norm, self.qkv = spec.head_dim, spec.qk_norm, spec.qkv
        self.scale, self.softcap = spec.scale, spec.softcap
        self.sizes = [spec.heads * spec.head_dim] + 2 * [spec.key_value_heads * spec.head_dim]
        self.matrices = [name for name, *_ in spec.matrices()]
        kind = TransposedLinear if spec.transposed else nn.Linear
        for name, outputs, inputs, bias in spec.matrices():
            self.add_module(name, kind(inputs, outputs, bias))
        if spec.qk_norm:
            self.q_norm, self.k_norm = (norm.build() for norm in spec.norms())

    def forward(self, x_BTD: Tensor, shared: Pass, layer: int) -> Tensor:
        b, t, _ = x_BTD.shape
        operations = shared.operations
        q_BTHK, k_BTGK, v_BTGK = self.heads(x_BTD, shared.rotation, operations)
        if shared.cache is not None:
            k_BTGK, v_BTGK = shared.cache.extend(layer, k_BTGK, v_BTGK)
        out_BTHK = operations.attend(q_BTHK, k_BTGK, v_BTGK, shared.mask, self.scale, self.softcap)
        return operations.project(out_BTHK.reshape(b, t, -1), [getattr(self, self.matrices[-1])])[0]

    def heads(
        self, x_BTD: Tensor, rotation: Rotation | None, operations: Operations = PLAIN
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, T, H, K], keys and values [B, T, G, K], as attention takes them."""
        inner = operations.project(x_BTD, [getattr(self, name) for name in self.matrices[:-1]])
        if self.qkv == "by head":
            q_BTHK, k_BTGK, v_BTGK = inner[0].unflatten(-1, (-1, 3 * self.head_dim)).chunk(3, -1)
        else:
            q, k, v = inner if self.qkv == "separate" else inner[0].split(self.sizes, -1)
            if self.qk_norm == "width":
                q, k = self.q_norm(q, operations), self.k_norm(k, operations)
            q_BTHK, k_BTGK, v_BTGK = (x.unflatten(-1, (-1, self.head_dim)) for x in (q, k, v))
        if self.qk_norm == "head":
            q_BTHK, k_BTGK = self.q_norm(q_BTHK, operations), self.k_norm(k_BTGK, operations)
        if rotation is not None:
            q_BTHK, k_BTGK = operations.rotate(q_BTHK, rotation), operations.rotate(k_BTGK, rotation)
        return q_BTHK, k_BTGK, v_BTGK


class XIELU(nn.Module):
    """xIELU (arXiv:2411.13010): αp x² + βx for x > 0, else αn (e^min(x, eps) − 1 − x) + βx, with trained αp and αn."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha_p, self.alpha_n = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
        self.beta, self.eps = nn.Buffer(torch.tensor(0.5)), nn.Buffer(torch.tensor(-1e-6))

    def forward(self, x: Tensor) -> Tensor:
        alpha_p, alpha_n = F.softplus(self.alpha_p), self.beta + F.softplus(self.alpha_n)
        positive = alpha_p * x * x + self.beta * x
        return torch.where(x > 0, positive, (torch.expm1(torch.min(x, self.eps)) - x) * alpha_n + self.beta * x)


class MLP(nn.Module):
    """What an MLPSpec (model/blocks.py) describes."""

    def __init__(self, spec: Any) -> None:
        super().__init__()
        self.activation, self.gated, self.joined = spec.activation, spec.gated, bool(spec.joined)
        self.matrices = [name for name, *_ in spec.matrices()]
        kind = TransposedLinear if spec.transposed else nn.Linear
        for name, outputs, inputs in spec.matrices():
            self.add_module(name, kind(inputs, outputs, spec.bias))
        if spec.activation == "xielu":
            self.act_fn = XIELU()

    def forward(self, x_BTD: Tensor, operations: Operations) -> Tensor:
        *inner, down = (getattr(self, name) for name in self.matrices)
        products = operations.project(x_BTD, inner)
        if self.joined:
            products = products[0].chunk(2, -1)
        if self.activation == "xielu":
            active = self.act_fn(products[0]) * products[1] if self.gated else self.act_fn(products[0])
        elif self.gated:
            active = operations.gated(self.activation, *products)
        else:
            active = operations.activate(self.activation, products[0])
        return operations.project(active, [down])[0]


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

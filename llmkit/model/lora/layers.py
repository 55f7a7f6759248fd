"""Linear layers with frozen weights and trained low-rank adapters (model/lora/config.py), in place of a decoder's own.

    adapt(model, lora, seed=0)                   # in place: only the adapters require gradients now
    model.trained_state()                        # {"model.layers.0.self_attn.q_proj.lora_A.weight": ..., ...}

Frozen matrices keep the type in which they are stored, and quantised ones stay packed: a pass converts one layer at a
time, which costs 1/(tokens of the pass) of its product. Names of parameters are those of PEFT's files after the prefix.
The plain operations are here; model/lora/products.py has the faster ones of a CPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmkit.model.decoder import Decoder
from llmkit.model.initial import initial
from llmkit.model.lora.config import LoraConfig
from llmkit.model.lora.tokens import TokenTable
from llmkit.model.modules import TransposedLinear
from llmkit.seeds import derive


class FrozenLinear(nn.Module):
    """A linear layer [out, in] that is not trained, with an adapter or without one.

    `packed` holds the weights in another form (a weights.Quantized), in place of a parameter.
    """

    weight: Tensor | None
    squares: Tensor

    def __init__(self, linear: nn.Linear, packed: Any = None) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.transposed = isinstance(linear, TransposedLinear)
        self.weight = None if packed else linear.weight
        self.bias = linear.bias
        self.packed = packed
        self.scale = 0.0
        self.has_adapter = self.has_magnitude = False

    def adapt(self, a: Tensor, scale: float, magnitude: bool) -> None:
        """Add an adapter with the matrix A [r, in], B = 0 and, for DoRA, the norms of the rows as magnitudes."""
        self.scale, self.has_adapter, self.has_magnitude = scale, True, magnitude
        self.lora_A = nn.ParameterDict({"weight": nn.Parameter(a)})
        self.lora_B = nn.ParameterDict({"weight": nn.Parameter(a.new_zeros(self.out_features, len(a)))})
        if magnitude:
            norms = torch.linalg.vector_norm(self.dense(torch.float32), dim=1)
            self.register_buffer("squares", norms.square(), persistent=False)
            self.lora_magnitude_vector = nn.Parameter(norms)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        if self.packed is not None:  # not a buffer: moved, but neither stored nor converted
            self.packed = self.packed.apply(lambda tensor: tensor.to(fn(tensor).device))
        return super()._apply(fn, recurse)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The frozen matrix [out, in], perhaps a view."""
        weight = self.packed.dense() if self.weight is None else self.weight
        return (weight.T if self.transposed else weight).to(dtype)

    def factors(self, weight: Tensor) -> Tensor | None:
        """DoRA's factors [out] of the rows of W + scale · B A: magnitude / norm, the norm without a gradient.

        The squared norms are |W|² + 2 scale · B (A Wᵀ) + scale² · B (A Aᵀ) Bᵀ by rows, without a matrix [out, in].
        """
        if not self.has_magnitude:
            return None
        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            a, b = self.lora_A["weight"].to(weight.dtype), self.lora_B["weight"].to(weight.dtype) * self.scale
            squares = self.squares + (b * (2 * (weight @ a.T) + b @ (a @ a.T))).sum(1)
            norms = squares.clamp(min=1e-30).sqrt()
        return self.lora_magnitude_vector / norms

    def forward(self, x: Tensor) -> Tensor:
        weight = self.dense(x.dtype)
        if not self.has_adapter:
            return F.linear(x, weight, self.bias)
        low = F.linear(F.linear(x, self.lora_A["weight"]), self.lora_B["weight"])
        y = F.linear(x, weight) + self.scale * low
        factors = self.factors(weight)
        y = y if factors is None else y * factors.to(y.dtype)
        return y if self.bias is None else y + self.bias


def adapt(model: Decoder, lora: LoraConfig, seed: int, packed: Mapping[str, Any] | None = None) -> None:
    """Freeze a decoder in place and add the adapters; `packed` are the matrices of layers by the weight's name.

    The initial values depend on the seed and the name of each layer alone.
    """
    model.adapter = lora
    model.requires_grad_(False)
    scales = {module: lora.scale_of(module) for module, *_ in lora.modules(model.config)}
    for name, module in list(model.layers.named_modules(prefix=model.config.family.layers.removesuffix("."))):
        if not isinstance(module, nn.Linear):
            continue
        frozen = FrozenLinear(module, (packed or {}).get(f"{name}.weight"))
        if name in scales:
            frozen.adapt(_initial_a(model, name, lora.rank_of(name), frozen.in_features, seed), scales[name], lora.dora)
        _replace(model, name, frozen)
    for name, ids in lora.tables(model.config).items():
        _replace(model, name, TokenTable(model.get_parameter(f"{name}.weight"), ids))


def _replace(model: Decoder, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _initial_a(model: Decoder, module: str, rank: int, inputs: int, seed: int) -> Tensor:
    name = f"{module}.lora_A.weight"
    generator = torch.Generator().manual_seed(derive(seed, "lora", name))
    return (torch.rand(rank, inputs, generator=generator) * 2 - 1) * initial(model.config, name, 2).bound

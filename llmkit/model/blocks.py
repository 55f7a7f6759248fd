"""The parts of a transformer block, described without torch: tensors, sizes, and how a block combines them.

    block = PreNormBlock(qk_norm="head")
    parts = block.parts(config, layer=0)        # {"input_layernorm": NormSpec(96, 1e-6), "self_attn": ..., ...}
    parts["mlp"].parameters()                   # {"gate_proj.weight": Parameter((256, 96), "linear", "mlp"), ...}
    parts["mlp"].build()                        # modules.MLP, a torch module with these parameters

An architecture names a block: one of those here, or a class of its own with the same two methods. Parameter
counts, expected tensors, initialisation, optimizer groups, quantisation and the memory estimate all follow from
the parts, so a configuration can be checked and planned without loading torch. A part of a new kind needs the
three methods of `Part`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from llmkit.model.config import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor, nn

Kind = Literal["linear", "gain", "bias", "embedding", "head"]
QKNorm = Literal["head", "width"] | None


@dataclass(frozen=True, slots=True)
class Parameter:
    """One tensor: its shape, what it does, and the group under which metrics report it (training/metrics/curves.py)."""

    shape: tuple[int, ...]
    kind: Kind
    group: str
    to_residual: bool = False  # a matrix whose product is added to the residual stream


class Part(Protocol):
    """One child of a block: a norm, attention, a feed-forward network."""

    def parameters(self) -> dict[str, Parameter]:
        """Parameters by name within the part, in the order of the torch module's."""

    def activation_elements(self) -> tuple[int, int]:
        """Elements per token that are kept for the backward pass: in float32, and in the type of the matrix
        products."""

    def build(self) -> nn.Module:
        """The torch module."""


class Block(Protocol):
    """How one layer of the decoder is composed. The same object serves all layers, and holds no tensors."""

    def parts(self, config: ModelConfig, layer: int) -> dict[str, Part]:
        """The layer's parts by their names in Hugging Face's checkpoints, in the order in which they are
        initialised."""

    def forward(self, modules: Any, x_BTD: Tensor, shared: Any, layer: int) -> Tensor:
        """The layer's output. `modules` has the built parts as attributes; `shared` is the forward pass's
        (modules.Pass)."""


@dataclass(frozen=True, slots=True)
class NormSpec:
    """RMSNorm over `width` elements. With `float32_gain` the gain is applied before the result is cast back to
    the input's type."""

    width: int
    eps: float
    float32_gain: bool = False

    def parameters(self) -> dict[str, Parameter]:
        return {"weight": Parameter((self.width,), "gain", "norms")}

    def activation_elements(self) -> tuple[int, int]:
        return 3 * self.width, 0  # the input, what is scaled, and the output

    def build(self) -> nn.Module:
        from llmkit.model.modules import RMSNorm

        return RMSNorm(self.width, self.eps, self.float32_gain)


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """Grouped-query attention with rotary positions. `qk_norm` is the RMSNorm of queries and keys before the
    rotation: over each head, over the full width before heads are split, or none. `float32_gain` is that of the
    norm."""

    width: int
    heads: int
    key_value_heads: int
    head_dim: int
    bias: bool
    qk_norm: QKNorm
    eps: float
    float32_gain: bool = False

    @classmethod
    def from_config(cls, config: ModelConfig, qk_norm: QKNorm = None, float32_gain: bool = False) -> AttentionSpec:
        return cls(
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            config.attention_bias,
            qk_norm,
            config.rms_norm_eps,
            float32_gain,
        )

    def parameters(self) -> dict[str, Parameter]:
        d, q, kv = self.width, self.heads * self.head_dim, self.key_value_heads * self.head_dim
        parameters: dict[str, Parameter] = {}
        for name, rows, columns in (("q_proj", q, d), ("k_proj", kv, d), ("v_proj", kv, d), ("o_proj", d, q)):
            parameters |= _linear(name, rows, columns, self.bias, "attention", to_residual=name == "o_proj")
        for name, norm in zip(("q_norm", "k_norm"), self.norms(), strict=False):
            parameters[f"{name}.weight"] = norm.parameters()["weight"]
        return parameters

    def norms(self) -> list[NormSpec]:
        """Of queries and of keys; empty without qk_norm."""
        if self.qk_norm is None:
            return []
        heads = (self.heads, self.key_value_heads) if self.qk_norm == "width" else (1, 1)
        return [NormSpec(count * self.head_dim, self.eps, self.float32_gain) for count in heads]

    def activation_elements(self) -> tuple[int, int]:
        q, kv = self.heads * self.head_dim, self.key_value_heads * self.head_dim
        # Queries, keys and values, and the output of attention (twice).
        return 2 * (q + kv) if self.qk_norm else 0, 3 * q + 2 * kv

    def build(self) -> nn.Module:
        from llmkit.model.modules import Attention

        norms = [norm.build() for norm in self.norms()]
        return Attention(self.width, self.heads, self.key_value_heads, self.head_dim, self.bias, self.qk_norm, norms)


@dataclass(frozen=True, slots=True)
class GatedMLPSpec:
    """SwiGLU: down(silu(gate(x)) · up(x)) with `hidden` elements between (arXiv:2002.05202)."""

    width: int
    hidden: int
    bias: bool

    @classmethod
    def from_config(cls, config: ModelConfig) -> GatedMLPSpec:
        return cls(config.hidden_size, config.intermediate_size, config.mlp_bias)

    def parameters(self) -> dict[str, Parameter]:
        d, f = self.width, self.hidden
        parameters: dict[str, Parameter] = {}
        for name, rows, columns in (("gate_proj", f, d), ("up_proj", f, d), ("down_proj", d, f)):
            parameters |= _linear(name, rows, columns, self.bias, "mlp", to_residual=name == "down_proj")
        return parameters

    def activation_elements(self) -> tuple[int, int]:
        return 0, 4 * self.hidden  # the gate, its SiLU, up, and their product

    def build(self) -> nn.Module:
        from llmkit.model.modules import MLP

        return MLP(self.width, self.hidden, bias=self.bias)


@dataclass(frozen=True, slots=True)
class PreNormBlock:
    """x + attention(norm(x)), then x + mlp(norm(x)) (arXiv:2002.04745)."""

    qk_norm: QKNorm = None

    def parts(self, config: ModelConfig, layer: int) -> dict[str, Part]:
        norm = NormSpec(config.hidden_size, config.rms_norm_eps)
        return {
            "input_layernorm": norm,
            "self_attn": AttentionSpec.from_config(config, self.qk_norm),
            "post_attention_layernorm": norm,
            "mlp": GatedMLPSpec.from_config(config),
        }

    def forward(self, modules: Any, x_BTD: Tensor, shared: Any, layer: int) -> Tensor:
        operations = shared.operations
        x_BTD = x_BTD + modules.self_attn(modules.input_layernorm(x_BTD, operations), shared, layer)
        return x_BTD + modules.mlp(modules.post_attention_layernorm(x_BTD, operations), operations)


def _linear(name: str, rows: int, columns: int, bias: bool, group: str, *, to_residual: bool) -> dict[str, Parameter]:
    """The parameters of a linear layer, weights [rows, columns]."""
    parameters = {f"{name}.weight": Parameter((rows, columns), "linear", group, to_residual)}
    return parameters | ({f"{name}.bias": Parameter((rows,), "bias", group)} if bias else {})

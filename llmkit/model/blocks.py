"""The parts of a transformer block, described without torch: tensors, sizes, and how a block combines them.

    block = ResidualBlock(attention=partial(AttentionSpec.from_config, qk_norm="head"))
    parts = block.parts(config, layer=0)        # {"input_layernorm": NormSpec(96, 1e-6), "self_attn": ..., ...}
    parts["mlp"].parameters()                   # {"gate_proj.weight": Parameter((256, 96), "linear", "mlp"), ...}
    parts["mlp"].build()                        # modules.MLP, a torch module with these parameters

An architecture names a block: one of those here, or a class of its own with the same two methods. Parameter
counts, expected tensors, initialisation, optimizer groups, quantisation and the memory estimate all follow from
the parts, so a configuration can be checked and planned without loading torch. A part of a new kind needs the
three methods of `Part`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

from llmkit.model.config import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor, nn

Kind = Literal["linear", "gain", "bias", "embedding", "head", "constant", "lora_A", "lora_B", "magnitude", "tokens"]
QKNorm = Literal["head", "width"] | None
QKV = Literal["separate", "joined", "by head"]


@dataclass(frozen=True, slots=True)
class Parameter:
    """One tensor: its shape, what it does, and the group under which metrics report it (training/metrics/curves.py).

    A "constant" is stored, but neither trained nor counted. `initial` is the value of a new model's, by default 1 for
    gains and 0 for biases; matrices are drawn (model/initial.py).
    """

    shape: tuple[int, ...]
    kind: Kind
    group: str
    to_residual: bool = False  # a matrix whose product is added to the residual stream
    initial: float | None = None


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
    the input's type. With `offset` the stored gain is what is added to 1."""

    width: int
    eps: float
    float32_gain: bool = False
    offset: bool = False

    @classmethod
    def from_config(cls, config: ModelConfig, **changes: Any) -> NormSpec:
        return cls(config.hidden_size, config.rms_norm_eps, **changes)

    def parameters(self) -> dict[str, Parameter]:
        return {"weight": Parameter((self.width,), "gain", "norms", initial=0.0 if self.offset else 1.0)}

    def activation_elements(self) -> tuple[int, int]:
        return 3 * self.width, 0  # the input, what is scaled, and the output

    def build(self) -> nn.Module:
        from llmkit.model.modules import RMSNorm

        return RMSNorm(self.width, self.eps, self.float32_gain, self.offset)


@dataclass(frozen=True, slots=True)
class LayerNormSpec:
    """LayerNorm (arXiv:1607.06450) over `width` elements, with or without a bias."""

    width: int
    eps: float
    bias: bool = True

    @classmethod
    def from_config(cls, config: ModelConfig, **changes: Any) -> LayerNormSpec:
        return cls(config.hidden_size, config.rms_norm_eps, **changes)

    def parameters(self) -> dict[str, Parameter]:
        parameters = {"weight": Parameter((self.width,), "gain", "norms")}
        return parameters | ({"bias": Parameter((self.width,), "bias", "norms")} if self.bias else {})

    def activation_elements(self) -> tuple[int, int]:
        return 3 * self.width, 0

    def build(self) -> nn.Module:
        from llmkit.model.modules import LayerNorm

        return LayerNorm(self.width, self.eps, self.bias)


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """Grouped-query attention; the layer's rotary embedding and window are the family's.

    `qk_norm` is the RMSNorm of queries and keys before the rotation: over each head, over the full width before heads
    are split, or none; `float32_gain` and `offset` are that norm's. `scale` multiplies the products of queries and
    keys, and `softcap` c limits the result to c · tanh(x / c). Matrices of queries, keys and values are separate,
    joined in this order under the name `joined`, or joined "by head", so that each head has its three neighbours.
    With `transposed`, matrices are stored [in, out].
    """

    width: int
    heads: int
    key_value_heads: int
    head_dim: int
    bias: bool
    output_bias: bool
    eps: float
    scale: float
    softcap: float | None = None
    qk_norm: QKNorm = None
    float32_gain: bool = False
    offset: bool = False
    qkv: QKV = "separate"
    joined: str = "qkv_proj"
    output: str = "o_proj"
    transposed: bool = False

    @classmethod
    def from_config(cls, config: ModelConfig, layer: int, **changes: Any) -> AttentionSpec:
        spec = cls(
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            config.attention_bias,
            config.attention_bias,
            config.rms_norm_eps,
            config.head_dim**-0.5,
        )
        return replace(spec, **changes) if changes else spec

    def matrices(self) -> list[tuple[str, int, int, bool]]:
        """(name, outputs, inputs, whether it has a bias) of each matrix, the one into the residual stream last."""
        d, q, kv = self.width, self.heads * self.head_dim, self.key_value_heads * self.head_dim
        if self.qkv == "separate":
            inner = [("q_proj", q, d, self.bias), ("k_proj", kv, d, self.bias), ("v_proj", kv, d, self.bias)]
        else:
            inner = [(self.joined, q + 2 * kv, d, self.bias)]
        return [*inner, (self.output, d, q, self.output_bias)]

    def parameters(self) -> dict[str, Parameter]:
        parameters: dict[str, Parameter] = {}
        for name, rows, columns, bias in self.matrices():
            parameters |= _linear(
                name, rows, columns, bias, "attention", to_residual=name == self.output, transposed=self.transposed
            )
        for name, norm in zip(("q_norm", "k_norm"), self.norms(), strict=False):
            parameters[f"{name}.weight"] = norm.parameters()["weight"]
        return parameters

    def norms(self) -> list[NormSpec]:
        """Of queries and of keys; empty without qk_norm."""
        if self.qk_norm is None:
            return []
        heads = (self.heads, self.key_value_heads) if self.qk_norm == "width" else (1, 1)
        return [NormSpec(count * self.head_dim, self.eps, self.float32_gain, self.offset) for count in heads]

    def activation_elements(self) -> tuple[int, int]:
        q, kv = self.heads * self.head_dim, self.key_value_heads * self.head_dim
        # Queries, keys and values, and the output of attention (twice).
        return 2 * (q + kv) if self.qk_norm else 0, 3 * q + 2 * kv

    def build(self) -> nn.Module:
        from llmkit.model.modules import Attention

        return Attention(self)


@dataclass(frozen=True, slots=True)
class MLPSpec:
    """A feed-forward network with `hidden` elements between its matrices: down(f(gate(x)) · up(x)) (SwiGLU and
    GeGLU, arXiv:2002.05202), or down(f(up(x))) where it is not `gated`.

    `activation` is f (model/operations.py). `names` are those of the matrices: gate, up and down; with `joined` gate
    and up are one matrix of that name, in this order. With `transposed`, matrices are stored [in, out].
    """

    width: int
    hidden: int
    bias: bool
    activation: str = "silu"
    gated: bool = True
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    joined: str = ""
    transposed: bool = False

    @classmethod
    def from_config(cls, config: ModelConfig, layer: int, **changes: Any) -> MLPSpec:
        spec = cls(config.hidden_size, config.intermediate_size, config.mlp_bias, config.activation)
        return replace(spec, **changes) if changes else spec

    def matrices(self) -> list[tuple[str, int, int]]:
        """(name, outputs, inputs) of each matrix, the one into the residual stream last."""
        d, f, (gate, up, down) = self.width, self.hidden, self.names
        if self.joined:
            inner = [(self.joined, 2 * f, d)]
        else:
            inner = [(gate, f, d)] * self.gated + [(up, f, d)]
        return [*inner, (down, d, f)]

    def parameters(self) -> dict[str, Parameter]:
        parameters: dict[str, Parameter] = {}
        for name, rows, columns in self.matrices():
            parameters |= _linear(
                name, rows, columns, self.bias, "mlp", to_residual=name == self.names[2], transposed=self.transposed
            )
        if self.activation == "xielu":  # its shape is trained
            parameters |= {
                "act_fn.alpha_p": Parameter((1,), "gain", "mlp", initial=math.log(math.expm1(0.8))),
                "act_fn.alpha_n": Parameter((1,), "gain", "mlp", initial=math.log(math.expm1(0.3))),
                "act_fn.beta": Parameter((), "constant", "mlp"),
                "act_fn.eps": Parameter((), "constant", "mlp"),
            }
        return parameters

    def activation_elements(self) -> tuple[int, int]:
        return 0, (4 if self.gated else 2) * self.hidden  # the gate, its activation, up, and their product

    def build(self) -> nn.Module:
        from llmkit.model.modules import MLP

        return MLP(self)


@dataclass(frozen=True, slots=True)
class ResidualBlock:
    """Attention and a feed-forward network, each added to the residual stream: x + after(attention(before(x))), then
    the same with the network (arXiv:2002.04745 for the norms before).

    The fields give the parts of a layer, their names in checkpoints, and the norms: before attention, after it, before
    the network, after it; "" for none. In a `parallel` family both read the same x; without a norm of its own the
    network then reads what attention does. What each adds is multiplied by the family's residual_scale.
    """

    attention: Callable[[ModelConfig, int], Part] = AttentionSpec.from_config
    mlp: Callable[[ModelConfig, int], Part] = MLPSpec.from_config
    norm: Callable[[ModelConfig], Part] = NormSpec.from_config
    norms: tuple[str, str, str, str] = ("input_layernorm", "", "post_attention_layernorm", "")
    names: tuple[str, str] = ("self_attn", "mlp")

    def parts(self, config: ModelConfig, layer: int) -> dict[str, Part]:
        norm, (before, after, before_mlp, after_mlp) = self.norm(config), self.norms
        parts = {
            before: norm,
            self.names[0]: self.attention(config, layer),
            before_mlp: norm,
            self.names[1]: self.mlp(config, layer),
            after: norm,
            after_mlp: norm,
        }
        parts.pop("", None)
        return parts

    def forward(self, modules: Any, x_BTD: Tensor, shared: Any, layer: int) -> Tensor:
        operations, scale = shared.operations, shared.residual_scale
        before, after, before_mlp, after_mlp = self.norms

        def normed(name: str, x: Tensor) -> Tensor:
            result: Tensor = getattr(modules, name)(x, operations) if name else x
            return result

        read = normed(before, x_BTD)
        attended = normed(after, getattr(modules, self.names[0])(read, shared, layer))
        attended = attended * scale if scale != 1 else attended
        mlp = getattr(modules, self.names[1])
        if shared.parallel:
            read = normed(before_mlp, x_BTD) if before_mlp else read
            return x_BTD + attended + mlp(read, operations) * scale
        x_BTD = x_BTD + attended
        added = normed(after_mlp, mlp(normed(before_mlp, x_BTD), operations))
        return x_BTD + (added * scale if scale != 1 else added)


def _linear(
    name: str, rows: int, columns: int, bias: bool, group: str, *, to_residual: bool, transposed: bool
) -> dict[str, Parameter]:
    """The parameters of a linear layer, weights [rows, columns]."""
    shape = (columns, rows) if transposed else (rows, columns)
    parameters = {f"{name}.weight": Parameter(shape, "linear", group, to_residual)}
    return parameters | ({f"{name}.bias": Parameter((rows,), "bias", group)} if bias else {})

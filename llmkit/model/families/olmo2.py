"""OLMo 2 (arXiv:2501.00656): norms on the outputs of attention and MLP instead of their inputs, and on all
queries and keys before heads are split. In half precision, norms apply their gains and the rotary embedding is
computed in float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmkit.model.blocks import AttentionSpec, GatedMLPSpec, NormSpec, Part
from llmkit.model.config import ModelConfig
from llmkit.model.families import ARCHITECTURES
from llmkit.model.family import Family

if TYPE_CHECKING:
    from torch import Tensor


class ReorderedNormBlock:
    """x + norm(attention(x)), then x + norm(mlp(x))."""

    def parts(self, config: ModelConfig, layer: int) -> dict[str, Part]:
        norm = NormSpec(config.hidden_size, config.rms_norm_eps, float32_gain=True)
        return {
            "self_attn": AttentionSpec.from_config(config, qk_norm="width", float32_gain=True),
            "mlp": GatedMLPSpec.from_config(config),
            "post_attention_layernorm": norm,
            "post_feedforward_layernorm": norm,
        }

    def forward(self, modules: Any, x_BTD: Tensor, shared: Any, layer: int) -> Tensor:
        operations = shared.operations
        x_BTD = x_BTD + modules.post_attention_layernorm(modules.self_attn(x_BTD, shared, layer), operations)
        return x_BTD + modules.post_feedforward_layernorm(modules.mlp(x_BTD, operations), operations)


ARCHITECTURES.register("olmo2")(
    Family(
        "Olmo2ForCausalLM",
        ReorderedNormBlock(),
        defaults={"rms_norm_eps": 1e-5},
        unsupported=("mlp_bias",),
        float32_gain=True,
        float32_rotation=True,
    )
)

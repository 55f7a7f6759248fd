"""ERNIE 4.5, dense models: Llama's block with one switch for all biases and a rotary embedding of neighbouring pairs,
computed in float32.
"""

from __future__ import annotations

from llmkit.model.blocks import AttentionSpec, MLPSpec, ResidualBlock
from llmkit.model.config import ModelConfig
from llmkit.model.families import ARCHITECTURES
from llmkit.model.family import Family, Key


def attention(config: ModelConfig, layer: int) -> AttentionSpec:
    """`use_bias` covers all matrices."""
    bias = config.own["use_bias"]
    return AttentionSpec.from_config(config, layer, bias=bias, output_bias=bias)


def mlp(config: ModelConfig, layer: int) -> MLPSpec:
    """`use_bias` covers all matrices."""
    return MLPSpec.from_config(config, layer, bias=config.own["use_bias"])


ARCHITECTURES.register("ernie4_5")(
    Family(
        "Ernie4_5ForCausalLM",
        ResidualBlock(attention, mlp),
        defaults={
            "max_position_embeddings": 131_072,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "rms_norm_eps": 1e-5,
            "rope_theta": 5e5,
            "tie_word_embeddings": True,
        },
        keys={"use_bias": Key(False, "flag")},
        unsupported=("attention_bias", "mlp_bias"),
        adjacent_pairs=True,
        float32_rotation=True,
    )
)

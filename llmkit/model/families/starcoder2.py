"""StarCoder 2 (arXiv:2402.19173): grouped-query attention and an MLP without a gate, with LayerNorm and biases."""

from __future__ import annotations

from llmkit.model.blocks import LayerNormSpec, MLPSpec, ResidualBlock
from llmkit.model.config import ModelConfig
from llmkit.model.families import ARCHITECTURES
from llmkit.model.families.ernie4_5 import attention
from llmkit.model.family import Family, Key, uniform_window


def mlp(config: ModelConfig, layer: int) -> MLPSpec:
    """Two matrices, under GPT-2's names."""
    bias = config.own["use_bias"]
    return MLPSpec.from_config(config, layer, bias=bias, gated=False, names=("", "c_fc", "c_proj"))


ARCHITECTURES.register("starcoder2")(
    Family(
        "Starcoder2ForCausalLM",
        ResidualBlock(attention, mlp, LayerNormSpec.from_config),
        defaults={
            "max_position_embeddings": 4096,
            "num_key_value_heads": 2,
            "hidden_act": "gelu_pytorch_tanh",
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
            "initializer_range": 0.018042,
        },
        keys={
            "use_bias": Key(True, "flag"),
            "sliding_window": Key(None, "count or null"),
            "residual_dropout": Key(0.0, "amount", omitted=True),
            "embedding_dropout": Key(0.0, "amount", omitted=True),
        },
        renamed={"rms_norm_eps": ("norm_epsilon",)},
        unsupported=("attention_bias", "mlp_bias"),
        norm=LayerNormSpec.from_config,
        window=uniform_window,
    )
)

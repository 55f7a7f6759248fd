"""Seed-OSS: Llama's block with biases on queries, keys and values, and optionally on the output of attention."""

from __future__ import annotations

from llmkit.model.blocks import AttentionSpec, ResidualBlock
from llmkit.model.config import ModelConfig
from llmkit.model.families import ARCHITECTURES
from llmkit.model.family import Family, Key


def attention(config: ModelConfig, layer: int) -> AttentionSpec:
    """The two switches of biases."""
    return AttentionSpec.from_config(config, layer, output_bias=config.own["attention_out_bias"])


ARCHITECTURES.register("seed_oss")(
    Family(
        "SeedOssForCausalLM",
        ResidualBlock(attention),
        defaults={
            "max_position_embeddings": 524_288,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "attention_bias": True,
        },
        keys={
            "attention_out_bias": Key(False, "flag"),
            "attention_dropout": Key(0.1, "amount"),
            "residual_dropout": Key(0.1, "amount"),
        },
    )
)

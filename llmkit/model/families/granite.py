"""Granite 3 (parametrised as in muP, arXiv:2203.03466): Llama's block with multipliers of the embedding, the
scores, what each layer adds, and the logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmkit.model.blocks import AttentionSpec, ResidualBlock
from llmkit.model.config import ModelConfig
from llmkit.model.families import ARCHITECTURES
from llmkit.model.family import Family, Key


def attention(config: ModelConfig, layer: int) -> AttentionSpec:
    """`attention_multiplier` takes the place of 1/√head_dim."""
    return AttentionSpec.from_config(config, layer, scale=config.own["attention_multiplier"])


def preset(sizes: Mapping[str, Any]) -> dict[str, Any]:
    """The multipliers of Granite 3, which fit any width: 1/head_dim, and a residual stream of limited growth."""
    return {
        "attention_multiplier": 1 / sizes["head_dim"],
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
        "logits_scaling": 8.0,
    }


ARCHITECTURES.register("granite")(
    Family(
        "GraniteForCausalLM",
        ResidualBlock(attention),
        keys={
            "embedding_multiplier": Key(1.0),
            "attention_multiplier": Key(1.0),
            "residual_multiplier": Key(1.0),
            "logits_scaling": Key(1.0),
        },
        preset=preset,
        embedding_scale=lambda config: config.own["embedding_multiplier"],
        residual_scale=lambda config: config.own["residual_multiplier"],
        hidden_scale=lambda config: 1 / config.own["logits_scaling"],
    )
)

"""Mistral (arXiv:2310.06825): Llama's block with a sliding window."""

from __future__ import annotations

from llmkit.model.blocks import ResidualBlock
from llmkit.model.families import ARCHITECTURES
from llmkit.model.family import Family, Key, uniform_window

ARCHITECTURES.register("mistral")(
    Family(
        "MistralForCausalLM",
        ResidualBlock(),
        defaults={"max_position_embeddings": 131_072, "num_key_value_heads": 8},
        keys={"sliding_window": Key(4096, "count or null"), "layer_types": Key(None, "layers", omitted=True)},
        unsupported=("attention_bias", "mlp_bias"),
        window=uniform_window,
        preset=lambda sizes: {"sliding_window": None},
    )
)

"""Qwen 3 (arXiv:2505.09388): Llama's block with an RMSNorm on each head of queries and keys."""

from __future__ import annotations

from functools import partial

from llmkit.model.blocks import AttentionSpec, ResidualBlock
from llmkit.model.families import ARCHITECTURES
from llmkit.model.family import OPTIONAL_WINDOW, Family, optional_window

ARCHITECTURES.register("qwen3")(
    Family(
        "Qwen3ForCausalLM",
        ResidualBlock(partial(AttentionSpec.from_config, qk_norm="head")),
        defaults={"max_position_embeddings": 32_768, "num_key_value_heads": 32, "head_dim": 128},
        keys=OPTIONAL_WINDOW,
        unsupported=("mlp_bias",),
        window=optional_window,
    )
)

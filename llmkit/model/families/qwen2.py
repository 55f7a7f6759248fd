"""Qwen 2 and 2.5 (arXiv:2407.10671): Llama's block with biases on queries, keys and values."""

from __future__ import annotations

from functools import partial

from llmkit.model.blocks import AttentionSpec, ResidualBlock
from llmkit.model.families import ARCHITECTURES
from llmkit.model.family import OPTIONAL_WINDOW, Family, optional_window

ARCHITECTURES.register("qwen2")(
    Family(
        "Qwen2ForCausalLM",
        ResidualBlock(partial(AttentionSpec.from_config, bias=True)),
        defaults={"max_position_embeddings": 32_768, "num_key_value_heads": 32},
        keys=OPTIONAL_WINDOW,
        unsupported=("attention_bias", "mlp_bias"),
        window=optional_window,
    )
)

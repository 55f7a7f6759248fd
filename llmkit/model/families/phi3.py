"""Phi 3 and 4 (arXiv:2404.14219): Llama's block with joined matrices of queries, keys and values, and of gate and up,
and longrope, which older directories call "su" or "yarn".
"""

from __future__ import annotations

from functools import partial

from llmkit.model.blocks import AttentionSpec, MLPSpec, ResidualBlock
from llmkit.model.families import ARCHITECTURES
from llmkit.model.family import Family, Key, uniform_window

ARCHITECTURES.register("phi3")(
    Family(
        "Phi3ForCausalLM",
        ResidualBlock(
            partial(AttentionSpec.from_config, qkv="joined"), partial(MLPSpec.from_config, joined="gate_up_proj")
        ),
        defaults={"max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
        keys={
            "sliding_window": Key(None, "count or null"),
            "original_max_position_embeddings": Key(4096, "count"),
            "resid_pdrop": Key(0.0, "amount", omitted=True),
            "embd_pdrop": Key(0.0, "amount", omitted=True),
        },
        unsupported=("attention_bias", "mlp_bias"),
        preset=lambda sizes: {"original_max_position_embeddings": sizes["max_position_embeddings"]},
        partial_rotary=True,
        rope_kinds={"su": "longrope", "yarn": "longrope"},
        window=uniform_window,
    )
)

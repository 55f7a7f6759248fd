"""GLM 4 (arXiv:2406.12793): norms before and after attention and MLP, biases on queries, keys and values, joined gate
and up, and a rotary embedding of neighbouring pairs in half of each head.
"""

from __future__ import annotations

from functools import partial

from llmkit.model.blocks import AttentionSpec, MLPSpec, ResidualBlock
from llmkit.model.families import ARCHITECTURES
from llmkit.model.family import Family

ARCHITECTURES.register("glm4")(
    Family(
        "Glm4ForCausalLM",
        ResidualBlock(
            partial(AttentionSpec.from_config, output_bias=False),
            partial(MLPSpec.from_config, joined="gate_up_proj"),
            norms=(
                "input_layernorm",
                "post_self_attn_layernorm",
                "post_attention_layernorm",
                "post_mlp_layernorm",
            ),
        ),
        defaults={
            "max_position_embeddings": 131_072,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "rms_norm_eps": 1.5625e-7,
            "partial_rotary_factor": 0.5,
            "attention_bias": True,
        },
        unsupported=("mlp_bias",),
        partial_rotary=True,
        adjacent_pairs=True,
    )
)

"""Apertus (arXiv:2509.14233): a norm on each head of queries and keys, and an MLP without a gate, whose activation,
xIELU, is trained.
"""

from __future__ import annotations

from functools import partial

from llmkit.model.blocks import AttentionSpec, MLPSpec, ResidualBlock
from llmkit.model.families import ARCHITECTURES
from llmkit.model.family import Family

ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

ARCHITECTURES.register("apertus")(
    Family(
        "ApertusForCausalLM",
        ResidualBlock(
            partial(AttentionSpec.from_config, qk_norm="head"),
            partial(MLPSpec.from_config, gated=False),
            norms=("attention_layernorm", "", "feedforward_layernorm", ""),
        ),
        defaults={
            "max_position_embeddings": 65_536,
            "hidden_act": "xielu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 1.2e7,
            "rope_scaling": ROPE,
        },
        unsupported=("mlp_bias",),
    )
)

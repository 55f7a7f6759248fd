"""GPT-NeoX (arXiv:2204.06745) and Pythia (arXiv:2304.01373): parallel attention and MLP with LayerNorm and biases,
joined queries, keys and values, and a rotary embedding of a quarter of each head.
"""

from __future__ import annotations

from functools import partial

from llmkit.model.blocks import AttentionSpec, LayerNormSpec, MLPSpec, ResidualBlock
from llmkit.model.families import ARCHITECTURES
from llmkit.model.family import Family, Key, Names

ARCHITECTURES.register("gpt_neox")(
    Family(
        "GPTNeoXForCausalLM",
        ResidualBlock(
            partial(AttentionSpec.from_config, qkv="by head", joined="query_key_value", output="dense"),
            partial(MLPSpec.from_config, bias=True, gated=False, names=("", "dense_h_to_4h", "dense_4h_to_h")),
            LayerNormSpec.from_config,
            names=("attention", "mlp"),
        ),
        defaults={
            "hidden_act": "gelu",
            "rms_norm_eps": 1e-5,
            "partial_rotary_factor": 0.25,
            "attention_bias": True,
            "intermediate_size": 24576,
        },
        keys={
            "use_parallel_residual": Key(True, "flag"),
            "hidden_dropout": Key(0.0, "amount", omitted=True),
            "classifier_dropout": Key(0.1, "amount", omitted=True),
        },
        renamed={
            "rms_norm_eps": ("layer_norm_eps",),
            "partial_rotary_factor": ("rotary_pct",),
            "rope_theta": ("rotary_emb_base",),
        },
        unsupported=("mlp_bias",),
        grouped=False,
        partial_rotary=True,
        names=Names("gpt_neox", "embed_in", "layers", "final_layer_norm", "embed_out"),
        norm=LayerNormSpec.from_config,
        parallel=lambda config: config.own["use_parallel_residual"],
        ignored=(".attention.bias", ".attention.masked_bias"),
    )
)

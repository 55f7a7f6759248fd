"""Gemma 2 (arXiv:2408.00118): Gemma with norms before and after attention and MLP, soft caps on scores and logits,
and a sliding window in every other layer.
"""

from __future__ import annotations

from llmkit.model.blocks import AttentionSpec, ResidualBlock
from llmkit.model.config import ModelConfig
from llmkit.model.families import ARCHITECTURES
from llmkit.model.families.gemma import NORM, embedding_scale
from llmkit.model.family import Family, Key, patterned_window

NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)


def attention(config: ModelConfig, layer: int) -> AttentionSpec:
    """Scores are divided by the root of `query_pre_attn_scalar`, and capped."""
    own = config.own
    return AttentionSpec.from_config(
        config, layer, scale=own["query_pre_attn_scalar"] ** -0.5, softcap=own["attn_logit_softcapping"]
    )


ARCHITECTURES.register("gemma2")(
    Family(
        "Gemma2ForCausalLM",
        ResidualBlock(attention, norm=NORM, norms=NORMS),
        defaults={
            "max_position_embeddings": 8192,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "hidden_act": "gelu_pytorch_tanh",
            "tie_word_embeddings": True,
        },
        keys={
            "query_pre_attn_scalar": Key(256, "number"),
            "sliding_window": Key(4096, "count or null"),
            "layer_types": Key(None, "layers"),
            "attn_logit_softcapping": Key(50.0, "number or null"),
            "final_logit_softcapping": Key(30.0, "number or null"),
            "use_bidirectional_attention": Key(None, "fixed", omitted=True),
        },
        renamed={"hidden_act": ("hidden_activation",)},
        unsupported=("mlp_bias",),
        preset=lambda sizes: {"query_pre_attn_scalar": sizes["head_dim"]},
        norm=NORM,
        window=patterned_window(2),
        embedding_scale=embedding_scale,
        rounded_scale=True,
        softcap=lambda config: config.own["final_logit_softcapping"],
    )
)

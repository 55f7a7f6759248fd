"""Gemma 3, text models (arXiv:2503.19786): Gemma 2 with norms on each head of queries and keys instead of a cap on
scores, and a sliding window with a rotary embedding of its own in five layers of six.
"""

from __future__ import annotations

from llmkit.model.blocks import AttentionSpec, ResidualBlock
from llmkit.model.config import ModelConfig
from llmkit.model.families import ARCHITECTURES
from llmkit.model.families.gemma import NORM, embedding_scale
from llmkit.model.families.gemma2 import NORMS
from llmkit.model.family import Family, Key, local_and_global_rope, window_by_pattern


def attention(config: ModelConfig, layer: int) -> AttentionSpec:
    """Scores are divided by the root of `query_pre_attn_scalar`; `attn_logit_softcapping` is never applied."""
    scale = config.own["query_pre_attn_scalar"] ** -0.5
    return AttentionSpec.from_config(config, layer, scale=scale, qk_norm="head", float32_gain=True, offset=True)


ARCHITECTURES.register("gemma3_text")(
    Family(
        "Gemma3ForCausalLM",
        ResidualBlock(attention, norm=NORM, norms=NORMS),
        defaults={
            "max_position_embeddings": 131_072,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "hidden_act": "gelu_pytorch_tanh",
            "tie_word_embeddings": True,
            "rope_theta": 1e6,
        },
        keys={
            "query_pre_attn_scalar": Key(256, "number"),
            "sliding_window": Key(4096, "count or null"),
            "sliding_window_pattern": Key(6, "count"),
            "layer_types": Key(None, "layers"),
            "attn_logit_softcapping": Key(None, "number or null"),
            "final_logit_softcapping": Key(None, "number or null"),
            "use_bidirectional_attention": Key(False, "fixed", omitted=True),
        },
        renamed={"hidden_act": ("hidden_activation",)},
        unsupported=("mlp_bias",),
        preset=lambda sizes: {"query_pre_attn_scalar": sizes["head_dim"]},
        norm=NORM,
        rope=local_and_global_rope,
        local_theta=1e4,
        window=window_by_pattern,
        embedding_scale=embedding_scale,
        rounded_scale=True,
        softcap=lambda config: config.own["final_logit_softcapping"],
    )
)

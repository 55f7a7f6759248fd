"""GPT-2 (Radford et al., 2019): learned positions, LayerNorm, biases, and an MLP without a gate. Matrices are stored
[in, out].
"""

from __future__ import annotations

from functools import partial

from llmkit.model.blocks import AttentionSpec, LayerNormSpec, MLPSpec, ResidualBlock
from llmkit.model.config import ModelConfig
from llmkit.model.families import ARCHITECTURES
from llmkit.model.family import Family, Key, Names, no_rope


def attention(config: ModelConfig, layer: int) -> AttentionSpec:
    """Scores divided by √head_dim, and by the number of the layer where the configuration says so."""
    own = config.own
    scale = config.head_dim**-0.5 if own["scale_attn_weights"] else 1.0
    if own["scale_attn_by_inverse_layer_idx"]:
        scale /= layer + 1
    return AttentionSpec.from_config(
        config,
        layer,
        bias=True,
        output_bias=True,
        scale=scale,
        qkv="joined",
        joined="c_attn",
        output="c_proj",
        transposed=True,
    )


ARCHITECTURES.register("gpt2")(
    Family(
        "GPT2LMHeadModel",
        ResidualBlock(
            attention,
            partial(MLPSpec.from_config, bias=True, gated=False, names=("", "c_fc", "c_proj"), transposed=True),
            LayerNormSpec.from_config,
            norms=("ln_1", "", "ln_2", ""),
            names=("attn", "mlp"),
        ),
        defaults={
            "max_position_embeddings": 1024,
            "hidden_act": "gelu_new",
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
            "intermediate_size": None,
        },
        keys={
            "scale_attn_weights": Key(True, "flag", omitted=True),
            "scale_attn_by_inverse_layer_idx": Key(False, "flag", omitted=True),
            "reorder_and_upcast_attn": Key(False, "flag", omitted=True),  # a matter of half precision
            "add_cross_attention": Key(False, "fixed", omitted=True),
            "resid_pdrop": Key(0.1, "amount"),
            "embd_pdrop": Key(0.1, "amount"),
            "attn_pdrop": Key(0.1, "amount"),
        },
        renamed={
            "hidden_size": ("n_embd", "hidden_size"),
            "num_hidden_layers": ("n_layer", "num_hidden_layers"),
            "num_attention_heads": ("n_head", "num_attention_heads"),
            "intermediate_size": ("n_inner", "intermediate_size"),
            "max_position_embeddings": ("n_positions", "max_position_embeddings", "n_ctx"),
            "rms_norm_eps": ("layer_norm_epsilon",),
            "hidden_act": ("activation_function",),
        },
        unsupported=("attention_bias", "mlp_bias"),
        grouped=False,
        names=Names("transformer", "wte", "h", "ln_f", positions="wpe"),
        norm=LayerNormSpec.from_config,
        rope=no_rope,
        ignored=(".attn.bias", ".attn.masked_bias"),
    )
)

"""OLMo 2 (arXiv:2501.00656): norms on the outputs of attention and MLP instead of their inputs, and on all
queries and keys before heads are split. In half precision, norms apply their gains and the rotary embedding is
computed in float32.
"""

from __future__ import annotations

from functools import partial

from llmkit.model.blocks import AttentionSpec, NormSpec, ResidualBlock
from llmkit.model.families import ARCHITECTURES
from llmkit.model.family import Family

NORM = partial(NormSpec.from_config, float32_gain=True)
BLOCK = ResidualBlock(
    partial(AttentionSpec.from_config, qk_norm="width", float32_gain=True),
    norm=NORM,
    norms=("", "post_attention_layernorm", "", "post_feedforward_layernorm"),
)

ARCHITECTURES.register("olmo2")(
    Family(
        "Olmo2ForCausalLM",
        BLOCK,
        defaults={"rms_norm_eps": 1e-5},
        unsupported=("mlp_bias",),
        norm=NORM,
        float32_rotation=True,
    )
)

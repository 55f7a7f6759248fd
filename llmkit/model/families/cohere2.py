"""Command R7B and A (arXiv:2504.00698): attention and MLP read the same LayerNorm without bias; a sliding window with
a rotary embedding of neighbouring pairs in three layers of four, full attention without positions in the others.
"""

from __future__ import annotations

from functools import partial

from llmkit.model.blocks import LayerNormSpec, ResidualBlock
from llmkit.model.config import ModelConfig
from llmkit.model.families import ARCHITECTURES
from llmkit.model.family import Family, Key, global_rope, window_by_pattern
from llmkit.model.rope import Rope

NORM = partial(LayerNormSpec.from_config, bias=False)


def rope(config: ModelConfig, layer: int) -> Rope | None:
    """Of sliding layers only."""
    return None if window_by_pattern(config, layer) is None else global_rope(config, layer)


ARCHITECTURES.register("cohere2")(
    Family(
        "Cohere2ForCausalLM",
        ResidualBlock(norm=NORM, norms=("input_layernorm", "", "", "")),
        defaults={"max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "tie_word_embeddings": True},
        keys={
            "logit_scale": Key(0.0625),
            "sliding_window": Key(4096, "count"),
            "sliding_window_pattern": Key(4, "count", omitted=True),
            "layer_types": Key(None, "layers"),
        },
        renamed={"rms_norm_eps": ("layer_norm_eps",)},
        unsupported=("mlp_bias",),
        norm=NORM,
        rope=rope,
        adjacent_pairs=True,
        float32_rotation=True,
        window=window_by_pattern,
        parallel=lambda config: True,
        hidden_scale=lambda config: config.own["logit_scale"],
    )
)

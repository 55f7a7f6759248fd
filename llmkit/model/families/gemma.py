"""Gemma (arXiv:2403.08295): Llama's block with GeGLU, norms whose gains are stored as what is added to 1, and an
embedding that is multiplied by the square root of the width.
"""

from __future__ import annotations

import math
from functools import partial

from llmkit.model.blocks import NormSpec, ResidualBlock
from llmkit.model.config import ModelConfig
from llmkit.model.families import ARCHITECTURES
from llmkit.model.family import Family, Key

NORM = partial(NormSpec.from_config, float32_gain=True, offset=True)


def embedding_scale(config: ModelConfig) -> float:
    """√width."""
    return math.sqrt(config.hidden_size)


ARCHITECTURES.register("gemma")(
    Family(
        "GemmaForCausalLM",
        ResidualBlock(norm=NORM),
        defaults={
            "head_dim": 256,
            "hidden_act": "gelu_pytorch_tanh",
            "tie_word_embeddings": True,
            "max_position_embeddings": 8192,
            "num_key_value_heads": 16,
        },
        keys={"use_bidirectional_attention": Key(None, "fixed", omitted=True)},
        activations={"gelu": "gelu_tanh"},  # what old directories say, and mean
        unsupported=("mlp_bias",),
        norm=NORM,
        embedding_scale=embedding_scale,
        rounded_scale=True,
    )
)

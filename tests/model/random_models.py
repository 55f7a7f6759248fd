"""Random-weight models of every shape that the decoder knows."""

from __future__ import annotations

from typing import Any

import torch

from llmkit.model.config import ModelConfig
from llmkit.model.decoder import Decoder

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "eos_token_id": 0,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "llama, grouped, tied": {"architecture": "llama"},
    "llama, one group a head, untied, biases": {
        "architecture": "llama",
        "num_key_value_heads": 6,
        "tie_word_embeddings": False,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "llama, rope of llama 3": {"architecture": "llama", "rope_theta": 5e5, "rope_scaling": LLAMA3_ROPE},
    "llama, linear rope": {"architecture": "llama", "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "qwen3, grouped, tied": {},
    "qwen3, one key head, wide heads, untied": {
        "num_key_value_heads": 1,
        "head_dim": 16,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
    },
    "olmo2, grouped, tied": {"architecture": "olmo2", "rms_norm_eps": 1e-5},
    "olmo2, one group a head, untied, biases": {
        "architecture": "olmo2",
        "num_key_value_heads": 6,
        "tie_word_embeddings": False,
        "attention_bias": True,
    },
    "qwen3, heads that do not divide the width": {"num_attention_heads": 5, "num_key_value_heads": 5},
}


def random_model(seed: int = 0, **changes: Any) -> Decoder:
    """Every weight drawn, norms and biases too, and large enough that each of them moves the logits."""
    model = Decoder(ModelConfig(**(SIZES | changes)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            draw = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(draw * 0.15 if parameter.dim() > 1 else 1 + 0.3 * draw)
    return model.eval()

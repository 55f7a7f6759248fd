"""Qwen 3 (arXiv:2505.09388): Llama's block with an RMSNorm on each head of queries and keys."""

from __future__ import annotations

from llmkit.model.blocks import PreNormBlock
from llmkit.model.families import ARCHITECTURES
from llmkit.model.family import Family

ARCHITECTURES.register("qwen3")(
    Family("Qwen3ForCausalLM", PreNormBlock(qk_norm="head"), defaults={"head_dim": 128}, unsupported=("mlp_bias",))
)

"""Llama 2 and 3 (arXiv:2302.13971): pre-norm blocks of grouped-query attention and SwiGLU."""

from __future__ import annotations

from llmkit.model.blocks import ResidualBlock
from llmkit.model.families import ARCHITECTURES
from llmkit.model.family import Family

# transformers refuses a hidden_size that is not a multiple of the heads, even with an explicit head_dim.
ARCHITECTURES.register("llama")(Family("LlamaForCausalLM", ResidualBlock(), divisible_heads=True))

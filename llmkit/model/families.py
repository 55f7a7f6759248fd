"""Architectures: one row each over the shared decoder. A family that needs more than a row gets a file of its own.

Third-party packages add rows by the entry-point group `llmkit.architectures`, each pointing at a `Family`.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmkit.registry import Registry


@dataclass(frozen=True, slots=True)
class Family:
    """What distinguishes an architecture whose config.json says everything else."""

    hf_class: str  # "architectures" in config.json
    qk_norm: bool = False  # RMSNorm over each head of queries and keys, before the rotation
    whole_heads: bool = (
        False  # transformers refuses a hidden_size that is no multiple of the heads, even where head_dim is given
    )
    head_dim: int | None = None  # transformers' value where config.json gives none; None is hidden_size / heads


ARCHITECTURES = Registry("architecture", entry_points="llmkit.architectures")
ARCHITECTURES.register("llama")(Family("LlamaForCausalLM", whole_heads=True))
ARCHITECTURES.register("qwen3")(Family("Qwen3ForCausalLM", qk_norm=True, head_dim=128))

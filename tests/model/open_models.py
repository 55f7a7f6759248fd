"""Small random models of every dense family, as transformers makes and writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

BASE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 0,
    "pad_token_id": None,
}
WIDE = BASE | {"head_dim": 8}
WINDOW = {"sliding_window": 16}
FULL, SLIDING = "full_attention", "sliding_attention"


def rope(kind: str, theta: float = 1e4, **numbers: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **numbers}}


def yarn(**numbers: Any) -> dict[str, Any]:
    return rope("yarn", **({"factor": 8.0, "original_max_position_embeddings": 32} | numbers))


def long(pairs: int, **numbers: Any) -> dict[str, Any]:
    factors = {"short_factor": [1 + i / 10 for i in range(pairs)], "long_factor": [1.0 + i for i in range(pairs)]}
    return rope("longrope", **factors, **numbers)


def nested(full: dict[str, Any], sliding: dict[str, Any]) -> dict[str, Any]:
    return {"rope_parameters": {FULL: full["rope_parameters"], SLIDING: sliding["rope_parameters"]}}


# Each family plainly, then with what else its configuration can say.
MODELS: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {
        "plain": BASE,
        "biases, wide heads, linear rope": BASE | {"attention_bias": True, "mlp_bias": True, "head_dim": 16} | rope("linear", factor=2.0),
        "dynamic rope": BASE | {"max_position_embeddings": 64} | rope("dynamic", factor=2.0),
        "llama3 rope": BASE | rope("llama3", 5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32),
        "yarn": BASE | yarn(mscale=0.7, mscale_all_dim=0.9, beta_fast=20, truncate=False),
        "longrope": BASE | long(4, factor=4.0, original_max_position_embeddings=64),
    },
    "qwen2": {
        "plain": BASE,
        "late layers slide": BASE | WINDOW | {"use_sliding_window": True, "max_window_layers": 2},
        "tied, yarn": BASE | {"tie_word_embeddings": True} | yarn(),
    },
    "qwen3": {
        "plain": WIDE,
        "biases, late layers slide": WIDE | WINDOW | {"use_sliding_window": True, "max_window_layers": 2, "attention_bias": True},
    },
    "mistral": {"plain": WIDE | WINDOW, "no window, wide heads": WIDE | {"sliding_window": None, "head_dim": 16}},
    "olmo2": {"plain": BASE, "biases": BASE | {"attention_bias": True}},
    "olmo3": {"plain": BASE | WINDOW, "yarn, two bases": BASE | WINDOW | nested(yarn(), rope("default", 2e4))},
    "gemma": {"plain": WIDE},
    "gemma2": {
        "plain": WIDE | WINDOW | {"query_pre_attn_scalar": 10},
        "tight caps, untied": WIDE | WINDOW | {
            "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "layer_types": [FULL, FULL, SLIDING, SLIDING], "tie_word_embeddings": False,
        },
        "no caps": WIDE | WINDOW | {"attn_logit_softcapping": None, "final_logit_softcapping": None},
    },
    "gemma3_text": {
        "plain": WIDE | WINDOW | {"num_hidden_layers": 6, "query_pre_attn_scalar": 10},
        "cap, biases, linear rope": WIDE | WINDOW | {"final_logit_softcapping": 5.0, "attention_bias": True}
        | nested(rope("linear", 1e6, factor=8.0), rope("default")),
    },
    "granite": {
        "plain": BASE | {"embedding_multiplier": 6.0, "logits_scaling": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2},
        "biases, tied": BASE | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    },
    "phi3": {
        "plain": BASE,
        "window, longrope of a part": BASE | WINDOW | long(3, partial_rotary_factor=0.75)
        | {"partial_rotary_factor": 0.75, "original_max_position_embeddings": 64},
    },
    "smollm3": {
        "plain": BASE,
        "biases, untied": BASE | {"no_rope_layers": [1, 0, 0, 1], "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
        "sliding": BASE | WINDOW | {"use_sliding_window": True, "layer_types": [SLIDING, FULL] * 2},
    },
    "glm4": {"plain": WIDE, "no biases": WIDE | {"attention_bias": False}},
    "cohere2": {
        "plain": WIDE | WINDOW | {"logit_scale": 0.5},
        "biases, untied": WIDE | WINDOW | {"attention_bias": True, "logit_scale": 0.5, "tie_word_embeddings": False},
    },
    "seed_oss": {
        "plain": WIDE | {"attention_dropout": 0.0, "residual_dropout": 0.0},
        "other biases": WIDE | {"attention_out_bias": True, "mlp_bias": True, "attention_bias": False},
    },
    "apertus": {"plain": BASE, "biases, tied": BASE | {"attention_bias": True, "tie_word_embeddings": True}},
    "ernie4_5": {"plain": WIDE, "biases, untied": WIDE | {"use_bias": True, "tie_word_embeddings": False}},
    "starcoder2": {"plain": BASE | WINDOW, "no biases, untied": BASE | {"use_bias": False, "tie_word_embeddings": False}},
    "gpt_neox": {
        "plain": BASE,
        "one after the other, half rotated": BASE | {"use_parallel_residual": False, "attention_bias": False} | rope("default", partial_rotary_factor=0.5),
        "odd heads, tied": BASE | {"hidden_size": 45, "num_attention_heads": 5, "tie_word_embeddings": True} | rope("default", partial_rotary_factor=0.7),
    },
    "gpt2": {
        "plain": {"vocab_size": 97, "n_embd": 45, "n_layer": 3, "n_head": 5, "n_positions": 256, "bos_token_id": 1, "eos_token_id": 0},
        "untied, scores by layer": {
            "vocab_size": 97, "n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 256, "n_inner": 70,
            "scale_attn_by_inverse_layer_idx": True, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 0,
        },
    },
}  # fmt: skip
UNGROUPED = ("gpt2", "gpt_neox")


def transformers_model(family: str, settings: dict[str, Any], seed: int = 0) -> Any:
    """transformers' model with every weight drawn, norms and biases too, so that each of them moves the logits."""
    from transformers import AutoConfig, AutoModelForCausalLM

    absent = ("num_key_value_heads", "head_dim") if family in UNGROUPED else ()
    settings = {name: value for name, value in json.loads(json.dumps(settings)).items() if name not in absent}
    config = AutoConfig.for_model(family, **settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            draw = torch.randn(parameter.shape, generator=generator)
            gain = parameter.numel() > 1 and not family.startswith("gemma")  # gemma's are added to 1
            parameter.copy_(draw * 0.12 if parameter.dim() > 1 else 0.3 * draw + gain)
    return model


def model_directory(
    path: Path,
    family: str,
    tokenizer_files: dict[str, str] | None = None,
    changes: dict[str, Any] | None = None,
    seed: int = 0,
) -> Path:
    """A directory that transformers wrote, with a tokenizer if one is given."""
    transformers_model(family, MODELS[family]["plain"] | (changes or {}), seed).save_pretrained(path)
    for name, text in (tokenizer_files or {}).items():
        (path / name).write_text(text)
    return path


def skip_if_changed(changed: bool) -> None:
    """Skip what transformers reads in another way since 5.18."""
    import transformers

    if changed and tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 18):
        pytest.skip("transformers reads this in another way since 5.18")

"""Low-rank adapters of a decoder's linear layers, and their adapter_config.json in PEFT's layout. No torch.

A layer with the frozen matrix W [out, in] computes W x + scale · B A x with trained A [r, in] and B [out, r] (LoRA,
arXiv:2106.09685). The scale is alpha / r, or alpha / √r (rsLoRA, arXiv:2312.03732). DoRA (arXiv:2402.09353) gives every
row of W + scale · B A a trained length, the magnitude [out]. LoRA+ (arXiv:2402.12354) trains B at a higher rate.
Rows of the embedding and the output layer may be trained too: those of new tokens.

    lora = LoraConfig(8, 16.0, target_modules(config, "attention"))
    lora.tensors(config)        # {"model.layers.0.self_attn.q_proj.lora_A.weight": (8, 96), ...}
    read_config("adapter/")     # of PEFT or of ours; refused where it asks for what is not supported
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmkit.errors import LlmkitError, UsageError, suggestion
from llmkit.io.run_layout import ADAPTER_CONFIG, member
from llmkit.model.config import ModelConfig, read_json
from llmkit.model.family import LORA_A, LORA_B, MAGNITUDE, TOKENS, Family

ADAPTER_WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # of PEFT's names of tensors
MAX_RANK = 1 << 16
MAX_ID = 1 << 25  # as of tokenizers
GROUPS = ("all-linear", "attention", "mlp")
_NAME = re.compile(r"\w+(\.\w+)*")
# Keys of PEFT's LoraConfig that do not change what an adapter computes. Others are refused where they are set.
WITHOUT_EFFECT = {
    "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "fan_in_fan_out", "inference_mode",
    "lora_dropout", "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type",
    "eva_config", "loftq_config", "corda_config",
}  # fmt: skip
UNDERSTOOD = {
    "alpha_pattern", "bias", "init_lora_weights", "lora_alpha", "peft_type", "r", "rank_pattern", "target_modules",
    "trainable_token_indices", "use_dora", "use_rslora",
}  # fmt: skip
KEPT_BASE = (True, False, "gaussian", "eva", "orthogonal")  # initial values that leave the base as it is


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """The adapters of a model.

    `targets` are names of linear layers, or ends of such names that begin after a dot. `ranks` and `alphas` are those
    of layers that differ from the others, by the same kind of name. `tokens` are the ids whose rows are trained, in
    their order, by the name of the embedding or output layer ("": the embedding; a tied output layer has its rows).
    `b_rate` is the factor of the learning rate of B. `base` names the model, `base_digest` is the digest of its weights
    (content.weights_digest, "" if unknown), and `base_path` where it was when the adapters were made.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    dora: bool = False
    rslora: bool = False
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    b_rate: float = 1.0
    base: str = ""
    base_digest: str = ""
    base_path: str = ""

    def rank_of(self, module: str) -> int:
        return next((rank for name, rank in self.ranks.items() if is_named(module, name)), self.rank)

    def scale_of(self, module: str) -> float:
        """The factor of B A in the layer of this name."""
        alpha = next((alpha for name, alpha in self.alphas.items() if is_named(module, name)), self.alpha)
        rank = self.rank_of(module)
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def modules(self, config: ModelConfig) -> Iterator[tuple[str, int, int]]:
        """(name, inputs, outputs) of each adapted layer, in the decoder's order."""
        family: Family = config.family
        transposed = family.transposed(config)
        for name, parameter in family.parameters(config):
            module = name.removesuffix(".weight")
            if parameter.kind == "linear" and any(is_named(module, target) for target in self.targets):
                outputs, inputs = reversed(parameter.shape) if transposed else parameter.shape
                yield module, inputs, outputs

    def tensors(self, config: ModelConfig) -> dict[str, tuple[int, ...]]:
        """Name in the decoder and shape of every trained tensor."""
        shapes: dict[str, tuple[int, ...]] = {}
        for module, inputs, outputs in self.modules(config):
            rank = self.rank_of(module)
            shapes |= {module + LORA_A: (rank, inputs), module + LORA_B: (outputs, rank)}
            shapes |= {module + MAGNITUDE: (outputs,)} if self.dora else {}
        tables = self.tables(config).items()
        return shapes | {module + TOKENS: (len(ids), config.hidden_size) for module, ids in tables}

    def tables(self, config: ModelConfig) -> dict[str, tuple[int, ...]]:
        """The ids of `tokens` by the full names of the layers; a tied output layer has the rows of the embedding."""
        layers = outer_layers(config)
        return {
            layer: ids for layer in layers for name, ids in self.tokens.items() if is_named(layer, name or layers[0])
        }

    def adapted(self, config: ModelConfig, where: str) -> ModelConfig:
        """The configuration of the model with these adapters, which may have more rows for tokens than its base.

        Raises LlmkitError where `tokens` names other layers, or rows beyond the base's are missing.
        """
        tables, layers, rows = self.tables(config), outer_layers(config), config.vocab_size
        head = config.family.head.removesuffix(".weight")
        # PEFT also takes a tied output layer, if its ids are those of the embedding.
        tied = [ids for name, ids in self.tokens.items() if head not in layers and is_named(head, name)]
        if len(tables) + len(tied) != len(self.tokens) or any(ids != tables.get(layers[0]) for ids in tied):
            raise LlmkitError(
                f"{where}: trainable_token_indices names {', '.join(self.tokens) or 'a list'}"[:300],
                f"supported: {' and '.join(layers)}, with equal ids where the output layer is tied",
            )
        size = max([rows, *(max(ids) + 1 for ids in tables.values())])
        for layer in layers:
            new = set(tables.get(layer, ()))
            if missing := next((i for i in range(rows, size) if i not in new), None):
                raise LlmkitError(
                    f"{where}: trainable_token_indices goes up to {size - 1:,}, but the model has {rows:,} rows, and"
                    f" nothing gives {layer} one for {missing:,}",
                    "merge the adapter with its own tool",
                )
        return config.with_vocabulary(size)

    def to_peft(self, transposed: bool) -> dict[str, Any]:
        """The content of adapter_config.json; `transposed` is Family.transposed."""
        return {
            "alpha_pattern": dict(self.alphas),
            "base_model_name_or_path": self.base,
            "bias": "none",
            "fan_in_fan_out": transposed,
            "inference_mode": True,
            "init_lora_weights": True,
            "lora_alpha": int(self.alpha) if self.alpha == int(self.alpha) else self.alpha,
            "lora_dropout": 0.0,
            "modules_to_save": None,
            "peft_type": "LORA",
            "r": self.rank,
            "rank_pattern": dict(self.ranks),
            "target_modules": list(self.targets),
            "task_type": "CAUSAL_LM",
            **(
                {"trainable_token_indices": {name: list(ids) for name, ids in self.tokens.items()}}
                if self.tokens
                else {}
            ),
            "use_dora": self.dora,
            "use_rslora": self.rslora,
        }


def outer_layers(config: ModelConfig) -> list[str]:
    """The names of the embedding and, unless it is tied, the output layer."""
    family: Family = config.family
    names = [family.embedding] if config.tie_word_embeddings else [family.embedding, family.head]
    return [name.removesuffix(".weight") for name in names]


def token_tables(config: ModelConfig, ids: Iterable[int]) -> dict[str, tuple[int, ...]]:
    """The `tokens` of adapters with these rows of the embedding and the output layer; {} without ids."""
    tokens = tuple(ids)
    return {layer.rpartition(".")[2]: tokens for layer in outer_layers(config)} if tokens else {}


def is_named(module: str, name: str) -> bool:
    """Whether a name of target_modules means this layer."""
    return module == name or module.endswith(f".{name}")


def target_modules(config: ModelConfig, text: str) -> tuple[str, ...]:
    """The names that `text` stands for: one of GROUPS, or a comma-separated list of names of linear layers.

    Names are as short as they can be: `q_proj`, but `attn.c_proj` where the MLP has a `c_proj` that is not meant.
    Raises UsageError for a name that no linear layer has.
    """
    family: Family = config.family
    linear = {
        name.removesuffix(".weight"): parameter
        for name, parameter in family.layer_parameters(config, 0).items()
        if parameter.kind == "linear"
    }
    if text in GROUPS:
        chosen = {name for name, parameter in linear.items() if text in (GROUPS[0], parameter.group)}
    else:
        names = [name.strip() for name in text.split(",")]
        for name in names:
            if not any(is_named(f".{module}", name) for module in linear):
                leaves = {module.rpartition(".")[2] for module in linear}
                raise UsageError(
                    f"--lora-targets: no linear layer {name!r} in a {config.architecture}",
                    suggestion(name, {*GROUPS, *leaves}),
                )
        chosen = {module for module in linear if any(is_named(f".{module}", name) for name in names)}

    def shortest(module: str) -> str:
        leaf = module.rpartition(".")[2]
        return leaf if {other for other in linear if is_named(other, leaf)} <= chosen else module

    return tuple(sorted({shortest(module) for module in chosen}))


def read_config(directory: Path) -> LoraConfig:
    """The adapter_config.json of a directory, without `base_digest` and `base_path`.

    Raises LlmkitError that names the first key which is malformed, or asks for what is not supported.
    """
    path = member(directory, ADAPTER_CONFIG)
    content = read_json(path)

    def refuse(key: str, wanted: str) -> LlmkitError:
        return LlmkitError(f"{path}: {key} is {content.get(key)!r:.100}", f"supported: {wanted}")

    if content.get("peft_type") != "LORA":
        raise refuse("peft_type", "LORA; merge other adapters with their own tool")
    for key, value in content.items():
        if key not in WITHOUT_EFFECT | UNDERSTOOD and value not in (None, False, "", 0) and value != {} and value != []:
            raise LlmkitError(f"{path}: {key:.60} is not supported", "merge the adapter with its own tool")
    if content.get("bias", "none") != "none":
        raise refuse("bias", "none; merge the adapter with its own tool")
    initial = content.get("init_lora_weights", True)
    if initial not in KEPT_BASE or isinstance(initial, int) != isinstance(initial, bool):
        raise refuse("init_lora_weights", "those that leave the base as it is; convert the adapter with PEFT")
    for key in ("use_dora", "use_rslora"):
        if not isinstance(content.get(key, False), bool):
            raise refuse(key, "true or false")
    base = content.get("base_model_name_or_path") or ""
    if not isinstance(base, str) or "\0" in base:
        raise refuse("base_model_name_or_path", "the path of the model")
    rank, alpha = content.get("r"), content.get("lora_alpha", 8)
    if not isinstance(rank, int) or not _is_rank(rank):
        raise refuse("r", f"1 to {MAX_RANK}")
    if not _is_number(alpha):
        raise refuse("lora_alpha", "a number")
    patterns: dict[str, dict[str, Any]] = {}
    for key, is_valid in (("rank_pattern", _is_rank), ("alpha_pattern", _is_number)):
        pattern = content.get(key) or {}
        if not isinstance(pattern, dict) or not all(_NAME.fullmatch(k) and is_valid(v) for k, v in pattern.items()):
            raise refuse(key, "names of layers, without wildcards, and numbers")
        patterns[key] = pattern
    return LoraConfig(
        rank,
        float(alpha),
        _targets(content.get("target_modules"), refuse),
        content.get("use_dora", False),
        content.get("use_rslora", False),
        patterns["rank_pattern"],
        {name: float(value) for name, value in patterns["alpha_pattern"].items()},
        tokens=_tokens(content.get("trainable_token_indices"), refuse),
        base=base,
    )


def _targets(value: Any, refuse: Any) -> tuple[str, ...]:
    names = value if isinstance(value, list) else [value]
    if not names or not all(isinstance(name, str) and _NAME.fullmatch(name) for name in names):
        error: LlmkitError = refuse("target_modules", "a list of names of linear layers, without wildcards")
        raise error
    return tuple(sorted(set(names)))


def _tokens(value: Any, refuse: Any) -> dict[str, tuple[int, ...]]:
    tables = {} if value in (None, [], {}) else value if isinstance(value, dict) else {"": value}
    for name, ids in tables.items():
        are_ids = isinstance(ids, list) and ids and all(type(i) is int and 0 <= i < MAX_ID for i in ids)
        if not (are_ids and len(set(ids)) == len(ids) and (not name or _NAME.fullmatch(name))):
            error: LlmkitError = refuse(
                "trainable_token_indices", "token ids, each once, or such lists by names of layers"
            )
            raise error
    return {name: tuple(ids) for name, ids in tables.items()}


def _is_rank(value: Any) -> bool:
    return type(value) is int and 1 <= value <= MAX_RANK


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e9  # not for nan

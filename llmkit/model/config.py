"""Model configuration: the fields of a Hugging Face config.json, presets by size, parameter and FLOP counts.

    config = load_config("tiny", vocab_size=8192)      # a preset; "llama-tiny" for the other family
    config = load_config("config.json")                # any size

Old-style keys are written (`rope_theta`, `rope_scaling`, and both `dtype` and `torch_dtype`), which every reader of both generations takes.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmkit.errors import LlmkitError, UsageError, suggestion
from llmkit.model.families import ARCHITECTURES, Family

MAX_CONFIG_BYTES = 10 << 20
DEFAULT_FAMILY = "qwen3"
# Scalings of the rotary embedding, and the numbers that each needs.
ROPE_KINDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Sizes of a decoder. `architecture` is Hugging Face's model_type; lengths in tokens."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    architecture: str = DEFAULT_FAMILY
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    rope_scaling: dict[str, Any] | None = None
    tie_word_embeddings: bool = True
    attention_bias: bool = False
    mlp_bias: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        for name in (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "head_dim", "max_position_embeddings",
        ):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 31:
                raise LlmkitError(f"model configuration: {name} is {value!r}", "a positive whole number is needed")
        for name in ("rms_norm_eps", "rope_theta", "initializer_range"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 1e30:
                raise LlmkitError(f"model configuration: {name} is {value!r}", "a positive number is needed")
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(self, name)
            several = value if isinstance(value, list) and name == "eos_token_id" else [] if value is None else [value]
            if any(not isinstance(item, int) or isinstance(item, bool) for item in several):
                raise LlmkitError(f"model configuration: {name} is {value!r}", "a token id is needed, or none at all")
        for name in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
            if not isinstance(getattr(self, name), bool):
                raise LlmkitError(f"model configuration: {name} is {getattr(self, name)!r}", "true or false is needed")
        if self.num_attention_heads % self.num_key_value_heads:
            raise LlmkitError(
                f"model configuration: {self.num_attention_heads} heads do not divide among {self.num_key_value_heads} key-value heads",
                "num_attention_heads must be a multiple of num_key_value_heads",
            )
        if self.family.whole_heads and self.hidden_size % self.num_attention_heads:
            raise LlmkitError(
                f"model configuration: hidden_size {self.hidden_size} is no multiple of {self.num_attention_heads} heads",
                f"transformers refuses such a {self.architecture}; choose other sizes, or qwen3",
            )
        if self.head_dim % 2:
            raise LlmkitError(
                f"model configuration: head_dim {self.head_dim} is odd", "the rotary embedding turns pairs"
            )

    @property
    def family(self) -> Family:
        family: Family = ARCHITECTURES.get(self.architecture)
        return family

    def with_vocabulary(self, size: int, **special: Any) -> ModelConfig:
        """The same sizes for a tokenizer of `size` ids; `special` sets bos/eos/pad ids."""
        return dataclasses.replace(self, vocab_size=size, **special)

    def parameters(self) -> int:
        """Number of weights, tied ones counted once."""
        d, heads, kv = (
            self.hidden_size,
            self.num_attention_heads * self.head_dim,
            self.num_key_value_heads * self.head_dim,
        )
        attention = 2 * d * heads + 2 * d * kv + (heads + 2 * kv + d if self.attention_bias else 0)
        attention += 2 * self.head_dim if self.family.qk_norm else 0
        mlp = 3 * d * self.intermediate_size + (2 * self.intermediate_size + d if self.mlp_bias else 0)
        embeddings = self.vocab_size * d * (1 if self.tie_word_embeddings else 2)
        return embeddings + self.num_hidden_layers * (attention + mlp + 2 * d) + d

    def flops_per_token(self, sequence_length: int) -> int:
        """Training FLOPs a token, forward and backward: 6 for each weight that multiplies, 6·L·H·d_head·T for attention.

        That is half of what PaLM (app. B) counts for attention: a causal one need not compute what lies ahead.
        """
        multiplied = self.parameters() - (0 if self.tie_word_embeddings else self.vocab_size * self.hidden_size)
        attention = 6 * self.num_hidden_layers * self.num_attention_heads * self.head_dim * sequence_length
        return 6 * multiplied + attention

    def to_hf(self, dtype: str = "float32") -> dict[str, Any]:
        """config.json."""
        fields = dataclasses.asdict(self)
        del fields["architecture"]
        return {
            "architectures": [self.family.hf_class],
            "model_type": self.architecture,
            "hidden_act": "silu",
            "attention_dropout": 0.0,
            "use_cache": True,
            "dtype": dtype,
            "torch_dtype": dtype,
            **fields,
        }

    @classmethod
    def from_hf(cls, content: dict[str, Any], where: str = "config.json") -> ModelConfig:
        """From the content of a config.json of either generation; LlmkitError names what is missing or not supported."""
        if content.get("auto_map"):
            raise LlmkitError(
                f"{where}: auto_map names code to run",
                "llmkit never runs code from a model directory; only known architectures load",
            )
        kind = content.get("model_type")
        if kind not in ARCHITECTURES.names():
            raise LlmkitError(f"{where}: unknown architecture {kind!r}", suggestion(str(kind), ARCHITECTURES.names()))
        fields = {
            field.name: content[field.name] for field in dataclasses.fields(cls) if content.get(field.name) is not None
        }
        fields |= _rope_fields(content, where)
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            if name not in fields:
                raise LlmkitError(f"{where}: no {name}", "the configuration is incomplete")
        # Where a key is absent, transformers' own defaults hold.
        family, heads = ARCHITECTURES.get(kind), fields["num_attention_heads"]
        fields.setdefault("num_key_value_heads", heads)
        fields.setdefault("head_dim", family.head_dim)
        if fields["head_dim"] is None:
            width = fields["hidden_size"]
            if not isinstance(heads, int) or not isinstance(width, int) or heads < 1 or width % heads:
                raise LlmkitError(
                    f"{where}: hidden_size {width!r} does not divide among {heads!r} heads", "give head_dim"
                )
            fields["head_dim"] = width // heads
        fields.setdefault("tie_word_embeddings", False)
        fields.setdefault("rms_norm_eps", 1e-6)
        if content.get("hidden_act", "silu") not in ("silu", "swish"):
            raise LlmkitError(f"{where}: hidden_act {content['hidden_act']!r} is not supported", "only silu is")
        kinds = content.get("layer_types") or []
        if content.get("use_sliding_window") or (isinstance(kinds, list) and set(map(str, kinds)) - {"full_attention"}):
            raise LlmkitError(
                f"{where}: attention over a sliding window is not supported",
                "set use_sliding_window to false if your texts are shorter than the window",
            )
        return cls(architecture=str(kind), **{name: value for name, value in fields.items() if name != "architecture"})


def _rope_fields(content: dict[str, Any], where: str) -> dict[str, Any]:
    """rope_theta and rope_scaling from old-style keys or from transformers 5's rope_parameters."""
    rope = content.get("rope_parameters") or content.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise LlmkitError(f"{where}: rope_parameters is not a table", "see the model's documentation")
    kind = str(rope.get("rope_type") or rope.get("type") or "default")
    numbers = {"rope_theta": rope.get("rope_theta") or content.get("rope_theta") or 10_000.0}
    if kind not in ROPE_KINDS:
        raise LlmkitError(f"{where}: rope scaling {kind!r} is not supported", "known: " + ", ".join(ROPE_KINDS))
    if rope.get("partial_rotary_factor", content.get("partial_rotary_factor") or 1) != 1:
        raise LlmkitError(
            f"{where}: partial_rotary_factor is not supported", "only embeddings that turn all dimensions are"
        )
    numbers |= {name: rope.get(name) for name in ROPE_KINDS[kind]}
    for name, value in numbers.items():
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 1e30:
            raise LlmkitError(f"{where}: {name} of the rotary embedding is {value!r}", "a positive number is needed")
    theta = float(numbers.pop("rope_theta"))
    return {"rope_theta": theta, "rope_scaling": {"rope_type": kind} | numbers if numbers else None}


def _preset(width: int, layers: int, heads: int, kv: int, ffn: int, context: int, tied: bool = True) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": width // heads,
        "intermediate_size": ffn,
        "max_position_embeddings": context,
        "tie_word_embeddings": tied,
    }


# Sizes with a vocabulary of 8,192 (tiny to 15m), 32,768 (30m to 125m) and 65,536 ids; feed-forward about 8/3 of the width, head width 32 to 128.
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": _preset(96, 4, 3, 1, 256, 256),
    "5m": _preset(224, 6, 7, 7, 608, 512),
    "15m": _preset(384, 7, 6, 3, 1024, 1024),
    "30m": _preset(448, 6, 7, 7, 1216, 1024),
    "60m": _preset(640, 8, 10, 5, 1728, 1024),
    "125m": _preset(768, 14, 12, 6, 2048, 2048),
    "350m": _preset(1024, 22, 16, 8, 2816, 2048),
    "760m": _preset(1536, 22, 12, 6, 4096, 2048),
    "1b": _preset(1792, 23, 14, 7, 4864, 4096),
}


def load_config(name: str, vocab_size: int | None = None) -> ModelConfig:
    """A preset (`tiny`, `llama-125m`) for `vocab_size` ids, or the config.json at a path (whose vocabulary `vocab_size` replaces)."""
    path = Path(name)
    if path.is_file():
        config = ModelConfig.from_hf(read_json(path), str(path))
        return config if vocab_size is None else config.with_vocabulary(vocab_size)
    family, _, size = name.rpartition("-")
    if size not in PRESETS or (family and family not in ARCHITECTURES.names()):
        if name.endswith(".json") or "/" in name:
            raise LlmkitError(f"{name}: no such file", "give a preset or a config.json")
        known = [*PRESETS, *(f"{a}-{p}" for a in ARCHITECTURES.names() for p in PRESETS)]
        hint = suggestion(name, known)
        raise UsageError(
            f"unknown preset {name!r}",
            hint if hint.startswith("did") else "known: " + ", ".join(PRESETS) + ", or a config.json",
        )
    if vocab_size is None:
        raise LlmkitError(f"preset {name!r} needs a vocabulary size", "it comes from the tokenizer of the data")
    return ModelConfig(vocab_size=vocab_size, architecture=family or DEFAULT_FAMILY, **PRESETS[size])


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of bounded size; LlmkitError names the file."""
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise LlmkitError(f"{path}: larger than {MAX_CONFIG_BYTES >> 20} MiB", "this is no configuration")
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise LlmkitError(
            f"{path}: {error.strerror}", "a model directory holds config.json and model.safetensors"
        ) from error
    except (ValueError, RecursionError) as error:
        raise LlmkitError(f"{path}: invalid JSON ({error})", "the file is damaged") from error
    if not isinstance(content, dict):
        raise LlmkitError(f"{path}: not a JSON object", "the file is damaged")
    return content

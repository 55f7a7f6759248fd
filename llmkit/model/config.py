"""Model configuration: the fields of a Hugging Face config.json, presets by size, parameter and FLOP counts. No torch.

    config = load_config("tiny", vocab_size=8192)      # a preset; "llama-tiny" for another architecture
    config = load_config("config.json")                # any size

Written files have the old-style keys (`rope_theta`, `rope_scaling`, and both `dtype` and `torch_dtype`), which
old and new readers accept.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmkit.errors import InputWarning, LlmkitError, UsageError, suggestion
from llmkit.model.families import ARCHITECTURES

MAX_CONFIG_BYTES = 10 << 20
DEFAULT_FAMILY = "qwen3"
# transformers' values for keys that a config.json leaves out, unless the family has others. A head_dim of None is
# hidden_size / heads.
DEFAULTS: dict[str, Any] = {
    "head_dim": None,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
}
# Kinds of rotary embedding scaling and the numbers that each requires.
ROPE_KINDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Sizes and constants of a decoder. `architecture` is Hugging Face's model_type; lengths are in tokens."""

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
                raise LlmkitError(f"model configuration: {name} is {value!r}", "it must be a positive integer")
        for name in ("rms_norm_eps", "rope_theta", "initializer_range"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 1e30:
                raise LlmkitError(f"model configuration: {name} is {value!r}", "it must be a positive number")
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(self, name)
            ids = value if isinstance(value, list) and name == "eos_token_id" else [] if value is None else [value]
            if any(not isinstance(item, int) or isinstance(item, bool) for item in ids):
                raise LlmkitError(f"model configuration: {name} is {value!r}", "it must be a token id or null")
        for name in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
            if not isinstance(getattr(self, name), bool):
                raise LlmkitError(f"model configuration: {name} is {getattr(self, name)!r}", "it must be true or false")
            if getattr(self, name) and name in self.family.unsupported:
                raise LlmkitError(
                    f"model configuration: {self.architecture} does not support {name}", "set it to false"
                )
        if self.num_attention_heads % self.num_key_value_heads:
            raise LlmkitError(
                f"model configuration: {self.num_attention_heads} heads cannot share"
                f" {self.num_key_value_heads} key-value heads equally",
                "num_attention_heads must be a multiple of num_key_value_heads",
            )
        if self.family.divisible_heads and self.hidden_size % self.num_attention_heads:
            raise LlmkitError(
                f"model configuration: hidden_size {self.hidden_size} is not a multiple of"
                f" {self.num_attention_heads} heads",
                f"transformers rejects this for {self.architecture}; choose other sizes, or qwen3",
            )
        if self.head_dim % 2:
            raise LlmkitError(
                f"model configuration: head_dim {self.head_dim} is odd",
                "the rotary embedding rotates pairs of dimensions",
            )

    @property
    def family(self) -> Any:
        """The architecture's `Family` (model/family.py, which imports this file)."""
        return ARCHITECTURES.get(self.architecture)

    def with_vocabulary(self, size: int, **special: Any) -> ModelConfig:
        """The same sizes for a tokenizer of `size` ids; `special` sets bos/eos/pad ids."""
        return dataclasses.replace(self, vocab_size=size, **special)

    def parameters(self) -> int:
        """Number of weights, tied ones counted once."""
        count: int = self.family.parameter_count(self)
        return count

    def flops_per_token(self, sequence_length: int) -> int:
        """Training FLOPs per token, forward and backward: 6 per weight of a matrix product, 6·L·H·d_head·T for
        attention.

        The attention term is half of PaLM's (appendix B): causal attention need not compute scores of later tokens.
        """
        multiplied = self.parameters() - (0 if self.tie_word_embeddings else self.vocab_size * self.hidden_size)
        attention = 6 * self.num_hidden_layers * self.num_attention_heads * self.head_dim * sequence_length
        return 6 * multiplied + attention

    def to_hf(self, dtype: str = "float32") -> dict[str, Any]:
        """The content of config.json."""
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
        """From the content of a config.json, old or new style; LlmkitError names what is missing or not supported."""
        kind = content.get("model_type")
        if kind not in ARCHITECTURES.names():
            hint = "its auto_map names code, and no code of a model directory runs" if content.get("auto_map") else ""
            hint = hint or suggestion(str(kind), ARCHITECTURES.names())
            raise LlmkitError(f"{where}: unknown architecture {kind!r}", hint)
        if content.get("auto_map"):
            warnings.warn(f"{where}: auto_map is ignored: no code of a model runs", InputWarning, stacklevel=2)
        fields = {
            field.name: content[field.name] for field in dataclasses.fields(cls) if content.get(field.name) is not None
        }
        defaults = DEFAULTS | dict(ARCHITECTURES.get(kind).defaults)
        fields |= _rope_fields(content, where, defaults["rope_theta"])
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            if name not in fields:
                raise LlmkitError(f"{where}: no {name}", "the configuration is incomplete")
        heads = fields["num_attention_heads"]
        fields = {"num_key_value_heads": heads} | defaults | fields
        if fields["head_dim"] is None:
            width = fields["hidden_size"]
            if not isinstance(heads, int) or not isinstance(width, int) or heads < 1 or width % heads:
                raise LlmkitError(
                    f"{where}: hidden_size {width!r} is not a multiple of {heads!r} heads", "add head_dim"
                )
            fields["head_dim"] = width // heads
        if content.get("hidden_act", "silu") not in ("silu", "swish"):
            raise LlmkitError(f"{where}: hidden_act {content['hidden_act']!r} is not supported", "only silu is")
        layers = content.get("layer_types") or []
        if content.get("use_sliding_window") or (
            isinstance(layers, list) and set(map(str, layers)) - {"full_attention"}
        ):
            raise LlmkitError(
                f"{where}: sliding-window attention is not supported",
                "set use_sliding_window to false if your texts are shorter than the window",
            )
        return cls(architecture=str(kind), **{name: value for name, value in fields.items() if name != "architecture"})


def _rope_fields(content: dict[str, Any], where: str, default_theta: float) -> dict[str, Any]:
    """rope_theta and rope_scaling from old-style keys or from transformers 5's rope_parameters."""
    rope = content.get("rope_parameters") or content.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise LlmkitError(f"{where}: rope_parameters is not a JSON object", "see the model's documentation")
    kind = str(rope.get("rope_type") or rope.get("type") or "default")
    numbers = {"rope_theta": rope.get("rope_theta") or content.get("rope_theta") or default_theta}
    if kind not in ROPE_KINDS:
        raise LlmkitError(f"{where}: rope scaling {kind!r} is not supported", "known: " + ", ".join(ROPE_KINDS))
    if rope.get("partial_rotary_factor", content.get("partial_rotary_factor") or 1) != 1:
        raise LlmkitError(
            f"{where}: partial_rotary_factor is not supported", "rotary embeddings must cover all dimensions"
        )
    numbers |= {name: rope.get(name) for name in ROPE_KINDS[kind]}
    for name, value in numbers.items():
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 1e30:
            raise LlmkitError(f"{where}: {name} of the rotary embedding is {value!r}", "it must be a positive number")
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


# Named for their size with a vocabulary of 8,192 (tiny to 15m), 32,768 (30m to 125m) or 65,536 tokens. The feed-forward
# width is about 8/3 of the model's width, the head width 32 to 128.
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
    """A preset (`tiny`, `llama-125m`) with `vocab_size` tokens, or the config.json at a path, with its
    vocabulary replaced if one is given."""
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
        raise LlmkitError(f"preset {name!r} needs a vocabulary size", "it comes from the data's tokenizer")
    return ModelConfig(vocab_size=vocab_size, architecture=family or DEFAULT_FAMILY, **PRESETS[size])


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file of bounded size; LlmkitError names the file."""
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise LlmkitError(f"{path}: larger than {MAX_CONFIG_BYTES >> 20} MiB", "this is not a configuration")
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise LlmkitError(
            f"{path}: {error.strerror}", "a model directory contains config.json and model.safetensors"
        ) from error
    except (ValueError, RecursionError) as error:
        raise LlmkitError(f"{path}: invalid JSON ({error})", "the file is damaged") from error
    if not isinstance(content, dict):
        raise LlmkitError(f"{path}: not a JSON object", "the file is damaged")
    return content

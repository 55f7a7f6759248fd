"""Model configuration: the fields of a Hugging Face config.json, presets by size, parameter and FLOP counts. No torch.

    config = load_config("tiny", vocab_size=8192)      # a preset; "llama-tiny" for another architecture
    config = load_config("config.json")                # any size

Written files have the old-style keys (`rope_theta`, `rope_scaling`, and both `dtype` and `torch_dtype`), which
old and new readers accept, and the keys that the architecture's family (model/family.py) declares.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmkit.errors import InputWarning, LlmkitError, UsageError, suggestion
from llmkit.model.families import ARCHITECTURES
from llmkit.model.rope import FULL, ORIGINAL, SLIDING, is_positive, rope_fields

MAX_CONFIG_BYTES = 10 << 20
DEFAULT_FAMILY = "qwen3"
# transformers' values for keys that a config.json leaves out, unless the family has others. A head_dim of None is
# hidden_size / heads; an intermediate_size of None is four times hidden_size.
DEFAULTS: dict[str, Any] = {
    "head_dim": None,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "partial_rotary_factor": 1.0,
    "tie_word_embeddings": False,
}
CAUSAL = ("ForCausalLM", "LMHeadModel")  # ends of the names of transformers' classes of decoders
# Names of activations in config.json, and the function that each means (model/operations.py).
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "xielu": "xielu",
}


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Sizes and constants of a decoder. `architecture` is Hugging Face's model_type; lengths are in tokens.

    `local_rope` is the rotary embedding of sliding layers where it has parameters of its own, as in
    `rope_parameters`. `own` has the keys that only this family has (Family.keys), under Hugging Face's names.
    """

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
    partial_rotary_factor: float = 1.0
    local_rope: dict[str, Any] | None = None
    hidden_act: str = ""
    tie_word_embeddings: bool = True
    attention_bias: bool = False
    mlp_bias: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    own: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        family = self.family
        # A frozen dataclass can still fill in what depends on the family.
        object.__setattr__(self, "hidden_act", self.hidden_act or family.defaults.get("hidden_act", "silu"))
        object.__setattr__(self, "own", {name: key.default for name, key in family.keys.items()} | self.own)
        if family.local_theta and self.local_rope is None:
            local = {"rope_type": "default", "rope_theta": family.local_theta}
            object.__setattr__(self, "local_rope", local)
        for name in (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "head_dim", "max_position_embeddings",
        ):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 31:
                raise LlmkitError(f"model configuration: {name} is {value!r}", "it must be a positive integer")
        for name in ("rms_norm_eps", "rope_theta", "initializer_range", "partial_rotary_factor"):
            value = getattr(self, name)
            if not is_positive(value) or (name == "partial_rotary_factor" and value > 1):
                raise LlmkitError(f"model configuration: {name} is {value!r}", "it must be a positive number")
            object.__setattr__(self, name, float(value))
        if self.partial_rotary_factor != 1 and not family.partial_rotary:
            raise LlmkitError(
                f"model configuration: {self.architecture} does not support partial_rotary_factor",
                "remove it, if the model was trained with whole heads rotated, as in transformers",
            )
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(self, name)
            ids = value if isinstance(value, list) and name == "eos_token_id" else [] if value is None else [value]
            if any(not isinstance(item, int) or isinstance(item, bool) for item in ids):
                raise LlmkitError(f"model configuration: {name} is {value!r}", "it must be a token id or null")
        for name in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
            if not isinstance(getattr(self, name), bool):
                raise LlmkitError(f"model configuration: {name} is {getattr(self, name)!r}", "it must be true or false")
            if getattr(self, name) and name in family.unsupported:
                raise LlmkitError(
                    f"model configuration: {self.architecture} does not support {name}", "set it to false"
                )
        if self.num_attention_heads % self.num_key_value_heads:
            raise LlmkitError(
                f"model configuration: {self.num_attention_heads} heads cannot share"
                f" {self.num_key_value_heads} key-value heads equally",
                "num_attention_heads must be a multiple of num_key_value_heads",
            )
        if not family.grouped and (self.num_key_value_heads, self.head_dim * self.num_attention_heads) != (
            self.num_attention_heads,
            self.hidden_size,
        ):
            raise LlmkitError(
                f"model configuration: {self.architecture} has as many key-value heads as heads, which divide"
                " hidden_size among them",
                "leave out num_key_value_heads and head_dim",
            )
        if family.divisible_heads and self.hidden_size % self.num_attention_heads:
            raise LlmkitError(
                f"model configuration: hidden_size {self.hidden_size} is not a multiple of"
                f" {self.num_attention_heads} heads",
                f"transformers rejects this for {self.architecture}; choose other sizes, or qwen3",
            )
        if family.rotary and self.rotary_dims % 2:
            raise LlmkitError(
                f"model configuration: {self.rotary_dims} dimensions of a head are rotated, an odd number",
                "the rotary embedding rotates pairs of dimensions: change head_dim",
            )
        for name, value in self.own.items():
            if name not in family.keys:
                raise LlmkitError(f"model configuration: {self.architecture} has no {name}")
            if problem := family.keys[name].problem(value, self.num_hidden_layers):
                raise LlmkitError(f"model configuration: {name} is {_shortened(value)}", f"it must be {problem}")
            if type(value) is int and value > 1 << 53:
                self.own[name] = float(value)  # which tensors take, unlike integers of more than 64 bits
        if not isinstance(self.hidden_act, str) or self.hidden_act not in ACTIVATIONS:
            raise LlmkitError(
                f"model configuration: activation {self.hidden_act!r} is not supported",
                "known: " + ", ".join(ACTIVATIONS),
            )
        for numbers in (self.rope_scaling or {}, self.local_rope or {}):
            for name in ("short_factor", "long_factor"):
                if name in numbers and len(numbers[name]) != self.rotary_dims // 2:
                    raise LlmkitError(
                        f"model configuration: {name} has {len(numbers[name])} numbers",
                        f"it must have one for each of {self.rotary_dims // 2} pairs of rotated dimensions",
                    )

    @property
    def family(self) -> Any:
        """The architecture's `Family` (model/family.py, which imports this file)."""
        return ARCHITECTURES.get(self.architecture)

    @property
    def rotary_dims(self) -> int:
        """Number of dimensions of each head that the rotary embedding rotates: the first ones."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def context(self) -> int:
        """Most tokens of a sequence: max_position_embeddings, or what yarn extends its original context to, since many
        published configurations leave max_position_embeddings as it was before."""
        scaling = self.rope_scaling or {}
        if scaling.get("rope_type") != "yarn":
            return self.max_position_embeddings
        original = scaling.get(ORIGINAL) or self.max_position_embeddings
        return max(self.max_position_embeddings, int(original * (scaling.get("factor") or 1)))

    @property
    def activation(self) -> str:
        """The function between the matrices of feed-forward networks (model/operations.py)."""
        name: str | None = self.family.activations.get(self.hidden_act)
        return name or ACTIVATIONS[self.hidden_act]

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
        family = self.family
        fields = dataclasses.asdict(self)
        del fields["architecture"], fields["local_rope"]
        own = {
            name: value
            for name, value in fields.pop("own").items()
            if not (family.keys[name].omitted and value == family.keys[name].default)
        }
        if self.partial_rotary_factor == family.defaults.get("partial_rotary_factor", 1):
            del fields["partial_rotary_factor"]
        if not family.rotary:
            del fields["rope_theta"], fields["rope_scaling"]
        activation = {family.renamed.get("hidden_act", ("hidden_act",))[0]: fields.pop("hidden_act")}
        fields = {family.renamed.get(name, (name,))[0]: value for name, value in fields.items()}
        if self.rope_scaling and self.rope_scaling["rope_type"] == "yarn" and "factor" not in self.rope_scaling:
            old = self.rope_scaling.get(ORIGINAL) or self.max_position_embeddings
            fields["rope_scaling"] = self.rope_scaling | {"factor": self.max_position_embeddings / old}
        if "layer_types" in own:
            own["layer_types"] = [
                FULL if family.window(self, layer) is None else SLIDING for layer in range(self.num_hidden_layers)
            ]
        if family.local_theta:
            main = {"rope_type": "default"} | (self.rope_scaling or {}) | {"rope_theta": self.rope_theta}
            fields["rope_parameters"] = {FULL: main, SLIDING: self.local_rope}
            del fields["rope_scaling"]  # transformers prefers it
        elif "rope_scaling" in family.defaults and self.rope_scaling is None:  # null would mean the default
            fields["rope_parameters"] = {"rope_type": "default", "rope_theta": self.rope_theta}
            del fields["rope_scaling"]
        return {
            "architectures": [family.hf_class],
            "model_type": self.architecture,
            **activation,
            "attention_dropout": 0.0,
            "use_cache": True,
            "dtype": dtype,
            "torch_dtype": dtype,
            **fields,
            **own,
        }

    @classmethod
    def from_hf(cls, content: dict[str, Any], where: str = "config.json") -> ModelConfig:
        """From the content of a config.json, old or new style; LlmkitError names what is missing or not supported."""
        kind = content.get("model_type")
        if kind not in ARCHITECTURES.names():
            hint = "its auto_map names code, and no code of a model directory runs; " if content.get("auto_map") else ""
            raise LlmkitError(f"{where}: unknown architecture {kind!r}", hint + _nearest(content))
        if content.get("auto_map"):
            warnings.warn(f"{where}: auto_map is ignored: no code of a model runs", InputWarning, stacklevel=2)
        if content.get("is_causal") is False:
            raise LlmkitError(f"{where}: is_causal is false", "models of text in both directions are not supported")
        family = ARCHITECTURES.get(kind)
        fields: dict[str, Any] = {}
        for name in FIELDS:
            keys = family.renamed.get(name, (name,))
            found = [content[key] for key in keys if content.get(key) is not None]
            if found:
                fields[name] = found[0]
        defaults = DEFAULTS | dict(family.defaults)
        if family.rotary:
            fields |= rope_fields(content, where, family, fields.get("rope_theta") or defaults["rope_theta"])
        else:
            fields = {name: value for name, value in fields.items() if "rope" not in name}
        heads = fields.get("num_attention_heads")
        fields = {"num_key_value_heads": heads} | defaults | fields
        width = fields.get("hidden_size")
        if "intermediate_size" in defaults and fields["intermediate_size"] is None and isinstance(width, int):
            fields["intermediate_size"] = 4 * width
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            if name not in fields:
                raise LlmkitError(
                    f"{where}: no {family.renamed.get(name, (name,))[0]}", "the configuration is incomplete"
                )
        if fields["head_dim"] is None:
            width = fields["hidden_size"]
            if not isinstance(heads, int) or not isinstance(width, int) or heads < 1 or width % heads:
                raise LlmkitError(
                    f"{where}: hidden_size {width!r} is not a multiple of {heads!r} heads", "add head_dim"
                )
            fields["head_dim"] = width // heads
        sliding = content.get("use_sliding_window")
        fields["own"] = {
            name: content.get(name, key.when_sliding or key.default if sliding else key.default)
            for name, key in family.keys.items()
        }
        layers = content.get("layer_types") or []
        if "layer_types" not in family.keys and (
            (content.get("use_sliding_window") and "sliding_window" not in family.keys)
            or (isinstance(layers, list) and set(map(str, layers)) - {FULL})
        ):
            raise LlmkitError(
                f"{where}: {kind} has no layers with a sliding window beside others",
                "leave out use_sliding_window and layer_types if your texts are shorter than the window",
            )
        try:
            config = cls(architecture=str(kind), **fields)
        except LlmkitError as error:
            raise LlmkitError(error.message.replace("model configuration", where, 1), error.hint) from None
        for name, key in family.keys.items():  # a list that says what the pattern says is left out
            if key.kind in ("layers", "switches") and config.own[name]:
                plain = dataclasses.replace(config, own=config.own | {name: None})
                if all(
                    kind(plain, i) == kind(config, i)
                    for kind in (family.window, family.rope)
                    for i in range(config.num_hidden_layers)
                ):
                    config = plain
        return config


# Fields of ModelConfig that a config.json has under their own names, or those of Family.renamed.
OF_THE_FAMILY = ("architecture", "own", "local_rope")
FIELDS = [item.name for item in dataclasses.fields(ModelConfig) if item.name not in OF_THE_FAMILY]


def _nearest(content: dict[str, Any]) -> str:
    """A hint that says that this is no decoder of text, or names the known architecture with the config.json most like
    `content`: most of its keys are there, and few that belong to others."""
    classes = content.get("architectures")
    if isinstance(classes, list) and classes and not any(str(name).endswith(CAUSAL) for name in classes):
        known_names = ", ".join(ARCHITECTURES.names())
        return f"{_shortened(classes[0])} is not a causal language model of text alone; known: {known_names}"
    known = {name: ARCHITECTURES.get(name).config_keys() for name in ARCHITECTURES.names()}
    rope = content.get("rope_parameters")
    keys = content.keys() | (rope.keys() if isinstance(rope, dict) else set())
    telling = keys & set[str]().union(*(keys for pair in known.values() for keys in pair))

    def distance(name: str) -> tuple[int, int, str]:
        always, others = known[name]
        return len(always - telling) + len(telling - always - others), -len(telling & others), name

    names = sorted(known, key=distance)
    return f"its configuration is most like that of {names[0]}; known: " + ", ".join(sorted(names))


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else text[:57] + "..."


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
    sizes = PRESETS[size]
    architecture = ARCHITECTURES.get(family or DEFAULT_FAMILY)
    if not architecture.grouped:
        sizes = sizes | {"num_key_value_heads": sizes["num_attention_heads"]}
    own = architecture.preset(sizes)
    return ModelConfig(vocab_size=vocab_size, architecture=family or DEFAULT_FAMILY, **sizes, own=own)


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

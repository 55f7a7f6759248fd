"""The tensors, parameter count and memory of a model, from its architecture and configuration. No torch.

    family = config.family
    family.parameter_count(config)              # tied weights once
    expected_tensors(config)                    # {"model.embed_tokens.weight": (8192, 96), ...}, in the decoder's order
    find_parameter(config, "model.layers.0.mlp.down_proj.weight")   # Parameter((96, 256), "linear", "mlp", True)

The block's parameters are its own; around the blocks every decoder has an embedding, a final norm and, unless
tied, an output layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from llmkit.model.blocks import Block, Kind, NormSpec, Parameter, Part
from llmkit.model.config import FULL, SLIDING, ModelConfig
from llmkit.model.rope import Rope, is_positive

# What follows the name of a linear layer in the names of its adapter's tensors (model/lora/config.py).
LORA_A, LORA_B, MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"
TOKENS = ".token_adapter.trainable_tokens_delta"  # rows of the embedding or output layer
ADAPTED: dict[str, Kind] = {LORA_A: "lora_A", LORA_B: "lora_B", MAGNITUDE: "magnitude", TOKENS: "tokens"}
ROTARY_TABLE = "rotary_emb.inv_freq"  # a table that old directories hold for each layer


@dataclass(frozen=True, slots=True)
class Names:
    """Names of a decoder's outer modules in checkpoints. `positions` is the table of learned positions, if any."""

    body: str = "model"
    embedding: str = "embed_tokens"
    layers: str = "layers"
    norm: str = "norm"
    head: str = "lm_head"
    positions: str = ""


@dataclass(frozen=True, slots=True)
class Key:
    """A key of config.json that only some families have: its default and what values it takes.

    A "number" is above 0, an "amount" may be 0. A "fixed" key is one whose other values are not supported. With
    `omitted` it is written only where it differs from its default. `when_sliding` is another default, of a
    configuration with `use_sliding_window`.
    """

    default: Any
    kind: Literal[
        "flag", "number", "amount", "count", "count or null", "number or null", "layers", "switches", "fixed"
    ] = "number"
    omitted: bool = False
    when_sliding: Any = None

    def problem(self, value: Any, layers: int) -> str:
        """What a value must be, if it is not that; "" otherwise."""
        if value is None and (self.kind.endswith("null") or self.kind in ("layers", "switches")):
            return ""
        match self.kind:
            case "fixed":
                return "" if value in (self.default, None) else f"{self.default!r}: other values are not supported"
            case "flag":
                return "" if isinstance(value, bool) else "true or false"
            case "layers" | "switches":
                known = (FULL, SLIDING) if self.kind == "layers" else (0, 1)
                fits = isinstance(value, list) and len(value) == layers and all(item in known for item in value)
                return "" if fits else f"a list of {' and '.join(map(str, known))}, one for each of {layers:,} layers"
            case "count" | "count or null":
                return "" if is_positive(value) and isinstance(value, int) else "a positive integer"
            case "amount":
                return "" if is_positive(value) or (value == 0 and type(value) in (int, float)) else "a number"
        return "" if is_positive(value) else "a positive number"


# Sliding windows where config.json may switch them on, from layer `max_window_layers` on.
OPTIONAL_WINDOW = {
    "use_sliding_window": Key(False, "flag", omitted=True),
    "sliding_window": Key(None, "count or null", omitted=True, when_sliding=4096),
    "max_window_layers": Key(28, "amount", omitted=True),
    "layer_types": Key(None, "layers", omitted=True),
}


def no_window(config: ModelConfig, layer: int) -> int | None:
    """Every layer sees the whole context."""
    return None


def uniform_window(config: ModelConfig, layer: int) -> int | None:
    """Every layer sees `sliding_window` tokens, if that is set, but those that `layer_types` excepts."""
    window: int | None = config.own["sliding_window"]
    types = config.own.get("layer_types")
    return None if types and types[layer] == FULL else window


def optional_window(config: ModelConfig, layer: int) -> int | None:
    """That of OPTIONAL_WINDOW."""
    own = config.own
    if not own["use_sliding_window"]:
        return None
    types = own["layer_types"]
    slides = types[layer] == SLIDING if types else layer >= own["max_window_layers"]
    return own["sliding_window"] if slides else None


def patterned_window(interval: int) -> Callable[[ModelConfig, int], int | None]:
    """A sliding window in all layers but every `interval`-th, unless `layer_types` says otherwise."""

    def window(config: ModelConfig, layer: int) -> int | None:
        types = config.own["layer_types"]
        slides = types[layer] == SLIDING if types else (layer + 1) % interval != 0
        return config.own["sliding_window"] if slides else None

    return window


def window_by_pattern(config: ModelConfig, layer: int) -> int | None:
    """`patterned_window` with the configuration's own interval, `sliding_window_pattern`."""
    return patterned_window(config.own["sliding_window_pattern"])(config, layer)


def global_rope(config: ModelConfig, layer: int) -> Rope:
    """The same rotary embedding in every layer."""
    family: Family = config.family
    return _rope(config, (config.rope_scaling or {}) | {"rope_theta": config.rope_theta}, family)


def local_and_global_rope(config: ModelConfig, layer: int) -> Rope:
    """Sliding layers have a rotary embedding of their own."""
    family: Family = config.family
    if family.window(config, layer) is None or config.local_rope is None:
        return global_rope(config, layer)
    return _rope(config, config.local_rope, family)


def no_rope(config: ModelConfig, layer: int) -> None:
    """No rotary embedding."""


def _rope(config: ModelConfig, parameters: Mapping[str, Any], family: Family) -> Rope:
    numbers: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in parameters.items()
    }
    kind, theta = str(numbers.pop("rope_type", "default")), float(numbers.pop("rope_theta"))
    if old := config.own.get("original_max_position_embeddings"):
        numbers["original_max_position_embeddings"] = old  # of the configuration itself: it is preferred
    return Rope(
        theta, config.rotary_dims, config.max_position_embeddings, kind, tuple(sorted(numbers.items())),
        family.adjacent_pairs, family.float32_rotation,
    )  # fmt: skip


COMMON_KEYS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "rms_norm_eps", "hidden_act",
    "max_position_embeddings", "num_key_value_heads", "head_dim", "attention_bias", "mlp_bias",
)  # fmt: skip


def one(config: ModelConfig) -> float:
    """No multiplier."""
    return 1.0


@dataclass(frozen=True, slots=True)
class Family:
    """An architecture. It is registered under its model_type (model/families/).

    `hf_class` goes into "architectures" of config.json. `defaults` are transformers' values for fields of
    ModelConfig that a config.json leaves out, where they differ from config.DEFAULTS; `keys` are keys that only this
    family has, and `renamed` the keys of fields with other names than ModelConfig's, the written one first.
    `unsupported` are switches of ModelConfig that the architecture does not have. With `divisible_heads` hidden_size
    has to be a multiple of the number of heads; without `grouped` each head has its own keys and values, and their
    widths add up to hidden_size. `preset` gives values of `keys` for a new model of certain sizes.

    `norm` is the one after the last layer. `rope` and `window` give the rotary embedding and the number of tokens
    that a layer sees (itself included; None: all). `rope_kinds` are other names of kinds of scaling; `local_theta` is
    the default base of sliding layers where they have a rotary embedding of their own. With `partial_rotary` a
    configuration may rotate a part of each head. `adjacent_pairs` and `float32_rotation` are those of Rope.

    In `parallel`, attention and the network of a layer read the same input (blocks.ResidualBlock).

    Multipliers: of the embedding (with `rounded_scale`, rounded to the type of the weights), of what each layer adds,
    and of the final hidden states. `softcap` c gives logits c · tanh(logits / c). `ignored` are endings of names of
    tensors that directories may hold in addition. `activations` are names that mean another function here.
    """

    hf_class: str
    block: Block
    defaults: Mapping[str, Any] = field(default_factory=dict)
    keys: Mapping[str, Key] = field(default_factory=dict)
    renamed: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    unsupported: tuple[str, ...] = ()
    divisible_heads: bool = False
    grouped: bool = True
    preset: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda sizes: {}
    names: Names = Names()
    norm: Callable[[ModelConfig], Part] = NormSpec.from_config
    rope: Callable[[ModelConfig, int], Rope | None] = global_rope
    rope_kinds: Mapping[str, str] = field(default_factory=dict)
    local_theta: float | None = None
    partial_rotary: bool = False
    adjacent_pairs: bool = False
    float32_rotation: bool = False
    window: Callable[[ModelConfig, int], int | None] = no_window
    embedding_scale: Callable[[ModelConfig], float] = one
    rounded_scale: bool = False
    parallel: Callable[[ModelConfig], bool] = lambda config: False
    residual_scale: Callable[[ModelConfig], float] = one
    hidden_scale: Callable[[ModelConfig], float] = one
    softcap: Callable[[ModelConfig], float | None] = lambda config: None
    ignored: tuple[str, ...] = ()
    activations: Mapping[str, str] = field(default_factory=dict)

    @property
    def rotary(self) -> bool:
        """Whether the architecture has rotary embeddings."""
        return self.rope is not no_rope

    @property
    def embedding(self) -> str:
        """Full name of the embedding's weights."""
        return f"{self.names.body}.{self.names.embedding}.weight"

    @property
    def head(self) -> str:
        """Full name of the output layer's weights, which tied models lack."""
        return f"{self.names.head}.weight"

    @property
    def layers(self) -> str:
        """What precedes a layer's number in the names of its parameters."""
        return f"{self.names.body}.{self.names.layers}."

    def config_keys(self) -> tuple[set[str], set[str]]:
        """Keys by which a config.json of this family is recognised: those that it always has, and others."""
        absent = {*self.unsupported, *(() if self.grouped else ("num_key_value_heads",))}
        absent |= set() if "head_dim" in self.defaults else {"head_dim"}
        always = {self.renamed.get(name, (name,))[0] for name in COMMON_KEYS if name not in absent}
        always |= {name for name, key in self.keys.items() if not key.omitted}
        rotary = {"partial_rotary_factor"} if self.partial_rotary else set()
        return always, (self.keys.keys() | rotary) - always

    def transposed(self, config: ModelConfig) -> bool:
        """Whether the matrices of the layers are stored [in, out]."""
        return any(getattr(part, "transposed", False) for part in self.block.parts(config, 0).values())

    def layer_parameters(self, config: ModelConfig, layer: int) -> dict[str, Parameter]:
        """Parameters of one layer by name within it."""
        return {
            f"{part}.{name}": parameter
            for part, spec in self.block.parts(config, layer).items()
            for name, parameter in spec.parameters().items()
        }

    def outer_parameters(self, config: ModelConfig) -> dict[str, Parameter]:
        """Parameters outside of the layers."""
        names, table = self.names, (config.vocab_size, config.hidden_size)
        parameters = {self.embedding: Parameter(table, "embedding", "embedding")}
        if names.positions:
            positions = (config.max_position_embeddings, config.hidden_size)
            parameters[f"{names.body}.{names.positions}.weight"] = Parameter(positions, "embedding", "embedding")
        for name, parameter in self.norm(config).parameters().items():
            parameters[f"{names.body}.{names.norm}.{name}"] = parameter
        return parameters if config.tie_word_embeddings else parameters | {self.head: Parameter(table, "head", "head")}

    def parameters(self, config: ModelConfig) -> Iterator[tuple[str, Parameter]]:
        """Every parameter of the model by its Hugging Face name, in the decoder's order."""
        outer = self.outer_parameters(config)
        first = [name for name, parameter in outer.items() if parameter.kind == "embedding"]
        yield from ((name, outer.pop(name)) for name in first)
        for layer in range(config.num_hidden_layers):
            for name, parameter in self.layer_parameters(config, layer).items():
                yield f"{self.layers}{layer}.{name}", parameter
        yield from outer.items()

    def parameter_count(self, config: ModelConfig) -> int:
        """Number of weights, tied ones counted once. All layers are the size of the first: a configuration may
        claim a billion of them."""
        layer, outer = (
            sum(math.prod(parameter.shape) for parameter in parameters.values() if parameter.kind != "constant")
            for parameters in (self.layer_parameters(config, 0), self.outer_parameters(config))
        )
        return config.num_hidden_layers * layer + outer

    def activation_elements(self, config: ModelConfig) -> tuple[int, int]:
        """Elements per token that all layers keep for the backward pass: in float32, and in the type of the
        matrix products."""
        parts = [part.activation_elements() for part in self.block.parts(config, 0).values()]
        full, product = (sum(counts) for counts in zip(*parts, strict=True))
        return config.num_hidden_layers * full, config.num_hidden_layers * product


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight of the decoder that `config` describes."""
    return {name: parameter.shape for name, parameter in config.family.parameters(config)}


def find_parameter(config: ModelConfig, name: str) -> Parameter | None:
    """The parameter of this name in a model of this configuration; that of an adapter has the shape of the matrix."""
    family: Family = config.family
    for ending, kind in ADAPTED.items():
        if name.endswith(ending):
            matrix = find_parameter(config, name.removesuffix(ending) + ".weight")
            return matrix and replace(matrix, kind=kind, initial=0.0 if kind == "lora_B" else None)
    if not name.startswith(family.layers):
        return family.outer_parameters(config).get(name)
    layer, _, inner = name.removeprefix(family.layers).partition(".")
    return family.layer_parameters(config, int(layer)).get(inner) if layer.isdecimal() else None


def linear_weights(config: ModelConfig) -> list[str]:
    """Names of the matrices of the layers, which are what is quantised, sorted."""
    return sorted(name for name, parameter in config.family.parameters(config) if parameter.kind == "linear")


def model_names(stored: Iterable[str], config: ModelConfig) -> dict[str, str]:
    """The decoder's name of each tensor in a directory, which may lack the prefix of the body, as the original GPT-2
    does, or hold the weights of a tied model under the name of the output layer only."""
    family: Family = config.family
    names, body = list(stored), f"{family.names.body}."
    prefix = "" if any(name.startswith(body) for name in names) else body
    found = {name: name if name == family.head else prefix + name for name in names}
    if config.tie_word_embeddings and family.head in found and family.embedding not in found.values():
        found[family.head] = family.embedding
    return found


def is_ignored(name: str, config: ModelConfig) -> bool:
    """Whether a directory may hold this tensor although the model has none: the output layer of a tied model,
    rotary tables and masks of old directories."""
    family: Family = config.family
    return (config.tie_word_embeddings and name == family.head) or name.endswith((ROTARY_TABLE, *family.ignored))

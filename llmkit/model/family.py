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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from llmkit.model.blocks import Block, NormSpec, Parameter
from llmkit.model.config import ModelConfig

EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
LAYERS = "model.layers."  # followed by the layer's number and the parameter's name in its block
ROTARY_TABLE = "rotary_emb.inv_freq"  # a table that old directories hold for each layer


@dataclass(frozen=True, slots=True)
class Family:
    """An architecture. It is registered under its model_type (model/families/).

    `hf_class` goes into "architectures" of config.json. `defaults` are transformers' values for keys that a
    config.json leaves out, where they differ from config.DEFAULTS. `unsupported` are switches of
    ModelConfig that the architecture does not have. With `divisible_heads` hidden_size has to be a multiple of
    the number of heads. `float32_gain` is that of the final norm (blocks.NormSpec); with `float32_rotation` cos
    and sin of the rotary embedding stay in float32.
    """

    hf_class: str
    block: Block
    defaults: Mapping[str, Any] = field(default_factory=dict)
    unsupported: tuple[str, ...] = ()
    divisible_heads: bool = False
    float32_gain: bool = False
    float32_rotation: bool = False

    def layer_parameters(self, config: ModelConfig, layer: int) -> dict[str, Parameter]:
        """Parameters of one layer by name within it."""
        return {
            f"{part}.{name}": parameter
            for part, spec in self.block.parts(config, layer).items()
            for name, parameter in spec.parameters().items()
        }

    def final_norm(self, config: ModelConfig) -> NormSpec:
        """The norm after the last layer."""
        return NormSpec(config.hidden_size, config.rms_norm_eps, self.float32_gain)

    def outer_parameters(self, config: ModelConfig) -> dict[str, Parameter]:
        """Parameters outside of the layers."""
        table = (config.vocab_size, config.hidden_size)
        parameters = {
            EMBEDDING: Parameter(table, "embedding", "embedding"),
            FINAL_NORM: self.final_norm(config).parameters()["weight"],
        }
        return parameters if config.tie_word_embeddings else parameters | {HEAD: Parameter(table, "head", "head")}

    def parameters(self, config: ModelConfig) -> Iterator[tuple[str, Parameter]]:
        """Every parameter of the model by its Hugging Face name, in the decoder's order."""
        outer = self.outer_parameters(config)
        yield EMBEDDING, outer.pop(EMBEDDING)
        for layer in range(config.num_hidden_layers):
            for name, parameter in self.layer_parameters(config, layer).items():
                yield f"{LAYERS}{layer}.{name}", parameter
        yield from outer.items()

    def parameter_count(self, config: ModelConfig) -> int:
        """Number of weights, tied ones counted once. All layers are the size of the first: a configuration may
        claim a billion of them."""
        layer, outer = (
            sum(math.prod(parameter.shape) for parameter in parameters.values())
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
    """The parameter of this name in a model of this configuration."""
    family: Family = config.family
    if not name.startswith(LAYERS):
        return family.outer_parameters(config).get(name)
    layer, _, inner = name.removeprefix(LAYERS).partition(".")
    return family.layer_parameters(config, int(layer)).get(inner) if layer.isdecimal() else None


def linear_weights(config: ModelConfig) -> list[str]:
    """Names of the matrices of the layers, which are what is quantised, sorted."""
    return sorted(name for name, parameter in config.family.parameters(config) if parameter.kind == "linear")


def is_ignored(name: str, config: ModelConfig) -> bool:
    """Whether a directory may hold this tensor although the model has none: the output layer of a tied model,
    rotary tables of old directories."""
    return (config.tie_word_embeddings and name == HEAD) or name.endswith(ROTARY_TABLE)

"""Initial distributions of a new decoder's weights, by parameter name.

    initial(config, "model.layers.0.mlp.down_proj.weight", 2)   # Initial(std=0.0053)

Normal with the configuration's `initializer_range` as standard deviation. It is smaller by √(2·layers) for
matrices whose output is added to the residual stream, so that the stream's variance does not grow with depth
(GPT-2). Adapters start as in PEFT: A uniform within 1/√inputs, B zero, magnitudes as the norms of the rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from llmkit.model.config import ModelConfig
from llmkit.model.family import find_parameter

# Of parts of adapters: what they start from, where that is not 0.
STARTS = {"lora_B": "", "magnitude": "norms of rows", "tokens": "means of rows"}


@dataclass(frozen=True, slots=True)
class Initial:
    """A normal distribution with mean 0 and standard deviation `std`; if that is 0, the constant `value`.

    With `bound` a uniform distribution from −bound to bound. `other` describes values that depend on other weights.
    """

    std: float = 0.0
    value: float = 0.0
    bound: float = 0.0
    other: str = ""

    def __str__(self) -> str:
        if self.other or self.bound:
            return self.other or f"uniform {self.bound:.3g}"
        return f"normal {self.std:.3g}" if self.std else f"{self.value:g}"


def initial(config: ModelConfig, name: str, dimensions: int) -> Initial:
    """The initial distribution of the parameter `name`, which has this number of dimensions."""
    parameter = find_parameter(config, name)
    if parameter is not None and parameter.kind == "lora_A":
        return Initial(bound=parameter.shape[not config.family.transposed(config)] ** -0.5)
    if parameter is not None and parameter.kind in STARTS:
        return Initial(other=STARTS[parameter.kind])
    if dimensions < 2:
        value = parameter.initial if parameter is not None else None
        return Initial(value=value if value is not None else 0.0 if name.endswith("bias") else 1.0)
    to_residual = parameter is not None and parameter.to_residual
    return Initial(config.initializer_range / (math.sqrt(2 * config.num_hidden_layers) if to_residual else 1.0))

"""What the weights of a new decoder are drawn from: by name and number of dimensions.

    initial(config, "model.layers.0.mlp.down_proj.weight", 2)   # Initial(std=0.0053)

Normal with the configuration's `initializer_range`; matrices that write into the residual stream by √(2·layers) smaller, so that the stream's
variance does not grow with the depth (GPT-2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from llmkit.model.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Initial:
    """Normal with mean 0 and `std`; where that is 0, every element is `value`."""

    std: float = 0.0
    value: float = 0.0

    def __str__(self) -> str:
        return f"normal {self.std:.3g}" if self.std else f"{self.value:g}"


def initial(config: ModelConfig, name: str, dimensions: int) -> Initial:
    """Initialisation of the tensor `name` that has so many dimensions."""
    if dimensions < 2:
        return Initial(value=0.0 if name.endswith("bias") else 1.0)
    into_stream = name.endswith(("o_proj.weight", "down_proj.weight"))
    return Initial(config.initializer_range / (math.sqrt(2 * config.num_hidden_layers) if into_stream else 1.0))

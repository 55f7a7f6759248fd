"""What a run needs: memory by what it is for, and FLOPs, before anything is made.

    memory(rows, config, tokens=4096, precision="bf16", device="cuda")    # {"weights": 5.0e9, ...} bytes

Weights, gradients and moments are exact. Activations are an estimate: what the layers keep for the way back, counted tensor by tensor for the decoder
without kernels that recompute. What comes and goes within an operation, and the allocator's slack, are not in it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from llmkit.model.config import ModelConfig
from llmkit.training.objectives import CHUNK_ELEMENTS
from llmkit.training.optim.parameter_groups import Row


def memory(rows: Iterable[Row], config: ModelConfig, tokens: int, precision: str, device: str) -> dict[str, int]:
    """Bytes of one process that puts `tokens` through the model at once; `snapshot` is in the memory of the host."""
    numbers = {row: math.prod(row.shape) for row in rows}
    weights = sum(numbers.values())
    moments: dict[str, int] = {}
    for row, count in numbers.items():
        name = f"moments of {row.optimizer}"
        moments[name] = moments.get(name, 0) + 4 * row.moments * count
    half = precision != "fp32"
    copies = sum(2 * count for row, count in numbers.items() if row.computed != row.stored)
    return {
        "weights": 4 * weights,
        "gradients": 4 * weights,
        **moments,
        **({f"weights in {precision}": copies} if copies else {}),
        "activations, about": tokens * activations(config, half),
        "logits, a chunk": CHUNK_ELEMENTS.get(device, 1 << 27) * (10 if half else 8),
        "snapshot on the host": 4 * weights + sum(moments.values()),
    }


def activations(config: ModelConfig, half: bool) -> int:
    """Bytes a token that all layers keep for the way back, about: the residual stream and norms in float32, the rest in the products' type."""
    full, product = config.family.activation_elements(config)
    return 4 * full + (2 if half else 4) * product


def flops(config: ModelConfig, length: int) -> tuple[int, int]:
    """Training FLOPs a token, 6 for each weight that multiplies, with attention over all `length` positions (PaLM's count), and over half of them,
    which is what a causal model needs."""
    half = config.flops_per_token(length)
    return 2 * half - config.flops_per_token(0), half

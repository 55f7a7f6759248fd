"""Resources that a run needs, before anything is allocated: memory by use, and FLOPs.

    estimate_memory(rows, config, tokens=4096, precision="bf16", device="cuda")    # {"weights": 5.0e9, ...} bytes

Weights, gradients and moments are exact. Activations are an estimate: what the layers keep for the backward
pass, counted tensor by tensor for the decoder without kernels that recompute. Temporary tensors within an
operation, and the allocator's slack, are not included.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from llmkit.model.config import ModelConfig
from llmkit.training.objectives import CHUNK_ELEMENTS
from llmkit.training.optim.parameter_groups import TensorRow


def estimate_memory(
    rows: Iterable[TensorRow], config: ModelConfig, tokens: int, precision: str, device: str
) -> dict[str, int]:
    """Bytes for one process that passes `tokens` tokens through the model at once.

    `snapshot on the host` is in host memory.
    """
    elements = {row: math.prod(row.shape) for row in rows}
    weights = sum(elements.values())
    moments: dict[str, int] = {}
    for row, count in elements.items():
        name = f"moments of {row.optimizer}"
        moments[name] = moments.get(name, 0) + 4 * row.moments * count
    half = precision != "fp32"
    copies = sum(2 * count for row, count in elements.items() if row.computed != row.stored)
    return {
        "weights": 4 * weights,
        "gradients": 4 * weights,
        **moments,
        **({f"weights in {precision}": copies} if copies else {}),
        "activations, about": tokens * activation_bytes(config, half),
        "logits, a chunk": CHUNK_ELEMENTS.get(device, 1 << 27) * (10 if half else 8),
        "snapshot on the host": 4 * weights + sum(moments.values()),
    }


def activation_bytes(config: ModelConfig, half: bool) -> int:
    """Approximate bytes per token that all layers keep for the backward pass: residual stream and norms in
    float32, the rest in the type of the matrix products."""
    full, product = config.family.activation_elements(config)
    return 4 * full + (2 if half else 4) * product


def training_flops(config: ModelConfig, length: int) -> tuple[int, int]:
    """Training FLOPs per token, 6 for each weight in a matrix product: with attention over all `length`
    positions (PaLM's count), and over half of them, as a causal model needs."""
    half = config.flops_per_token(length)
    return 2 * half - config.flops_per_token(0), half

"""Muon: the update of a matrix is its orthogonalized momentum; AdamW updates everything but the matrices of the
layers.

    optimizer = Muon(groups)       # from optimizer.build_optimizer; group["optimizer"] names the one that updates it

For a matrix W [A, B] with gradient G and learning rate η (Keller Jordan 2024; scale and decay of
arXiv:2502.16982):

    M ← M + (1 − μ)(G − M)                      momentum, μ = 0.95
    O ← orthogonalize(G + μ(M − G))             Nesterov; U·Vᵀ: singular vectors kept, singular values about 1
    W ← W − η·λ·W − η·0.2·√max(A, B)·O          as large as AdamW's update, so that η and the decay λ mean the same

Orthogonalization takes five steps of a quintic Newton-Schulz iteration: only matrix products, about 5·(4·n²·m
+ 2·n³) FLOPs per matrix with sides n ≤ m, whatever the batch. Against 6·n·m FLOPs per token for the rest this
is small with many tokens per step: a tenth at 33·n tokens, for a square matrix. The products run in bfloat16
where the device has it in hardware, else in float32, in batches of equal shape. The matrices of queries, keys
and values are separate. State: one number per weight, where AdamW has two. A sharded matrix (DTensor) is
gathered for its update on every process.

torch.optim.Muon is the same optimizer, always in bfloat16 and one matrix at a time;
tests/bench/optimizer_speed.md shows what that costs on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from llmkit.training.distributed.layout import local_shard, local_tensor
from llmkit.training.optim.adamw import AdamW, without_compiler

MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # the steepest at 0 that keep singular values near 1
ITERATIONS = 5
MIN_NORM = 1e-7  # lower bound for the norm divided by
BATCH_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 26}  # of the matrices multiplied at once


@without_compiler
class Muon(torch.optim.Optimizer):
    """Updates groups whose `optimizer` is "muon" (only matrices) by Muon, the others by a fused AdamW with
    the options `adamw`. Both share one state."""

    def __init__(self, groups: list[dict[str, Any]], **adamw: Any) -> None:
        super().__init__(groups, {})
        adamw_groups = [group for group in self.param_groups if group["optimizer"] != "muon"]
        # The same group objects, so that it sees their learning rates.
        self._adamw = AdamW(adamw_groups, **adamw) if adamw_groups else None
        if self._adamw:
            self._adamw.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        if self._adamw:
            self._adamw.step()
        for group in self.param_groups:
            if group["optimizer"] == "muon":
                self._update(
                    [p for p in group["params"] if p.grad is not None], float(group["lr"]), group["weight_decay"]
                )

    def _update(self, parameters: list[Tensor], rate: float, decay: float) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        for batch in _batches_by_shape(parameters):
            directions = []
            for parameter in batch:
                momentum, gradient = self.state[parameter]["momentum"], parameter.grad
                assert gradient is not None
                momentum.lerp_(gradient, 1 - MOMENTUM)
                directions.append(_full_tensor(torch.lerp(gradient, momentum, MOMENTUM)))
            updates = orthogonalize(torch.stack(directions).to(product_type(directions[0].device)))
            scale = 0.2 * math.sqrt(max(batch[0].shape))
            for parameter, update in zip(batch, updates, strict=True):
                shard = local_shard(update, parameter).to(parameter.dtype)
                local_tensor(parameter).mul_(1 - rate * decay).add_(shard, alpha=-rate * scale)


def orthogonalize(matrices: Tensor) -> Tensor:
    """Matrices [N, A, B] with approximately the singular vectors of `matrices` and singular values between
    about 0.7 and 1.2; zero stays zero."""
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.mT
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=MIN_NORM)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.mT


def product_type(device: torch.device) -> torch.dtype:
    """The type in which the products of the iteration are computed."""
    half = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if half else torch.float32


def _batches_by_shape(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """The parameters in lists of equal shape, each one batch of matrix products."""
    shapes: dict[torch.Size, list[Tensor]] = {}
    for parameter in parameters:
        shapes.setdefault(parameter.shape, []).append(parameter)
    for shape, group in shapes.items():
        batch_size = max(1, BATCH_ELEMENTS.get(group[0].device.type, 1 << 26) // shape.numel())
        for start in range(0, len(group), batch_size):
            yield group[start : start + batch_size]


def _full_tensor(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor

"""Muon: the momentum of a matrix, made orthogonal, is its update; everything that is no matrix of a layer goes to AdamW.

    optimizer = Muon(groups)       # of training.optimizer.build; group["optimizer"] says which of the two

For a matrix W [A, B] with gradient G and learning rate η (Keller Jordan 2024; scale and decay of arXiv:2502.16982):

    M ← M + (1 − μ)(G − M)                             momentum, μ = 0.95
    O ← orthogonalise(G + μ(M − G))                    Nesterov; all singular values about 1, those of U·Vᵀ
    W ← W − η·λ·W − η·0.2·√max(A, B)·O                 an update as large as one of AdamW, so that η and the decay λ mean the same for both

Five steps of a quintic Newton-Schulz iteration do the orthogonalisation: products alone, about 5·(4·n²·m + 2·n³) FLOPs a matrix with sides n ≤ m,
whatever the batch. Against 6·n·m FLOPs a token of the rest it is small for many tokens a step: a tenth at 33·n, for a square. They run in bfloat16
where the device has it in hardware, else in float32, in batches of equal shape. The queries', keys' and values' matrices are matrices of their own.
State: one number a weight, where AdamW has two. A sharded matrix (DTensor) is gathered for its update, on every process alike.

torch.optim.Muon is the same optimiser, always in bfloat16 and a matrix at a time: tests/bench/optimizer_speed.md has what that costs on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from llmkit.training.distributed.layout import local, local_part

MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # steepest at 0 of those that keep singular values near 1
ITERATIONS = 5
SMALLEST = 1e-7  # norm that is divided by at least
BATCH_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 26}  # of the matrices that are multiplied at once


class Muon(torch.optim.Optimizer):
    """Groups whose `optimizer` is "muon" (matrices alone) by Muon, the others by a fused AdamW made with `adamw` options; one state by parameter."""

    def __init__(self, groups: list[dict[str, Any]], **adamw: Any) -> None:
        super().__init__(groups, {})
        others = [group for group in self.param_groups if group["optimizer"] != "muon"]
        self._adamw = torch.optim.AdamW(others, **adamw) if others else None  # of the same groups: it sees their rates
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
        for batch in _of_equal_shape(parameters):
            directions = []
            for parameter in batch:
                momentum, gradient = self.state[parameter]["momentum"], parameter.grad
                assert gradient is not None
                momentum.lerp_(gradient, 1 - MOMENTUM)
                directions.append(_whole(torch.lerp(gradient, momentum, MOMENTUM)))
            updates = orthogonalise(torch.stack(directions).to(product_type(directions[0].device)))
            scale = 0.2 * math.sqrt(max(batch[0].shape))
            for parameter, update in zip(batch, updates, strict=True):
                part = local_part(update, parameter).to(parameter.dtype)
                local(parameter).mul_(1 - rate * decay).add_(part, alpha=-rate * scale)


def orthogonalise(matrices: Tensor) -> Tensor:
    """Matrices [N, A, B] with about the singular vectors of `matrices` and singular values between about 0.7 and 1.2; zero stays zero."""
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.mT
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=SMALLEST)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.mT


def product_type(device: torch.device) -> torch.dtype:
    """What the products of the iteration are computed in."""
    half = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if half else torch.float32


def _of_equal_shape(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """The parameters in lists of one shape, a batch of products each."""
    shapes: dict[torch.Size, list[Tensor]] = {}
    for parameter in parameters:
        shapes.setdefault(parameter.shape, []).append(parameter)
    for shape, found in shapes.items():
        most = max(1, BATCH_ELEMENTS.get(found[0].device.type, 1 << 26) // shape.numel())
        for start in range(0, len(found), most):
            yield found[start : start + most]


def _whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be sharded."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor

"""The gradient noise scale: from how many tokens a step on, a larger batch adds little (McCandlish et al., arXiv:1812.06162, appendix A).

The gradient of a batch of B tokens is the true gradient G plus noise, so the mean of its squared norm is |G|² + tr(Σ)/B. Two sizes in one step, a
micro-batch b and the whole step B, give both unknowns without bias:

    |G|²  = (B·|G_B|² − b·|G_b|²) / (B − b)            tr(Σ) = (|G_b|² − |G_B|²) / (1/b − 1/B)

Each is far too noisy by itself; their running means over many steps are divided: B_simple = tr(Σ) / |G|², in tokens. At that batch size half of the
gradient's squared norm is noise; well above it a run needs more tokens, below it more steps, for the same loss. Tokens of one sequence are no
independent draws, so what is counted per token are the draws that they amount to at this sequence length.

Cost: one norm over the gradients, on one step in EVERY. A step of a single micro-batch goes in two halves there, and of a single row gives nothing.
Shared among processes that hold the whole model, each one's first micro-batch is a part; where the model is sharded, they are one part together.
The running means decide nothing of the run; they are part of a checkpoint, so that the log of a resumed run is the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

EVERY = 10  # steps between measurements
MEMORY = 0.95  # of the running means, a measurement
ENOUGH = 10  # measurements before the ratio says anything
SETTLED = 0.25  # share of a run before which a batch beyond it is nothing to say: the scale starts small and grows as the loss falls


@dataclass(slots=True)
class NoiseScale:
    """Running means of tr(Σ) and |G|² and the number of measurements. They start at 0, which is out by one factor for both: their ratio is not."""

    noise: float = 0.0
    signal: float = 0.0
    count: int = 0
    objected: bool = False

    def measure(self, small: float, small_size: float, whole: float, whole_size: float) -> None:
        """Take in the squared norms of the mean gradients of a part and of the whole batch, with their sizes in tokens."""
        if not 0 < small_size < whole_size or not math.isfinite(small + whole):
            return
        signal = (whole_size * whole - small_size * small) / (whole_size - small_size)
        noise = (small - whole) / (1 / small_size - 1 / whole_size)
        self.noise = MEMORY * self.noise + (1 - MEMORY) * noise
        self.signal = MEMORY * self.signal + (1 - MEMORY) * signal
        self.count += 1

    @property
    def tokens(self) -> float | None:
        """B_simple; None while it is not known: too few measurements, or noise that hides the gradient."""
        if self.count < ENOUGH or self.signal <= 0 or self.noise <= 0:
            return None
        return self.noise / self.signal

    def objection(self, batch: int, done: float) -> str:
        """What there is to say, once, of so many tokens a step when the share `done` of the run is behind."""
        if self.objected or self.tokens is None or batch <= self.tokens or done < SETTLED:
            return ""
        self.objected = True
        return (
            f"{batch:,} tokens a step are beyond the critical batch size here, about {self.tokens:,.0f} (gradient noise scale): "
            "fewer a step would learn more from each"
        )

    def state(self) -> list[float]:
        """For a checkpoint."""
        return [self.noise, self.signal, self.count]

    def restore(self, state: Sequence[float]) -> None:
        """Inverse of `state`, of a file that may be anybody's; ValueError or TypeError for something else."""
        noise, signal, count = state or (0.0, 0.0, 0)  # nothing: of a run that has just begun
        if not all(abs(number) < 1e30 for number in (noise, signal, count)):
            raise ValueError("the gradient noise is no number")
        self.noise, self.signal, self.count = float(noise), float(signal), int(count)


def measured(step: int) -> bool:
    """Whether the noise is measured in step `step`, counted from 0."""
    return step % EVERY == 0


@dataclass(slots=True)
class Part:
    """The gradient of a process's first micro-batch of a step that weighs anything, as numbers that are summed over the processes.

    `sharded`: gradients are those of all processes' first micro-batches together; every process looks at them, whatever its own weighs.
    """

    sharded: bool = False
    values: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def look(self, parameters: Iterable[torch.nn.Parameter], weight: float, factor: float) -> None:
        """After a backward pass of a micro-batch of so much weight, whose gradients are the sum over its tokens times `factor`."""
        if self.values[2] or not (weight or self.sharded):
            return
        norm: Any = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        square = (float(norm.full_tensor() if self.sharded else norm) / factor) ** 2
        self.values = (square, weight, 1.0) if self.sharded else (square / weight**2, 1 / weight, 1.0)

    def together(self, sums: Sequence[float]) -> tuple[float, float]:
        """(squared norm of the mean gradient, size) from the `values` of all processes: their mean, and the harmonic mean of the sizes."""
        square, size, count = sums
        if not size:
            return 0.0, 0.0
        return (square / count / size**2, size) if self.sharded else (square / count, count / size)

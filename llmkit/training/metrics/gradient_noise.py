"""The gradient noise scale: the number of tokens per step beyond which a larger batch adds little (McCandlish et
al., arXiv:1812.06162, appendix A).

The gradient of a batch of B tokens is the true gradient G plus noise, so the mean of its squared norm is |G|²
+ tr(Σ)/B. Two batch sizes in one step, a micro-batch b and the whole step B, give unbiased estimates of both
unknowns:

    |G|²  = (B·|G_B|² − b·|G_b|²) / (B − b)            tr(Σ) = (|G_b|² − |G_B|²) / (1/b − 1/B)

Each is far too noisy by itself, so their running means over many steps are divided: B_simple = tr(Σ) / |G|²,
in tokens. At that batch size half of the gradient's squared norm is noise; far above it a run needs more
tokens, far below it more steps, for the same loss. Tokens of one sequence are not independent draws, so the
scale is in tokens at this sequence length.

Cost: one norm over the gradients, in one step out of EVERY. A step of a single micro-batch is split in two
halves there; a single row yields nothing. With whole models on several processes, each one's first
micro-batch is a small batch; with a sharded model they form one together. The running means influence nothing
in the run; they are stored in checkpoints so that the log of a resumed run is the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

EVERY = 10  # steps between measurements
MEMORY = 0.95  # of the running means, per measurement
ENOUGH = 10  # measurements before the ratio is meaningful
# Share of a run before which there is no warning: the scale starts small and grows as the loss falls.
SETTLED = 0.25


@dataclass(slots=True)
class NoiseScale:
    """Running means of tr(Σ) and |G|², and the number of measurements.

    Both start at 0 and are biased by the same factor; their ratio is not.
    """

    noise: float = 0.0
    signal: float = 0.0
    count: int = 0
    warned: bool = False

    def update(self, small: float, small_size: float, full: float, full_size: float) -> None:
        """Add a measurement: squared norms of the mean gradients of a small and of the full batch, and their
        sizes in tokens."""
        if not 0 < small_size < full_size or not math.isfinite(small + full):
            return
        signal = (full_size * full - small_size * small) / (full_size - small_size)
        noise = (small - full) / (1 / small_size - 1 / full_size)
        self.noise = MEMORY * self.noise + (1 - MEMORY) * noise
        self.signal = MEMORY * self.signal + (1 - MEMORY) * signal
        self.count += 1

    @property
    def tokens(self) -> float | None:
        """B_simple; None if unknown: too few measurements, or a gradient hidden by noise."""
        if self.count < ENOUGH or self.signal <= 0 or self.noise <= 0:
            return None
        return self.noise / self.signal

    def warning(self, batch_tokens: int, progress: float) -> str:
        """A warning, given once, if steps of `batch_tokens` tokens exceed the noise scale after the share
        `progress` of the run; else empty."""
        if self.warned or self.tokens is None or batch_tokens <= self.tokens or progress < SETTLED:
            return ""
        self.warned = True
        return (
            f"{batch_tokens:,} tokens per step exceed the critical batch size of about {self.tokens:,.0f} tokens "
            "(gradient noise scale): a smaller batch would learn more per token"
        )

    def state(self) -> list[float]:
        """For a checkpoint."""
        return [self.noise, self.signal, self.count]

    def restore(self, state: Sequence[float]) -> None:
        """Inverse of `state`, from an untrusted file; raises ValueError or TypeError for anything else."""
        noise, signal, count = state or (0.0, 0.0, 0)  # empty for a run that has just begun
        if not all(abs(number) < 1e30 for number in (noise, signal, count)):
            raise ValueError("the gradient noise is not finite")
        self.noise, self.signal, self.count = float(noise), float(signal), int(count)


def is_measured(step: int) -> bool:
    """Whether the noise is measured in step `step`, counted from 0."""
    return step % EVERY == 0


@dataclass(slots=True)
class SmallBatchGradient:
    """The gradient of this process's first micro-batch with any weight in a step, as numbers to be summed over
    the processes.

    `sharded`: the gradients are those of all processes' first micro-batches together, and every process
    observes them, whatever the weight of its own micro-batch.
    """

    sharded: bool = False
    values: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def observe(self, parameters: Iterable[torch.nn.Parameter], weight: float, factor: float) -> None:
        """Call after each backward pass: a micro-batch of this weight, whose gradients are the sum over its
        tokens times `factor`."""
        if self.values[2] or not (weight or self.sharded):
            return
        norm: Any = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        square = (float(norm.full_tensor() if self.sharded else norm) / factor) ** 2
        self.values = (square, weight, 1.0) if self.sharded else (square / weight**2, 1 / weight, 1.0)

    def combine(self, sums: Sequence[float]) -> tuple[float, float]:
        """(squared norm of the mean gradient, size) from the summed `values`: the mean over processes, and
        the harmonic mean of the sizes."""
        square, size, count = sums
        if not size:
            return 0.0, 0.0
        return (square / count / size**2, size) if self.sharded else (square / count, count / size)

"""Formulas that make one model of several, block by block in float32 numpy.

Each function takes a block [n] of the same tensor of every model, overwrites it, and returns the merged block, which may be one of those. A task
vector is what a model has learnt since the model that all started from: τ = θ − base.

- linear: mean ← mean + share · (θ − mean) over the models in order, with the `shares` of average.py. Equal models give that model to the bit.
- slerp (Shoemake 1985): the arc between two, sin((1−t)Ω)/sin Ω · a + sin(tΩ)/sin Ω · b, Ω the angle between the tensors as vectors.
- task arithmetic (arXiv:2212.04089): base + λ · Σ w·τ.
- DARE (arXiv:2311.03099): each element of τ is dropped with probability 1 − density, the others divided by density.
- TIES (arXiv:2306.01708): of each tensor of τ the elements of largest magnitude stay, a share `density`, the first of those that are equal;
  each position takes the sign of Σ w·τ, and base + λ · the weighted mean of those elements that have it.
- DARE with TIES: the dropping of DARE in the place of the trimming.

Only additions, multiplications and comparisons of float32, whose results IEEE 754 fixes, touch the elements: the same bytes on every machine.
Cost: linear in the elements; TIES reads everything twice and holds one tensor's magnitudes. Figures: tests/bench/average_speed.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from llmkit.seeds import derive

PARALLEL = 0.9995  # |cos Ω| from which the arc is taken for the straight line, whose formula is exact there


def linear(blocks: Sequence[np.ndarray], shares: Sequence[float]) -> np.ndarray:
    """The running mean; `shares` say how far it moves towards each model."""
    mean = blocks[0]
    for block, share in zip(blocks[1:], shares[1:], strict=True):
        if share == 1:
            mean = block
            continue
        block -= mean
        block *= np.float32(share)
        mean += block
    return mean


def angle_sums(a: np.ndarray, b: np.ndarray, wide: np.ndarray) -> np.ndarray:
    """a·a, b·b and a·b of two blocks, float64 [3]; their sums over a tensor give `arc`. `wide` is float64 room of the size of a block."""
    sums = [np.multiply(x, y, out=wide, dtype=np.float64).sum() for x, y in ((a, a), (b, b), (a, b))]
    return np.array(sums)


def arc(sums: np.ndarray, t: float) -> tuple[float, float] | None:
    """Coefficients of the two models; None where their tensors are all but parallel, or one is zero: then the straight line is meant."""
    norms = math.sqrt(sums[0]) * math.sqrt(sums[1])
    cosine = float(sums[2]) / norms if norms else 1.0
    if abs(cosine) > PARALLEL:
        return None
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def slerp(a: np.ndarray, b: np.ndarray, coefficients: tuple[float, float] | None, t: float) -> np.ndarray:
    """Between `a` (t = 0) and `b` (t = 1)."""
    if coefficients is None:
        return linear((a, b), (1.0, t))
    a *= np.float32(coefficients[0])
    b *= np.float32(coefficients[1])
    a += b
    return a


def task_arithmetic(
    tasks: Sequence[np.ndarray], base: np.ndarray, weights: Sequence[float], scale: float
) -> np.ndarray:
    """base + scale · Σ weight · task."""
    total = _weighted_sum(tasks, weights)
    total *= np.float32(scale)
    total += base
    return total


def elect(tasks: Sequence[np.ndarray], base: np.ndarray, weights: Sequence[float], scale: float) -> np.ndarray:
    """base + scale · the weighted mean of those elements of the tasks that have the sign of their weighted sum (TIES)."""
    for task, weight in zip(tasks, weights, strict=True):
        task *= np.float32(weight)
    total = tasks[0].copy()
    for task in tasks[1:]:
        total += task
    positive = total >= 0
    total.fill(0)
    share = np.zeros_like(total)
    for task, weight in zip(tasks, weights, strict=True):
        agrees = (task > 0) == positive
        agrees &= task != 0
        task *= agrees
        total += task
        share += agrees * np.float32(weight)
    np.maximum(share, np.float32(1e-30), out=share)  # where none agrees, 0 is divided
    total /= share
    total *= np.float32(scale)
    total += base
    return total


def _weighted_sum(tasks: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """Σ weight · task, in the room of the first."""
    for task, weight in zip(tasks, weights, strict=True):
        task *= np.float32(weight)
    for task in tasks[1:]:
        tasks[0] += task  # type: ignore[misc]
    return tasks[0]


def least_kept(magnitudes: np.ndarray, density: float) -> tuple[float, int]:
    """The least magnitude that stays where the largest do, a share `density` (one at least), and how many elements of just that magnitude do.

    Reorders `magnitudes`, which must not be empty.
    """
    kept = max(1, int(density * len(magnitudes)))
    magnitudes.partition(len(magnitudes) - kept)
    least = magnitudes[-kept]
    return float(least), kept - int(np.count_nonzero(magnitudes[-kept:] > least))


def trim(task: np.ndarray, least: float, equal: int) -> int:
    """Set the elements of a task vector that are smaller than `least` to 0, and those as large after the first `equal`.

    Returns how many of these are left for the blocks that follow. (Of weights stored in bfloat16 many changes are of one size.)
    """
    size = np.abs(task)
    stays = size >= np.float32(least)
    ties = np.flatnonzero(size == np.float32(least))
    stays[ties[equal:]] = False
    task *= stays
    return max(0, equal - len(ties))


def drop(task: np.ndarray, density: float, seed: int, name: str, model: int, start: int) -> None:
    """Set elements to 0 with probability 1 − density, and divide the others by density.

    Which ones is a function of seed, tensor, model's place in the call, and the block's place `start` in the tensor: the same on every
    machine, and for any part of the work alone. (The raw bits of a numpy generator are fixed for good; its distributions are not.)
    """
    bits = np.random.SFC64(derive(seed, "dare", name, model, start)).random_raw((len(task) + 1) // 2)
    drawn = np.asarray(bits, dtype="<u8").view("<u4")[: len(task)]
    task *= drawn < round(density * 2**32)  # at density 1 every number of 32 bits is smaller
    task *= np.float32(1 / density)

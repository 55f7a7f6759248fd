"""Formulas that merge models, block by block in float32 numpy.

Each function takes a block [n] of the same tensor of every model, overwrites it, and returns the merged block,
which may be one of those. A task vector is what a model has learnt since the model that all started from: τ = θ
− base.

- linear: mean ← mean + share · (θ − mean) over the models in order, with the `shares` of `methods`. Equal
  models give that model to the bit.
- slerp (Shoemake 1985): the arc between two models, sin((1−t)Ω)/sin Ω · a + sin(tΩ)/sin Ω · b, with Ω the angle
  between the tensors as vectors.
- task arithmetic (arXiv:2212.04089): base + λ · Σ w·τ.
- DARE (arXiv:2311.03099): each element of τ is dropped with probability 1 − density; the others are divided by
  density.
- TIES (arXiv:2306.01708): of each tensor of τ, the fraction `density` of largest magnitude is kept (of equal
  ones, the first). Each position takes the sign of Σ w·τ, and becomes base + λ · the weighted mean of those
  elements that have this sign.
- DARE with TIES: dropping as in DARE instead of trimming.

Elements are only touched by float32 additions, multiplications and comparisons, whose results IEEE 754 fixes:
the bytes are the same on every machine. Cost: linear in the elements; TIES reads everything twice and holds one
tensor's magnitudes. Measurements: tests/bench/average_speed.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from llmkit.seeds import derive

PARALLEL = 0.9995  # |cos Ω| above which the arc is replaced by the straight line, whose formula is exact there


def linear(blocks: Sequence[np.ndarray], shares: Sequence[float]) -> np.ndarray:
    """The running mean, which moves by `shares` of the way towards each model."""
    mean = blocks[0]
    for block, share in zip(blocks[1:], shares[1:], strict=True):
        if share == 1:
            mean = block
            continue
        block -= mean
        block *= np.float32(share)
        mean += block
    return mean


def angle_sums(a: np.ndarray, b: np.ndarray, buffer: np.ndarray) -> np.ndarray:
    """a·a, b·b and a·b of two blocks, float64 [3]; summed over a tensor, they are the input of `arc`. `buffer`
    is float64 [n].
    """
    sums = [np.multiply(x, y, out=buffer, dtype=np.float64).sum() for x, y in ((a, a), (b, b), (a, b))]
    return np.array(sums)


def arc(sums: np.ndarray, t: float) -> tuple[float, float] | None:
    """Coefficients of the two models; None if their tensors are nearly parallel, or one is zero: then use the
    straight line.
    """
    norms = math.sqrt(sums[0]) * math.sqrt(sums[1])
    cosine = float(sums[2]) / norms if norms else 1.0
    if abs(cosine) > PARALLEL:
        return None
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def slerp(a: np.ndarray, b: np.ndarray, coefficients: tuple[float, float] | None, t: float) -> np.ndarray:
    """The point between `a` (t = 0) and `b` (t = 1)."""
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
    """base + scale · the weighted mean of those elements of the task vectors that have the sign of their
    weighted sum (TIES).
    """
    for task, weight in zip(tasks, weights, strict=True):
        task *= np.float32(weight)
    total = tasks[0].copy()
    for task in tasks[1:]:
        total += task
    positive = total >= 0
    total.fill(0)
    agreeing_weight = np.zeros_like(total)
    for task, weight in zip(tasks, weights, strict=True):
        agrees = (task > 0) == positive
        agrees &= task != 0
        task *= agrees
        total += task
        agreeing_weight += agrees * np.float32(weight)
    np.maximum(agreeing_weight, np.float32(1e-30), out=agreeing_weight)  # if none agrees, 0 is divided
    total /= agreeing_weight
    total *= np.float32(scale)
    total += base
    return total


def _weighted_sum(tasks: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """Σ weight · task, in the memory of the first."""
    for task, weight in zip(tasks, weights, strict=True):
        task *= np.float32(weight)
    for task in tasks[1:]:
        tasks[0] += task  # type: ignore[misc]
    return tasks[0]


def trim_threshold(magnitudes: np.ndarray, density: float) -> tuple[float, int]:
    """The smallest magnitude among the largest fraction `density` (at least one element), and how many elements
    of exactly this magnitude to keep.

    Reorders `magnitudes`, which must not be empty.
    """
    keep = max(1, int(density * len(magnitudes)))
    magnitudes.partition(len(magnitudes) - keep)
    threshold = magnitudes[-keep]
    return float(threshold), keep - int(np.count_nonzero(magnitudes[-keep:] > threshold))


def trim(task: np.ndarray, threshold: float, keep_equal: int) -> int:
    """Set the elements of a task vector below `threshold` in magnitude to 0, and those equal to it after the
    first `keep_equal`.

    Returns how many equal ones the following blocks may keep. (With weights stored in bfloat16, many changes
    have the same magnitude.)
    """
    size = np.abs(task)
    keep = size >= np.float32(threshold)
    equal = np.flatnonzero(size == np.float32(threshold))
    keep[equal[keep_equal:]] = False
    task *= keep
    return max(0, keep_equal - len(equal))


def drop(task: np.ndarray, density: float, seed: int, name: str, model: int, start: int) -> None:
    """Set elements to 0 with probability 1 − density, and divide the others by density.

    Which ones is a function of seed, tensor, index of the model in the call, and start of the block in the
    tensor. It is the same on every machine, and for any part of the work alone. (numpy guarantees the raw bits
    of a generator, but not its distributions.)
    """
    bits = np.random.SFC64(derive(seed, "dare", name, model, start)).random_raw((len(task) + 1) // 2)
    drawn = np.asarray(bits, dtype="<u8").view("<u4")[: len(task)]
    task *= drawn < round(density * 2**32)  # at density 1, every 32-bit number is smaller
    task *= np.float32(1 / density)

"""Round-to-nearest quantisation of a weight matrix: w ≈ q · scale, q a signed integer, one scale a row or a group of neighbours in a row.

The plain scale spreads the largest magnitude over the range, absmax / ((2^bits − 1) / 2), which is absmax/7.5 for 4 bits and absmax/127.5 for 8.
In few bits a smaller scale is often better: it clips one weight and resolves the others more finely. Any scale is a legal one, so `search` takes,
group by group, the one of sixteen candidates with the least squared error.

Data in: weights [out, in] of any float type. Out: q int8 [out, in], scales [out, groups] in the type asked for. Cost: one pass over the matrix
for each candidate; memory a few times the matrix in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

CANDIDATES = 16
SMALLEST = 0.6  # the finest candidate, relative to the plain scale


def quantise(
    weight: Tensor, bits: int, group: int | None, *, search: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(q int8 [out, in], scale [out, in/group] in `dtype`); `group=None` is one scale a row.

    The scale is rounded to `dtype` before the weights are divided by it, so q · scale in `dtype` is what every reader gets.
    """
    rows, width = weight.shape
    size = width if group is None else group
    assert width % size == 0, "the width is not a multiple of the group"
    groups = weight.detach().float().reshape(rows, width // size, size)
    plain = groups.abs().amax(-1, keepdim=True) / ((2**bits - 1) / 2)
    plain[plain == 0] = 1.0  # a group of zeros
    best = plain.to(dtype).float()
    if search:
        error = _error(groups, best, bits)
        for step in range(1, CANDIDATES):
            scale = (plain * (1 - (1 - SMALLEST) * step / (CANDIDATES - 1))).to(dtype).float()
            found = _error(groups, scale, bits)
            better = (found < error) & (scale > 0)
            best, error = torch.where(better, scale, best), torch.where(better, found, error)
    best = torch.where(best > 0, best, torch.finfo(dtype).tiny)  # a group of weights that `dtype` cannot hold
    return _round(groups, best, bits).to(torch.int8).reshape(rows, width), best.squeeze(-1).to(dtype)


def _round(groups: Tensor, scale: Tensor, bits: int) -> Tensor:
    return (groups / scale).round_().clamp_(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def _error(groups: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Sum of squared differences of each group, [out, groups, 1]."""
    return (_round(groups, scale, bits) * scale - groups).square_().sum(-1, keepdim=True)

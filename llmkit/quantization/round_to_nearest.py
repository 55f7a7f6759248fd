"""Round-to-nearest quantisation of a weight matrix: w ≈ q · scale with signed integers q and one scale per row
or per group of neighbours in a row.

The plain scale maps the largest magnitude to the end of the range, absmax / ((2^bits − 1) / 2): absmax/7.5 for
4 bits, absmax/127.5 for 8. With few bits a smaller scale is often better: it clips one weight and resolves the
others more finely. `search` takes, for each group, the best of sixteen candidates by squared error. Any scale
is valid for a reader.

Input: weights [out, in] of any float type. Output: q int8 [out, in], scales [out, groups] in the requested
type. Cost: one pass over the matrix per candidate; memory is a few times the matrix in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

CANDIDATES = 16
SMALLEST = 0.6  # the finest candidate, relative to the plain scale


def quantize(
    weight: Tensor, bits: int, group: int | None, *, search: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(q int8 [out, in], scale [out, in/group] in `dtype`); with `group=None` one scale per row.

    Scales are rounded to `dtype` before the weights are divided by them, so every reader obtains the same q ·
    scale in `dtype`.
    """
    rows, width = weight.shape
    size = width if group is None else group
    assert width % size == 0, "the width is not a multiple of the group"
    groups = weight.detach().float().reshape(rows, width // size, size)
    plain = groups.abs().amax(-1, keepdim=True) / ((2**bits - 1) / 2)
    plain[plain == 0] = 1.0  # a group of zeros
    best = plain.to(dtype).float()
    if search:
        error = _squared_error(groups, best, bits)
        for step in range(1, CANDIDATES):
            scale = (plain * (1 - (1 - SMALLEST) * step / (CANDIDATES - 1))).to(dtype).float()
            candidate_error = _squared_error(groups, scale, bits)
            better = (candidate_error < error) & (scale > 0)
            best, error = torch.where(better, scale, best), torch.where(better, candidate_error, error)
    best = torch.where(best > 0, best, torch.finfo(dtype).tiny)  # weights too small for `dtype`
    return _round(groups, best, bits).to(torch.int8).reshape(rows, width), best.squeeze(-1).to(dtype)


def _round(groups: Tensor, scale: Tensor, bits: int) -> Tensor:
    return (groups / scale).round_().clamp_(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def _squared_error(groups: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Sum of squared differences per group, [out, groups, 1]."""
    return (_round(groups, scale, bits) * scale - groups).square_().sum(-1, keepdim=True)

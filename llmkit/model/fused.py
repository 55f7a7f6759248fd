"""The decoder's operations on the CPU in float32, forward and backward, with the kernels of model/kernels. They
move less memory than torch's operations, and attention skips keys that the causal mask hides or that belong to
another document.

Tensors and shapes are those of operations.py. Rows are divided among threads; results do not depend on their number.

Attention (after FlashAttention-2, arXiv:2307.08691) takes, for each block of queries, only the keys that one of
them sees: two matrix products per block in the forward pass and five in the backward pass, which recomputes the
probabilities. Memory: the scores of a block, at most SCORES elements per thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import Function

from llmkit.model.kernels import rows as kernels
from llmkit.model.kv_cache import KeyValueCache
from llmkit.model.lora.layers import FrozenLinear
from llmkit.model.lora.products import products
from llmkit.model.operations import Operations
from llmkit.model.rope import Rotation

QUERIES = 128  # per block of attention
SCORES = 1 << 19  # scores at once: 4 MiB with their gradients, about one core's share of the cache
GRAIN = 1 << 16  # minimum elements per thread


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


def over_rows(kernel: Any, rows: int, width: int, *arguments: Any, together: int = 1) -> None:
    """Run a kernel over all rows with torch's number of threads. Each thread gets a multiple of `together`
    rows, except at the end."""
    threads = min(torch.get_num_threads(), rows * width // GRAIN)
    arrays = [a.detach().numpy() if isinstance(a, Tensor) else a for a in arguments]
    if threads < 2:
        kernel(0, rows, *arrays)
        return
    step = -(-rows // (threads * together)) * together
    starts = range(0, rows, step)
    list(_pool(threads).map(lambda start: kernel(start, min(start + step, rows), *arrays), starts))


class _Norm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        flat = x.detach().reshape(-1, x.shape[-1]).contiguous()
        y, inverse = torch.empty_like(flat), flat.new_empty(len(flat))
        gains = weight.detach().clone()  # numpy would keep the storage alive, and FSDP must free a gathered weight
        over_rows(kernels.norm, *flat.shape, flat, gains, np.float32(eps), y, inverse)
        ctx.save_for_backward(x, gains, inverse)
        return y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        x, weight, inverse = ctx.saved_tensors
        flat, grad = (v.reshape(-1, v.shape[-1]).contiguous() for v in (x, grad))
        dx = torch.empty_like(flat)
        dweight = flat.new_zeros(-(-len(flat) // kernels.BLOCK), len(weight))
        arguments = (flat, weight, inverse, grad, dx, dweight)
        over_rows(kernels.norm_back, *flat.shape, *arguments, together=kernels.BLOCK)
        return dx.view(x.shape), dweight.sum(0), None


class _Gated(Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, kernel: Any, back: Any) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        ctx.back = back
        y = torch.empty_like(gate)
        flat = [v.view(-1, gate.shape[-1]) for v in (gate, up, y)]
        over_rows(kernel, *flat[0].shape, *flat)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        gate, up = ctx.saved_tensors
        dgate, dup = torch.empty_like(gate), torch.empty_like(up)
        flat = [v.view(-1, gate.shape[-1]) for v in (gate, up, grad.contiguous(), dgate, dup)]
        over_rows(ctx.back, *flat[0].shape, *flat)
        return dgate, dup, None, None


GATED = {
    "silu": (kernels.swiglu, kernels.swiglu_back),
    "gelu_tanh": (kernels.geglu, kernels.geglu_back),
}


class _Rotate(Function):
    @staticmethod
    def forward(ctx: Any, x_BTHK: Tensor, cos: Tensor, sin: Tensor, adjacent: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.adjacent = adjacent
        return _rotate(x_BTHK, cos, sin, adjacent, 1.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, sin, ctx.adjacent, -1.0), None, None, None


def _rotate(x_BTHK: Tensor, cos: Tensor, sin: Tensor, adjacent: bool, sign: float) -> Tensor:
    flat = x_BTHK.contiguous().flatten(0, 1)
    y = torch.empty_like(flat)
    kernel = kernels.rotate_adjacent if adjacent else kernels.rotate
    over_rows(kernel, len(flat), flat[0].numel(), flat, cos, sin, np.float32(sign), y)
    return y.view(x_BTHK.shape)


def _blocks(begins_BT: np.ndarray, heads: int, groups: int) -> Any:
    """(sequence, heads, key-value groups, queries, keys) of each block of attention; all but the first are slices."""
    sequences, length = begins_BT.shape
    share = heads // groups
    for b in range(sequences):
        for start in range(0, length, QUERIES):
            stop = min(start + QUERIES, length)
            low = int(begins_BT[b, start])
            together = max(1, SCORES // ((stop - start) * (stop - low) * share))
            for g in range(0, groups, together):
                last = min(g + together, groups)
                yield b, slice(g * share, last * share), slice(g, last), slice(start, stop), slice(low, stop)


def _per_query_head(x_TGK: Tensor, share: int) -> Tensor:
    """Keys or values [T, G, K] as [G · share, T, K], without a copy if share is 1."""
    return _repeat(x_TGK.transpose(0, 1), share)


def _repeat(x: Tensor, share: int) -> Tensor:
    return x if share == 1 else x.repeat_interleave(share, 0)


def _contiguous_transpose(x_BTGK: Tensor) -> Tensor:
    """Contiguous [B, G, K, T]: products with it are a fifth faster than with the transposed view."""
    return x_BTGK.permute(0, 2, 3, 1).contiguous()


class _Attend(Function):
    @staticmethod
    def forward(
        ctx: Any, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, begins_BT: np.ndarray, scale: float, cap: float
    ) -> Tensor:
        b, t, h, _ = q_BTHK.shape
        share = h // k_BTGK.shape[2]
        numbers = np.float32(scale), np.float32(cap)
        out = torch.empty_like(q_BTHK)
        logsum = q_BTHK.new_empty(b, h, t)
        buffer = q_BTHK.new_empty(max(SCORES, share * QUERIES * t))
        transposed = _contiguous_transpose(k_BTGK)
        for row, heads, groups, queries, keys in _blocks(begins_BT, h, h // share):
            q = q_BTHK[row, queries, heads].transpose(0, 1)
            n, r, c = q.shape[0], q.shape[1], keys.stop - keys.start
            scores = buffer[: n * r * c].view(n, r, c)
            torch.bmm(q, _repeat(transposed[row, groups, :, keys], share), out=scores)
            arguments = scores.view(n * r, c), r, queries.start, begins_BT[row], *numbers, logsum[row, heads]
            over_rows(kernels.softmax, n * r, c, *arguments)
            out[row, queries, heads] = torch.bmm(scores, _per_query_head(v_BTGK[row, keys, groups], share)).transpose(
                0, 1
            )
        ctx.save_for_backward(q_BTHK, k_BTGK, v_BTGK, out, logsum)
        ctx.begins, ctx.numbers = begins_BT, numbers
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q_BTHK, k_BTGK, v_BTGK, out, logsum = ctx.saved_tensors
        t, h, k = q_BTHK.shape[1:]
        share = h // k_BTGK.shape[2]
        delta = (grad * out).sum(-1).transpose(1, 2).contiguous()
        dq, dk, dv = torch.empty_like(q_BTHK), torch.zeros_like(k_BTGK), torch.zeros_like(v_BTGK)
        buffer = q_BTHK.new_empty(2, max(SCORES, share * QUERIES * t))
        transposed = _contiguous_transpose(k_BTGK), _contiguous_transpose(v_BTGK)
        for row, heads, groups, queries, keys in _blocks(ctx.begins, h, h // share):
            q, g = (x[row, queries, heads].transpose(0, 1) for x in (q_BTHK, grad))
            n, r, c = q.shape[0], q.shape[1], keys.stop - keys.start
            scores, change = (x[: n * r * c].view(n, r, c) for x in buffer)
            key, value = (_repeat(x[row, groups, :, keys], share) for x in transposed)
            torch.bmm(q, key, out=scores)
            torch.bmm(g, value, out=change)
            over_rows(
                kernels.softmax_back, n * r, c, scores.view(n * r, c), r, queries.start, ctx.begins[row], *ctx.numbers,
                logsum[row, heads], change.view(n * r, c), delta[row, heads],
            )  # fmt: skip
            dq[row, queries, heads] = torch.bmm(change, _per_query_head(k_BTGK[row, keys, groups], share)).transpose(
                0, 1
            )
            for total, left, right in ((dk, change, q), (dv, scores, g)):
                into = total[row, keys, groups].transpose(0, 1)
                if share == 1:
                    into.baddbmm_(left.transpose(1, 2), right)
                else:
                    into += torch.bmm(left.transpose(1, 2), right).view(-1, share, c, k).sum(1)
        return dq, dk, dv, None, None, None


class Fused(Operations):
    """The kernels, for passes in float32 on the CPU, without a cache and with contiguous documents; otherwise
    the plain operations."""

    def prepare(
        self, x_BTD: Tensor, document_ids: Tensor | None, cache: KeyValueCache | None, window: int | None
    ) -> tuple[Operations, Any]:
        unsupported = x_BTD.device.type != "cpu" or x_BTD.dtype != torch.float32 or torch.is_autocast_enabled("cpu")
        b, t, _ = x_BTD.shape
        begins = None if unsupported or cache is not None else first_keys(document_ids, b, t, window)
        return super().prepare(x_BTD, document_ids, cache, window) if begins is None else (self, begins)

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return _Norm.apply(x, weight, eps)

    def project(self, x: Tensor, matrices: Sequence[nn.Module]) -> Sequence[Tensor]:
        frozen = [matrix for matrix in matrices if isinstance(matrix, FrozenLinear)]
        return products(x, frozen) if frozen else super().project(x, matrices)

    def rotate(self, x_BTHK: Tensor, rotation: Rotation) -> Tensor:
        return _Rotate.apply(x_BTHK, rotation.cos.flatten(0, -2), rotation.sin.flatten(0, -2), rotation.adjacent)

    def attend(
        self, q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, mask: Any, scale: float, softcap: float | None
    ) -> Tensor:
        return _Attend.apply(q_BTHK, k_BSGK, v_BSGK, mask, scale, softcap or 0.0)

    def gated(self, activation: str, gate: Tensor, up: Tensor) -> Tensor:
        if activation not in GATED:
            return super().gated(activation, gate, up)
        return _Gated.apply(gate, up, *GATED[activation])


def first_keys(document_ids: Tensor | None, b: int, t: int, window: int | None) -> np.ndarray | None:
    """Index int64 [B, T] in the row of the first key that each token sees: where its document or its window begins.
    None if a document is not contiguous."""
    begins = document_begins(document_ids, b, t)
    return begins if begins is None or window is None else np.maximum(begins, np.arange(t) - (window - 1))


def document_begins(document_ids: Tensor | None, b: int, t: int) -> np.ndarray | None:
    """Index int64 [B, T] in the row at which each token's document begins; None if a document is not contiguous."""
    begins = np.zeros((b, t), np.int64)
    if document_ids is None:
        return begins
    ids = document_ids.numpy()
    new = ids[:, 1:] != ids[:, :-1]
    np.maximum.accumulate(np.where(new, np.arange(1, t), 0), 1, out=begins[:, 1:])
    if any(len(np.unique(row)) != 1 + changes for row, changes in zip(ids, new.sum(1), strict=True)):
        return None
    return begins


def cross_entropy(
    logits: Tensor, targets: Tensor, factors: Tensor, z_loss: float, gradient: bool
) -> tuple[Tensor, Tensor]:
    """−log p(target) and log Z per row of logits [N, V]; with `gradient` the logits are overwritten with d(loss
    + z_loss · log² Z) · factor."""
    least, most = targets.aminmax() if len(targets) else (0, 0)
    if least < 0 or most >= logits.shape[1]:
        raise IndexError(f"a target is outside the vocabulary of {logits.shape[1]:,}")
    losses, log_z = logits.new_empty(2, len(logits))
    over_rows(
        kernels.cross_entropy, *logits.shape, logits, targets, factors, np.float32(z_loss), losses, log_z, gradient
    )
    return losses, log_z

"""Kernels over rows of float32 on the CPU: norm, rotation, SwiGLU, softmax of attention and of the loss,
forward and backward, each in one pass over memory.

Every kernel takes a range of rows [first, last) and C-contiguous arrays, and writes into output arguments. The
order of operations within a row does not depend on how rows are divided, so results do not depend on threads.
NaN and infinity propagate.

exp is the polynomial of Cephes (expf.c: 2 units in the last place over [-87, 88]). LLVM vectorises all loops.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

# Sums may be reordered, which allows vectorisation; nothing is assumed about NaN or infinity.
_SETTINGS: dict[str, Any] = {"cache": True, "nogil": True, "_nrt": False, "error_model": "numpy"}
SUMS = {"reassoc", "contract", "nsz"}


def rows_kernel(function: Any) -> Any:
    return numba.njit(**_SETTINGS, fastmath=SUMS)(function)


def exact(function: Any) -> Any:
    """A function that is inlined into its callers and keeps its order of operations."""
    return numba.njit(**_SETTINGS, fastmath={"contract"}, forceinline=True)(function)


_emitted: Any = intrinsic  # emits LLVM instructions
_I32, _F32 = ir.IntType(32), ir.FloatType()


@_emitted
def _power(_, magic):  # type: ignore[no-untyped-def]
    """2^n from n + MAGIC."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        bits = builder.bitcast(arguments[0], _I32)
        n = builder.sub(bits, ir.Constant(_I32, 0x4B400000 - 127))
        return builder.bitcast(builder.shl(n, ir.Constant(_I32, 23)), _F32)

    return types.float32(types.float32), generate


@_emitted
def _key(_, value):  # type: ignore[no-untyped-def]
    """An int32 with the order of the floats: its maximum vectorises, that of floats does not."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        bits = builder.bitcast(arguments[0], _I32)
        sign = builder.ashr(bits, ir.Constant(_I32, 31))
        return builder.xor(bits, builder.and_(sign, ir.Constant(_I32, 0x7FFFFFFF)))

    return types.int32(types.float32), generate


@_emitted
def _value(_, key):  # type: ignore[no-untyped-def]
    """The inverse of `_key`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        sign = builder.ashr(arguments[0], ir.Constant(_I32, 31))
        bits = builder.xor(arguments[0], builder.and_(sign, ir.Constant(_I32, 0x7FFFFFFF)))
        return builder.bitcast(bits, _F32)

    return types.float32(types.int32), generate


_f = np.float32
ZERO, ONE, TWO, LOWEST, HIGHEST = _f(0), _f(1), _f(2), _f(-87), _f(88)
MAGIC = _f(12582912)  # 1.5 · 2^23: adding it rounds to an integer
GELU, GELU_CUBE = _f(1.5957691216), _f(0.0713548163)  # 2 √(2/π), and that times 0.044715
LOG2E, LN2_HIGH, LN2_LOW = _f(1.44269504), _f(0.693359375), _f(-2.12194440e-4)
C0, C1, C2, C3, C4, C5 = map(_f, (1.98756915e-4, 1.39819995e-3, 8.33345191e-3, 4.16657959e-2, 1.66666655e-1, 0.5))
LEAST = np.int32(-(2**31))
BLOCK = 256  # rows that are summed into one partial gradient of a norm's weight


@exact
def exp(x):  # type: ignore[no-untyped-def]
    """e^x for x up to 88; below -87 the value at -87 (1.6e-38)."""
    x = LOWEST if x < LOWEST else x
    magic = x * LOG2E + MAGIC
    n = magic - MAGIC
    r = x - n * LN2_HIGH - n * LN2_LOW
    p = ((((C0 * r + C1) * r + C2) * r + C3) * r + C4) * r + C5
    return (p * r * r + r + ONE) * _power(magic)


@exact
def sigmoid(x):  # type: ignore[no-untyped-def]
    """1 / (1 + e^-x); below -88 the value at -88."""
    return ONE / (ONE + exp(HIGHEST if -x > HIGHEST else -x))


@exact
def capped(score, cap):  # type: ignore[no-untyped-def]
    """cap · tanh(score / cap)."""
    e = exp(-TWO * abs(score / cap))
    size = cap * (ONE - e) / (ONE + e)
    return -size if score < ZERO else size


@rows_kernel
def norm(first, last, x, weight, eps, y, inverse):  # type: ignore[no-untyped-def]
    """y = x · inverse · weight, inverse = 1 / rms(x)."""
    width = x.shape[1]
    for i in range(first, last):
        total = ZERO
        for j in range(width):
            total += x[i, j] * x[i, j]
        scale = ONE / np.sqrt(total / _f(width) + eps)
        inverse[i] = scale
        for j in range(width):
            y[i, j] = x[i, j] * scale * weight[j]


@rows_kernel
def norm_back(first, last, x, weight, inverse, grad, dx, dweight):  # type: ignore[no-untyped-def]
    """Gradients of `norm`; the weight's are accumulated in dweight [blocks of BLOCK rows, width]."""
    width = x.shape[1]
    for i in range(first, last):
        block = i // BLOCK
        scale, total = inverse[i], ZERO
        for j in range(width):
            normed = x[i, j] * scale
            dweight[block, j] += grad[i, j] * normed
            total += grad[i, j] * weight[j] * normed
        total /= _f(width)
        for j in range(width):
            dx[i, j] = (grad[i, j] * weight[j] - x[i, j] * scale * total) * scale


@rows_kernel
def swiglu(first, last, gate, up, y):  # type: ignore[no-untyped-def]
    """y = silu(gate) · up."""
    for i in range(first, last):
        for j in range(gate.shape[1]):
            g = gate[i, j]
            y[i, j] = g * sigmoid(g) * up[i, j]


@rows_kernel
def swiglu_back(first, last, gate, up, grad, dgate, dup):  # type: ignore[no-untyped-def]
    for i in range(first, last):
        for j in range(gate.shape[1]):
            g = gate[i, j]
            s = sigmoid(g)
            dup[i, j] = grad[i, j] * g * s
            dgate[i, j] = grad[i, j] * up[i, j] * s * (ONE + g * (ONE - s))


@rows_kernel
def geglu(first, last, gate, up, y):  # type: ignore[no-untyped-def]
    """y = gelu(gate) · up with the tanh approximation: g σ(2u), u = √(2/π) (g + 0.044715 g³)."""
    for i in range(first, last):
        for j in range(gate.shape[1]):
            g = gate[i, j]
            y[i, j] = g * sigmoid(g * (GELU + GELU_CUBE * g * g)) * up[i, j]


@rows_kernel
def geglu_back(first, last, gate, up, grad, dgate, dup):  # type: ignore[no-untyped-def]
    for i in range(first, last):
        for j in range(gate.shape[1]):
            g = gate[i, j]
            square = g * g
            s = sigmoid(g * (GELU + GELU_CUBE * square))
            dup[i, j] = grad[i, j] * g * s
            slope = g * (GELU + _f(3) * GELU_CUBE * square)
            dgate[i, j] = grad[i, j] * up[i, j] * s * (ONE + slope * (ONE - s))


@rows_kernel
def rotate_adjacent(first, last, x, cos, sin, sign, y):  # type: ignore[no-untyped-def]
    """`rotate` for pairs of neighbours."""
    period, pairs = cos.shape[0], cos.shape[1] // 2
    for i in range(first, last):
        position = i % period
        for h in range(x.shape[1]):
            for j in range(pairs):
                a, b = x[i, h, 2 * j], x[i, h, 2 * j + 1]
                c, s = cos[position, j], sin[position, j] * sign
                y[i, h, 2 * j] = a * c - b * s
                y[i, h, 2 * j + 1] = b * c + a * s
            for j in range(2 * pairs, x.shape[2]):
                y[i, h, j] = x[i, h, j]


@rows_kernel
def rotate(first, last, x, cos, sin, sign, y):  # type: ignore[no-untyped-def]
    """Rotate the first dimensions of each head of x [rows, H, K] by the angles of cos and sin [rows of a sequence,
    dimensions]; sign -1 is the inverse."""
    period, half = cos.shape[0], cos.shape[1] // 2
    for i in range(first, last):
        position = i % period
        for h in range(x.shape[1]):
            for j in range(half):
                a, b = x[i, h, j], x[i, h, half + j]
                c, s = cos[position, j], sin[position, j] * sign
                y[i, h, j] = a * c - b * s
                y[i, h, half + j] = b * c + a * s
            for j in range(2 * half, x.shape[2]):
                y[i, h, j] = x[i, h, j]


@rows_kernel
def softmax(first, last, scores, rows, first_query, begins, scale, cap, logsum):  # type: ignore[no-untyped-def]
    """Replace raw scores [heads · rows, keys] with probabilities. Row r of a head is query `first_query + r` of
    a sequence, which sees the keys from begins[query] to its own; key 0 here is begins[first_query]. A `cap` above 0
    caps the scores. `logsum` [heads, queries] is kept for the backward pass."""
    offset = begins[first_query]
    for i in range(first, last):
        query = first_query + i % rows
        low, high = begins[query] - offset, query + 1 - offset
        seen, top, factor = scores[i, low:high], LEAST, scale
        if cap > ZERO:
            factor = ONE
            for j in range(len(seen)):
                seen[j] = capped(seen[j] * scale, cap)
        for j in range(len(seen)):
            top = max(top, _key(seen[j]))
        most, total = _value(top) * factor, ZERO
        for j in range(len(seen)):
            p = exp(seen[j] * factor - most)
            seen[j] = p
            total += p
        logsum[i // rows, query] = most + np.log(total)
        share = ONE / total
        for j in range(len(seen)):
            seen[j] *= share
        scores[i, :low] = ZERO
        scores[i, high:] = ZERO


@rows_kernel
def softmax_back(  # type: ignore[no-untyped-def]
    first, last, scores, rows, first_query, begins, scale, cap, logsum, grad, delta
):
    """Recompute probabilities in place of raw scores, and replace the gradient of the probabilities with that
    of the raw scores."""
    offset = begins[first_query]
    for i in range(first, last):
        query, head = first_query + i % rows, i // rows
        low, high = begins[query] - offset, query + 1 - offset
        shift, mean = logsum[head, query], delta[head, query]
        seen, change = scores[i, low:high], grad[i, low:high]
        if cap > ZERO:
            for j in range(len(seen)):
                score = capped(seen[j] * scale, cap)
                p = exp(score - shift)
                seen[j] = p
                change[j] = p * (change[j] - mean) * (ONE - (score / cap) * (score / cap)) * scale
        else:
            for j in range(len(seen)):
                p = exp(seen[j] * scale - shift)
                seen[j] = p
                change[j] = p * (change[j] - mean) * scale
        for part in (scores, grad):
            part[i, :low] = ZERO
            part[i, high:] = ZERO


@rows_kernel
def cross_entropy(  # type: ignore[no-untyped-def]
    first, last, logits, targets, factors, z_loss, losses, log_z, gradient
):
    """-log softmax(logits)[target] and log Z of each row; with `gradient`, logits are overwritten with that of
    (loss + z_loss · log² Z) · factor."""
    width = logits.shape[1]
    for i in range(first, last):
        top = LEAST
        for j in range(width):
            top = max(top, _key(logits[i, j]))
        most, total = _value(top), ZERO
        picked = logits[i, targets[i]]
        for j in range(width):
            p = exp(logits[i, j] - most)
            logits[i, j] = p
            total += p
        log_z[i] = most + np.log(total)
        losses[i] = log_z[i] - picked
        if gradient:
            share = factors[i] * (ONE + _f(2) * z_loss * log_z[i]) / total
            for j in range(width):
                logits[i, j] *= share
            logits[i, targets[i]] -= factors[i]

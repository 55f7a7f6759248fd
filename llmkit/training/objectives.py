"""Losses: functions of (model, batch, scale) that return the minimised loss of a step, metrics for the log, and
the loss of each token.

    result = next_token(model, batch, 1 / source.weight(step), z_loss=1e-4)
    result.loss.backward()

Loss and metrics are sums over the batch times `scale`; summed over all micro-batches and processes they are
those of the step.

Linear cross-entropy. The logits of a batch (tokens × vocabulary) are by far its largest tensor, so the head
and the loss are computed together, one chunk of rows at a time, and no more than one chunk of logits exists.
`linear_cross_entropy` knows the factor of each token's loss beforehand and computes the gradients in the same
pass, while the chunk is in cache: three matrix products in all, as without chunks. `token_log_probabilities`
returns a log-probability per token for losses that need more (DPO) and recomputes the logits in the backward
pass. Positions of weight 0 are left out, which in fine-tuning saves most of the work on the head.

The z-loss (PaLM, arXiv:2204.02311) adds coefficient · log² Z to the loss of each token, Z being the softmax
denominator: it keeps logits from drifting, at no cost, since log Z is known anyway. The `loss` in the log
stays the plain −log p.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd import Function

from llmkit.model.runtime import cpu_kernels
from llmkit.seeds import derive
from llmkit.training.data import Batch

# Logits in memory at once: 8 MiB of float32 on CPU, the fastest there, 512 MiB on a GPU.
CHUNK_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 27}

Metrics = dict[str, Tensor]
HeadRows = tuple[Tensor, Tensor]  # Decoder.head_rows


class ObjectiveResult(NamedTuple):
    """Result of an objective for a batch.

    `loss` is minimised and has a gradient; `metrics` have none, and a `loss` among them replaces the
    minimised one in the log. `token_losses` float32 [N] are −log p at `positions` int64 [N] of the flattened
    batch; None if unknown.
    """

    loss: Tensor
    metrics: Metrics
    token_losses: Tensor | None = None
    positions: Tensor | None = None


class Objective(Protocol):
    """A loss function; all sums are multiplied by `scale`."""

    def __call__(self, model: Any, batch: Batch, scale: float) -> ObjectiveResult: ...


def next_token(
    model: Any,
    batch: Batch,
    scale: float,
    z_loss: float = 0.0,
    noise: Callable[[Batch, int], Tensor] | None = None,
) -> ObjectiveResult:
    """Weighted cross-entropy of the next token: Σ weight · (−log p(target) + z_loss · log² Z) · scale.

    In training, `noise(batch, D)` [R, L, D] is added to the embeddings.
    """
    added = noise(batch, model.config.hidden_size) if noise and model.training else None
    hidden, index = counted_hidden_states(model, batch, added)
    factors = batch.weights.flatten()[index] * scale
    targets = batch.targets.flatten()[index]
    head, some = model.head_weight, model.head_rows
    loss, token_losses = linear_cross_entropy(hidden, head, targets, factors, z_loss, model.softcap, some)
    metrics = {}
    if z_loss:
        metrics["loss"] = (token_losses.double() * factors).sum()
        metrics["z_loss"] = loss.detach() - metrics["loss"]
    return ObjectiveResult(loss, metrics, token_losses, index)


class EmbeddingNoise:
    """Uniform noise on the embeddings of a row, in ±alpha / √(tokens of the row · D) (NEFTune, Jain et al. 2023,
    arXiv:2310.05914). That of a row depends on `seed` and its number in the run alone."""

    def __init__(self, alpha: float, seed: int) -> None:
        self._alpha, self._seed = alpha, seed

    def __call__(self, batch: Batch, width: int) -> Tensor:
        noise = torch.zeros(*batch.input_ids.shape, width, device=batch.input_ids.device)
        generator = torch.Generator(noise.device)
        for sequence, start, stop, number in batch.extra["rows"].tolist():
            generator.manual_seed(derive(self._seed, "embedding noise", number))
            limit = self._alpha / ((stop - start) * width) ** 0.5
            noise[sequence, start:stop].uniform_(-limit, limit, generator=generator)
        return noise


def counted_hidden_states(model: Any, batch: Batch, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Hidden states [N, D] of the positions of `batch` with nonzero weight, and their index int64 [N] in the
    flattened batch; `noise` [R, L, D] is added to the embeddings."""
    hidden = model.hidden(batch.input_ids, document_ids=batch.document_ids, noise=noise).flatten(0, 1)
    index = batch.weights.flatten().nonzero().squeeze(1)
    return (hidden if len(index) == len(hidden) else hidden.index_select(0, index)), index


def linear_cross_entropy(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    factors: Tensor,
    z_loss: float = 0.0,
    softcap: float | None = None,
    rows: HeadRows | None = None,
) -> tuple[Tensor, Tensor]:
    """Σ_i factors_i · (−log p_i + z_loss · log² Z_i), a scalar, and all −log p_i, float32 [N] without gradient.

    p_i = softmax(head · hidden_i)[targets_i], and Z_i is the denominator of that softmax; with a `softcap` c the
    logits are c · tanh(head · hidden_i / c). `hidden` [N, D], `head` [V, D], `targets` int64 [N], `factors` float32
    [N] without gradient. `rows` are those rows of `head` that have a gradient, if the others have none.
    """
    dtype = _compute_dtype(hidden)
    # A Function cannot find this out itself.
    wanted = [torch.is_grad_enabled() and tensor.requires_grad for tensor in (hidden, head)]
    ids, values = rows or (None, None)
    loss, token_losses = _LinearCrossEntropy.apply(
        hidden, head, targets, factors, z_loss, softcap, dtype, *wanted, ids, values
    )
    return loss, token_losses


def token_log_probabilities(
    hidden: Tensor, head: Tensor, targets: Tensor, softcap: float | None = None, rows: HeadRows | None = None
) -> Tensor:
    """log softmax(head · hidden_i)[targets_i] as float32 [N], with gradients for `hidden` [N, D] and `head` [V, D];
    `softcap` and `rows` are those of `linear_cross_entropy`."""
    dtype = _compute_dtype(hidden)
    return _TokenLogProbabilities.apply(hidden, head, targets, softcap, dtype, *(rows or (None, None)))


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    """The type of matrix products: that of autocast if it is on. Logits and losses are always float32."""
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def _at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor in float32, or in its own type if that is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _cap(logits: Tensor, softcap: float | None) -> Tensor | None:
    """Caps logits in place; returns the slope of the cap at each, in place of a second pass."""
    if softcap is None:
        return None
    logits.div_(softcap).tanh_()
    slope = 1 - logits.square()
    logits.mul_(softcap)
    return slope


def _chunks(hidden: Tensor, vocabulary: int) -> Iterator[slice]:
    rows = max(16, CHUNK_ELEMENTS.get(hidden.device.type, 1 << 27) // vocabulary)
    for start in range(0, len(hidden), rows):
        yield slice(start, min(start + rows, len(hidden)))


def _add_product(total: Tensor, gradient: Tensor, rows: Tensor) -> None:
    """total [V, D] += gradientᵀ [V, N] · rows [N, D]; in one pass where the types are equal."""
    if total.dtype == rows.dtype:
        total.addmm_(gradient.T, rows)
    else:
        total += gradient.T @ rows


def _cross_entropy(
    logits: Tensor, targets: Tensor, factors: Tensor, z_loss: float, gradient: bool
) -> tuple[Tensor, Tensor]:
    """See model.fused.cross_entropy."""
    log_z = torch.logsumexp(logits, dim=1)
    token_losses = log_z - logits.gather(1, targets[:, None])[:, 0]
    if gradient:
        # With respect to logits: (1 + 2 · z_loss · log Z) · softmax − one-hot, times the factor of its row.
        logits.sub_(log_z[:, None]).exp_()
        if z_loss:
            logits.mul_(1 + 2 * z_loss * log_z[:, None])
        logits.scatter_add_(1, targets[:, None], logits.new_full((len(logits), 1), -1.0)).mul_(factors[:, None])
    return token_losses, log_z


class _LinearCrossEntropy(Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        targets: Tensor,
        factors: Tensor,
        z_loss: float,
        softcap: float | None,
        dtype: torch.dtype,
        needs_grad_rows: bool,
        needs_grad_weight: bool,
        ids: Tensor | None,
        values: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        token_losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        needs_gradient = needs_grad_rows or needs_grad_weight
        with torch.autocast(hidden.device.type, enabled=False):
            rows, weight = hidden.detach().to(dtype), head.detach().to(dtype)
            # In float16 a factor of 1/tokens would flush the gradients to zero: it is applied in the backward
            # pass, with the loss scale.
            largest = factors.abs().amax().clamp(min=1e-30) if len(factors) else factors.new_ones(())
            relative = factors / largest
            grad_rows = torch.empty_like(rows) if needs_grad_rows else None
            grad_weight = torch.zeros_like(head, dtype=_at_least_float32(head[:0]).dtype) if needs_grad_weight else None
            grad_values = None
            if values is not None and needs_grad_rows:
                grad_values = torch.zeros_like(values, dtype=_at_least_float32(values[:0]).dtype)
            loss = factors.new_zeros((), dtype=torch.float64)
            for chunk in _chunks(rows, len(weight)):
                logits = _at_least_float32(rows[chunk] @ weight.T)
                slope = _cap(logits, softcap)
                kernels = cpu_kernels(logits)
                cross_entropy = kernels.cross_entropy if kernels else _cross_entropy
                losses, log_z = cross_entropy(logits, targets[chunk], relative[chunk], z_loss, needs_gradient)
                token_losses[chunk] = losses
                if z_loss:
                    losses = losses + z_loss * log_z.square()
                loss += (losses.double() * factors[chunk].double()).sum()
                if not needs_gradient:
                    continue
                gradient = (logits if slope is None else logits.mul_(slope)).to(dtype)
                if grad_rows is not None:
                    torch.mm(gradient, weight, out=grad_rows[chunk])
                if grad_weight is not None:
                    _add_product(grad_weight, gradient, rows[chunk])
                if grad_values is not None:
                    _add_product(grad_values, gradient[:, ids], rows[chunk])
        if needs_gradient:
            ctx.save_for_backward(grad_rows, grad_weight, grad_values, largest)
            ctx.types = (hidden.dtype, head.dtype, None if values is None else values.dtype)
        ctx.mark_non_differentiable(token_losses)
        ctx.set_materialize_grads(False)
        return loss.to(_at_least_float32(hidden[:0]).dtype), token_losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        *totals, largest = ctx.saved_tensors
        factor = grad * largest
        pairs = zip(totals, ctx.types, strict=True)
        rows, weight, values = (None if total is None else (total * factor).to(dtype) for total, dtype in pairs)
        return rows, weight, *[None] * 8, values


class _TokenLogProbabilities(Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        targets: Tensor,
        softcap: float | None,
        dtype: torch.dtype,
        ids: Tensor | None,
        values: Tensor | None,
    ) -> Tensor:
        result = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            rows, weight = hidden.detach().to(dtype), head.detach().to(dtype)
            for chunk in _chunks(rows, len(weight)):
                logits = (rows[chunk] @ weight.T).float()
                _cap(logits, softcap)
                result[chunk] = torch.log_softmax(logits, dim=1).gather(1, targets[chunk, None])[:, 0]
        ctx.save_for_backward(hidden, head, targets, ids, values)
        ctx.dtype, ctx.softcap = dtype, softcap
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden, head, targets, ids, values = ctx.saved_tensors
        with torch.autocast(hidden.device.type, enabled=False):
            rows, weight = hidden.to(ctx.dtype), head.to(ctx.dtype)
            grad_rows = torch.empty_like(rows)
            grad_weight = torch.zeros_like(head, dtype=torch.float32) if ctx.needs_input_grad[1] else None
            grad_values = torch.zeros_like(values, dtype=torch.float32) if ctx.needs_input_grad[6] else None
            for chunk in _chunks(rows, len(weight)):
                logits = (rows[chunk] @ weight.T).float()
                slope = _cap(logits, ctx.softcap)
                gradient = torch.softmax(logits, dim=1)
                gradient.scatter_add_(1, targets[chunk, None], gradient.new_full((len(gradient), 1), -1.0))
                if slope is not None:
                    gradient.mul_(slope)
                gradient = gradient.mul_(-grad[chunk, None]).to(ctx.dtype)
                torch.mm(gradient, weight, out=grad_rows[chunk])
                if grad_weight is not None:
                    _add_product(grad_weight, gradient, rows[chunk])
                if grad_values is not None:
                    _add_product(grad_values, gradient[:, ids], rows[chunk])
        weight = None if grad_weight is None else grad_weight.to(head.dtype)
        return (
            grad_rows.to(hidden.dtype),
            weight,
            *[None] * 4,
            None if grad_values is None else grad_values.to(values.dtype),
        )

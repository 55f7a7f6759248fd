"""One training step in parts: gradients over all micro-batches and processes, the update, an evaluation, the
documents of a step.

    result = accumulate(context, step, step_metrics)     # gradients are reduced and clipped; nothing has changed yet
    update(context, lr, step_metrics)                    # or discard_gradients(context)

The loss of each micro-batch is divided by the weight of the whole step, so that gradients only have to be
summed; see training/data.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmkit.model.decoder import Decoder
from llmkit.training.checkpoint.run_directory import RunDirectory
from llmkit.training.checkpoint.trainer_state import TrainerState
from llmkit.training.data import Batch, Source
from llmkit.training.distributed.processes import Processes
from llmkit.training.guard.diagnosis import StepDocument
from llmkit.training.metrics.gradient_noise import SmallBatchGradient, is_measured
from llmkit.training.metrics.loss_by_source import LossTally
from llmkit.training.metrics.step_metrics import StepMetrics
from llmkit.training.objectives import Objective, ObjectiveResult, next_token
from llmkit.training.optim.optimizer import clip_gradients, set_learning_rate
from llmkit.training.optim.schedule import Schedule
from llmkit.training.options import CheckpointOptions, HeldOutOptions, LogOptions, OptimizerOptions

Tensors = dict[str, torch.Tensor]


@dataclass(slots=True)
class TrainContext:
    """Everything that a run consists of.

    `state` is the trainer state of step 0; its fields other than the progress hold for the whole run. `start`
    is the checkpoint to resume from, already loaded into `model`. `write_model(directory, weights, step,
    tokens)` writes a model directory; `initial()` returns the weights and moments of step 0 once more.
    `before_step(step)` applies the parts of the model's configuration that depend on the step. `report`
    receives every record of the log, `notify` messages for the user.
    """

    model: Decoder
    optimizer: torch.optim.Optimizer
    objective: Objective
    metric_names: tuple[str, ...]  # metrics that the objective reports besides the loss
    source: Source
    schedule: Schedule
    processes: Processes
    directory: RunDirectory
    state: TrainerState
    write_model: Callable[[Path, Tensors, int, int], None]
    initial: Callable[[], tuple[Tensors, Tensors]]
    optimization: OptimizerOptions = field(default_factory=OptimizerOptions)
    checkpoints: CheckpointOptions = field(default_factory=CheckpointOptions)
    evaluation: HeldOutOptions = field(default_factory=HeldOutOptions)
    logging: LogOptions = field(default_factory=LogOptions)
    start: Path | None = None
    micro_batch: int = 8
    heldout: Source | None = None
    uniform_loss: float = math.inf  # of a uniform guess over the vocabulary, where the loss is one of tokens
    decode: Callable[[list[int]], str] | None = None
    flops_per_token: float = 0.0
    token_bytes: torch.Tensor | None = None  # int64 [V]: bytes of text that each token stands for, if known
    at_checkpoint: Sequence[Callable[[Any, int], dict[str, float]]] = ()  # of (model, step); their results are logged
    changed: list[str] = field(default_factory=list)  # changes let through by --accept-change
    before_step: Callable[[int], None] = field(default=lambda step: None)
    report: Callable[[dict[str, Any]], None] = field(default=lambda record: None)
    notify: Callable[[str], None] = field(default=lambda text: None)


@dataclass(slots=True)
class StepResult:
    """Result of a step's forward and backward passes: metrics (`loss` among them), gradient norm, and mean loss
    of the worst row (NaN: unknown).

    `small_batch` is the squared norm and the weight of the gradient of a part of the batch in steps that
    measure the gradient noise scale, else zeros. `metric_sums` is StepMetrics.local_sums() summed over all
    processes.
    """

    metrics: dict[str, float]
    grad_norm: float
    worst_row_loss: float
    small_batch: tuple[float, float] = (0.0, 0.0)
    metric_sums: list[float] = field(default_factory=list)

    def guard_metrics(self) -> tuple[float, float, float]:
        """guard.METRICS of the step."""
        return self.metrics["loss"], self.grad_norm, self.worst_row_loss


def accumulate(context: TrainContext, step: int, step_metrics: StepMetrics) -> StepResult:
    """Forward and backward passes of a step: leaves the gradients of all processes, clipped, in the parameters.

    Weights and moments stay as they are.
    """
    source, processes, scaler = context.source, context.processes, context.processes.accelerator.scaler
    scale = 1.0 / max(source.weight(step), 1e-9)
    parameters = [p for group in context.optimizer.param_groups for p in group["params"]]
    sums: Tensors = {}
    worst_row_loss = -math.inf
    rows, lockstep = source.rows(step), processes.layout.lockstep
    micro_batch = context.micro_batch * source.length_ratio(step)
    small_batch = SmallBatchGradient(lockstep)
    if is_measured(step) and (processes.world_size == 1 or lockstep):
        micro_batch = max(1, min(micro_batch, rows // (2 * processes.world_size)))
    context.model.train()
    step_metrics.begin_step(step)
    passes = processes.micro_batches(context.model, rows, micro_batch, sync_first=is_measured(step))
    for start, stop, factor in passes:
        batch = step_metrics.load_batch(step, start, stop, counted=factor > 0)
        with processes.accelerator.autocast():
            result = context.objective(context.model, batch, scale * factor)
        (scaler.scale(result.loss) if scaler else result.loss).backward()
        for name, value in ({"loss": result.loss.detach()} | result.metrics).items():
            sums[name] = sums.get(name, 0) + value
        worst_row_loss = max(worst_row_loss, _worst_row_loss(batch, result))
        if factor:
            step_metrics.add_losses(batch, result)
        if is_measured(step):
            weight, loss_scale = factor * float(batch.weights.sum()), scaler.get_scale() if scaler else 1.0
            small_batch.observe(parameters, weight, scale * loss_scale)
    processes.all_reduce_gradients(parameters)
    if scaler:
        scaler.unscale_(context.optimizer)
    metrics, worst_row_loss, metric_sums = _reduce_metrics(context, sums, worst_row_loss, step_metrics.local_sums())
    step_metrics.before_update()
    small = small_batch.combine(processes.all_reduce(small_batch.values)) if is_measured(step) else (0.0, 0.0)
    return StepResult(
        metrics, float(clip_gradients(parameters, context.optimization.clip or 0.0)), worst_row_loss, small, metric_sums
    )


def update(context: TrainContext, lr: float, step_metrics: StepMetrics) -> None:
    """Apply the gradients left by `accumulate`, with this learning rate."""
    scaler = context.processes.accelerator.scaler
    set_learning_rate(context.optimizer, lr)
    if scaler:
        scaler.step(context.optimizer)
        scaler.update()
    else:
        context.optimizer.step()
    step_metrics.after_update()
    context.optimizer.zero_grad(set_to_none=True)


def discard_gradients(context: TrainContext) -> None:
    """Discard the gradients left by `accumulate`."""
    context.optimizer.zero_grad(set_to_none=True)
    if context.processes.accelerator.scaler:  # it has no public way to leave a step out
        context.processes.accelerator.scaler._per_optimizer_states.clear()


def _reduce_metrics(
    context: TrainContext, sums: Tensors, worst_row_loss: float, metric_sums: list[float]
) -> tuple[dict[str, float], float, list[float]]:
    """Metrics of the whole step by name, the loss of its worst row (NaN: unknown), and `metric_sums` over all
    processes. A process that had no rows in the step adds zeros."""
    names = ("loss", *context.metric_names)
    values = torch.stack([torch.as_tensor(sums.get(name, 0.0)).double() for name in names]).tolist()
    by_rank = [0.0] * context.processes.world_size  # one slot per process, so that the sum holds the value of each
    by_rank[context.processes.rank] = worst_row_loss if math.isfinite(worst_row_loss) else 0.0
    reduced = context.processes.all_reduce([*values, *by_rank, *metric_sums])
    metrics = dict(zip(names, reduced, strict=False))
    reduced = reduced[len(names) :]
    largest = max(reduced[: len(by_rank)])
    return metrics, largest if largest > 0 else math.nan, reduced[len(by_rank) :]


def _worst_row_loss(batch: Batch, result: ObjectiveResult) -> float:
    """The highest mean loss of a row; -inf if the losses of tokens are unknown."""
    if result.token_losses is None or result.positions is None or not len(result.positions):
        return -math.inf
    shape = batch.targets.shape
    losses = result.token_losses.new_zeros(shape.numel()).index_put((result.positions,), result.token_losses)
    counted = (batch.weights > 0).sum(dim=1)
    return float((losses.view(shape).sum(dim=1) / counted.clamp(min=1)).max())


def evaluate(
    context: TrainContext,
    source: Source,
    step: int = 0,
    should_stop: Callable[[], bool] = lambda: False,
    tally: LossTally | None = None,
) -> float | None:
    """Weighted mean loss of a step of `source` over all processes; None if `should_stop` interrupted any of them.

    `tally` collects the token losses of this process.
    """
    processes = context.processes
    scale = 1.0 / max(source.weight(step), 1e-9)
    total, stopped = 0.0, False
    context.model.eval()
    with torch.no_grad():
        for start, stop, factor in processes.micro_batches(context.model, source.rows(step), context.micro_batch):
            stopped = processes.agree(should_stop())
            if stopped:
                break
            batch = source.batch(step, start, stop).to(processes.device)
            with processes.accelerator.autocast():
                result = context.objective(context.model, batch, scale * factor)
            total += float(result.metrics.get("loss", result.loss))
            if tally and factor:
                tally.add(batch, result)
    total, interrupted = processes.all_reduce([total, float(stopped)])
    return None if interrupted else total


def evaluate_held_out(context: TrainContext, should_stop: Callable[[], bool]) -> dict[str, float] | None:
    """Logged metrics of the held-out data: loss, losses and bits per byte by domain.

    None if `should_stop` interrupted it.
    """
    assert context.heldout is not None
    tally = LossTally(context.heldout, context.token_bytes, context.processes.device)
    loss = evaluate(context, context.heldout, should_stop=should_stop, tally=tally)
    if loss is None:
        return None
    sums = context.processes.all_reduce(tally.sums())
    return {"heldout_loss": loss} | tally.means(sums, "heldout", "heldout_bpb", "heldout_bpb")


def step_documents(context: TrainContext, step: int, *, compute_losses: bool = True) -> list[StepDocument]:
    """The documents of a step in order, with the losses of their tokens under the current weights.

    Every process computes all of them.
    """
    tokens: dict[str, np.ndarray] = {}
    losses: dict[str, list[np.ndarray]] = {}
    context.model.eval()
    rows = context.source.rows(step)
    for start in range(0, rows, context.micro_batch):
        stop = min(start + context.micro_batch, rows)
        batch = context.source.batch(step, start, stop)
        token_losses = np.full(batch.targets.shape, np.nan, np.float32)
        if compute_losses:
            with torch.no_grad(), context.processes.accelerator.autocast():
                result = next_token(context.model, batch.to(context.processes.device), 1.0)
            if result.positions is not None and result.token_losses is not None:
                token_losses.reshape(-1)[result.positions.cpu().numpy()] = result.token_losses.cpu().numpy()
        count, length = batch.targets.shape
        owners = np.zeros((count, length), np.int64) if batch.document_ids is None else batch.document_ids.numpy()
        for row in range(count):
            cuts = [0, *(np.flatnonzero(np.diff(owners[row])) + 1).tolist(), length]
            for first, last in zip(cuts, cuts[1:], strict=False):
                if owners[row, first] >= 0:
                    # A batch of pairs has two rows for each pair.
                    name, document = context.source.document(step, start + row % (stop - start), first)
                    tokens[name] = document
                    losses.setdefault(name, []).append(token_losses[row, first:last])
    context.processes.layout.reshard(context.model)
    return [StepDocument(name, np.asarray(tokens[name]), np.concatenate(losses[name])) for name in tokens if name]

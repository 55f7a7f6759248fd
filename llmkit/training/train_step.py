"""One step of training, and what it is made of: gradients over all micro-batches and processes, the update, an evaluation, the documents in it.

    measured = accumulate(training, step)     # gradients are there, clipped; nothing has changed yet
    update(training, rate)                    # or drop(training)

Losses of micro-batches are divided by the weight of the whole step, so that the gradients only have to be added up; see training.data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmkit.training.checkpoint.run_directory import RunDirectory, TrainerState
from llmkit.training.data import Batch, Source
from llmkit.training.distributed.processes import Processes
from llmkit.training.guard.diagnosis import Piece
from llmkit.training.metrics.gradient_noise import Part, measured
from llmkit.training.metrics.loss_by_source import LossTally
from llmkit.training.metrics.step_metrics import StepMetrics
from llmkit.training.objectives import Objective, Result, next_token
from llmkit.training.optim.optimizer import clip_gradients, set_rate
from llmkit.training.optim.schedule import Schedule

Tensors = dict[str, torch.Tensor]


@dataclass(slots=True)
class TrainContext:
    """All that a run consists of. `state` is that of step 0 and gives what does not change; `start` is the checkpoint to go on from, already loaded
    into `model`. `write_model(directory, weights, step, tokens)` fills a model directory; `initial()` gives weights and moments of step 0 once more.
    `before_step(step)` sets what of the model is a function of the step. `report` is called with every record of the log, `say` with what a user should know."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    objective: Objective
    figures: tuple[str, ...]  # names of what the objective reports beside the loss
    source: Source
    schedule: Schedule
    processes: Processes
    directory: RunDirectory
    state: TrainerState
    write_model: Callable[[Path, Tensors, int, int], None]
    initial: Callable[[], tuple[Tensors, Tensors]]
    start: Path | None = None
    micro_batch: int = 8
    clip: float = 1.0
    save_every: int = 0
    keep: int = 0
    keep_every: int = 0
    heldout: Source | None = None
    eval_every: int = 0
    max_hours: float = math.inf
    max_rollbacks: int = 8  # within a window of the guard; 0: no guard
    chance: float = math.inf  # loss of a guess among all tokens, where the loss is one of tokens
    decode: Callable[[list[int]], str] | None = None
    flops_per_token: float = 0.0
    log_every: int = 10
    token_bytes: torch.Tensor | None = None  # int64 [V]: the text that each token stands for, where that is known
    at_checkpoint: Sequence[Callable[[Any, int], dict[str, float]]] = ()  # of (model, step); what they return is logged
    changed: list[str] = field(default_factory=list)  # what --accept-change let pass
    before_step: Callable[[int], None] = field(default=lambda step: None)
    report: Callable[[dict[str, Any]], None] = field(default=lambda record: None)
    say: Callable[[str], None] = field(default=lambda text: None)


@dataclass(slots=True)
class StepResult:
    """What the forward and backward passes of a step gave: its figures (`loss` among them), gradient norm, mean loss of its worst row, and where the
    noise is measured squared norm and weight of the gradient of a `part` (else 0)."""

    figures: dict[str, float]
    norm: float
    worst: float
    part: tuple[float, float] = (0.0, 0.0)
    seen: list[float] = field(default_factory=list)  # StepMetrics.sums() of all processes

    def for_guard(self) -> tuple[float, float, float]:
        return self.figures["loss"], self.norm, self.worst


def accumulate(t: TrainContext, step: int, watch: StepMetrics) -> StepResult:
    """Forward and backward passes of a step: the gradients of all processes, clipped, lie at the parameters. Weights and moments are as before."""
    source, processes, scaler = t.source, t.processes, t.processes.accelerator.scaler
    scale = 1.0 / max(source.weight(step), 1e-9)
    parameters = [p for group in t.optimizer.param_groups for p in group["params"]]
    sums: Tensors = {}
    worst = -math.inf
    rows, lockstep = source.rows(step), processes.layout.lockstep
    micro_batch = t.micro_batch * source.shortened(step)
    part = Part(lockstep)
    if measured(step) and (processes.world_size == 1 or lockstep):
        micro_batch = max(1, min(micro_batch, rows // (2 * processes.world_size)))
    t.model.train()
    watch.begin(step)
    for start, stop, factor in processes.micro_batches(t.model, rows, micro_batch, add_first=measured(step)):
        batch = watch.take(step, start, stop, counts=factor > 0)
        with processes.accelerator.autocast():
            found = t.objective(t.model, batch, scale * factor)
        (scaler.scale(found.loss) if scaler else found.loss).backward()
        for name, value in ({"loss": found.loss.detach()} | found.figures).items():
            sums[name] = sums.get(name, 0) + value
        worst = max(worst, _worst_row(batch, found))
        if factor:
            watch.losses(batch, found)
        if measured(step):
            part.look(parameters, factor * float(batch.weights.sum()), scale * (scaler.get_scale() if scaler else 1.0))
    processes.add_gradients(parameters)
    if scaler:
        scaler.unscale_(t.optimizer)
    figures, worst, seen = _gather(t, sums, worst, watch.sums())
    watch.before()
    small = part.together(processes.all_reduce(part.values)) if measured(step) else (0.0, 0.0)
    return StepResult(figures, float(clip_gradients(parameters, t.clip)), worst, small, seen)


def update(t: TrainContext, rate: float, watch: StepMetrics) -> None:
    """Take the step whose gradients `accumulate` has left, with this learning rate."""
    scaler = t.processes.accelerator.scaler
    set_rate(t.optimizer, rate)
    if scaler:
        scaler.step(t.optimizer)
        scaler.update()
    else:
        t.optimizer.step()
    watch.after()
    t.optimizer.zero_grad(set_to_none=True)


def drop(t: TrainContext) -> None:
    """Forget the gradients that `accumulate` has left."""
    t.optimizer.zero_grad(set_to_none=True)
    if t.processes.accelerator.scaler:  # which knows of no step that is not taken
        t.processes.accelerator.scaler._per_optimizer_states.clear()


def _gather(
    t: TrainContext, sums: Tensors, worst: float, more: list[float]
) -> tuple[dict[str, float], float, list[float]]:
    """The figures of the whole step by name, the loss of its worst row (nan: unknown), and the sums of `more`. A process that had no row in it adds
    zeros."""
    names = ("loss", *t.figures)
    values = torch.stack([torch.as_tensor(sums.get(name, 0.0)).double() for name in names]).tolist()
    each = [0.0] * t.processes.world_size  # one place for every process: their sum then holds the value of each
    each[t.processes.rank] = worst if math.isfinite(worst) else 0.0
    found = t.processes.all_reduce([*values, *each, *more])
    figures = dict(zip(names, found, strict=False))
    found = found[len(names) :]
    largest = max(found[: len(each)])
    return figures, largest if largest > 0 else math.nan, found[len(each) :]


def _worst_row(batch: Batch, found: Result) -> float:
    """The highest mean loss of a row; -inf where losses of tokens are not known."""
    if found.token_losses is None or found.positions is None or not len(found.positions):
        return -math.inf
    shape = batch.targets.shape
    losses = found.token_losses.new_zeros(shape.numel()).index_put((found.positions,), found.token_losses).view(shape)
    counted = (batch.weights > 0).sum(dim=1)
    return float((losses.sum(dim=1) / counted.clamp(min=1)).max())


def evaluate(
    t: TrainContext,
    source: Source,
    step: int = 0,
    stopped: Callable[[], bool] = lambda: False,
    tally: LossTally | None = None,
) -> float | None:
    """Mean loss over the weights of a step of `source`, all processes together; None where any was `stopped` before the end. `tally` gets the losses
    of this process's tokens."""
    processes = t.processes
    scale = 1.0 / max(source.weight(step), 1e-9)
    total, stops = 0.0, False
    t.model.eval()
    with torch.no_grad():
        for start, stop, factor in processes.micro_batches(t.model, source.rows(step), t.micro_batch):
            stops = processes.agree(stopped())
            if stops:
                break
            batch = source.batch(step, start, stop).to(processes.device)
            with processes.accelerator.autocast():
                found = t.objective(t.model, batch, scale * factor)
            total += float(found.figures.get("loss", found.loss))
            if tally and factor:
                tally.add(batch, found)
    total, left = processes.all_reduce([total, float(stops)])
    return None if left else total


def held_out(t: TrainContext, stopped: Callable[[], bool]) -> dict[str, float] | None:
    """What the log says of the held-out data: loss, losses and bits a byte by domain; None where a signal came before the end."""
    assert t.heldout is not None
    tally = LossTally(t.heldout, t.token_bytes, t.processes.device)
    loss = evaluate(t, t.heldout, stopped=stopped, tally=tally)
    if loss is None:
        return None
    numbers = t.processes.all_reduce(tally.numbers())
    return {"heldout_loss": loss} | tally.figures(numbers, "heldout", "heldout_bpb", "heldout_bpb")


def pieces_of(t: TrainContext, step: int, *, losses: bool = True) -> list[Piece]:
    """The documents of a step in order, with the loss of their tokens in it under the weights as they are. Every process computes all of it."""
    tokens: dict[str, np.ndarray] = {}
    lost: dict[str, list[np.ndarray]] = {}
    t.model.eval()
    rows = t.source.rows(step)
    for start in range(0, rows, t.micro_batch):
        batch = t.source.batch(step, start, min(start + t.micro_batch, rows))
        found = np.full(batch.targets.shape, np.nan, np.float32)
        if losses:
            with torch.no_grad(), t.processes.accelerator.autocast():
                result = next_token(t.model, batch.to(t.processes.device), 1.0)
            if result.positions is not None and result.token_losses is not None:
                found.reshape(-1)[result.positions.cpu().numpy()] = result.token_losses.cpu().numpy()
        count, length = batch.targets.shape
        owners = np.zeros((count, length), np.int64) if batch.document_ids is None else batch.document_ids.numpy()
        for row in range(count):
            cuts = [0, *(np.flatnonzero(np.diff(owners[row])) + 1).tolist(), length]
            for first, last in zip(cuts, cuts[1:], strict=False):
                if owners[row, first] >= 0:
                    # A batch of pairs has two rows for each.
                    name, whole = t.source.document(
                        step, start + row % (min(start + t.micro_batch, rows) - start), first
                    )
                    tokens[name] = whole
                    lost.setdefault(name, []).append(found[row, first:last])
    t.processes.layout.reshard(t.model)
    return [Piece(name, np.asarray(tokens[name]), np.concatenate(lost[name])) for name in tokens if name]

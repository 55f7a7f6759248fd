"""Metrics of a step beyond the loss: every curve of curves.py that is measured during the step.

    step_metrics = StepMetrics(model, source, processes, directory, every=10, token_bytes=lengths)
    step_metrics.begin_step(step)
    batch = step_metrics.load_batch(step, start, stop)         # times the wait and counts the contents
    step_metrics.add_losses(batch, result)                     # losses by source, after each micro-batch
    sums = processes.all_reduce(step_metrics.local_sums())     # joins the loop's one all-reduce
    step_metrics.before_update(), optimizer.step(), step_metrics.after_update()
    record |= step_metrics.finish_step(sums, grad_norm, clip)

Measuring changes nothing: weights and random state are the same with and without it
(tests/training/test_curves.py). Costly metrics are measured in the first step and every `every`-th, a
function of the step alone. Cost: see tests/bench/curves_cost.md. Under FSDP each process measures its own
shards, and the squares are summed.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmkit.model.config import ModelConfig
from llmkit.model.family import find_parameter
from llmkit.training.data import PADDING_ID, Batch, Source
from llmkit.training.distributed.layout import local_tensor
from llmkit.training.distributed.processes import Processes
from llmkit.training.metrics.activations import activation_statistics
from llmkit.training.metrics.curves import GROUPS
from llmkit.training.metrics.loss_by_source import LossTally
from llmkit.training.metrics.machine import machine_metrics
from llmkit.training.objectives import ObjectiveResult
from llmkit.training.source_groups import PADDING_CODE

MAX_SAMPLED = 1 << 16  # elements of a tensor whose change is measured
COUNTS = ("positions", "padding", "documents", "sequences", "counted", "data_seconds")


class StepMetrics:
    """Metrics of one step at a time.

    `token_bytes` int64 [V] are the bytes of text that each token stands for; None if unknown.
    """

    def __init__(
        self,
        model: Any,
        source: Source,
        processes: Processes,
        directory: Path,
        every: int = 10,
        token_bytes: Tensor | None = None,
    ) -> None:
        self._model, self._source, self._processes, self._directory = model, source, processes, directory
        self._every, self._bytes = every, None if token_bytes is None else token_bytes.to(processes.device)
        self._parameters: dict[str, list[torch.nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self._parameters.setdefault(parameter_group(name, model.config), []).append(parameter)
        self.begin_step(0)

    def begin_step(self, step: int) -> None:
        """Start a new step, counted from 0."""
        self._step, self._started = step, time.perf_counter()
        self._counts = dict.fromkeys(COUNTS, 0.0)
        self._tally = LossTally(self._source, self._bytes, self._processes.device)
        self._metrics: dict[str, float] = {}

    @property
    def detailed(self) -> bool:
        """Whether this step measures the costly metrics too."""
        return self._every > 0 and (self._step == 0 or (self._step + 1) % self._every == 0)

    def load_batch(self, step: int, start: int, stop: int, counted: bool = True) -> Batch:
        """The rows [start, stop) of the step on this process's device.

        Those of an extra pass in a lockstep layout are not counted.
        """
        began = time.perf_counter()
        batch = self._source.batch(step, start, stop)
        if counted:
            self._count_contents(batch)
        batch = batch.to(self._processes.device)
        self._counts["data_seconds"] += time.perf_counter() - began
        return batch

    def _count_contents(self, batch: Batch) -> None:
        """Count positions, documents and padding of a batch."""
        counts = self._counts
        padding = torch.zeros_like(batch.targets, dtype=torch.bool)
        if batch.document_ids is not None:
            padding |= batch.document_ids == PADDING_ID
        if "groups" in batch.extra:
            padding |= batch.extra["groups"] == PADDING_CODE
        first = ~padding
        if batch.document_ids is not None:
            first[:, 1:] &= batch.document_ids[:, 1:] != batch.document_ids[:, :-1]
        else:
            first[:, 1:] &= padding[:, :-1]
        counts["positions"] += batch.targets.numel()
        counts["padding"] += int(padding.sum())
        counts["documents"] += int(first.sum())
        counts["sequences"] += len(batch.targets)
        counts["counted"] += int((batch.weights != 0).sum())

    def add_losses(self, batch: Batch, result: ObjectiveResult) -> None:
        """Add the token losses of a micro-batch to their groups."""
        self._tally.add(batch, result)

    def local_sums(self) -> list[float]:
        """The sums of this process, to be all-reduced; always the same number of values."""
        return [*self._counts.values(), *self._tally.sums()]

    @torch.no_grad()
    def before_update(self) -> None:
        """Measure norms by group and remember the weights.

        The gradients are those of the whole step, not yet clipped.
        """
        if not self.detailed:
            return
        self._samples = {name: [_sample(p).clone() for p in group] for name, group in self._parameters.items()}
        for name, group in self._parameters.items():
            self._metrics[f"grad_norm/{name}"] = self._norm([p.grad for p in group if p.grad is not None])
            self._metrics[f"param_norm/{name}"] = self._norm(group)

    @torch.no_grad()
    def after_update(self) -> None:
        """Measure the size of the update relative to the weights."""
        if not self.detailed:
            return
        for name, group in self._parameters.items():
            samples = self._samples[name]
            change = self._norm([_sample(p) - old for p, old in zip(group, samples, strict=True)])
            self._metrics[f"update_ratio/{name}"] = change / max(self._norm(samples), 1e-30)
        self._samples = {}

    def finish_step(self, sums: list[float], grad_norm: float, clip: float) -> dict[str, float]:
        """The metrics of the step; `sums` are `local_sums()` over all processes."""
        counts = dict(zip(COUNTS, sums, strict=False))
        metrics = self._tally.means(sums[len(COUNTS) :], "loss", "", "bits_per_byte")
        tokens = self._source.tokens(self._step + 1)
        if data_tokens := getattr(self._source, "data_tokens", 0):
            metrics["epoch"] = tokens / data_tokens
        metrics |= {
            "clipped": max(0.0, 1 - clip / grad_norm) if clip and grad_norm else 0.0,
            "tokens_counted": int(counts["counted"]),
            "sequences": int(counts["sequences"]),
            "documents": int(counts["documents"]),
            "padding": counts["padding"] / max(counts["positions"], 1),
            "data_seconds": counts["data_seconds"] / self._processes.world_size,
        }
        if self.detailed:
            self._metrics |= activation_statistics(self._model, self._source, self._step, self._processes)
            self._metrics |= machine_metrics(self._processes.device, self._directory)
        metrics |= self._metrics
        metrics["step_seconds"] = time.perf_counter() - self._started
        return {name: value if isinstance(value, int) else float(f"{value:.6g}") for name, value in metrics.items()}

    def _norm(self, tensors: list[Any]) -> float:
        """Joint 2-norm of the tensors; of shards, over all processes."""
        shards = [local_tensor(tensor) for tensor in tensors]
        square = float(torch.stack(torch._foreach_norm(shards)).double().square().sum()) if shards else 0.0
        sharded = any(hasattr(tensor, "to_local") for group in self._parameters.values() for tensor in group)
        return math.sqrt(self._processes.all_reduce([square])[0] if sharded else square)


def parameter_group(name: str, config: ModelConfig) -> str:
    """The group (curves.GROUPS) of a parameter by its Hugging Face name."""
    parameter = find_parameter(config, name)
    return parameter.group if parameter else GROUPS[-1]


def _sample(tensor: Tensor) -> Tensor:
    """Up to MAX_SAMPLED elements, evenly spaced; a view."""
    flat = local_tensor(tensor.detach()).flatten()
    return flat[:: max(1, -(-len(flat) // MAX_SAMPLED))]

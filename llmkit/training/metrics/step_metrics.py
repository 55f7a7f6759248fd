"""What a step shows of itself: the figures of curves.py that need more than the loss.

    watch = StepMetrics(model, source, processes, directory, every=10, token_bytes=lengths)
    watch.begin(step)
    batch = watch.take(step, start, stop)           # times the wait and counts what is in it
    watch.losses(batch, found)                      # losses by source, after each micro-batch
    numbers = watch.sums()                          # join the loop's one all-reduce
    watch.before(), optimizer.step(), watch.after()
    record |= watch.end(numbers, norm, clip)

All is read, nothing written: weights and random state are the same with and without (tests/training/test_curves.py). What costs something is
measured in the first step and every `every`-th, a function of the step alone. Cost: see tests/bench/curves_cost.md. Under FSDP each process
measures its own shards, and the squares are added up.
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
from llmkit.training.data import PADDING, Batch, Source
from llmkit.training.distributed.layout import local
from llmkit.training.distributed.processes import Processes
from llmkit.training.metrics.activations import probe
from llmkit.training.metrics.curves import GROUPS
from llmkit.training.metrics.loss_by_source import LossTally
from llmkit.training.metrics.machine import machine_figures
from llmkit.training.objectives import Result
from llmkit.training.source_groups import NOTHING

SAMPLED = 1 << 16  # elements of a tensor whose change is followed
COUNTS = ("positions", "nothing", "documents", "sequences", "counted", "data_seconds")


class StepMetrics:
    """Figures of one step at a time. `token_bytes` int64 [V] is the text that each token stands for, None where that is not known."""

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
                self._parameters.setdefault(group_of(name, model.config), []).append(parameter)
        self.begin(0)

    def begin(self, step: int) -> None:
        """A new step, counted from 0."""
        self._step, self._started = step, time.perf_counter()
        self._count = dict.fromkeys(COUNTS, 0.0)
        self._tally = LossTally(self._source, self._bytes, self._processes.device)
        self._figures: dict[str, float] = {}

    @property
    def due(self) -> bool:
        """Whether this step measures what costs something."""
        return self._every > 0 and (self._step == 0 or (self._step + 1) % self._every == 0)

    def take(self, step: int, start: int, stop: int, counts: bool = True) -> Batch:
        """The rows [start, stop) of the step on this process's device; rows that only keep step with other processes do not count."""
        began = time.perf_counter()
        batch = self._source.batch(step, start, stop)
        if counts:
            self._tell(batch)
        batch = batch.to(self._processes.device)
        self._count["data_seconds"] += time.perf_counter() - began
        return batch

    def _tell(self, batch: Batch) -> None:
        """Count what is in a batch."""
        count = self._count
        nothing = torch.zeros_like(batch.targets, dtype=torch.bool)
        if batch.document_ids is not None:
            nothing |= batch.document_ids == PADDING
        if "groups" in batch.extra:
            nothing |= batch.extra["groups"] == NOTHING
        first = ~nothing
        if batch.document_ids is not None:
            first[:, 1:] &= batch.document_ids[:, 1:] != batch.document_ids[:, :-1]
        else:
            first[:, 1:] &= nothing[:, :-1]
        count["positions"] += batch.targets.numel()
        count["nothing"] += int(nothing.sum())
        count["documents"] += int(first.sum())
        count["sequences"] += len(batch.targets)
        count["counted"] += int((batch.weights != 0).sum())

    def losses(self, batch: Batch, found: Result) -> None:
        """Add the token losses of a micro-batch to their groups."""
        self._tally.add(batch, found)

    def sums(self) -> list[float]:
        """What has to be added up over all processes; always as many numbers."""
        return [*self._count.values(), *self._tally.numbers()]

    @torch.no_grad()
    def before(self) -> None:
        """Norms by group, and the weights as they are; the gradients are whole and not yet clipped."""
        if not self.due:
            return
        self._samples = {name: [_sample(p).clone() for p in group] for name, group in self._parameters.items()}
        for name, group in self._parameters.items():
            self._figures[f"grad_norm/{name}"] = self._norm([p.grad for p in group if p.grad is not None])
            self._figures[f"param_norm/{name}"] = self._norm(group)

    @torch.no_grad()
    def after(self) -> None:
        """How far the step went, relative to where the weights were."""
        if not self.due:
            return
        for name, group in self._parameters.items():
            olds = self._samples[name]
            moved = self._norm([_sample(p) - old for p, old in zip(group, olds, strict=True)])
            self._figures[f"update_ratio/{name}"] = moved / max(self._norm(olds), 1e-30)
        self._samples = {}

    def end(self, numbers: list[float], norm: float, clip: float) -> dict[str, float]:
        """The figures of the step; `numbers` are `sums()` over all processes, `norm` is that of the gradient."""
        count = dict(zip(COUNTS, numbers, strict=False))
        figures = self._tally.figures(numbers[len(COUNTS) :], "loss", "", "bits_per_byte")
        tokens = self._source.tokens(self._step + 1)
        if passes := getattr(self._source, "data_tokens", 0):
            figures["epoch"] = tokens / passes
        figures |= {
            "clipped": max(0.0, 1 - clip / norm) if clip and norm else 0.0,
            "tokens_counted": int(count["counted"]),
            "sequences": int(count["sequences"]),
            "documents": int(count["documents"]),
            "padding": count["nothing"] / max(count["positions"], 1),
            "data_seconds": count["data_seconds"] / self._processes.world_size,
        }
        if self.due:
            self._figures |= probe(self._model, self._source, self._step, self._processes)
            self._figures |= machine_figures(self._processes.device, self._directory)
        figures |= self._figures
        figures["step_seconds"] = time.perf_counter() - self._started
        return {name: value if isinstance(value, int) else float(f"{value:.6g}") for name, value in figures.items()}

    def _norm(self, tensors: list[Any]) -> float:
        """Length of all tensors together; of shards over all processes."""
        parts = [local(tensor) for tensor in tensors]
        square = float(torch.stack(torch._foreach_norm(parts)).double().square().sum()) if parts else 0.0
        shards = any(hasattr(tensor, "to_local") for group in self._parameters.values() for tensor in group)
        return math.sqrt(self._processes.all_reduce([square])[0] if shards else square)


def group_of(name: str, config: ModelConfig) -> str:
    """The group (curves.GROUPS) of a parameter by its Hugging Face name."""
    parameter = find_parameter(config, name)
    return parameter.group if parameter else GROUPS[-1]


def _sample(tensor: Tensor) -> Tensor:
    """Up to SAMPLED elements, evenly spread; a view."""
    flat = local(tensor.detach()).flatten()
    return flat[:: max(1, -(-len(flat) // SAMPLED))]

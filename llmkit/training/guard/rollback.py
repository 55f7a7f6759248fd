"""The state of a run copied to the host and back, over all processes in whatever layout: what rollbacks and checkpoints are made of.

The main process's snapshot holds whole tensors, one copy (training.snapshot). Every process calls these functions, and hands over or takes its part.

When copies are made depends on the step alone, so a run that was killed has the same to go back to. A checkpoint that a signal asked for is one copy
more: a rollback from it comes to the same weights, but what a lasting rise is compared with is then a later state than it would have been.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain

import torch

from llmkit.io.run_layout import step_of
from llmkit.training.checkpoint.run_directory import (
    TrainerState,
    damage,
    load_optimizer_tensors,
    load_trainer_state,
    load_weights,
)
from llmkit.training.checkpoint.snapshot import HostSnapshot
from llmkit.training.distributed.layout import copy_whole, full_tensors, local
from llmkit.training.optim.optimizer import named_state, restore_optimizer
from llmkit.training.train_step import TrainContext


def hold(t: TrainContext, snapshot: HostSnapshot, state: TrainerState) -> None:
    """Copy weights and moments to the snapshot of the main process, as those of `state`."""
    weights = full_tensors(t.model.state_dict().items(), t.processes.is_main)
    moments = full_tensors(named_state(t.model, t.optimizer), t.processes.is_main)
    if t.processes.is_main:
        snapshot.copy(state, weights, moments)
    else:
        for _ in chain(weights, moments):
            pass


def find_before(t: TrainContext, snapshot: HostSnapshot, first: int) -> TrainerState:
    """Make the snapshot hold the latest good state with fewer than `first` steps: its own, a checkpoint's, the start's. What belongs to it, everywhere."""
    found: TrainerState = t.processes.broadcast(_find(t, snapshot, first) if t.processes.is_main else None)
    return found


def _find(t: TrainContext, snapshot: HostSnapshot, first: int) -> TrainerState:
    snapshot.wait()
    held = snapshot.state
    if held is not None and held.step < first and all_finite(snapshot.weights.values()):
        return held
    checkpoints = t.directory.checkpoints()
    before = [checkpoint for checkpoint in checkpoints if step_of(checkpoint) < first]
    # Where --keep has removed those, the oldest that is left: better than the start.
    for checkpoint in reversed(before or (checkpoints[:1] if t.keep else [])):
        if damage(checkpoint) is None:
            state, weights = load_trainer_state(checkpoint), load_weights(checkpoint)
            if all_finite(weights.values()):
                snapshot.copy(state, weights.items(), load_optimizer_tensors(checkpoint).items())
                return state
    weights, moments = t.initial()
    snapshot.copy(t.state, weights.items(), moments.items())
    return t.state


def place(t: TrainContext, snapshot: HostSnapshot) -> None:
    """Put what the snapshot holds back into model and optimiser."""
    _place_weights(t, snapshot)
    t.optimizer.state.clear()
    restore_optimizer(t.model, t.optimizer, t.processes.from_main(snapshot.moments), "the last good state")


@contextmanager
def weights_of(t: TrainContext, snapshot: HostSnapshot) -> Iterator[None]:
    """The model with the weights that the snapshot holds, for as long as the block runs. Memory: this process's part of the weights once more."""
    now = {name: local(tensor.detach()).clone() for name, tensor in t.model.state_dict().items()}
    _place_weights(t, snapshot)
    try:
        yield
    finally:
        t.processes.layout.reshard(t.model)
        for name, tensor in t.model.state_dict().items():
            local(tensor.detach()).copy_(now[name])


def _place_weights(t: TrainContext, snapshot: HostSnapshot) -> None:
    t.processes.layout.reshard(t.model)
    weights = t.processes.from_main(snapshot.weights)
    for name, tensor in t.model.state_dict().items():
        copy_whole(tensor, weights[name])


def all_finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether there are numbers alone in what this process holds of them."""
    return all(bool(torch.isfinite(local(tensor.detach())).all()) for tensor in tensors)

"""Copies a run's state to the host and back, over all processes and in any layout, for rollbacks and
checkpoints.

The main process's snapshot holds whole tensors, one copy (checkpoint/snapshot.py). Every process calls these
functions, and sends or receives its shards.

Snapshots are taken at steps that depend on the step number alone, so a killed and resumed run has the same
ones to roll back to. A checkpoint requested by a signal adds one more snapshot: a rollback from it ends in
the same weights, but a persistent rise in loss is then compared with a later state than it would have been.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain

import torch

from llmkit.io.run_layout import step_of
from llmkit.training.checkpoint.run_directory import find_damage
from llmkit.training.checkpoint.snapshot import HostSnapshot
from llmkit.training.checkpoint.trainer_state import (
    TrainerState,
    load_optimizer_tensors,
    load_trainer_state,
    load_weights,
)
from llmkit.training.distributed.layout import copy_full, full_tensors, local_tensor
from llmkit.training.optim.optimizer import named_state, restore_optimizer
from llmkit.training.train_step import TrainContext


def take_snapshot(context: TrainContext, snapshot: HostSnapshot, state: TrainerState) -> None:
    """Copy the weights and moments that belong to `state` into the snapshot of the main process."""
    is_main = context.processes.is_main
    weights = full_tensors(context.model.trained_state().items(), is_main)
    moments = full_tensors(named_state(context.model, context.optimizer), is_main)
    if is_main:
        snapshot.copy(state, weights, moments)
    else:
        for _ in chain(weights, moments):  # take part in gathering each tensor
            pass


def load_state_before(context: TrainContext, snapshot: HostSnapshot, first: int) -> TrainerState:
    """Fill the snapshot with the latest good state of fewer than `first` steps: the snapshot itself, a
    checkpoint, or the initial state.

    Returns its trainer state on every process.
    """
    state: TrainerState = context.processes.broadcast(
        _load_on_main(context, snapshot, first) if context.processes.is_main else None
    )
    return state


def _load_on_main(context: TrainContext, snapshot: HostSnapshot, first: int) -> TrainerState:
    snapshot.wait()
    current = snapshot.state
    if current is not None and current.step < first and all_finite(snapshot.weights.values()):
        return current
    checkpoints = context.directory.checkpoints()
    earlier = [checkpoint for checkpoint in checkpoints if step_of(checkpoint) < first]
    # If --keep has removed those, the oldest remaining checkpoint is better than the initial state.
    for checkpoint in reversed(earlier or (checkpoints[:1] if context.checkpoints.keep else [])):
        if find_damage(checkpoint) is None:
            state, weights = load_trainer_state(checkpoint), load_weights(checkpoint)
            if all_finite(weights.values()):
                snapshot.copy(state, weights.items(), load_optimizer_tensors(checkpoint).items())
                return state
    weights, moments = context.initial()
    snapshot.copy(context.state, weights.items(), moments.items())
    return context.state


def restore_snapshot(context: TrainContext, snapshot: HostSnapshot) -> None:
    """Load the snapshot into model and optimizer."""
    _load_weights(context, snapshot)
    context.optimizer.state.clear()
    moments = context.processes.from_main(snapshot.moments)
    restore_optimizer(context.model, context.optimizer, moments, "the last good state")


@contextmanager
def snapshot_weights(context: TrainContext, snapshot: HostSnapshot) -> Iterator[None]:
    """Run the block with the snapshot's weights in the model.

    Memory: another copy of this process's shards of the weights.
    """
    current = {name: local_tensor(tensor.detach()).clone() for name, tensor in context.model.trained_state().items()}
    _load_weights(context, snapshot)
    try:
        yield
    finally:
        context.processes.layout.reshard(context.model)
        for name, tensor in context.model.trained_state().items():
            local_tensor(tensor.detach()).copy_(current[name])


def _load_weights(context: TrainContext, snapshot: HostSnapshot) -> None:
    context.processes.layout.reshard(context.model)
    weights = context.processes.from_main(snapshot.weights)
    for name, tensor in context.model.trained_state().items():
        copy_full(tensor, weights[name])


def all_finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether this process's shards of the tensors are all finite."""
    return all(bool(torch.isfinite(local_tensor(tensor.detach())).all()) for tensor in tensors)

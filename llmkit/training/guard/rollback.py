"""The state of a run copied to the host and back, over all processes in whatever layout: what rollbacks and checkpoints are made of.

The main process's keeper holds whole tensors, one copy (training.keeper). Every process calls these functions, and hands over or takes its part.

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
from llmkit.training.checkpoint.snapshot import Keeper
from llmkit.training.distributed.layout import copy_whole, full_tensors, local
from llmkit.training.optim.optimizer import named_state, restore_optimizer
from llmkit.training.train_step import Training


def hold(t: Training, keeper: Keeper, state: TrainerState) -> None:
    """Copy weights and moments to the keeper of the main process, as those of `state`."""
    weights = full_tensors(t.model.state_dict().items(), t.processes.main)
    moments = full_tensors(named_state(t.model, t.optimizer), t.processes.main)
    if t.processes.main:
        keeper.copy(state, weights, moments)
    else:
        for _ in chain(weights, moments):
            pass


def find_before(t: Training, keeper: Keeper, first: int) -> TrainerState:
    """Make the keeper hold the latest good state with fewer than `first` steps: its own, a checkpoint's, the start's. What belongs to it, everywhere."""
    found: TrainerState = t.processes.tell(_find(t, keeper, first) if t.processes.main else None)
    return found


def _find(t: Training, keeper: Keeper, first: int) -> TrainerState:
    keeper.wait()
    held = keeper.state
    if held is not None and held.step < first and all_finite(keeper.weights.values()):
        return held
    checkpoints = t.directory.checkpoints()
    before = [checkpoint for checkpoint in checkpoints if step_of(checkpoint) < first]
    # Where --keep has removed those, the oldest that is left: better than the start.
    for checkpoint in reversed(before or (checkpoints[:1] if t.keep else [])):
        if damage(checkpoint) is None:
            state, weights = load_trainer_state(checkpoint), load_weights(checkpoint)
            if all_finite(weights.values()):
                keeper.copy(state, weights.items(), load_optimizer_tensors(checkpoint).items())
                return state
    weights, moments = t.initial()
    keeper.copy(t.state, weights.items(), moments.items())
    return t.state


def place(t: Training, keeper: Keeper) -> None:
    """Put what the keeper holds back into model and optimiser."""
    _place_weights(t, keeper)
    t.optimizer.state.clear()
    restore_optimizer(t.model, t.optimizer, t.processes.from_main(keeper.moments), "the last good state")


@contextmanager
def weights_of(t: Training, keeper: Keeper) -> Iterator[None]:
    """The model with the weights that the keeper holds, for as long as the block runs. Memory: this process's part of the weights once more."""
    now = {name: local(tensor.detach()).clone() for name, tensor in t.model.state_dict().items()}
    _place_weights(t, keeper)
    try:
        yield
    finally:
        t.processes.layout.rest(t.model)
        for name, tensor in t.model.state_dict().items():
            local(tensor.detach()).copy_(now[name])


def _place_weights(t: Training, keeper: Keeper) -> None:
    t.processes.layout.rest(t.model)
    weights = t.processes.from_main(keeper.weights)
    for name, tensor in t.model.state_dict().items():
        copy_whole(tensor, weights[name])


def all_finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether there are numbers alone in what this process holds of them."""
    return all(bool(torch.isfinite(local(tensor.detach())).all()) for tensor in tensors)

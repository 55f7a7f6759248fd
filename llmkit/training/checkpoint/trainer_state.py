"""The state that a checkpoint holds besides the model: state/trainer.json and the optimizer's tensors.

    state = load_trainer_state(checkpoint)         # step, tokens, learning rate, options, ...
    moments = load_optimizer_tensors(checkpoint)

A file may come from anybody, so every field is checked before it is used.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from llmkit.errors import LlmkitError
from llmkit.io.names import utf8_path
from llmkit.io.run_layout import STATE, regular
from llmkit.lineage.fields import present_options
from llmkit.model.lora.config import ADAPTER_WEIGHTS, PREFIX
from llmkit.model.pretrained.directory import WEIGHTS, is_adapter
from llmkit.options import former_names
from llmkit.training.options import RampOptions, ScheduleOptions

OPTIMIZER = "optimizer.safetensors"
TRAINER = "trainer.json"


@dataclass(slots=True)
class TrainerState:
    """A checkpoint's contents other than tensors; a function of the options and the data alone."""

    command: str
    options: dict[str, Any]
    inputs: list[str]  # digests
    step: int
    tokens: int
    rate: float
    batch_size: int
    length: int
    environment: dict[str, Any]  # see environment.py
    scaler: dict[str, Any]
    guard: dict[str, Any] = field(default_factory=dict)  # Guard.state(), the skipped steps included
    noise: list[float] = field(default_factory=list)  # NoiseScale.state()

    def to_json(self) -> bytes:
        return json.dumps({key: getattr(self, key) for key in self.__slots__}, indent=1, sort_keys=True).encode()


# The types that a file must have.
FIELD_TYPES: dict[str, type | tuple[type, ...]] = {
    "command": str,
    **dict.fromkeys(("options", "environment", "scaler", "guard"), dict),
    **dict.fromkeys(("step", "tokens", "batch_size", "length"), int),
    **dict.fromkeys(("inputs", "noise"), list),
    "rate": (int, float),
}


def load_trainer_state(checkpoint: Path) -> TrainerState:
    """trainer.json of a checkpoint, with former names of options replaced.

    Raises LlmkitError if it is missing or damaged.
    """
    path = checkpoint / STATE / TRAINER
    try:
        fields = {"environment": {}} | json.loads(regular(path).read_bytes())
        state = TrainerState(**{key: fields[key] for key in TrainerState.__slots__})
        for name, kind in FIELD_TYPES.items():
            if not isinstance(getattr(state, name), kind) or isinstance(getattr(state, name), bool):
                raise TypeError(f"{name} is {getattr(state, name)!r}")
        if min(state.batch_size, state.length) < 1 or min(state.step, state.tokens, state.rate) < 0:
            raise ValueError("a size below 1, or a count below 0")
        current_names = former_names(RampOptions if state.command == "anneal" else ScheduleOptions)
        options = {current_names.get(name, name): value for name, value in state.options.items()}
        state.options = present_options({"command": state.command, "options": options})
        return state
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise LlmkitError(
            f"{path}: not a readable trainer state ({error})", "use another checkpoint, or start over with -f"
        ) from error


def load_optimizer_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Tensors of the optimizer's state by name; raises LlmkitError if the file is missing or damaged."""
    return _load_file(checkpoint / STATE / OPTIMIZER, "optimizer state")


def load_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """What a checkpoint holds of Decoder.trained_state(); raises LlmkitError if the file is missing or damaged."""
    if not is_adapter(checkpoint):
        return _load_file(checkpoint / WEIGHTS, "weights file")
    tensors = _load_file(checkpoint / ADAPTER_WEIGHTS, "file of adapters")
    return {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}


def _load_file(path: Path, description: str) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        with utf8_path(regular(path)) as name:
            return load_file(name)
    except (OSError, SafetensorError) as error:
        raise LlmkitError(
            f"{path}: not a readable {description} ({error})", "use another checkpoint, or start over with -f"
        ) from error


def refuse_changes(old: TrainerState, new: TrainerState) -> None:
    """Raise LlmkitError if a resumed run would differ from the run that was started; names the difference."""
    if old.command != new.command:
        raise LlmkitError(f"the run was started by `llmkit {old.command}`", "resume it with the same command")
    current = json.loads(json.dumps(new.options))
    for key in sorted(old.options.keys() | current.keys()):
        before, now = old.options.get(key), current.get(key)
        if before != now:
            was, is_ = ("not given" if value is None else repr(value) for value in (before, now))
            raise LlmkitError(
                f"--{key.rstrip('_').replace('_', '-')} was {was} when the run was started and is {is_} now",
                "resume with the options of its config.toml, or choose another output",
            )
    if old.inputs != new.inputs:
        raise LlmkitError("the inputs are not those that the run was started with", "choose another output")

"""The optimizer of a model by its table of tensor rules, gradient clipping, and the optimizer's state as plain
tensors by name.

    optimizer = build_optimizer(model, "muon", weight_decay=0.1)
    set_learning_rate(optimizer, 3e-4); optimizer.step()
    tensors = dict(named_state(model, optimizer))          # and restore_optimizer(model, other, tensors, file)

parameter_groups.py decides which optimizer handles each tensor and which tensors decay. AdamW's fused kernel
does the whole update in one pass over memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from llmkit.errors import LlmkitError, UsageError
from llmkit.training.distributed.layout import distributed_like
from llmkit.training.optim.adamw import AdamW
from llmkit.training.optim.muon import Muon
from llmkit.training.optim.parameter_groups import tensor_table

BETAS = (0.9, 0.95)
EPSILON = 1e-8
# Tensors that an optimizer keeps for each parameter, in the parameter's shape.
MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq"), "muon": ("momentum",)}


def parse_betas(text: str) -> tuple[float, float]:
    """Parse `0.9,0.95`. Raises UsageError unless it is two numbers in [0, 1)."""
    try:
        first, second = map(float, text.split(","))
    except ValueError:
        first = second = -1.0
    if not (0 <= first < 1 and 0 <= second < 1):
        raise UsageError(f"--betas {text!r}: expected two numbers in [0, 1)", "such as 0.9,0.95")
    return first, second


def build_optimizer(
    model: Any, optimizer: str = "adamw", weight_decay: float = 0.1, betas: tuple[float, float] = BETAS
) -> torch.optim.Optimizer:
    """The optimizer `adamw` or `muon` over all parameters that require gradients, with a group for each
    combination of the rules' settings. `betas` are AdamW's. The loop sets the learning rate before each step."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups: dict[tuple[str, float, float], dict[str, Any]] = {}
    shapes = {name: p.shape for name, p in named.items()}
    b_rate = model.adapter.b_rate if model.adapter else 1.0
    for row in tensor_table(shapes, model.config, optimizer, weight_decay, b_rate=b_rate):
        settings = {"optimizer": row.optimizer, "weight_decay": row.decay, "rate": row.rate, "lr": 0.0}
        group = groups.setdefault((row.optimizer, row.decay, row.rate), {"params": [], **settings})
        group["params"].append(named[row.name])
    adamw: dict[str, Any] = {"lr": 0.0, "betas": betas, "eps": EPSILON, "fused": True}
    param_groups = list(groups.values())
    return Muon(param_groups, **adamw) if optimizer == "muon" else AdamW(param_groups, **adamw)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set every group's learning rate to `lr` times the group's own factor."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["rate"]


def clip_gradients(parameters: Iterable[torch.Tensor], limit: float) -> torch.Tensor:
    """Scale all gradients so that their joint 2-norm is at most `limit` (0: no clipping); returns the norm before."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if hasattr(norm, "full_tensor"):  # sharded gradients
        norm, gradients = norm.full_tensor(), [g.to_local() for g in gradients]  # type: ignore[attr-defined]
    if limit > 0:
        torch._foreach_mul_(gradients, (limit / (norm + 1e-6)).clamp(max=1.0))
    return norm


def named_state(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, torch.Tensor]]:
    """The moments as `exp_avg.NAME` and `exp_avg_sq.NAME` or `momentum.NAME`, sharded as they are, and
    AdamW's number of updates as `step` (the same for all parameters)."""
    step = None
    for name, parameter in model.named_parameters():
        for key, tensor in optimizer.state.get(parameter, {}).items():
            if key == "step":
                step = tensor.reshape(1)
            else:
                yield f"{key}.{name}", tensor
    if step is not None:
        yield "step", step


def optimizer_of_state(names: Iterable[str]) -> str:
    """The name of the optimizer whose state has tensors of these names."""
    return "muon" if any(name.startswith("momentum.") for name in names) else "adamw"


def restore_optimizer(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor], name: str
) -> None:
    """Inverse of `named_state`; `name` is the file, for messages.

    Raises LlmkitError if a tensor is missing or has another shape.
    """
    if not tensors:  # no step taken yet (fp16 skips those with infinite gradients)
        return
    optimizer_by_parameter = {
        parameter: group["optimizer"] for group in optimizer.param_groups for parameter in group["params"]
    }
    expected, stored = ("muon" if "muon" in optimizer_by_parameter.values() else "adamw"), optimizer_of_state(tensors)
    if expected != stored:
        raise LlmkitError(f"{name}: state of {stored}, but this run uses {expected}", f"--optimizer {stored}")
    for key, parameter in model.named_parameters():
        if parameter not in optimizer_by_parameter:
            continue
        state: dict[str, torch.Tensor] = {}
        for moment in MOMENTS[optimizer_by_parameter[parameter]]:
            tensor = tensors.get(f"{moment}.{key}")
            if tensor is None or tensor.shape != parameter.shape:
                problem = "missing" if tensor is None else f"of shape {list(tensor.shape)}"
                raise LlmkitError(
                    f"{name}: {moment}.{key} is {problem}, expected {list(parameter.shape)}",
                    "the checkpoint is damaged",
                )
            state[moment] = distributed_like(tensor, parameter)
        if optimizer_by_parameter[parameter] == "adamw":
            if tensors.get("step") is None or tensors["step"].numel() != 1:
                raise LlmkitError(f"{name}: step is missing or not a single number", "the checkpoint is damaged")
            # The fused kernel needs the count on the device of the parameter.
            state["step"] = tensors["step"].reshape(()).to(parameter.device, torch.float32, copy=True)
        optimizer.state[parameter] = state

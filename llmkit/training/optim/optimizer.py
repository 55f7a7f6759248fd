"""The optimiser of a model by its table of rules, gradient clipping, and the optimiser's state as plain tensors by name.

    optimizer = build(model, "muon", weight_decay=0.1)
    set_rate(optimizer, 3e-4); optimizer.step()
    tensors = dict(named_state(model, optimizer))          # and restore_optimizer(model, other, tensors, file)

Which tensor is whose and what decays stands in training.rules. AdamW's fused kernel does the whole update in one pass over memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from llmkit.errors import LlmkitError
from llmkit.training.distributed.layout import placed_like
from llmkit.training.optim.muon import Muon
from llmkit.training.optim.parameter_groups import table

BETAS = (0.9, 0.95)
EPSILON = 1e-8
# Tensors that an optimiser keeps for a parameter, of the parameter's shape.
MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq"), "muon": ("momentum",)}


def build(
    model: Any, optimizer: str = "adamw", weight_decay: float = 0.1, betas: tuple[float, float] = BETAS
) -> torch.optim.Optimizer:
    """The optimiser `adamw` or `muon` over all parameters that take gradients; a group for each combination that the rules make. `betas` are
    AdamW's. The loop sets the learning rate before each step.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups: dict[tuple[str, float, float], dict[str, Any]] = {}
    for row in table({name: p.shape for name, p in named.items()}, model.config, optimizer, weight_decay):
        more = {"optimizer": row.optimizer, "weight_decay": row.decay, "rate": row.rate, "lr": 0.0}
        group = groups.setdefault((row.optimizer, row.decay, row.rate), {"params": [], **more})
        group["params"].append(named[row.name])
    adamw: dict[str, Any] = {"lr": 0.0, "betas": betas, "eps": EPSILON, "fused": True}
    listed = list(groups.values())
    return Muon(listed, **adamw) if optimizer == "muon" else torch.optim.AdamW(listed, **adamw)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group the learning rate `rate`, times its own factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["rate"]


def clip_gradients(parameters: Iterable[torch.Tensor], limit: float) -> torch.Tensor:
    """Scale all gradients so that their joint 2-norm is at most `limit` (0: leave them); returns the norm before."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if hasattr(norm, "full_tensor"):  # sharded gradients
        norm, gradients = norm.full_tensor(), [g.to_local() for g in gradients]  # type: ignore[attr-defined]
    if limit > 0:
        torch._foreach_mul_(gradients, (limit / (norm + 1e-6)).clamp(max=1.0))
    return norm


def named_state(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, torch.Tensor]]:
    """The moments as `exp_avg.NAME` and `exp_avg_sq.NAME` or `momentum.NAME`, and AdamW's number of updates as `step` (the same for all), as they
    lie."""
    step = None
    for name, parameter in model.named_parameters():
        for key, tensor in optimizer.state.get(parameter, {}).items():
            if key == "step":
                step = tensor.reshape(1)
            else:
                yield f"{key}.{name}", tensor
    if step is not None:
        yield "step", step


def kind_of(names: Iterable[str]) -> str:
    """The optimiser whose state has tensors of these names."""
    return "muon" if any(name.startswith("momentum.") for name in names) else "adamw"


def restore_optimizer(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor], name: str
) -> None:
    """Inverse of `named_state`; `name` is the file, for messages. Raises LlmkitError where a tensor is missing or misshapen."""
    if not tensors:  # no step was taken yet (fp16 skips those with infinite gradients)
        return
    by = {parameter: group["optimizer"] for group in optimizer.param_groups for parameter in group["params"]}
    expected, found = ("muon" if "muon" in by.values() else "adamw"), kind_of(tensors)
    if expected != found:
        raise LlmkitError(f"{name}: the state of {found}, this run is trained by {expected}", f"--optimizer {found}")
    for key, parameter in model.named_parameters():
        if parameter not in by:
            continue
        state: dict[str, torch.Tensor] = {}
        for moment in MOMENTS[by[parameter]]:
            tensor = tensors.get(f"{moment}.{key}")
            if tensor is None or tensor.shape != parameter.shape:
                what = "missing" if tensor is None else f"of shape {list(tensor.shape)}"
                raise LlmkitError(
                    f"{name}: {moment}.{key} is {what}, expected {list(parameter.shape)}", "the checkpoint is damaged"
                )
            state[moment] = placed_like(tensor, parameter)
        if by[parameter] == "adamw":
            if tensors.get("step") is None or tensors["step"].numel() != 1:
                raise LlmkitError(f"{name}: step is missing or no single number", "the checkpoint is damaged")
            # The fused kernel wants the count on the device of the parameter.
            state["step"] = tensors["step"].reshape(()).to(parameter.device, torch.float32, copy=True)
        optimizer.state[parameter] = state

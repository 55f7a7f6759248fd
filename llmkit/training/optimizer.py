"""AdamW with weight decay on matrices only, gradient clipping, and its state as plain tensors by name.

Decay: 2-D weights of the layers and of an untied head. None: embeddings (a rare token's row would shrink without ever being used), norm
gains and biases. The fused kernel does the whole update in one pass over memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import nn

from llmkit.errors import LlmkitError
from llmkit.training.parallel import placed_like

BETAS = (0.9, 0.95)
EPSILON = 1e-8
MOMENTS = ("exp_avg", "exp_avg_sq")


def decays(name: str, parameter: torch.Tensor) -> bool:
    """Whether weight decay applies to this parameter."""
    return parameter.ndim >= 2 and "embed" not in name


def adamw(model: nn.Module, weight_decay: float = 0.1, betas: tuple[float, float] = BETAS) -> torch.optim.AdamW:
    """AdamW over all parameters that take gradients, in two groups. The loop sets the learning rate before each step."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in named if decays(name, p)], "weight_decay": weight_decay},
        {"params": [p for name, p in named if not decays(name, p)], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, betas=betas, eps=EPSILON, fused=True)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group the learning rate `rate`."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def clip_gradients(parameters: Iterable[torch.Tensor], limit: float) -> torch.Tensor:
    """Scale all gradients so that their joint 2-norm is at most `limit` (0: leave them); returns the norm before."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if hasattr(norm, "full_tensor"):  # sharded gradients
        norm, gradients = norm.full_tensor(), [g.to_local() for g in gradients]  # type: ignore[attr-defined]
    if limit > 0:
        torch._foreach_mul_(gradients, (limit / (norm + 1e-6)).clamp(max=1.0))
    return norm


def named_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, torch.Tensor]]:
    """The moments as `exp_avg.NAME` and `exp_avg_sq.NAME`, and the number of updates as `step` (the same for all), as they lie."""
    step = None
    for name, parameter in model.named_parameters():
        state = optimizer.state.get(parameter)
        if state:
            yield from ((f"{moment}.{name}", state[moment]) for moment in MOMENTS)
            step = state["step"].reshape(1)
    if step is not None:
        yield "step", step


def restore_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor], name: str
) -> None:
    """Inverse of `named_state`; `name` is the file, for messages. Raises LlmkitError where a tensor is missing or misshapen."""
    if not tensors:  # no step was taken yet (fp16 skips those with infinite gradients)
        return
    for key, parameter in model.named_parameters():
        state: dict[str, torch.Tensor] = {}
        for moment in MOMENTS:
            tensor = tensors.get(f"{moment}.{key}")
            if tensor is None or tensor.shape != parameter.shape:
                found = "missing" if tensor is None else f"of shape {list(tensor.shape)}"
                raise LlmkitError(
                    f"{name}: {moment}.{key} is {found}, expected {list(parameter.shape)}", "the checkpoint is damaged"
                )
            state[moment] = placed_like(tensor, parameter)
        if tensors.get("step") is None or tensors["step"].numel() != 1:
            raise LlmkitError(f"{name}: step is missing or no single number", "the checkpoint is damaged")
        # The fused kernel wants the count on the device of the parameter.
        state["step"] = tensors["step"].reshape(()).to(parameter.device, torch.float32, copy=True)
        optimizer.state[parameter] = state

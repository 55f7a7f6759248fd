"""AdamW as torch has it, without torch's compiler.

The methods of torch's optimizers import torch._dynamo, and with it sympy, when they are first called: nearly as much
work as importing torch itself, at the start of every run, compiled or not. Here they are the functions that torch
wraps; nothing of them is ever part of a compiled graph.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch

Class = TypeVar("Class", bound=type)
METHODS = ("add_param_group", "load_state_dict", "state_dict", "zero_grad")


def without_compiler(kind: Class) -> Class:
    """Class decorator: the methods of torch.optim.Optimizer as they are inside their wrappers."""
    for name in METHODS:
        setattr(kind, name, inspect.unwrap(getattr(torch.optim.Optimizer, name)))
    return kind


_step: Callable[..., Any] = inspect.unwrap(torch.optim.AdamW.step)


@without_compiler
class AdamW(torch.optim.AdamW):
    """torch.optim.AdamW, the same to the bit."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        return _step(self, closure)

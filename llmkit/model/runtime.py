"""What makes a decoder ready to be trained on this machine: which operations it uses, and what is compiled, computed again or put into 8 bits.

    prepare(model, device, Runtime(checkpoint=True))       # in place; names of parameters, state and optimiser stay as they are

On the CPU in float32 the operations are the kernels of model/fused.py, which are as fast as what torch compiles there and need no compiler
(tests/bench/train_speed.md). On a GPU every layer is compiled (one piece of code for all of them, kept in the user's cache directory), attention with a
document mask is flex_attention, and the matrices of queries, keys and values are joined for the product, as are gate and up.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmkit.errors import UsageError
from llmkit.model.decoder import Decoder
from llmkit.model.kv_cache import KeyValueCache
from llmkit.model.operations import Operations

FP8_CAPABILITY = (8, 9)  # of GPUs that multiply in 8 bits


@dataclass(slots=True)
class Runtime:
    """How a model is trained; nothing here decides what comes out beyond rounding."""

    compile: bool | None = None  # None: on a GPU
    checkpoint: bool = False  # keep each layer's input only, and compute the rest again on the way back
    fp8: bool = False
    emulate: bool = False  # fp8 in other arithmetic, for tests where no GPU has it


def prepare(
    model: Decoder, device: torch.device, runtime: Runtime, say: Callable[[str], None] = lambda line: None
) -> None:
    """Make a model that will be trained on `device` ready, before it is laid over processes; `say` is told what cannot be had."""
    kind = kernels(device, runtime, say)
    if runtime.fp8:
        to_fp8(model, runtime.emulate)
    fused = fused_kernels() if kind == "numba" else None
    model.operations = (
        fused.Fused() if fused else Joined(device.type == "cuda" and not runtime.fp8, device.type == "cuda")
    )
    for layer in model.model.layers:
        if runtime.checkpoint:
            layer.forward = partial(_checkpointed, layer.forward)
        if kind == "compiled":
            layer.compile(dynamic=False)


def kernels(device: torch.device, runtime: Runtime, say: Callable[[str], None] = lambda line: None) -> str:
    """By what a model is computed: compiled, numba or plain. It decides the last bits; `say` is told what cannot be had."""
    compiled = device.type == "cuda" if runtime.compile is None else runtime.compile
    if compiled and (reason := no_compiler(device)):
        say(f"nothing is compiled: {reason}")
        compiled = False
    return "compiled" if compiled else "numba" if device.type == "cpu" and fused_kernels() else "plain"


@cache
def fused_kernels() -> ModuleType | None:
    """model.fused; None where there is no numba for this Python."""
    try:
        from llmkit.model import fused
    except ImportError:
        return None
    return fused


def cpu_kernels(x: Tensor) -> ModuleType | None:
    """model.fused where its kernels take such a tensor."""
    return fused_kernels() if x.device.type == "cpu" and x.dtype == torch.float32 else None


class Joined(Operations):
    """The plain operations with products of one input joined, and, where it is `flex`, attention that skips other documents."""

    def __init__(self, join: bool, flex: bool) -> None:
        self.join, self.flex = join, flex

    def prepare(
        self, x_BTD: Tensor, document_ids: Tensor | None, cache: KeyValueCache | None
    ) -> tuple[Operations, Any]:
        if not self.flex or document_ids is None or cache is not None:
            return self, super().prepare(x_BTD, document_ids, cache)[1]
        from torch.nn.attention.flex_attention import create_block_mask

        documents_BT = document_ids

        def allowed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (q >= k) & (documents_BT[b, q] == documents_BT[b, k])

        b, t, _ = x_BTD.shape
        return self, create_block_mask(allowed, b, None, t, t, device=x_BTD.device.type)

    def project(self, x: Tensor, matrices: Sequence[nn.Linear]) -> Sequence[Tensor]:
        if not self.join or not torch.is_grad_enabled():
            return super().project(x, matrices)
        bias = None if matrices[0].bias is None else torch.cat([m.bias for m in matrices])
        whole = F.linear(x, torch.cat([m.weight for m in matrices]), bias)
        return whole.split([m.out_features for m in matrices], -1)

    def attend(self, q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, mask: Any) -> Tensor:
        if isinstance(mask, tuple):
            return super().attend(q_BTHK, k_BSGK, v_BSGK, mask)
        from torch.nn.attention.flex_attention import flex_attention

        q, k, v = (x.transpose(1, 2).to(v_BSGK.dtype) for x in (q_BTHK, k_BSGK, v_BSGK))
        attention = flex_attention if torch.compiler.is_compiling() or not q.is_cuda else _compiled_flex()
        out: Any = attention(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
        return out.transpose(1, 2)


@cache
def _compiled_flex() -> Any:
    """Not compiled, flex_attention holds all scores."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _checkpointed(forward: Callable[..., Tensor], *arguments: Any) -> Tensor:
    from torch.utils.checkpoint import checkpoint

    if not torch.is_grad_enabled():
        return forward(*arguments)
    result: Tensor = checkpoint(forward, *arguments, use_reentrant=False, preserve_rng_state=False)  # nothing is random
    return result


def no_compiler(device: torch.device) -> str:
    """Why torch cannot compile for this device; "" where it can, which is tried on a sum of two numbers."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(_cache_directory()))
    try:
        torch.compile(lambda x: x + 1, dynamic=False)(torch.zeros(2, device=device))
    except Exception as error:  # of torch, its compiler, Triton or the C++ compiler, each with types of its own
        return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return ""


def _cache_directory() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "llmkit" / "torch"


def to_fp8(model: Decoder, emulate: bool = False) -> None:
    """Matrix products of the layers in 8 bits, scaled tensor by tensor (arXiv:2209.05433), by torchao; the weights stay as they are."""
    check_fp8(emulate)
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    def fits(module: nn.Module, name: str) -> bool:  # the hardware multiplies in sixteens
        sizes = (getattr(module, "in_features", 1), getattr(module, "out_features", 1))
        return "lm_head" not in name and all(size % 16 == 0 for size in sizes)

    convert_to_float8_training(model, config=Float8LinearConfig(emulate=emulate), module_filter_fn=fits)


def check_fp8(emulate: bool = False) -> None:
    """UsageError where there is nothing to multiply in 8 bits with."""
    if find_spec("torchao") is None:
        raise UsageError("fp8 needs torchao", "pip install 'llmkit[fp8]', or train in bf16")
    if not emulate and not (torch.cuda.is_available() and torch.cuda.get_device_capability() >= FP8_CAPABILITY):
        raise UsageError("fp8 needs a GPU that multiplies in 8 bits (H100, H200, L4, ...)", "train in bf16")


def be_deterministic() -> None:
    """Only algorithms that give the same bits each time; before anything runs on a GPU."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)

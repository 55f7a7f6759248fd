"""Prepares a decoder for training on this machine: chooses its operations, compilation, activation
checkpointing and fp8.

    prepare(model, device, Runtime(checkpoint=True))       # in place; names of parameters and state stay the same

On the CPU in float32 the operations are the kernels of model/fused.py, which are as fast as torch's compiled
code and need no compiler (tests/bench/train_speed.md). On a GPU every layer is compiled (one compilation for
all of them, cached in the user's cache directory), attention with a document mask is flex_attention, and the
products with the query, key and value matrices are joined, as are gate and up.
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

FP8_CAPABILITY = (8, 9)  # the first compute capability with fp8 matrix products


@dataclass(slots=True)
class Runtime:
    """How a model is computed in training. Results differ by rounding only."""

    compile: bool | None = None  # None: on a GPU
    checkpoint: bool = False  # keep only each layer's input, and recompute the rest in the backward pass
    fp8: bool = False
    emulate: bool = False  # emulate fp8, for tests without a GPU that supports it


def prepare(
    model: Decoder, device: torch.device, runtime: Runtime, say: Callable[[str], None] = lambda line: None
) -> None:
    """Prepare a model for training on `device`, before it is distributed over processes; `say` gets a line if
    it cannot be compiled."""
    kind = kernels(device, runtime, say)
    if runtime.fp8:
        to_fp8(model, runtime.emulate)
    fused = fused_kernels() if kind == "numba" else None
    model.operations = (
        fused.Fused() if fused else Joined(device.type == "cuda" and not runtime.fp8, device.type == "cuda")
    )
    for layer in model.layers:
        if runtime.checkpoint:
            layer.forward = partial(_checkpointed, layer.forward)
        if kind == "compiled":
            layer.compile(dynamic=False)


def kernels(device: torch.device, runtime: Runtime, say: Callable[[str], None] = lambda line: None) -> str:
    """How a model is computed: "compiled", "numba" or "plain". The choice affects rounding; `say` gets a line
    if nothing can be compiled."""
    compiled = device.type == "cuda" if runtime.compile is None else runtime.compile
    if compiled and (reason := no_compiler(device)):
        say(f"nothing is compiled: {reason}")
        compiled = False
    return "compiled" if compiled else "numba" if device.type == "cpu" and fused_kernels() else "plain"


@cache
def fused_kernels() -> ModuleType | None:
    """The module model.fused; None if numba cannot be imported."""
    try:
        from llmkit.model import fused
    except ImportError:
        return None
    return fused


def cpu_kernels(x: Tensor) -> ModuleType | None:
    """The module model.fused if its kernels support this tensor."""
    return fused_kernels() if x.device.type == "cpu" and x.dtype == torch.float32 else None


class Joined(Operations):
    """Plain operations with joined products of one input (`join`) and attention that skips other documents'
    keys (`flex`)."""

    def __init__(self, join: bool, flex: bool) -> None:
        self.join, self.flex = join, flex

    def prepare(
        self, x_BTD: Tensor, document_ids: Tensor | None, cache: KeyValueCache | None, window: int | None
    ) -> tuple[Operations, Any]:
        b, t, _ = x_BTD.shape
        slides = window is not None and t > window
        if not self.flex or cache is not None or (document_ids is None and not slides):
            return self, super().prepare(x_BTD, document_ids, cache, window)[1]
        from torch.nn.attention.flex_attention import create_block_mask

        documents_BT, reach = document_ids, window or t

        def is_visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            seen = (q >= k) & (q - k < reach)
            return seen if documents_BT is None else seen & (documents_BT[b, q] == documents_BT[b, k])

        rows = None if documents_BT is None else b
        return self, create_block_mask(is_visible, rows, None, t, t, device=x_BTD.device.type)

    def project(self, x: Tensor, matrices: Sequence[Any]) -> Sequence[Tensor]:
        plain = all(isinstance(matrix, nn.Linear) for matrix in matrices)
        if not self.join or len(matrices) < 2 or not plain or not torch.is_grad_enabled():
            return super().project(x, matrices)
        bias = None if matrices[0].bias is None else torch.cat([m.bias for m in matrices])
        product = F.linear(x, torch.cat([m.weight for m in matrices]), bias)
        return product.split([m.out_features for m in matrices], -1)

    def attend(
        self, q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, mask: Any, scale: float, softcap: float | None
    ) -> Tensor:
        if isinstance(mask, tuple):
            return super().attend(q_BTHK, k_BSGK, v_BSGK, mask, scale, softcap)
        from torch.nn.attention.flex_attention import flex_attention

        cap = softcap or 0.0

        def capped(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return cap * torch.tanh(score / cap)

        q, k, v = (x.transpose(1, 2).to(v_BSGK.dtype) for x in (q_BTHK, k_BSGK, v_BSGK))
        attention = flex_attention if torch.compiler.is_compiling() or not q.is_cuda else _compiled_flex()
        out: Any = attention(q, k, v, capped if softcap else None, mask, scale, enable_gqa=q.shape[1] != k.shape[1])
        return out.transpose(1, 2)


@cache
def _compiled_flex() -> Any:
    """flex_attention, which materialises all scores unless it is compiled."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _checkpointed(forward: Callable[..., Tensor], *arguments: Any) -> Tensor:
    from torch.utils.checkpoint import checkpoint

    if not torch.is_grad_enabled():
        return forward(*arguments)
    result: Tensor = checkpoint(forward, *arguments, use_reentrant=False, preserve_rng_state=False)  # no dropout
    return result


def no_compiler(device: torch.device) -> str:
    """Why torch cannot compile for this device; "" if it can. Compiles a trivial function to find out."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(_cache_directory()))
    try:
        torch.compile(lambda x: x + 1, dynamic=False)(torch.zeros(2, device=device))
    except Exception as error:  # from torch, its compiler, Triton or the C++ compiler, each with its own types
        return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return ""


def _cache_directory() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "llmkit" / "torch"


def to_fp8(model: Decoder, emulate: bool = False) -> None:
    """Compute matrix products of the layers in fp8 with per-tensor scales (arXiv:2209.05433), using torchao;
    weights keep their type."""
    check_fp8(emulate)
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    def fits(module: nn.Module, name: str) -> bool:  # the hardware needs multiples of 16
        sizes = (getattr(module, "in_features", 1), getattr(module, "out_features", 1))
        return name != model.config.family.names.head and all(size % 16 == 0 for size in sizes)

    convert_to_float8_training(model, config=Float8LinearConfig(emulate=emulate), module_filter_fn=fits)


def check_fp8(emulate: bool = False) -> None:
    """UsageError if fp8 is not available."""
    if find_spec("torchao") is None:
        raise UsageError("fp8 needs torchao", "pip install 'llmkit[fp8]', or train in bf16")
    if not emulate and not (torch.cuda.is_available() and torch.cuda.get_device_capability() >= FP8_CAPABILITY):
        raise UsageError("fp8 needs a GPU with 8-bit matrix products (H100, H200, L4, ...)", "train in bf16")


def be_deterministic() -> None:
    """Restrict torch to deterministic algorithms. Must be called before anything runs on a GPU."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)

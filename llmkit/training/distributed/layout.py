"""How the model is distributed over the processes: one class per layout, chosen by --parallel.

`ddp`: every process holds the whole model and its moments; the gradients are summed in buckets once per step.
`fsdp`: torch's FSDP2 (`fully_shard`, arXiv:2304.11277): each layer is a group of its own, of which each of
the n processes holds 1/n of weights, gradients and moments (16 bytes per parameter over n) and gathers the
rest while it computes. Embeddings, last norm and head are the outermost group, which stays gathered from the
forward pass to the end of the backward pass, since the loss reads the head directly. Weights, gradients and
moments are float32; with precision bf16, layers are gathered in bf16. Losses are divided by the weight of the
whole step, so gradients are summed, never averaged.

    layout = create_layout("fsdp", processes=2)
    layout.parallelize(model, device, precision)       # parameters are DTensors now
    for name, tensor in full_tensors(model.state_dict().items(), main): ...    # whole, on the main process
    load_tensors(model, weights)                       # each process reads its shards of the mapped files

A checkpoint is the same for every layout: whole tensors by name, from which any number of processes in either
layout resumes. Gathering needs device memory for one whole tensor. Further layouts (tensor, context, expert
parallelism) would be further classes of this form.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llmkit.errors import UsageError, unknown_name

BUCKET_ELEMENTS = 1 << 24  # gradients are summed in buckets of 64 MiB
# Whole gradients are kept over the micro-batches of a step if they take at most one part in so many of a GPU's memory.
GRADIENT_MEMORY_RATIO = 8


class Layout(Protocol):
    """A way to distribute the model.

    `lockstep`: all processes must make the same number of passes, in training and evaluation.
    """

    name: str
    lockstep: bool

    def parallelize(self, model: nn.Module, device: torch.device, precision: str) -> None:
        """Distribute the model's parameters over the processes, in place. They may be on the meta device."""

    def reshard(self, model: nn.Module) -> None:
        """Return the parameters to their state between steps: after a forward pass without a backward pass
        some are still gathered."""

    def set_gradient_sync(self, model: nn.Module, last: bool) -> None:
        """Called before each pass of a step; gradients are summed over the processes after the `last` one."""

    def all_reduce_gradients(self, gradients: Sequence[Tensor]) -> None:
        """Called after the last pass: make the gradients those of the whole step, in place."""


class Replicated:
    """Data parallelism: the whole model on every process."""

    name, lockstep = "ddp", False

    def parallelize(self, model: nn.Module, device: torch.device, precision: str) -> None:
        model.to(device)

    def reshard(self, model: nn.Module) -> None:
        pass

    def set_gradient_sync(self, model: nn.Module, last: bool) -> None:
        pass

    def all_reduce_gradients(self, gradients: Sequence[Tensor]) -> None:
        bucket: list[Tensor] = []
        for i, gradient in enumerate(gradients):
            bucket.append(gradient)
            if sum(g.numel() for g in bucket) >= BUCKET_ELEMENTS or i + 1 == len(gradients):
                flat = torch.cat([g.flatten() for g in bucket])
                dist.all_reduce(flat)
                offset = 0
                for g in bucket:
                    g.copy_(flat[offset : offset + g.numel()].view_as(g))
                    offset += g.numel()
                bucket = []


class Sharded:
    """FSDP2 over all processes."""

    name, lockstep = "fsdp", True

    def __init__(self, processes: int) -> None:
        self._processes, self._keep_gradients = processes, True

    def parallelize(self, model: nn.Module, device: torch.device, precision: str) -> None:
        # Accelerate's own FSDP2 would silently become DDP on a CPU; its mesh and torch's function work everywhere.
        from accelerate import ParallelismConfig
        from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

        if precision == "fp16":
            raise UsageError("--parallel fsdp does not support fp16", "use bf16, or --parallel ddp")
        mesh = ParallelismConfig(dp_shard_size=self._processes).build_device_mesh(device.type)["dp_shard"]
        half = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        for layer in model.layers:  # type: ignore[union-attr]
            policy = half if precision in ("bf16", "fp8") else MixedPrecisionPolicy()
            fully_shard(layer, mesh=mesh, mp_policy=policy)  # type: ignore[arg-type]
        fully_shard(model, mesh=mesh, reshard_after_forward=False)
        register_fsdp_forward_method(model, "hidden")
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        if device.type == "cuda":
            size = 4 * sum(p.numel() for p in model.parameters())
            self._keep_gradients = size * GRADIENT_MEMORY_RATIO <= torch.cuda.get_device_properties(device).total_memory

    def reshard(self, model: nn.Module) -> None:
        from torch.distributed.fsdp import FSDPModule

        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def set_gradient_sync(self, model: nn.Module, last: bool) -> None:
        model.set_requires_gradient_sync(last or not self._keep_gradients)  # type: ignore[operator]

    def all_reduce_gradients(self, gradients: Sequence[Tensor]) -> None:
        pass  # done by the backward pass


LAYOUTS = ("auto", "ddp", "fsdp")


def create_layout(name: str, processes: int) -> Layout:
    """The layout for `--parallel NAME`; a single process has nothing to distribute."""
    if name not in LAYOUTS:
        raise unknown_name("--parallel", name, LAYOUTS)
    return Sharded(processes) if name == "fsdp" and processes > 1 else Replicated()


def full_tensors(named: Iterable[tuple[str, Tensor]], main: bool) -> Iterator[tuple[str, Tensor]]:
    """(name, whole tensor on the CPU) of tensors that may be sharded: a model's state_dict, an optimizer's
    `named_state`.

    Every process must iterate to the end; only the `main` one receives anything. A yielded tensor may share
    memory with the original: copy it to keep it beyond the next step.
    """
    for name, tensor in named:
        full = tensor.detach()
        if hasattr(full, "full_tensor"):
            full = full.full_tensor()
        if main:
            yield name, full.cpu()


def local_shard(full: Tensor, parameter: Tensor) -> Tensor:
    """The part of the whole tensor `full` that this process holds of `parameter`, a view.

    All of it unless the parameter is a DTensor.
    """
    if not hasattr(parameter, "placements"):
        return full
    mesh = parameter.device_mesh  # type: ignore[attr-defined]
    for dimension, placement in enumerate(parameter.placements):
        if placement.is_shard():
            chunks = full.chunk(mesh.size(dimension), placement.dim)
            rank = mesh.get_local_rank(dimension)
            full = chunks[rank] if rank < len(chunks) else full.narrow(placement.dim, 0, 0)
    return full


def distributed_like(full: Tensor, parameter: Tensor) -> Tensor:
    """A copy of the whole tensor `full` in the type, on the device and in the layout of `parameter`.

    Reads only this process's shard.
    """
    copy = torch.empty_like(parameter, requires_grad=False)
    copy_full(copy, full)
    return copy


def local_tensor(tensor: Tensor) -> Tensor:
    """This process's shard of a tensor, or all of an ordinary tensor; shares its memory."""
    shard: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return shard


def copy_full(target: Tensor, full: Tensor) -> None:
    """Copy the whole tensor `full` into `target`, which may be sharded."""
    local_tensor(target).detach().copy_(local_shard(full, target))


def load_tensors(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load whole tensors by name into the distributed parameters of `model`.

    Each process reads only its shards of what is mapped from disk.
    """
    for name, parameter in model.state_dict().items():
        copy_full(parameter, weights[name])

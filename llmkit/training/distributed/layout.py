"""How the model lies over the processes: one plan a layout, chosen by --parallel.

`ddp`: every process holds the whole model and its moments; the gradients are summed in buckets once a step. `fsdp`: torch's FSDP2
(`fully_shard`, arXiv:2304.11277): each layer is a group of its own, of which every process holds the n-th part of weights, gradients and moments
(16 bytes a parameter over n) and gathers the rest while it computes; embeddings, last norm and head are the outermost group, which stays whole
from the forward pass to the end of the backward pass, since the loss reads the head directly. Weights, gradients and moments are float32; where
precision is bf16, layers are gathered in bf16. Losses are divided by the weight of the whole step, so gradients are added, never averaged.

    layout = layout_named("fsdp", processes=2)
    layout.place(model, device, precision)                       # parameters are DTensors now
    for name, tensor in full_tensors(model.state_dict().items(), main): ...    # whole, on the main process, one at a time
    load_tensors(model, weights)                                     # each process takes its part of what is mapped from disk

A checkpoint is the same whatever the layout: whole tensors by name, which any number of processes in either layout goes on from. Gathering costs
one whole tensor of device memory. Further layouts (tensor, context, expert parallelism) are further plans of this form.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llmkit.errors import UsageError, unknown_name

BUCKET_ELEMENTS = 1 << 24  # gradients are summed in pieces of 64 MiB
SHARE_FOR_GRADIENTS = (
    8  # whole gradients are kept over the micro-batches of a step where they take at most this part of a GPU
)


class Layout(Protocol):
    """A plan. `lockstep`: all processes must make the same number of passes through the model, in training and evaluation."""

    name: str
    lockstep: bool

    def place(self, model: nn.Module, device: torch.device, precision: str) -> None:
        """Lay the model's parameters over the processes; in place. They may be on the meta device."""

    def reshard(self, model: nn.Module) -> None:
        """Make the model's parameters what they are between steps: after a pass without a backward pass some are still gathered."""

    def set_gradient_sync(self, model: nn.Module, last: bool) -> None:
        """Before each pass of a step: whether it is the last, after which gradients are added up."""

    def add_gradients(self, gradients: Sequence[Tensor]) -> None:
        """After the last pass: make the gradients those of the whole step, in place."""


class Replicated:
    """Data-parallel: the whole model everywhere."""

    name, lockstep = "ddp", False

    def place(self, model: nn.Module, device: torch.device, precision: str) -> None:
        model.to(device)

    def reshard(self, model: nn.Module) -> None:
        pass

    def set_gradient_sync(self, model: nn.Module, last: bool) -> None:
        pass

    def add_gradients(self, gradients: Sequence[Tensor]) -> None:
        bucket: list[Tensor] = []
        for i, gradient in enumerate(gradients):
            bucket.append(gradient)
            if sum(g.numel() for g in bucket) >= BUCKET_ELEMENTS or i + 1 == len(gradients):
                flat = torch.cat([g.flatten() for g in bucket])
                dist.all_reduce(flat)
                at = 0
                for g in bucket:
                    g.copy_(flat[at : at + g.numel()].view_as(g))
                    at += g.numel()
                bucket = []


class Sharded:
    """FSDP2 over all processes."""

    name, lockstep = "fsdp", True

    def __init__(self, processes: int) -> None:
        self._processes, self._keep_gradients = processes, True

    def place(self, model: nn.Module, device: torch.device, precision: str) -> None:
        # Accelerate's own FSDP2 would silently become DDP on a CPU; its mesh and torch's function work everywhere.
        from accelerate import ParallelismConfig
        from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

        if precision == "fp16":
            raise UsageError("fp16 does not go with --parallel fsdp", "use bf16, or --parallel ddp")
        mesh = ParallelismConfig(dp_shard_size=self._processes).build_device_mesh(device.type)["dp_shard"]
        half = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        for layer in model.model.layers:  # type: ignore[union-attr]
            fully_shard(layer, mesh=mesh, mp_policy=half if precision in ("bf16", "fp8") else MixedPrecisionPolicy())  # type: ignore[arg-type]
        fully_shard(model, mesh=mesh, reshard_after_forward=False)
        register_fsdp_forward_method(model, "hidden")
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        if device.type == "cuda":
            whole = 4 * sum(p.numel() for p in model.parameters())
            self._keep_gradients = whole * SHARE_FOR_GRADIENTS <= torch.cuda.get_device_properties(device).total_memory

    def reshard(self, model: nn.Module) -> None:
        from torch.distributed.fsdp import FSDPModule

        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def set_gradient_sync(self, model: nn.Module, last: bool) -> None:
        model.set_requires_gradient_sync(last or not self._keep_gradients)  # type: ignore[operator]

    def add_gradients(self, gradients: Sequence[Tensor]) -> None:
        pass  # the backward pass has done it


LAYOUTS = ("auto", "ddp", "fsdp")


def layout_named(name: str, processes: int) -> Layout:
    """The plan for `--parallel NAME`; with one process there is nothing to lay out."""
    if name not in LAYOUTS:
        raise unknown_name("--parallel", name, LAYOUTS)
    return Sharded(processes) if name == "fsdp" and processes > 1 else Replicated()


def full_tensors(named: Iterable[tuple[str, Tensor]], main: bool) -> Iterator[tuple[str, Tensor]]:
    """(name, whole tensor on the CPU) of tensors that may be laid over the processes: a model's state_dict, an optimiser's `named_state`.

    Every process iterates to the end; only on `main` does anything come out. What comes out may share memory with what went in: copy what is to
    outlive the next step.
    """
    for name, tensor in named:
        whole = tensor.detach()
        if hasattr(whole, "full_tensor"):
            whole = whole.full_tensor()
        if main:
            yield name, whole.cpu()


def local_part(whole: Tensor, parameter: Tensor) -> Tensor:
    """The part of `whole` that this process holds of `parameter`, a view: all of it where the parameter is no DTensor."""
    if not hasattr(parameter, "placements"):
        return whole
    mesh = parameter.device_mesh  # type: ignore[attr-defined]
    for dimension, placement in enumerate(parameter.placements):
        if placement.is_shard():
            parts = whole.chunk(mesh.size(dimension), placement.dim)
            mine = mesh.get_local_rank(dimension)
            whole = parts[mine] if mine < len(parts) else whole.narrow(placement.dim, 0, 0)
    return whole


def placed_like(whole: Tensor, parameter: Tensor) -> Tensor:
    """A copy of `whole` in the type, on the device and in the layout of `parameter`, for which only the own part is read."""
    placed = torch.empty_like(parameter, requires_grad=False)
    copy_whole(placed, whole)
    return placed


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, in its memory."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def copy_whole(target: Tensor, whole: Tensor) -> None:
    """Set `target`, which may be laid over processes, to `whole`."""
    local(target).detach().copy_(local_part(whole, target))


def load_tensors(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Set the model's parameters, placed before, to whole tensors by name: mapped from disk, each process reads its own part."""
    for name, parameter in model.state_dict().items():
        copy_whole(parameter, weights[name])

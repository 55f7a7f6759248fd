"""Processes: how many, on which device, and the few things they say to each other.

Accelerate finds out where we are: alone, started by `accelerate launch`, torchrun or Slurm, or by `launch` below; on CPU (gloo) or GPUs (NCCL).
Each process computes the rows of the step that fall to it, and one all-reduce a step adds up the gradients; losses are already divided by the
weight of the whole step, so the sum is the gradient, whatever the number of processes and micro-batches.

    processes = start("auto", threads=None)
    for first, last in processes.share(rows=8, micro_batch=2): ...
    processes.add_gradients(parameters)
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from llmkit.errors import LlmkitError, UsageError

PRECISIONS = ("auto", "fp32", "bf16", "fp16")
BUCKET_ELEMENTS = 1 << 24  # gradients are summed in pieces of 64 MiB
SHUTDOWN_SECONDS = 600  # what a stopped group may take to save


@dataclass(slots=True)
class Processes:
    """This process among `count`; `accelerator` holds device, autocast and the loss scaler."""

    accelerator: Any
    precision: str

    @property
    def device(self) -> torch.device:
        return self.accelerator.device  # type: ignore[no-any-return]

    @property
    def rank(self) -> int:
        return int(self.accelerator.process_index)

    @property
    def count(self) -> int:
        return int(self.accelerator.num_processes)

    @property
    def main(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def share(self, rows: int, micro_batch: int) -> Iterator[tuple[int, int]]:
        """Row ranges [start, stop) of a step that this process computes, at most `micro_batch` rows each."""
        first, last = rows * self.rank // self.count, rows * (self.rank + 1) // self.count
        for start in range(first, last, micro_batch):
            yield start, min(start + micro_batch, last)

    def add(self, values: Sequence[float]) -> list[float]:
        """Each value summed over all processes."""
        if self.count == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return tensor.tolist()  # type: ignore[no-any-return]

    def add_tensor(self, tensor: torch.Tensor) -> None:
        """Sum a tensor over all processes, in place."""
        if self.count > 1:
            on_device = tensor.to(self.device)
            dist.all_reduce(on_device)
            tensor.copy_(on_device)

    def add_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Sum the gradients over all processes; a parameter without one counts as zero."""
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self.count == 1:
            return
        bucket: list[torch.Tensor] = []
        for i, parameter in enumerate(parameters):
            bucket.append(parameter.grad)  # type: ignore[arg-type]
            if sum(g.numel() for g in bucket) >= BUCKET_ELEMENTS or i + 1 == len(parameters):
                flat = torch.cat([g.flatten() for g in bucket])
                dist.all_reduce(flat)
                at = 0
                for gradient in bucket:
                    gradient.copy_(flat[at : at + gradient.numel()].view_as(gradient))
                    at += gradient.numel()
                bucket = []

    def wait(self) -> None:
        """Until every process is here."""
        self.accelerator.wait_for_everyone()

    def leave(self) -> None:
        """Leave the group; last."""
        if self.count > 1:
            dist.destroy_process_group()


def start(precision: str = "auto", threads: int | None = None) -> Processes:
    """Join the group that this process belongs to (alone where there is none), choose device and precision."""
    from accelerate import Accelerator

    if precision not in PRECISIONS:
        raise UsageError(f"unknown precision {precision!r}", "one of: " + ", ".join(PRECISIONS))
    cuda = torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "").lower() not in ("1", "true", "yes")
    if precision == "auto":
        precision = "bf16" if cuda and torch.cuda.is_bf16_supported() else "fp32"
    if precision == "fp16" and not cuda:
        raise UsageError("fp16 needs a GPU", "train in fp32 or bf16 on this machine")
    if threads:
        torch.set_num_threads(threads)
    _keep_memory()
    accelerator = Accelerator(cpu=not cuda, mixed_precision="no" if precision == "fp32" else precision)
    return Processes(accelerator, precision)


def _keep_memory() -> None:
    """Keep glibc from giving the memory of each step's tensors back to the system only to ask for it again."""
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library
        return
    mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
    mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD


def launch(count: int, arguments: Sequence[str]) -> int:
    """Run `python -m llmkit ARGUMENTS` as a group of `count` processes on this machine and return the exit code.

    Each is told its place by the environment, as torchrun does it. A signal to this process reaches all of them.
    """
    import dataclasses
    import logging
    import uuid

    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    logging.disable(logging.CRITICAL)  # the processes speak for themselves
    known = {field.name for field in dataclasses.fields(LaunchConfig)}
    more: dict[str, Any] = {"shutdown_timeout": SHUTDOWN_SECONDS} if "shutdown_timeout" in known else {}
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        max_restarts=0,
        monitor_interval=0.1,
        **more,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "llmkit", *arguments)
    except SignalException as error:
        return 128 + int(error.sigval)
    except ChildFailedError as error:
        code = int(error.get_first_failure()[1].exitcode)  # the others were stopped because of it
        if code < 0:
            raise LlmkitError(f"a training process was killed by signal {-code}", "go on with --resume") from error
        return code
    return 0

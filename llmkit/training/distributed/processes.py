"""The processes of a training group: how many, on which device, and the collectives between them.

Accelerate finds out where this process runs: alone, or started by `accelerate launch`, torchrun, Slurm or
`elastic.launch`; on CPU (gloo) or GPUs (NCCL). Each process computes its share of a step's rows, and the
gradients are summed once per step (in the way of the layout, layout.py). Losses are already divided by the
weight of the whole step, so the sum is the gradient for any number of processes and micro-batches.

    processes = start("auto", threads=None)
    for start, stop, factor in processes.micro_batches(model, rows=8, micro_batch=2): ...
    processes.all_reduce_gradients(parameters)
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from llmkit.errors import LostError, UsageError
from llmkit.model.pretrained.safetensors import layout_of
from llmkit.model.runtime import check_fp8
from llmkit.training.distributed.layout import Layout, create_layout
from llmkit.training.distributed.stragglers import Stopwatch
from llmkit.training.distributed.watchdog import Watchdog

PRECISIONS = ("auto", "fp32", "bf16", "fp16", "fp8")
# In the messages of errors that mean that another process or the device is gone.
LOST_MARKERS = ("gloo", "nccl", "connection closed by peer", "connection reset by peer", "cuda error")


@dataclass(slots=True)
class Processes:
    """This process and its group.

    `accelerator` holds the device, autocast and the loss scaler; `layout` distributes the model over the
    group.
    """

    accelerator: Any
    precision: str
    layout: Layout
    seconds_per_row: list[float] = field(default_factory=list)  # by rank, in the last step
    _stopwatch: Stopwatch | None = None
    _timing_pending: bool = False  # measured, but not yet exchanged
    _watchdog: Watchdog | None = None

    @property
    def device(self) -> torch.device:
        return self.accelerator.device  # type: ignore[no-any-return]

    @property
    def rank(self) -> int:
        return int(self.accelerator.process_index)

    @property
    def world_size(self) -> int:
        return int(self.accelerator.num_processes)

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and messages."""
        return self.rank == 0

    def local_row_ranges(self, rows: int, micro_batch: int) -> Iterator[tuple[int, int]]:
        """Row ranges [start, stop) of a step for this process, at most `micro_batch` rows each."""
        first, last = rows * self.rank // self.world_size, rows * (self.rank + 1) // self.world_size
        for start in range(first, last, micro_batch):
            self.heartbeat()
            yield start, min(start + micro_batch, last)

    def micro_batches(
        self, model: torch.nn.Module, rows: int, micro_batch: int, *, sync_first: bool = False
    ) -> Iterator[tuple[int, int, float]]:
        """(start, stop, factor) of each pass of this process through `model`: its row ranges with factor 1.

        In a lockstep layout, a process with fewer ranges makes extra passes of factor 0, over a row whose
        loss does not count. With `sync_first` gradients are summed over the processes after the first pass
        too, not only after the last.
        """
        passes = [(start, stop, 1.0) for start, stop in self.local_row_ranges(rows, micro_batch)]
        if self._stopwatch is None:
            self._stopwatch = Stopwatch(self.device)
        self._stopwatch.start(sum(stop - start for start, stop, _ in passes))
        if self.layout.lockstep:
            largest = -(-rows // self.world_size)
            most = -(-largest // micro_batch)
            passes += [(0, 1, 0.0)] * (most - len(passes))
        for number, row_range in enumerate(passes, 1):
            self.heartbeat()
            self.layout.set_gradient_sync(model, number == len(passes) or (sync_first and number == 1))
            yield row_range

    def heartbeat(self) -> None:
        """Tell the watchdog that this process makes progress; to be called during long work."""
        if self._watchdog:
            self._watchdog.heartbeat()

    @contextmanager
    def without_timeout(self) -> Iterator[None]:
        """A block that may take arbitrarily long, such as scoring tasks: the watchdog counts it as progress."""
        if self._watchdog:
            self._watchdog.suspended = True
        try:
            yield
        finally:
            if self._watchdog:
                self._watchdog.suspended = False

    def _enter_collective(self) -> None:
        if self._watchdog:
            self._watchdog.enter_collective()

    def all_reduce(self, values: Sequence[float]) -> list[float]:
        """Each value summed over all processes. The first call after a step also exchanges `seconds_per_row`."""
        if self.world_size == 1:
            return list(values)
        self._enter_collective()
        timings = [0.0] * self.world_size if self._timing_pending else []
        if self._timing_pending and self._stopwatch:
            timings[self.rank] = self._stopwatch.seconds_per_row()
        tensor = torch.tensor([*values, *timings], dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        sums: list[float] = tensor.tolist()
        if self._timing_pending:
            self.seconds_per_row, self._timing_pending = sums[len(values) :], False
        self.heartbeat()
        return sums[: len(values)]

    def agree(self, flag: bool) -> bool:
        """Whether any process has set `flag`, in a lockstep layout; otherwise this process's own `flag`."""
        return bool(self.all_reduce([float(flag)])[0]) if self.layout.lockstep else flag

    def all_reduce_tensor(self, tensor: torch.Tensor) -> None:
        """Sum a tensor over all processes, in place."""
        if self.world_size > 1:
            self._enter_collective()
            on_device = tensor.to(self.device)
            dist.all_reduce(on_device)
            tensor.copy_(on_device)

    def all_reduce_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Sum the gradients over all processes, in place; a missing gradient counts as zero."""
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self.world_size == 1:
            return
        if self._stopwatch:
            self._stopwatch.stop()
            self._timing_pending = True
        self._enter_collective()
        self.layout.all_reduce_gradients([parameter.grad for parameter in parameters])  # type: ignore[misc]

    def broadcast(self, value: Any) -> Any:
        """The main process's `value`, on every process."""
        if self.world_size == 1:
            return value
        self._enter_collective()
        values = [value]
        dist.broadcast_object_list(values, device=self.device)
        return values[0]

    def from_main(self, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """The main process's tensors by name, on every process, broadcast one at a time: all must read the
        same ones in the same order."""
        return tensors if self.world_size == 1 else BroadcastTensors(self, tensors)

    def barrier(self) -> None:
        """Wait until every process has reached this call."""
        self._enter_collective()
        self.accelerator.wait_for_everyone()
        self.heartbeat()

    def start_watchdog(self, timeout: float, event: Callable[..., None]) -> None:
        """Start the watchdog, which ends this process if any of the group makes no progress for `timeout` seconds.

        0: no watchdog.
        """
        if timeout:
            self._watchdog = Watchdog(self.rank, self.world_size, timeout, event)
            self._watchdog.start()

    def leave(self, *, failed: bool = False) -> None:
        """Leave the group; the last call. A process that has failed does not wait for the others."""
        if self._watchdog:
            self._watchdog.stop()
        if self.world_size > 1 and not failed:
            dist.destroy_process_group()


class BroadcastTensors(Mapping[str, torch.Tensor]):
    """See `Processes.from_main`."""

    def __init__(self, processes: Processes, tensors: Mapping[str, torch.Tensor]) -> None:
        self._processes, self._tensors = processes, tensors
        self._layout = processes.broadcast(dict(layout_of(tensors)))

    def __getitem__(self, name: str) -> torch.Tensor:
        dtype, shape = self._layout[name]
        device = self._processes.device
        is_main = self._processes.is_main
        tensor = self._tensors[name].to(device) if is_main else torch.empty(shape, dtype=dtype, device=device)
        self._processes.heartbeat()
        dist.broadcast(tensor, 0)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._layout)

    def __len__(self) -> int:
        return len(self._layout)


def start(
    precision: str = "auto", threads: int | None = None, parallel: str = "auto", hang_timeout: float = 0.0
) -> Processes:
    """Join the group of this process (or run alone), and choose device, precision and layout."""
    from accelerate import Accelerator, InitProcessGroupKwargs

    if precision not in PRECISIONS:
        raise UsageError(f"unknown precision {precision!r}", "one of: " + ", ".join(PRECISIONS))
    create_layout(parallel, 1)  # refuse a wrong name before any process waits for another
    cuda = torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "").lower() not in ("1", "true", "yes")
    if precision == "auto":
        precision = "bf16" if cuda and torch.cuda.is_bf16_supported() else "fp32"
    if precision == "fp16" and not cuda:
        raise UsageError("fp16 needs a GPU", "train in fp32 or bf16 on this machine")
    if precision == "fp8":
        check_fp8()
    if threads:
        torch.set_num_threads(threads)
    _keep_freed_memory()
    # The group's own timeout is a second line of defence: the watchdog knows more.
    patience = [InitProcessGroupKwargs(timeout=timedelta(seconds=2 * hang_timeout + 60))] if hang_timeout else []
    mixed = {"fp32": "no", "fp8": "bf16"}.get(precision, precision)
    try:
        accelerator = Accelerator(cpu=not cuda, mixed_precision=mixed, kwargs_handlers=patience)
    except RuntimeError as error:  # the others may be gone already
        raise as_lost_error(error) or error from error
    return Processes(accelerator, precision, create_layout(parallel, accelerator.num_processes))


def as_lost_error(error: BaseException) -> LostError | None:
    """A LostError for an error which means that another process or the device is gone; None for any other."""
    if isinstance(error, torch.OutOfMemoryError) or not isinstance(error, RuntimeError):
        return None
    text = str(error)
    if not isinstance(error, dist.DistError) and not any(word in text.lower() for word in LOST_MARKERS):
        return None
    # "[/path/of/a/source.cc:537] Read error [127.0.0.1]:8942: Connection reset by peer. This is typically ..."
    reason = re.sub(r"^\[[^\]]*\] ", "", (text.splitlines() or [type(error).__name__])[0]).partition(". ")[0]
    return LostError(
        f"lost the other processes ({reason})", "continue with --resume, or automatically with --max-restarts"
    )


def _keep_freed_memory() -> None:
    """Keep glibc from returning the memory of each step's tensors to the system only to request it again."""
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library
        return
    mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
    mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD

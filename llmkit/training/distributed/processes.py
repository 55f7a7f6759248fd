"""Processes: how many, on which device, and the few things they say to each other.

Accelerate finds out where we are: alone, started by `accelerate launch`, torchrun or Slurm, or by `elastic.launch`; on CPU (gloo) or GPUs (NCCL).
Each process computes the rows of the step that fall to it, and the gradients are added up once a step (how, is a matter of `parallel`); losses are
already divided by the weight of the whole step, so the sum is the gradient, whatever the number of processes and micro-batches.

    processes = start("auto", threads=None)
    for first, last, factor in processes.micro_batches(model, rows=8, micro_batch=2): ...
    processes.add_gradients(parameters)
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
from llmkit.training.distributed.layout import Layout, layout_named
from llmkit.training.distributed.stragglers import Stopwatch
from llmkit.training.distributed.watchdog import Watchdog

PRECISIONS = ("auto", "fp32", "bf16", "fp16", "fp8")
LOST_WORDS = ("gloo", "nccl", "connection closed by peer", "connection reset by peer", "cuda error")


@dataclass(slots=True)
class Processes:
    """This process among `count`; `accelerator` holds device, autocast and the loss scaler, `layout` how the model lies over the group."""

    accelerator: Any
    precision: str
    layout: Layout
    seconds: list[float] = field(default_factory=list)  # each process's own seconds a row in the last step, by rank
    _watch: Stopwatch | None = None
    _measured: bool = False
    _dog: Watchdog | None = None

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
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def share(self, rows: int, micro_batch: int) -> Iterator[tuple[int, int]]:
        """Row ranges [start, stop) of a step that this process computes, at most `micro_batch` rows each."""
        first, last = rows * self.rank // self.world_size, rows * (self.rank + 1) // self.world_size
        for start in range(first, last, micro_batch):
            self.beat()
            yield start, min(start + micro_batch, last)

    def micro_batches(
        self, model: torch.nn.Module, rows: int, micro_batch: int, *, add_first: bool = False
    ) -> Iterator[tuple[int, int, float]]:
        """(start, stop, factor) of each pass that this process makes through `model`: its row ranges with factor 1.

        Where a layout goes in lockstep, a process with fewer ranges makes passes of factor 0 more, over a row whose loss does not count.
        With `add_first` it adds up the gradients after the first pass too, not only after the last.
        """
        turns = [(start, stop, 1.0) for start, stop in self.share(rows, micro_batch)]
        if self._watch is None:
            self._watch = Stopwatch(self.device)
        self._watch.start(sum(stop - start for start, stop, _ in turns))
        if self.layout.lockstep:
            largest = -(-rows // self.world_size)
            most = -(-largest // micro_batch)
            turns += [(0, 1, 0.0)] * (most - len(turns))
        for number, turn in enumerate(turns, 1):
            self.beat()
            self.layout.set_gradient_sync(model, number == len(turns) or (add_first and number == 1))
            yield turn

    def beat(self) -> None:
        """Tell the watch-dog that this process gets on; for whatever takes long."""
        if self._dog:
            self._dog.beat()

    @contextmanager
    def at_length(self) -> Iterator[None]:
        """What may take as long as it likes, such as scores on tasks: to the watch-dog it is progress."""
        if self._dog:
            self._dog.patient = True
        try:
            yield
        finally:
            if self._dog:
                self._dog.patient = False

    def _meet(self) -> None:
        if self._dog:
            self._dog.meet()

    def all_reduce(self, values: Sequence[float]) -> list[float]:
        """Each value summed over all processes. The first time in a step it carries `seconds` too."""
        if self.world_size == 1:
            return list(values)
        self._meet()
        mine = [0.0] * self.world_size if self._measured else []
        if self._measured and self._watch:
            mine[self.rank] = self._watch.seconds()
        tensor = torch.tensor([*values, *mine], dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        found: list[float] = tensor.tolist()
        if self._measured:
            self.seconds, self._measured = found[len(values) :], False
        self.beat()
        return found[: len(values)]

    def agree(self, flag: bool) -> bool:
        """`flag`, or whether any process has it set where the layout wants all to go the same way."""
        return bool(self.all_reduce([float(flag)])[0]) if self.layout.lockstep else flag

    def add_tensor(self, tensor: torch.Tensor) -> None:
        """Sum a tensor over all processes, in place."""
        if self.world_size > 1:
            self._meet()
            on_device = tensor.to(self.device)
            dist.all_reduce(on_device)
            tensor.copy_(on_device)

    def add_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Make the gradients those of the whole step; a parameter without one counts as zero."""
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self.world_size == 1:
            return
        if self._watch:
            self._watch.stop()
            self._measured = True
        self._meet()
        self.layout.add_gradients([parameter.grad for parameter in parameters])  # type: ignore[misc]

    def broadcast(self, value: Any) -> Any:
        """The main process's `value`, on every process."""
        if self.world_size == 1:
            return value
        self._meet()
        place = [value]
        dist.broadcast_object_list(place, device=self.device)
        return place[0]

    def from_main(self, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """The main process's tensors by name, for every process; all must ask for the same ones in the same order. They come one at a time."""
        return tensors if self.world_size == 1 else FromMain(self, tensors)

    def barrier(self) -> None:
        """Until every process is here."""
        self._meet()
        self.accelerator.wait_for_everyone()
        self.beat()

    def watch(self, timeout: float, event: Callable[..., None]) -> None:
        """Start the watch-dog, which ends this process where one of the group makes no progress for `timeout` seconds; 0: none."""
        if timeout:
            self._dog = Watchdog(self.rank, self.world_size, timeout, event)
            self._dog.start()

    def leave(self, *, failed: bool = False) -> None:
        """Leave the group; last. A process that has failed waits for nobody."""
        if self._dog:
            self._dog.stop()
        if self.world_size > 1 and not failed:
            dist.destroy_process_group()


class FromMain(Mapping[str, torch.Tensor]):
    """See `Processes.from_main`."""

    def __init__(self, processes: Processes, tensors: Mapping[str, torch.Tensor]) -> None:
        self._processes, self._tensors = processes, tensors
        self._layout = processes.broadcast(dict(layout_of(tensors)))

    def __getitem__(self, name: str) -> torch.Tensor:
        dtype, shape = self._layout[name]
        device = self._processes.device
        here = self._processes.is_main
        tensor = self._tensors[name].to(device) if here else torch.empty(shape, dtype=dtype, device=device)
        self._processes.beat()
        dist.broadcast(tensor, 0)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._layout)

    def __len__(self) -> int:
        return len(self._layout)


def start(
    precision: str = "auto", threads: int | None = None, parallel: str = "auto", hang_timeout: float = 0.0
) -> Processes:
    """Join the group that this process belongs to (alone where there is none), choose device, precision and layout."""
    from accelerate import Accelerator, InitProcessGroupKwargs

    if precision not in PRECISIONS:
        raise UsageError(f"unknown precision {precision!r}", "one of: " + ", ".join(PRECISIONS))
    layout_named(parallel, 1)  # a wrong name is said before anybody waits for anybody
    cuda = torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "").lower() not in ("1", "true", "yes")
    if precision == "auto":
        precision = "bf16" if cuda and torch.cuda.is_bf16_supported() else "fp32"
    if precision == "fp16" and not cuda:
        raise UsageError("fp16 needs a GPU", "train in fp32 or bf16 on this machine")
    if precision == "fp8":
        check_fp8()
    if threads:
        torch.set_num_threads(threads)
    _keep_memory()
    # The group's own timeout is the second line of defence: the watch-dog knows more.
    patience = [InitProcessGroupKwargs(timeout=timedelta(seconds=2 * hang_timeout + 60))] if hang_timeout else []
    mixed = {"fp32": "no", "fp8": "bf16"}.get(precision, precision)
    try:
        accelerator = Accelerator(cpu=not cuda, mixed_precision=mixed, kwargs_handlers=patience)
    except RuntimeError as error:  # the others may be gone already
        raise lost(error) or error from error
    return Processes(accelerator, precision, layout_named(parallel, accelerator.num_processes))


def lost(error: BaseException) -> LostError | None:
    """What to say of an error that means that another process or the device is gone; None for any other."""
    if isinstance(error, torch.OutOfMemoryError) or not isinstance(error, RuntimeError):
        return None
    text = str(error)
    if not isinstance(error, dist.DistError) and not any(word in text.lower() for word in LOST_WORDS):
        return None
    # "[/path/of/a/source.cc:537] Read error [127.0.0.1]:8942: Connection reset by peer. This is typically ..."
    reason = re.sub(r"^\[[^\]]*\] ", "", (text.splitlines() or [type(error).__name__])[0]).partition(". ")[0]
    return LostError(f"lost the other processes ({reason})", "go on with --resume; --max-restarts does so by itself")


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

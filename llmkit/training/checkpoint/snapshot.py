"""The last good state of a run in host memory, written to disk in the background while training continues.

There is one copy: weights and moments after some step, 4 bytes each (12 bytes per parameter with AdamW in
float32). A rollback is restored from it. A checkpoint is written from it by a thread that syncs every file,
computes its digest and renames the directory (checkpoint/run_directory.py); the copy is not replaced before
that is done.

A full disk does not end a run: the previous checkpoint stays, and the failure is reported
(checkpoint/checkpointer.py).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from pathlib import Path

from torch import Tensor

from llmkit.training.checkpoint.run_directory import RunDirectory
from llmkit.training.checkpoint.trainer_state import TrainerState

Tensors = dict[str, Tensor]


class HostSnapshot:
    """`write_model(directory, weights, step, tokens)` writes a model directory.

    `keep` and `keep_every` are those of RunDirectory.save.
    """

    def __init__(
        self,
        directory: RunDirectory,
        write_model: Callable[[Path, Tensors, int, int], None],
        keep: int = 0,
        keep_every: int = 0,
    ) -> None:
        self.state: TrainerState | None = None  # None before the first copy
        self.weights: Tensors = {}
        self.moments: Tensors = {}
        self.last_checkpoint: Path | None = None  # the last complete one
        self._directory, self._write_model, self._keep, self._keep_every = directory, write_model, keep, keep_every
        self._thread: threading.Thread | None = None
        self._disk_error: OSError | None = None
        self._exception: BaseException | None = None

    @property
    def writing(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._thread is not None and self._thread.is_alive()

    def copy(
        self, state: TrainerState, weights: Iterable[tuple[str, Tensor]], moments: Iterable[tuple[str, Tensor]]
    ) -> None:
        """Replace the snapshot by this state, copying one tensor at a time.

        First waits for a checkpoint that is being written.
        """
        self.wait()
        self.weights = _copy_to_host(self.weights, weights)
        self.moments = _copy_to_host(self.moments, moments)
        self.state = state

    def save(self) -> None:
        """Start writing the snapshot as a checkpoint."""
        self.wait()
        self._thread = threading.Thread(target=self._write, name="checkpoint")
        self._thread.start()

    def failure(self, *, wait: bool = False) -> OSError | None:
        """The error that kept the last checkpoint from being written, returned once.

        With `wait` finish writing first.
        """
        if wait:
            self.wait()
        elif self.writing:
            return None
        if self._exception is not None:
            raise self._exception
        error, self._disk_error = self._disk_error, None
        return error

    def remove_checkpoints_after(self, step: int) -> None:
        """Remove the checkpoints of later steps, which a rollback has undone."""
        self.last_checkpoint = self._directory.remove_checkpoints_after(step)

    def wait(self) -> None:
        """Wait until no checkpoint is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self) -> None:
        state = self.state
        assert state is not None
        try:
            self.last_checkpoint = self._directory.save(
                state,
                self.moments,
                lambda directory: self._write_model(directory, self.weights, state.step, state.tokens),
                self._keep,
                self._keep_every,
            )
        except OSError as error:
            self._disk_error = error
        except BaseException as error:  # raised by `failure`, in the main thread
            self._exception = error


def _copy_to_host(old: Tensors, new: Iterable[tuple[str, Tensor]]) -> Tensors:
    """Copies of `new` in host memory, reusing the memory of `old` where it fits."""
    copies = {}
    for name, tensor in new:
        buffer = old.get(name)
        if buffer is not None and buffer.shape == tensor.shape and buffer.dtype == tensor.dtype:
            copies[name] = buffer.copy_(tensor.detach())
        else:
            copies[name] = tensor.detach().to("cpu", copy=True).contiguous()
    return copies

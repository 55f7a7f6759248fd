"""The last good state of a run on the host, and its way to disk while training goes on.

There is one copy: weights and moments as they were after some step (4 bytes each: 12 bytes a parameter with AdamW in float32). A rollback is taken
from it; a checkpoint is written from it by a thread, which syncs every file, digests it and renames the directory (training.state). It is renewed
when that is done.

A disk that is full does not end a run: the checkpoint before stays, the failure is reported, and the next step that may tries again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from pathlib import Path

from torch import Tensor

from llmkit.training.checkpoint.run_directory import RunDirectory, TrainerState

Tensors = dict[str, Tensor]


class HostSnapshot:
    """`write_model(directory, weights, step, tokens)` fills a model directory; `keep` and `keep_every` are RunDirectory.save's."""

    def __init__(
        self,
        directory: RunDirectory,
        write_model: Callable[[Path, Tensors, int, int], None],
        keep: int = 0,
        keep_every: int = 0,
    ) -> None:
        self.state: TrainerState | None = None  # what is held, None before the first copy
        self.weights: Tensors = {}
        self.moments: Tensors = {}
        self.saved: Path | None = None  # the last checkpoint that is whole
        self._directory, self._write_model, self._keep, self._keep_every = directory, write_model, keep, keep_every
        self._thread: threading.Thread | None = None
        self._error: OSError | None = None
        self._fault: BaseException | None = None

    @property
    def writing(self) -> bool:
        """Whether a checkpoint is under way."""
        return self._thread is not None and self._thread.is_alive()

    def copy(
        self, state: TrainerState, weights: Iterable[tuple[str, Tensor]], moments: Iterable[tuple[str, Tensor]]
    ) -> None:
        """Hold this state instead of the one before, each tensor copied as it comes; waits for a checkpoint that is under way."""
        self.wait()
        self.weights = _copied(self.weights, weights)
        self.moments = _copied(self.moments, moments)
        self.state = state

    def save(self) -> None:
        """Start to write what is held."""
        self.wait()
        self._thread = threading.Thread(target=self._write, name="checkpoint")
        self._thread.start()

    def failure(self, *, wait: bool = False) -> OSError | None:
        """What kept the last checkpoint from being written, reported once; with `wait` after it has come to its end."""
        if wait:
            self.wait()
        elif self.writing:
            return None
        if self._fault is not None:
            raise self._fault
        error, self._error = self._error, None
        return error

    def forget(self, after: int) -> None:
        """Remove the checkpoints of later steps: the run went back before them, and takes another way."""
        self.saved = self._directory.forget(after)

    def wait(self) -> None:
        """Until no checkpoint is under way."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self) -> None:
        state = self.state
        assert state is not None
        try:
            self.saved = self._directory.save(
                state,
                self.moments,
                lambda directory: self._write_model(directory, self.weights, state.step, state.tokens),
                self._keep,
                self._keep_every,
            )
        except OSError as error:
            self._error = error
        except BaseException as error:  # raised where it is asked for, in the main thread
            self._fault = error


def _copied(old: Tensors, new: Iterable[tuple[str, Tensor]]) -> Tensors:
    """Copies of `new` on the host, in the memory of `old` where it fits."""
    result = {}
    for name, tensor in new:
        place = old.get(name)
        if place is not None and place.shape == tensor.shape and place.dtype == tensor.dtype:
            result[name] = place.copy_(tensor.detach())
        else:
            result[name] = tensor.detach().to("cpu", copy=True).contiguous()
    return result

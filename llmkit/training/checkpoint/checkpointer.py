"""When a run takes snapshots and writes checkpoints, and what happens if a checkpoint cannot be stored.

    checkpointer.save(step)                 # snapshot now, written to disk while training continues
    checkpointer.report_failure(step)       # a failed write is reported, and tried again after the next step

A full disk does not end a run: the previous checkpoint stays, and every following step tries again.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from llmkit.training.checkpoint.snapshot import HostSnapshot
from llmkit.training.guard.guard import Guard
from llmkit.training.guard.rollback import take_snapshot
from llmkit.training.metrics.gradient_noise import NoiseScale
from llmkit.training.metrics.log import MetricsLog
from llmkit.training.train_step import TrainContext

# Steps between snapshots for rollbacks, and tokens where copying is slow relative to computing: about 1 % of
# the time. Not based on the clock, since what a step is compared with must be the same in a run that was
# killed and resumed.
SNAPSHOT_STEPS = 10
SNAPSHOT_TOKENS = {"cuda": 1 << 24}


class Checkpointer:
    """Snapshots and checkpoints of a run. `save_every` is in steps; `log` is None on all processes but the main one."""

    def __init__(
        self,
        context: TrainContext,
        guard: Guard,
        noise_scale: NoiseScale,
        log: MetricsLog | None,
        step: int,
        save_every: int,
    ) -> None:
        self._context, self._guard, self._noise_scale, self._log = context, guard, noise_scale, log
        self.snapshot = HostSnapshot(
            context.directory, context.write_model, context.checkpoints.keep, context.checkpoints.keep_every
        )
        self.snapshot.last_checkpoint = context.start
        self.due = False  # a checkpoint is to be written as soon as possible
        self.last_step = step  # of the last checkpoint that was begun
        self.snapshot_seconds = 0.0  # duration of the last snapshot
        self._reported: Path | str | None = ""  # the last checkpoint at the time of the last reported failure
        self._save_every = save_every
        tokens = SNAPSHOT_TOKENS.get(context.processes.device.type, 0)
        self._snapshot_every = max(SNAPSHOT_STEPS, tokens // (context.state.batch_size * context.state.length))

    def after_step(self, step: int, *, ending: bool) -> bool:
        """Save a checkpoint if one is due (True), else take a snapshot every few steps.

        Neither during a series of spikes unless the run ends.
        """
        self.due |= step % self._save_every == 0
        if ending or (self.due and not self._guard.spike_start):
            self.save(step, wait=ending)
            return True
        if self._context.checkpoints.max_rollbacks and step % self._snapshot_every == 0 and not self._guard.spike_start:
            self.take_snapshot(step)
        return False

    def take_snapshot(self, step: int) -> None:
        """Copy the state after `step` steps to the host memory of the main process; every process takes part."""
        context, source = self._context, self._context.source
        began = time.monotonic()
        scaler = context.processes.accelerator.scaler
        tokens = source.tokens(step)
        lr = context.schedule.for_step(source.tokens(max(0, step - 1)), tokens) if step else 0.0
        state = replace(
            context.state,
            step=step,
            tokens=tokens,
            rate=lr,
            scaler=scaler.state_dict() if scaler else {},
            guard=self._guard.state(),
            noise=self._noise_scale.state(),
        )
        take_snapshot(context, self.snapshot, state)
        self.snapshot_seconds = time.monotonic() - began

    def save(self, step: int, *, wait: bool = False) -> None:
        """Start writing a checkpoint; with `wait` return when it is written."""
        self.due = False
        self.last_step = step
        self.take_snapshot(step)
        if self._log:
            try:
                self._log.sync()
                self.snapshot.save()
            except OSError as error:
                self._report(step, error)
        if wait:
            self.report_failure(step, wait=True)

    def report_failure(self, step: int, *, wait: bool = False) -> None:
        """If the last checkpoint could not be stored, report it and try again after the next step.

        With `wait` finish writing first.
        """
        error = self.snapshot.failure(wait=wait)
        if error is not None:
            self._report(step, error)

    def _report(self, step: int, error: OSError) -> None:
        self.due = True
        if self._log:
            self._context.directory.event("save failed", step=step, error=str(error))
        checkpoint = self.snapshot.last_checkpoint
        if self._reported != checkpoint:  # not after every step
            last_good = f"the last good one is {checkpoint.name}" if checkpoint else "there is none yet"
            reason = error.strerror or error
            self._context.notify(f"a checkpoint could not be stored ({reason}); retrying after every step, {last_good}")
        self._reported = checkpoint

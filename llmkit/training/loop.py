"""The training loop shared by train, anneal, sft and dpo, which differ in objective, source of batches and
schedule.

    outcome = fit(TrainContext(model, optimizer, next_token, (), source, schedule, processes, directory, ...))

In each step every process computes the loss of its rows in micro-batches, divided by the weight of the whole
step; one all-reduce sums the gradients; they are clipped; the guard checks the step's metrics
(guard/recovery.py); and the optimizer takes the step with a learning rate that is a function of the tokens
seen. Step n always reads batch n: a batch that the guard skips is passed over, and no other batch moves.
Everything is a function of the step number, the parameters, the optimizer's moments and the guard's state,
all of which a checkpoint holds: a run killed at any point ends in the same bytes as an undisturbed one (with
the same number of processes and threads).

SIGTERM, SIGHUP and SIGINT end the run with a checkpoint and then take effect (exit code 143, 129 or 130); a second one
ends the process at once. A single process abandons the step or evaluation it is in, compilation included;
several processes finish their step together. SIGUSR1 saves a checkpoint and training continues. `max_hours`
ends the run like a signal, with exit code 75.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable
from typing import Any

from llmkit.errors import LlmkitError, UnfinishedError
from llmkit.io.run_layout import step_of
from llmkit.training.checkpoint.checkpointer import Checkpointer
from llmkit.training.checkpoint.environment import hardware_info
from llmkit.training.checkpoint.trainer_state import load_optimizer_tensors, load_trainer_state
from llmkit.training.distributed.stragglers import StragglerDetector, scheduled_garbage_collection
from llmkit.training.guard.guard import Guard
from llmkit.training.guard.recovery import Recovery, restore_progress
from llmkit.training.metrics.curves import smoothed_loss
from llmkit.training.metrics.gradient_noise import NoiseScale
from llmkit.training.metrics.log import MFU, MetricsLog, Throughput, peak_flops
from llmkit.training.metrics.step_metrics import StepMetrics
from llmkit.training.optim.optimizer import restore_optimizer
from llmkit.training.signals import Interrupted, Signals, watch_signals
from llmkit.training.train_step import (
    StepResult,
    TrainContext,
    accumulate,
    discard_gradients,
    evaluate_held_out,
    update,
)

DEFAULT_COUNT = 10  # checkpoints and evaluations of a run without --save-every and --eval-every


def fit(context: TrainContext) -> dict[str, Any]:
    """Train to the end, or until a signal; returns steps, tokens, last loss and speed.

    Raises LlmkitError if the guard gives up or the last checkpoint could not be stored, and UnfinishedError
    (exit code 75) at the time limit.
    """
    with watch_signals() as signals, scheduled_garbage_collection() as collect_garbage:
        loop = Loop(context, signals, collect_garbage)
        try:
            outcome = loop.run()
        finally:
            loop.close()
    if signals.number:
        context.notify(f"stopped after step {loop.step:,}; continue with --resume")
        signals.raise_received()
    if loop.out_of_time:
        raise UnfinishedError(
            f"time limit of {context.checkpoints.max_hours:g} hours reached at step {loop.step:,}",
            "continue with --resume",
        )
    return outcome


class Loop:
    """A run in progress: `step` steps are finished."""

    def __init__(self, context: TrainContext, signals: Signals, collect_garbage: Callable[[int], None]) -> None:
        self.context, self.signals, self._collect_garbage = context, signals, collect_garbage
        self.guard = Guard(context.uniform_loss, context.checkpoints.max_rollbacks)
        self.noise_scale = NoiseScale()
        self.step = 0
        if context.start:
            state = load_trainer_state(context.start)
            self.step = state.step
            moments = load_optimizer_tensors(context.start)
            restore_optimizer(context.model, context.optimizer, moments, str(context.start))
            restore_progress(context, self.guard, self.noise_scale, state)
        self.out_of_time = False
        self.log = MetricsLog(context.directory.metrics, self.step) if context.processes.is_main else None
        self.record: dict[str, Any] = dict(self.log.last) if self.log else {}
        default_interval = max(1, -(-context.source.steps // DEFAULT_COUNT))
        self._eval_every = context.evaluation.eval_every or default_interval
        save_every = context.checkpoints.save_every or default_interval
        self._checkpointer = Checkpointer(context, self.guard, self.noise_scale, self.log, self.step, save_every)
        self._recovery = Recovery(context, self.guard, self.noise_scale, self._checkpointer.snapshot, self.log)
        self._metrics = StepMetrics(
            context.model,
            context.source,
            context.processes,
            context.directory.path,
            context.logging.log_every,
            context.token_bytes,
        )
        self._stragglers = StragglerDetector()
        self._step_seconds = 0.0  # duration of the last step
        self._started = time.monotonic()

    def close(self) -> None:
        """Wait until a checkpoint in progress is written."""
        self._checkpointer.snapshot.failure(wait=True)
        if self.log:
            self.log.close()

    def run(self) -> dict[str, Any]:
        context, source, processes = self.context, self.context.source, self.context.processes
        peak, peak_origin = peak_flops(processes.device, processes.precision, processes.world_size)
        self._throughput = Throughput(context.flops_per_token, peak)
        environment = context.state.environment | hardware_info(processes.device)
        environment |= {"processes": processes.world_size, "parallel": processes.layout.name}
        accepted = {"accepted": context.changed} if context.changed else {}
        name = "resume" if context.start else "start"
        self._event(
            name, step=self.step, peak_flops=peak, peak=peak_origin, mfu=MFU, environment=environment, **accepted
        )
        self._checkpointer.take_snapshot(self.step)
        # A run that was stopped during an evaluation catches up on it.
        missed = bool(self.log) and self.step > 0 and self._evaluation_due() and "heldout_loss" not in self.record
        if processes.all_reduce([float(missed)])[0]:
            metrics = self._evaluate()
            if self.log and metrics is not None:
                self.record = {"step": self.step, "tokens": source.tokens(self.step)} | self.record
                self.record |= metrics
                self.log.write(self.record)
        stop = self._should_stop()
        while self.step < source.steps and not stop:
            advanced = self._advance()
            stop = self._should_stop()
            if advanced:
                saved = self._checkpointer.after_step(self.step, ending=stop or self.step == source.steps)
                if saved and not stop:
                    self._run_checkpoint_callbacks()
        if stop:
            self._checkpointer.report_failure(self.step, wait=True)
            unsaved = self._checkpointer.due or self._checkpointer.last_step != self.step
            if processes.all_reduce([float(unsaved)])[0]:
                self._checkpointer.save(self.step, wait=True)
        return self._finish(stop)

    def _advance(self) -> bool:
        """Take or skip the next step, or roll back; False if no step was taken or skipped."""
        context, source, number = self.context, self.context.source, self.step + 1
        began = time.perf_counter()
        context.before_step(self.step)
        tokens, tokens_before = source.tokens(number), source.tokens(self.step)
        lr = context.schedule.for_step(tokens_before, tokens)
        record: dict[str, Any] = {"step": number, "tokens": tokens}
        if number in self.guard.skipped:
            record |= {"lr": lr, "skipped": True}
        else:
            try:
                with self.signals.interruptible(context.processes.world_size == 1):
                    result = accumulate(context, self.step, self._metrics)
            except Interrupted:
                discard_gradients(context)
                return False
            step = self._recovery.review(number, result) if context.checkpoints.max_rollbacks else None
            if step is not None:
                self.step = step
                discard_gradients(context)
                if step + 1 != number:
                    return False
                # Its metrics are in events.jsonl: after a rollback the step is passed over again, and then has none.
                record |= {"lr": lr, "skipped": True}
            else:
                update(context, lr, self._metrics)
                record |= {**result.metrics, "lr": lr, "grad_norm": result.grad_norm}
                record |= self._measure_noise_scale(result, tokens - tokens_before)
                record |= self._compare_ranks(number)
                record |= self._metrics.finish_step(
                    result.metric_sums, result.grad_norm, context.optimization.clip or 0.0
                )
        self.step = number
        self._collect_garbage(number)
        self._step_seconds = time.perf_counter() - began
        tokens_left = source.tokens(source.steps) - tokens
        record |= self._throughput.update(tokens - tokens_before, self._step_seconds, tokens_left)
        if self._evaluation_due():
            record |= self._evaluate() or {}
        self.record = record
        if self.log:
            record["loss_smooth"] = smoothed_loss(self.log.last, record)
            self.log.write(record)
            context.report(record)
        return True

    def _measure_noise_scale(self, result: StepResult, tokens: int) -> dict[str, float]:
        """The gradient noise scale in steps that measure it; warns once if the `tokens` of a step exceed it."""
        if not result.small_batch[1]:
            return {}
        self.noise_scale.update(*result.small_batch, result.grad_norm**2, self.context.source.weight(self.step))
        if warning := self.noise_scale.warning(tokens, self.step / self.context.source.steps):
            self.context.notify(warning)
        return {"noise_scale": round(self.noise_scale.tokens)} if self.noise_scale.tokens else {}

    def _compare_ranks(self, number: int) -> dict[str, float]:
        """Metrics of how evenly the processes work, every few steps.

        Logs an event for a process that has become slow.
        """
        metrics, straggler = self._stragglers.update(number, self.context.processes.seconds_per_row)
        if straggler is not None:
            self._event("straggler", step=number, rank=straggler, spread=metrics["rank_spread"])
        return metrics

    def _evaluation_due(self) -> bool:
        heldout, steps = self.context.heldout, self.context.source.steps
        return heldout is not None and (self.step % self._eval_every == 0 or self.step == steps)

    def _evaluate(self) -> dict[str, float] | None:
        """Metrics on the held-out data; None if a signal came before the end."""
        try:
            with self.signals.interruptible(self.context.processes.world_size == 1):
                return evaluate_held_out(self.context, lambda: bool(self.signals.number))
        except Interrupted:
            return None

    def _should_stop(self) -> bool:
        """Whether any process received a stop signal, or the time limit is reached.

        The same answer on every process.
        """
        context, processes = self.context, self.context.processes
        elapsed = time.monotonic() - self._started
        time_needed = elapsed + self._checkpointer.snapshot_seconds + self._step_seconds
        time_is_up = processes.is_main and time_needed > 3600 * (context.checkpoints.max_hours or math.inf)
        self._checkpointer.report_failure(self.step)
        save_requested, self.signals.save = self.signals.save, False  # a request from here on waits for the next call
        flags = (self.signals.number, time_is_up, save_requested or self._checkpointer.due)
        stop, out_of_time, save = processes.all_reduce([float(flag) for flag in flags])
        self._checkpointer.due = bool(save)
        self.out_of_time = bool(out_of_time) and not stop and self.step < context.source.steps
        if stop and not self.signals.number:
            self.signals.number = signal.SIGTERM  # another process received it
        return bool(stop or self.out_of_time)

    def _run_checkpoint_callbacks(self) -> None:
        """Samples and scores of a checkpoint: on the main process, or on all where a pass through the model
        needs them."""
        context = self.context
        try:
            with self.signals.interruptible(context.processes.world_size == 1), context.processes.without_timeout():
                for callback in context.at_checkpoint if self.log or context.processes.layout.lockstep else ():
                    try:
                        self.record |= callback(context.model, self.step)
                    except OSError as error:  # most likely a full disk
                        context.notify(f"step {self.step:,}: {error}")
                    context.processes.layout.reshard(context.model)
        except Interrupted:
            return
        if self.log and context.at_checkpoint:
            self.log.write(self.record)
            context.report(self.record)

    def _finish(self, stop: bool) -> dict[str, Any]:
        """Link the final model of a completed run and return the outcome."""
        context, source = self.context, self.context.source
        completed = self.step == source.steps and not stop
        checkpoint = self._checkpointer.snapshot.last_checkpoint
        if context.processes.is_main:
            if self.step and (checkpoint is None or step_of(checkpoint) != self.step):
                last_good = f"{checkpoint} is the last good one" if checkpoint else "there is none"
                raise LlmkitError(
                    f"{context.directory.path}: the checkpoint of step {self.step:,} could not be stored",
                    f"{last_good}; free some space, then continue with --resume",
                )
            if completed and checkpoint is not None:
                context.directory.link_final(checkpoint)
            if completed and (loss := self.record.get("loss") or 0.0) > context.uniform_loss + 1:
                context.notify(
                    f"the final loss of {loss:.4g} is worse than a uniform guess ({context.uniform_loss:.4g}): "
                    "lower the learning rate"
                )
        self._event("end" if completed else "stop", step=self.step)
        if completed and self.log:
            context.directory.seal()
        context.processes.barrier()
        return {
            "steps": self.step,
            "tokens": source.tokens(self.step),
            "loss": self.record.get("loss"),
            "heldout_loss": self.record.get("heldout_loss"),
            "skipped": len(self.guard.skipped) or None,
            "seconds": round(time.monotonic() - self._started, 1),
            "tokens_per_second": round(self._throughput.tokens_per_second),
        }

    def _event(self, name: str, **details: Any) -> None:
        if self.log:
            self.context.directory.event(name, **details)

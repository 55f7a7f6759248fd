"""What happens to a step that the guard objects to: skip its batch, roll the run back, or stop the run.

    step = recovery.review(number, result)      # None: take the step; else the finished steps to continue from

Every process makes the same calls with the same metrics and so reaches the same decision. Each decision is an
event in events.jsonl with the documents of the batch; more than `max_rollbacks` of them within a window stop
the run.
"""

from __future__ import annotations

import math
from typing import Any

from llmkit.errors import LlmkitError
from llmkit.training.checkpoint.snapshot import HostSnapshot
from llmkit.training.checkpoint.trainer_state import TrainerState
from llmkit.training.guard.diagnosis import StepDocument, find_broken_documents
from llmkit.training.guard.guard import PATIENCE, WINDOW, Guard, StepVerdict
from llmkit.training.guard.rollback import all_finite, load_state_before, restore_snapshot, snapshot_weights
from llmkit.training.metrics.gradient_noise import NoiseScale
from llmkit.training.metrics.log import MetricsLog
from llmkit.training.train_step import StepResult, TrainContext, evaluate, step_documents

MAX_EVENT_DOCUMENTS = 1000  # documents named in one event

# Causes, in events.jsonl and in messages.
NON_FINITE_WEIGHTS = "non-finite weights"
NON_FINITE_LOSS = "non-finite loss"
BROKEN_DOCUMENTS = "broken documents"
PERSISTENT_RISE = "persistent rise in loss"


class Recovery:
    """Acts on the guard's verdicts. `log` is None on all processes but the main one."""

    def __init__(
        self,
        context: TrainContext,
        guard: Guard,
        noise_scale: NoiseScale,
        snapshot: HostSnapshot,
        log: MetricsLog | None,
    ) -> None:
        self._context, self._guard, self._noise_scale = context, guard, noise_scale
        self._snapshot, self._log = snapshot, log

    def review(self, number: int, result: StepResult) -> int | None:
        """Decide on step `number`, whose gradients are accumulated but not applied.

        None to take the step. Otherwise the number of finished steps that the run now has: `number` - 1 to
        pass over this step, fewer after a rollback. Raises LlmkitError after too many rollbacks.
        """
        context, guard, metrics = self._context, self._guard, result.guard_metrics()
        scaler = context.processes.accelerator.scaler
        if scaler is not None and math.isfinite(metrics[0]) and not math.isfinite(result.grad_norm):
            return None  # fp16's loss scaler is probing its limits, and skips such a step itself
        verdict = guard.judge(number, metrics)
        if verdict is StepVerdict.GOOD:
            guard.accept(number, metrics)
            return None
        if verdict is StepVerdict.NON_FINITE and not self._weights_finite():
            repeated = guard.retried == number  # then the cause is this step, or the one that left such weights
            guard.retried = number
            first, last = max(1, number - repeated), number if repeated else 0
            return self._roll_back(number, first, last, NON_FINITE_WEIGHTS, result)
        broken = self._diagnose(number, verdict)
        if context.processes.all_reduce([float(bool(broken) and context.processes.is_main)])[0]:
            cause = NON_FINITE_LOSS if verdict is StepVerdict.NON_FINITE else BROKEN_DOCUMENTS
            documents = [
                {"id": document.name, "reason": reason, "loss": _finite_or_none(document.loss)}
                for document, reason in broken[:MAX_EVENT_DOCUMENTS]
            ]
            within_limit = guard.skip(number, number, number)
            self._record(number, number - 1, cause, [number], documents, result)
            self._check_limit(within_limit, number)
            return number - 1
        if verdict is StepVerdict.PERSISTENT:
            return self._review_persistent_rise(number, metrics, result)
        loss, grad_norm, _ = metrics
        self._event("spike", step=number, kept=True, loss=loss, grad_norm=grad_norm, deviation=guard.deviation(metrics))
        guard.record_spike(number)
        return None

    def _diagnose(self, number: int, verdict: StepVerdict) -> list[tuple[StepDocument, str]]:
        """The documents to blame for step `number`, each with the reason."""
        context, last_good = self._context, self._guard.last_good[0]
        documents = step_documents(context, number - 1)
        usual_losses = [document.loss for document in step_documents(context, last_good - 1)] if last_good else []
        if verdict is StepVerdict.NON_FINITE:
            non_finite = [(document, "non-finite loss") for document in documents if not math.isfinite(document.loss)]
            return non_finite or [(document, "in the batch") for document in documents]
        return find_broken_documents(documents, usual_losses, context.decode)

    def _review_persistent_rise(
        self, number: int, metrics: tuple[float, float, float], result: StepResult
    ) -> int | None:
        """Roll back if the model before the spikes is better on this batch; otherwise accept the new loss as normal."""
        context, guard = self._context, self._guard
        load_state_before(context, self._snapshot, guard.spike_start)
        with snapshot_weights(context, self._snapshot):
            loss_before = evaluate(context, context.source, number - 1)
        if loss_before is not None and guard.model_degraded(loss_before, metrics):
            start = guard.spike_start
            first = max(1, start - 2 * PATIENCE) if guard.recently_rolled_back(start) else start
            return self._roll_back(number, first, number, PERSISTENT_RISE, result)
        self._event("change", step=number, since=guard.spike_start, loss=metrics[0])
        guard.reset_baseline()
        return None

    def _roll_back(self, number: int, first: int, last: int, cause: str, result: StepResult) -> int:
        """Return to the last good state before step `first` and skip the steps from there to `last` (0: skip none).

        Returns its step count.
        """
        context, guard = self._context, self._guard
        skipped = list(range(first, last + 1)) if last else []
        within_limit = guard.skip(first, last, number) if last else guard.record_rollback(number)
        names = (
            document.name for step in skipped for document in step_documents(context, step - 1, compute_losses=False)
        )
        documents = [{"id": name, "reason": "in the batch"} for name in dict.fromkeys(names)]
        state = load_state_before(context, self._snapshot, first)
        restore_snapshot(context, self._snapshot)
        restore_progress(context, guard, self._noise_scale, state, rollback=True)
        if self._log:
            self._log.truncate_after(state.step)
            self._snapshot.remove_checkpoints_after(state.step)
        self._record(number, state.step, cause, skipped, documents[:MAX_EVENT_DOCUMENTS], result)
        self._check_limit(within_limit, number)
        return state.step

    def _record(
        self,
        number: int,
        to: int,
        cause: str,
        skipped: list[int],
        documents: list[dict[str, Any]],
        result: StepResult,
    ) -> None:
        """Log a rollback or skip as an event and notify the user."""
        loss, grad_norm, _ = result.guard_metrics()
        self._event(
            "rollback",
            step=number,
            to=to,
            cause=cause,
            skipped=skipped,
            documents=documents,
            loss=_finite_or_none(loss),
            grad_norm=_finite_or_none(grad_norm),
        )
        message = f"step {number:,}: {cause} (loss {loss:.4g}); back to step {to:,}"
        if skipped[1:]:
            message += f", skipping steps {skipped[0]:,} to {skipped[-1]:,}"
        elif skipped:
            message += f", skipping step {skipped[0]:,}"
        if documents:
            message += ": " + ", ".join(item["id"] for item in documents[:3])
        if documents[3:]:
            message += f" and {len(documents) - 3:,} more"
        self._context.notify(message)

    def _check_limit(self, within_limit: bool, number: int) -> None:
        """Stop the run after too many rollbacks."""
        if within_limit:
            return
        checkpoint = self._snapshot.last_checkpoint
        hint = f"the last good checkpoint is {checkpoint}" if checkpoint else "there is no checkpoint yet"
        limit = self._context.checkpoints.max_rollbacks
        raise LlmkitError(
            f"more than {limit} rollbacks within {WINDOW} steps, the last at step {number:,}",
            f"lower the learning rate, or inspect the documents named in events.jsonl; {hint}",
        )

    def _weights_finite(self) -> bool:
        """Whether all weights are finite, on every process."""
        return not self._context.processes.all_reduce([float(not all_finite(self._context.model.parameters()))])[0]

    def _event(self, name: str, **details: Any) -> None:
        if self._log:
            self._context.directory.event(name, **details)


def restore_progress(
    context: TrainContext, guard: Guard, noise_scale: NoiseScale, state: TrainerState, *, rollback: bool = False
) -> None:
    """Restore guard, gradient noise scale and loss scaler from `state`.

    On a `rollback` the guard's later decisions stay in force.
    """
    try:
        if state.step > context.source.steps:
            raise ValueError(f"step {state.step} of {context.source.steps}")
        guard.restore(state.guard, rollback=rollback)
        noise_scale.restore(state.noise)
        if context.processes.accelerator.scaler is not None and state.scaler:
            context.processes.accelerator.scaler.load_state_dict(state.scaler)
    except (ValueError, TypeError, OverflowError, KeyError) as error:
        raise LlmkitError(
            f"{context.start}: not a readable trainer state ({error})", "use another checkpoint"
        ) from error


def _finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None

"""The training loop: train, anneal, sft and dpo are this one, with another objective, source of batches and schedule.

    outcome = fit(TrainContext(model, optimizer, next_token, (), source, schedule, processes, directory, state, write_model, initial))

A step: every process computes the loss of its rows in micro-batches, divided by the weight of the whole step; one all-reduce adds the gradients up;
they are clipped; the guard looks at the figures (training.guard); and the optimiser takes the step with a learning rate that is a function of the
tokens seen. Step n always reads batch n: what the guard skips is passed over, and nothing else moves. All of it is a function of the step number,
the parameters, the optimiser's moments and the guard's memory, which are what a checkpoint holds: a run that was killed anywhere ends in the same
bytes as one that was not (same number of processes and threads).

SIGTERM and SIGINT end the run with a checkpoint and then take their course (exit code 143 or 130); a second one ends the process at once. A single
process drops the step or the evaluation that it is in the middle of, compilation included; several finish their step together. SIGUSR1 saves
and goes on. `max_hours` ends the run like a signal, with exit code 75.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmkit.errors import LlmkitError, UnfinishedError
from llmkit.io.run_layout import step_of
from llmkit.training.checkpoint.environment import machine
from llmkit.training.checkpoint.run_directory import TrainerState, load_optimizer_tensors, load_trainer_state
from llmkit.training.checkpoint.snapshot import HostSnapshot
from llmkit.training.distributed.stragglers import StragglerDetector, collected
from llmkit.training.guard.diagnosis import suspects
from llmkit.training.guard.guard import PATIENCE, WINDOW, Guard, StepVerdict
from llmkit.training.guard.rollback import all_finite, find_before, hold, place, weights_of
from llmkit.training.metrics.curves import smoothed
from llmkit.training.metrics.gradient_noise import NoiseScale
from llmkit.training.metrics.log import MFU, MetricsLog, Speed, peak_flops
from llmkit.training.metrics.step_metrics import StepMetrics
from llmkit.training.optim.optimizer import restore_optimizer
from llmkit.training.signals import Interrupted, Signals, watch_signals
from llmkit.training.train_step import StepResult, TrainContext, accumulate, drop, evaluate, held_out, pieces_of, update

CHECKPOINTS = 10  # how many a run leaves on its way where --save-every does not say
# Between copies for rollbacks lie so many steps, and where copying is slow beside computing so many tokens: about 1 % of the time. Not the clock
# decides: what a step is compared with must be the same in a run that was killed.
HOLD_STEPS = 10
HOLD_TOKENS = {"cuda": 1 << 24}
NAMED = 1000  # documents in one event


def fit(training: TrainContext) -> dict[str, Any]:
    """Train to the end, or until a signal; returns steps, tokens, last loss and speed.

    Raises LlmkitError where the guard has given up, where the last checkpoint could not be stored, and (exit code 75) where the time is over.
    """
    with watch_signals() as signals, collected() as collect:
        loop = Loop(training, signals, collect)
        try:
            outcome = loop.run()
        finally:
            loop.close()
    if signals.number:
        training.say(f"stopped after step {loop.step:,}; --resume goes on from there")
        signals.raise_it()
    if loop.out_of_time:
        raise UnfinishedError(
            f"{training.max_hours:g} hours are over at step {loop.step:,}", "--resume goes on from there"
        )
    return outcome


class Loop:
    """A run in progress: `step` steps are done."""

    def __init__(self, t: TrainContext, signals: Signals, collect: Callable[[int], None]) -> None:
        self.t, self.signals, self._collect, self._pace = t, signals, collect, StragglerDetector()
        self.guard = Guard(t.chance, t.max_rollbacks)
        self.noise = NoiseScale()
        self.step = 0
        if t.start:
            state = load_trainer_state(t.start)
            self.step = state.step
            restore_optimizer(t.model, t.optimizer, load_optimizer_tensors(t.start), str(t.start))
            self._restore(state)
        self.out_of_time = False
        self.snapshot = HostSnapshot(t.directory, t.write_model, t.keep, t.keep_every)
        self.snapshot.saved = t.start
        self.log = MetricsLog(t.directory.metrics, self.step) if t.processes.is_main else None
        self.record: dict[str, Any] = dict(self.log.last) if self.log else {}
        self._watch = StepMetrics(t.model, t.source, t.processes, t.directory.path, t.log_every, t.token_bytes)
        self._save_every = t.save_every or max(1, -(-t.source.steps // CHECKPOINTS))
        self._eval_every = t.eval_every or max(1, -(-t.source.steps // CHECKPOINTS))
        self._owed = False  # a checkpoint
        self._hold_every = max(
            HOLD_STEPS, HOLD_TOKENS.get(t.processes.device.type, 0) // (t.state.batch_size * t.state.length)
        )
        self._told: Path | str | None = ""  # the checkpoint behind which none could be stored, which was said
        self._stored = self.step  # the last step that a checkpoint was begun at
        self._seconds = 0.0  # that the last step took
        self._copying = 0.0  # seconds that the last copy took
        self._started = time.monotonic()

    def close(self) -> None:
        """Let a checkpoint under way come to its end."""
        self.snapshot.failure(wait=True)
        if self.log:
            self.log.close()

    def run(self) -> dict[str, Any]:
        t, source = self.t, self.t.source
        peak, how = peak_flops(t.processes.device, t.processes.precision, t.processes.world_size)
        self._speed = Speed(t.flops_per_token, peak)
        made_with = t.state.environment | machine(t.processes.device)
        made_with |= {"processes": t.processes.world_size, "parallel": t.processes.layout.name}
        more = {"accepted": t.changed} if t.changed else {}
        name = "resume" if t.start else "start"
        self._event(name, step=self.step, peak_flops=peak, peak=how, mfu=MFU, environment=made_with, **more)
        self._hold()
        # A run that was stopped in the middle of an evaluation owes it.
        owed = bool(self.log) and self.step > 0 and self._evaluates() and "heldout_loss" not in self.record
        if t.processes.all_reduce([float(owed)])[0]:
            found = self._evaluate()
            if self.log and found is not None:
                self.record = {"step": self.step, "tokens": source.tokens(self.step)} | self.record
                self.record |= found
                self.log.write(self.record)
        stop = self._stopping()
        while self.step < source.steps and not stop:
            taken = self._advance()
            stop = self._stopping()
            if taken:
                self._keep_safe(stop)
        if stop:
            self._report(self.snapshot.failure(wait=True))
            if t.processes.all_reduce([float(self._owed or self._stored != self.step)])[0]:
                self._save(wait=True)
        return self._end(stop)

    def _advance(self) -> bool:
        """One step further, or some steps back; False where neither a step was taken nor passed over."""
        t, source, guard, number = self.t, self.t.source, self.guard, self.step + 1
        began = time.perf_counter()
        t.before_step(self.step)
        tokens, before = source.tokens(number), source.tokens(self.step)
        rate = t.schedule.for_step(before, tokens)
        record: dict[str, Any] = {"step": number, "tokens": tokens}
        if number in guard.skipped:
            record |= {"lr": rate, "skipped": True}
        else:
            try:
                with self.signals.breaking(t.processes.world_size == 1):
                    measured = accumulate(t, self.step, self._watch)
            except Interrupted:
                drop(t)
                return False
            if t.max_rollbacks and not self._passes(number, measured):
                drop(t)
                if self.step + 1 != number:
                    return False
                # Its figures stand in events.jsonl: passed over again it would have none.
                record |= {"lr": rate, "skipped": True}
            else:
                update(t, rate, self._watch)
                record |= {**measured.figures, "lr": rate, "grad_norm": measured.norm}
                record |= self._noise(measured, tokens - before)
                record |= self._compare(number)
                record |= self._watch.end(measured.seen, measured.norm, t.clip)
        self.step = number
        self._collect(number)
        self._seconds = time.perf_counter() - began
        record |= self._speed.step(tokens - before, self._seconds, source.tokens(source.steps) - tokens)
        if self._evaluates():
            record |= self._evaluate() or {}
        self.record = record
        if self.log:
            record["loss_smooth"] = smoothed(self.log.last, record)
            self.log.write(record)
            t.report(record)
        return True

    def _noise(self, measured: StepResult, tokens: int) -> dict[str, float]:
        """The gradient noise scale where it is measured; said once where a step of so many `tokens` passes it."""
        if not measured.part[1]:
            return {}
        self.noise.measure(*measured.part, measured.norm**2, self.t.source.weight(self.step))
        if said := self.noise.objection(tokens, self.step / self.t.source.steps):
            self.t.say(said)
        return {"noise_scale": round(self.noise.tokens)} if self.noise.tokens else {}

    def _compare(self, number: int) -> dict[str, float]:
        """How evenly the processes work, now and then; says which has become late."""
        figures, late = self._pace.step(number, self.t.processes.seconds)
        if late is not None:
            self._event("straggler", step=number, rank=late, spread=figures["rank_spread"])
        return figures

    def _passes(self, number: int, measured: StepResult) -> bool:
        """What the guard says of step `number`, whose gradients are there: whether to take it. Else it is skipped, or the run was set back."""
        t, guard, figures = self.t, self.guard, measured.for_guard()
        if (
            t.processes.accelerator.scaler is not None
            and math.isfinite(figures[0])
            and not math.isfinite(measured.norm)
        ):
            return True  # fp16's loss scaler probes its limits, and leaves such a step out by itself
        verdict = guard.judge(number, figures)
        if verdict is StepVerdict.GOOD:
            guard.accept(number, figures)
            return True
        if verdict is StepVerdict.BROKEN and not self._finite():
            again = guard.retried == number  # then it was this step, or the one that left such weights
            guard.retried = number
            first = max(1, number - again)
            self._go_back(number, first, number if again else 0, "weights that are no numbers", measured)
            return False
        pieces = pieces_of(t, self.step)
        usual = [p.loss for p in pieces_of(t, guard.reference[0] - 1)] if guard.reference[0] else []
        if verdict is StepVerdict.BROKEN:
            found = [(p, "no number") for p in pieces if not math.isfinite(p.loss)] or [
                (p, "in the batch") for p in pieces
            ]
        else:
            found = suspects(pieces, usual, t.decode)
        if t.processes.all_reduce([float(bool(found) and t.processes.is_main)])[0]:
            cause = "loss that is no number" if verdict is StepVerdict.BROKEN else "broken documents"
            documents = [{"id": p.name, "reason": why, "loss": _number(p.loss)} for p, why in found[:NAMED]]
            patient = guard.skip(number, number, number)
            self._tell(number, self.step, cause, [number], documents, measured)
            self._give_up(patient, number)
            return False
        if verdict is StepVerdict.LASTING:
            find_before(t, self.snapshot, guard.since)
            with weights_of(t, self.snapshot):
                before = evaluate(t, t.source, self.step)
            if before is not None and guard.harmed(before, figures):
                first = max(1, guard.since - 2 * PATIENCE) if guard.again(guard.since) else guard.since
                self._go_back(number, first, number, "loss that went up and stayed", measured)
                return False
            self._event("change", step=number, since=guard.since, loss=figures[0])
            guard.settle()
            return True
        self._event(
            "spike", step=number, kept=True, loss=figures[0], grad_norm=figures[1], deviation=guard.deviation(figures)
        )
        guard.doubt(number)
        return True

    def _go_back(self, number: int, first: int, last: int, cause: str, measured: StepResult) -> None:
        """To the last good state before step `first`, to go on without the steps from there to `last` (0: with all of them)."""
        t, guard = self.t, self.guard
        skipped = list(range(first, last + 1)) if last else []
        patient = guard.skip(first, last, number) if last else guard.rolled_back(number)
        documents = [
            {"id": name, "reason": "in the batch"}
            for name in dict.fromkeys(p.name for step in skipped for p in pieces_of(t, step - 1, losses=False))
        ]
        state = find_before(t, self.snapshot, first)
        place(t, self.snapshot)
        self._restore(state, rollback=True)
        self.step = state.step
        if self.log:
            self.log.cut(self.step)
            self.snapshot.forget(self.step)
        self._tell(number, self.step, cause, skipped, documents[:NAMED], measured)
        self._give_up(patient, number)

    def _tell(
        self,
        number: int,
        to: int,
        cause: str,
        skipped: list[int],
        documents: list[dict[str, Any]],
        measured: StepResult,
    ) -> None:
        loss, norm, _ = measured.for_guard()
        self._event(
            "rollback", step=number, to=to, cause=cause, skipped=skipped, documents=documents, loss=_number(loss), grad_norm=_number(norm)
        )  # fmt: skip
        names = ", ".join(item["id"] for item in documents[:3]) + (
            f" and {len(documents) - 3:,} more" if documents[3:] else ""
        )
        passed = (
            f", steps {skipped[0]:,} to {skipped[-1]:,} are skipped"
            if skipped[1:]
            else ", which is skipped"
            if skipped
            else ""
        )
        self.t.say(
            f"step {number:,}: {cause} (loss {loss:.4g}); back to step {to:,}{passed}" + (f": {names}" if names else "")
        )

    def _give_up(self, patient: bool, number: int) -> None:
        if patient:
            return
        saved = self.snapshot.saved
        where = f"the last good checkpoint is {saved}" if saved else "there is no checkpoint yet"
        raise LlmkitError(
            f"more than {self.t.max_rollbacks} rollbacks within {WINDOW} steps, the last at step {number:,}",
            f"lower the learning rate, or look at the data (events.jsonl names it); {where}",
        )

    def _restore(self, state: TrainerState, rollback: bool = False) -> None:
        try:
            if state.step > self.t.source.steps:
                raise ValueError(f"step {state.step} of {self.t.source.steps}")
            self.guard.restore(state.guard, rollback=rollback)
            self.noise.restore(state.noise)
            if self.t.processes.accelerator.scaler is not None and state.scaler:
                self.t.processes.accelerator.scaler.load_state_dict(state.scaler)
        except (ValueError, TypeError, OverflowError, KeyError) as error:
            raise LlmkitError(
                f"{self.t.start}: not a readable trainer state ({error})", "take another checkpoint"
            ) from error

    def _evaluates(self) -> bool:
        return self.t.heldout is not None and (self.step % self._eval_every == 0 or self.step == self.t.source.steps)

    def _evaluate(self) -> dict[str, float] | None:
        try:
            with self.signals.breaking(self.t.processes.world_size == 1):
                return held_out(self.t, lambda: bool(self.signals.number))
        except Interrupted:
            return None

    def _stopping(self) -> bool:
        """Whether any process was told to stop, or the time is over; every process gets the same answer."""
        t = self.t
        spent = time.monotonic() - self._started
        late = t.processes.is_main and spent + self._copying + self._seconds > 3600 * t.max_hours
        self._report(self.snapshot.failure())
        asked, self.signals.save = self.signals.save, False  # one that comes from here on is for the next time
        wishes = (self.signals.number, late, asked or self._owed)
        stop, late_, save = t.processes.all_reduce([float(wish) for wish in wishes])
        self._owed = bool(save)
        self.out_of_time = bool(late_) and not stop and self.step < t.source.steps
        if stop and not self.signals.number:
            self.signals.number = signal.SIGTERM  # another process was told to
        return bool(stop or self.out_of_time)

    def _keep_safe(self, stop: bool) -> None:
        """A checkpoint where one is due, else now and then a copy to go back to; none of doubtful states, but where the run ends."""
        last = self.step == self.t.source.steps
        self._owed |= self.step % self._save_every == 0
        if last or stop or (self._owed and not self.guard.since):
            self._save(wait=last or stop)
            if not stop:
                self._show()
        elif self.t.max_rollbacks and self.step % self._hold_every == 0 and not self.guard.since:
            self._hold()

    def _show(self) -> None:
        """What a checkpoint is good for: samples, scores. By the main process, by all of them where a pass through the model takes all."""
        t = self.t
        try:
            with self.signals.breaking(t.processes.world_size == 1), t.processes.at_length():
                for act in t.at_checkpoint if self.log or t.processes.layout.lockstep else ():
                    try:
                        self.record |= act(t.model, self.step)
                    except OSError as error:  # a full disk, most likely
                        t.say(f"step {self.step:,}: {error}")
                    t.processes.layout.reshard(t.model)
        except Interrupted:
            return
        if self.log and t.at_checkpoint:
            self.log.write(self.record)
            t.report(self.record)

    def _hold(self) -> None:
        """Copy the state to the host of the main process; all of them hand over what they have of it."""
        t = self.t
        began = time.monotonic()
        scaler = t.processes.accelerator.scaler
        tokens = t.source.tokens(self.step)
        rate = t.schedule.for_step(t.source.tokens(max(0, self.step - 1)), tokens) if self.step else 0.0
        state = replace(
            t.state,
            step=self.step,
            tokens=tokens,
            rate=rate,
            scaler=scaler.state_dict() if scaler else {},
            guard=self.guard.state(),
            noise=self.noise.state(),
        )
        hold(t, self.snapshot, state)
        self._copying = time.monotonic() - began

    def _save(self, wait: bool = False) -> None:
        self._owed = False
        self._stored = self.step
        self._hold()
        if self.log:
            try:
                self.log.sync()
                self.snapshot.save()
            except OSError as error:
                self._report(error)
        if wait:
            self._report(self.snapshot.failure(wait=True))

    def _report(self, error: OSError | None) -> None:
        """Say that a checkpoint could not be stored; the next step tries again."""
        if error is not None:
            self._owed = True
            self._event("save failed", step=self.step, error=str(error))
            if self._told != (saved := self.snapshot.saved):  # not at every step
                where = f"the last good one is {saved.name}" if saved else "there is none yet"
                self.t.say(
                    f"a checkpoint could not be stored ({error.strerror or error}); each step tries again, {where}"
                )
            self._told = saved

    def _end(self, stop: bool) -> dict[str, Any]:
        t, source = self.t, self.t.source
        done = self.step == source.steps and not stop
        saved = self.snapshot.saved
        if t.processes.is_main:
            if self.step and (saved is None or step_of(saved) != self.step):
                where = f"{saved} is the last good one" if saved else "there is none"
                raise LlmkitError(
                    f"the checkpoint of step {self.step:,} could not be stored", f"{where}; make room, then --resume"
                )
            if done and saved is not None:
                t.directory.finish(saved)
            if done and (loss := self.record.get("loss") or 0.0) > t.chance + 1:
                self.t.say(
                    f"the run ends with a loss of {loss:.4g}, a guess has {t.chance:.4g}: lower the learning rate"
                )
        self._event("end" if done else "stop", step=self.step)
        t.processes.barrier()
        return {
            "steps": self.step,
            "tokens": source.tokens(self.step),
            "loss": self.record.get("loss"),
            "heldout_loss": self.record.get("heldout_loss"),
            "skipped": len(self.guard.skipped) or None,
            "seconds": round(time.monotonic() - self._started, 1),
            "tokens_per_second": round(self._speed.smooth),
        }

    def _finite(self) -> bool:
        """Whether all weights are numbers, on every process."""
        return not self.t.processes.all_reduce([float(not all_finite(self.t.model.parameters()))])[0]

    def _event(self, name: str, **details: Any) -> None:
        if self.log:
            self.t.directory.event(name, **details)


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None

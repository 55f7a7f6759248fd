"""The training loop: train, anneal, sft and dpo are this one, with another objective, source of batches and schedule.

    outcome = fit(Training(model, optimizer, next_token, (), source, schedule, processes, directory, state, write_model))

A step: every process computes the loss of its rows in micro-batches, divided by the weight of the whole step; one all-reduce adds the gradients up;
they are clipped, and AdamW takes the step with a learning rate that is a function of the tokens seen. All of it is a function of the
step number, the parameters and the optimiser's moments, which are what a checkpoint holds: a run that was killed anywhere ends in the same
bytes as one that was not (same number of processes and threads).

SIGTERM and SIGINT set a flag, which is read between micro-batches of an evaluation too: the step is finished, saved, and the signal then takes
its course (exit code 143 or 130). A second one ends the process at once.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from llmkit.errors import LlmkitError, Terminated
from llmkit.training.curves import smoothed
from llmkit.training.data import Source
from llmkit.training.distributed import Processes
from llmkit.training.groups import Tally
from llmkit.training.metrics import MFU, MetricsLog, Speed, peak_flops
from llmkit.training.objectives import Objective
from llmkit.training.optimizer import clip_gradients, optimizer_tensors, restore_optimizer, set_rate
from llmkit.training.schedule import Schedule
from llmkit.training.state import (
    RunDirectory,
    TrainerState,
    load_optimizer_tensors,
    load_trainer_state,
)
from llmkit.training.watch import Watch

CHECKPOINTS = 10  # how many a run leaves on its way where --save-every does not say


@dataclass(slots=True)
class Training:
    """All that a run consists of. `state` is that of step 0 and gives what does not change; `start` is the checkpoint to go on from, already loaded
    into `model`. `write_model(directory, step, tokens)` fills a model directory. `report` is called with every record of the log."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    objective: Objective
    figures: tuple[str, ...]  # names of what the objective reports beside the loss
    source: Source
    schedule: Schedule
    processes: Processes
    directory: RunDirectory
    state: TrainerState
    write_model: Callable[[Path, int, int], None]
    start: Path | None = None
    micro_batch: int = 8
    clip: float = 1.0
    save_every: int = 0
    keep: int = 0
    heldout: Source | None = None
    eval_every: int = 0
    flops_per_token: float = 0.0
    log_every: int = 10
    token_bytes: torch.Tensor | None = None
    at_checkpoint: Sequence[Callable[[Any, int], dict[str, float]]] = ()  # of (model, step); what they return is logged
    report: Callable[[dict[str, Any]], None] = field(default=lambda record: None)


@dataclass(slots=True)
class Signals:
    """The first SIGTERM or SIGINT that arrived; 0 while there was none."""

    number: int = 0

    def raise_it(self) -> None:
        """Let the signal take its course."""
        raise KeyboardInterrupt if self.number == signal.SIGINT else Terminated


@contextmanager
def watch_signals() -> Iterator[Signals]:
    """Note SIGTERM and SIGINT instead of obeying them; the second one is obeyed. Only the main thread can do this."""
    signals = Signals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return

    def note(number: int, frame: object) -> None:
        if signals.number:
            signals.raise_it()
        signals.number = number

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def fit(training: Training) -> dict[str, Any]:
    """Train to the end, or until a signal; returns steps, tokens, last loss and speed. Raises LlmkitError where the loss is not finite."""
    t = training
    first = _restore(t)
    with watch_signals() as signals:
        log = MetricsLog(t.directory.metrics, first) if t.processes.main else None
        try:
            outcome = _run(t, first, log, signals)
        finally:
            if log:
                log.close()
    if signals.number:
        signals.raise_it()
    return outcome


def _restore(t: Training) -> int:
    """Put the optimiser where the checkpoint left it; returns the number of steps done."""
    if t.start is None:
        return 0
    state = load_trainer_state(t.start)
    restore_optimizer(t.model, t.optimizer, load_optimizer_tensors(t.start), str(t.start))
    if t.processes.accelerator.scaler is not None and state.scaler:
        t.processes.accelerator.scaler.load_state_dict(state.scaler)
    return state.step


def _run(t: Training, first: int, log: MetricsLog | None, signals: Signals) -> dict[str, Any]:
    source, processes = t.source, t.processes
    total = source.tokens(source.steps)
    save_every = t.save_every or max(1, -(-source.steps // CHECKPOINTS))
    eval_every = t.eval_every or max(1, -(-source.steps // CHECKPOINTS))
    peak, how = peak_flops(processes.device, processes.precision, processes.count)
    speed = Speed(t.flops_per_token, peak)
    started = time.monotonic()
    if log:
        t.directory.event("resume" if t.start else "start", step=first, peak_flops=peak, peak=how, mfu=MFU)
    record = dict(log.last) if log else {}
    checkpoint = t.start
    watch = Watch(t.model, source, processes, t.directory.path, t.log_every, t.token_bytes)

    def due(step: int) -> bool:
        return t.heldout is not None and (step % eval_every == 0 or step == source.steps)

    # A run that was stopped in the middle of an evaluation owes it.
    owed = processes.add([float(bool(log) and first > 0 and due(first) and "heldout_loss" not in record)])[0]
    if owed:
        found = evaluate(t, signals)
        if log and found is not None:
            record = {"step": first, "tokens": source.tokens(first)} | record | found
            log.write(record)

    step, stop = first, bool(processes.add([float(signals.number)])[0])
    while step < source.steps and not stop:
        rate = t.schedule.for_step(source.tokens(step), source.tokens(step + 1))
        figures = train_step(t, step, rate, watch)
        step += 1
        tokens = source.tokens(step)
        new = tokens - source.tokens(step - 1)
        record = {"step": step, "tokens": tokens, **figures, "lr": rate}
        record |= speed.step(new, figures["step_seconds"], total - tokens)
        if due(step):
            found = evaluate(t, signals)
            record |= found or {}
        if log:
            record["loss_smooth"] = smoothed(log.last.get("loss_smooth"), record["loss"], step)
            log.write(record)
            t.report(record)
        stop = bool(processes.add([float(signals.number)])[0])
        if step % save_every == 0 or step == source.steps or stop:
            checkpoint = _save(t, step, tokens, rate, log)
            if log and not stop:
                for act in t.at_checkpoint:
                    if more := act(t.model, step):
                        record |= more
                        log.write(record)
                        t.report(record)
    if stop and not signals.number:
        signals.number = signal.SIGTERM  # another process was told to stop
    if step == source.steps and not stop and processes.main:
        assert checkpoint is not None
        t.directory.finish(checkpoint)
    if log:
        t.directory.event("stop" if stop else "end", step=step)
    processes.wait()
    return {
        "steps": step,
        "tokens": source.tokens(step),
        "loss": record.get("loss"),
        "heldout_loss": record.get("heldout_loss"),
        "seconds": round(time.monotonic() - started, 1),
        "tokens_per_second": round(speed.smooth),
    }


def train_step(t: Training, step: int, rate: float, watch: Watch) -> dict[str, float]:
    """One optimiser step; returns the step's figures: `loss`, those of the objective, `grad_norm` before clipping, and what `watch` saw."""
    source, processes, scaler = t.source, t.processes, t.processes.accelerator.scaler
    scale = 1.0 / max(source.weight(step), 1e-9)
    parameters = [p for group in t.optimizer.param_groups for p in group["params"]]
    sums: dict[str, torch.Tensor] = {}
    t.model.train()
    watch.begin(step)
    for start, stop in processes.share(source.rows(step), t.micro_batch):
        batch = watch.take(step, start, stop)
        with processes.accelerator.autocast():
            found = t.objective(t.model, batch, scale)
        (scaler.scale(found.loss) if scaler else found.loss).backward()
        for name, value in ({"loss": found.loss.detach()} | found.figures).items():
            sums[name] = sums.get(name, 0) + value
        watch.losses(batch, found)
    processes.add_gradients(parameters)
    if scaler:
        scaler.unscale_(t.optimizer)
    totals, seen = _gather(t, sums, watch.sums())
    watch.before()
    norm = float(clip_gradients(parameters, t.clip))
    # The loss scaler of fp16 probes its limits: it skips a step with infinite gradients by itself.
    if not math.isfinite(totals["loss"]) or (scaler is None and not math.isfinite(norm)):
        raise LlmkitError(
            f"loss {totals['loss']}, gradient norm {norm} at step {step + 1}",
            "lower the learning rate, or look at the data of this step; --resume would come to the same point",
        )
    set_rate(t.optimizer, rate)
    if scaler:
        scaler.step(t.optimizer)
        scaler.update()
    else:
        t.optimizer.step()
    watch.after()
    t.optimizer.zero_grad(set_to_none=True)
    return totals | {"grad_norm": norm} | watch.end(seen, norm, t.clip)


def _gather(t: Training, sums: dict[str, torch.Tensor], more: list[float]) -> tuple[dict[str, float], list[float]]:
    """The figures of the whole step, by name, and the sums of `more`; a process that had no row in it adds zeros."""
    names = ("loss", *t.figures)
    values = torch.stack([torch.as_tensor(sums.get(name, 0.0)).double() for name in names]).tolist()
    found = t.processes.add([*values, *more])
    return dict(zip(names, found, strict=False)), found[len(names) :]


def evaluate(t: Training, signals: Signals | None = None) -> dict[str, float] | None:
    """Held-out figures, all processes together: the mean loss over the weights, losses and bits a byte by domain; None where a signal came before the end."""
    source, processes = t.heldout, t.processes
    assert source is not None
    scale = 1.0 / max(source.weight(0), 1e-9)
    total, stopped = 0.0, False
    tally = Tally(source, t.token_bytes, processes.device)
    t.model.eval()
    with torch.no_grad():
        for start, stop in processes.share(source.rows(0), t.micro_batch):
            stopped = bool(signals and signals.number)
            if stopped:
                break
            batch = source.batch(0, start, stop).to(processes.device)
            with processes.accelerator.autocast():
                found = t.objective(t.model, batch, scale)
            total += float(found.figures.get("loss", found.loss))
            tally.add(batch, found)
    total, stops, *numbers = processes.add([total, float(stopped), *tally.numbers()])
    return None if stops else {"heldout_loss": total} | tally.figures(numbers, "heldout", "heldout_bpb", "heldout_bpb")


def _save(t: Training, step: int, tokens: int, rate: float, log: MetricsLog | None) -> Path | None:
    """Store a checkpoint (main process), the lines of the log in front of it."""
    saved = None
    if log:
        log.sync()
        scaler = t.processes.accelerator.scaler
        state = replace(t.state, step=step, tokens=tokens, rate=rate, scaler=scaler.state_dict() if scaler else {})
        saved = t.directory.save(
            state,
            optimizer_tensors(t.model, t.optimizer),
            lambda directory: t.write_model(directory, step, tokens),
            t.keep,
        )
    t.processes.wait()
    return saved

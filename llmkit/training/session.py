"""A run that is open: its processes, run directory, resumption and model files, around the loop of every training
command.

    with session(options) as run:
        if not run.begin(record, inputs, batch_size, length, config_text):
            return                                     # finished before
        model = run.model(lambda: fresh_model)         # or the weights of the last checkpoint
        outcome = run.train(model, next_token, source, schedule, ...)

`training.runner` prepares all of this from the options of a command.
"""

from __future__ import annotations

import copy
import math
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmkit.errors import LlmkitError
from llmkit.io.record import Input, Lineage
from llmkit.io.run_layout import STATE
from llmkit.model.config import ModelConfig
from llmkit.model.decoder import Decoder
from llmkit.model.pretrained.checkpoint import load_info, load_model, load_tokenizer, open_weights, save_model
from llmkit.model.pretrained.safetensors import read_layout
from llmkit.model.runtime import Runtime, be_deterministic, kernels, prepare
from llmkit.shards.tokenizer_info import token_bytes
from llmkit.training.checkpoint.environment import accepted_names, environment, model_digest, refuse_drift
from llmkit.training.checkpoint.run_directory import RunDirectory, check_run, find_damage, open_run, write_config
from llmkit.training.checkpoint.trainer_state import (
    OPTIMIZER,
    TrainerState,
    load_optimizer_tensors,
    load_trainer_state,
    refuse_changes,
)
from llmkit.training.data import Source
from llmkit.training.distributed.elastic import restarted
from llmkit.training.distributed.layout import load_tensors
from llmkit.training.distributed.processes import Processes, as_lost_error, start
from llmkit.training.loop import fit
from llmkit.training.metrics.tracker import check_tracker
from llmkit.training.objectives import Objective, ObjectiveResult, next_token
from llmkit.training.optim.optimizer import build_optimizer, optimizer_of_state, restore_optimizer
from llmkit.training.optim.schedule import Schedule
from llmkit.training.options import (
    BatchOptions,
    CheckpointOptions,
    HeldOutOptions,
    LogOptions,
    MachineOptions,
    OptimizerOptions,
    parse_betas,
)
from llmkit.training.train_step import Tensors, TrainContext

BETAS = "0.9,0.95"
MICRO_BATCH_TOKENS = {"cpu": 1 << 11, "cuda": 1 << 16}


@dataclass(frozen=True)
class LoopOptions:
    """What every training command hands to the loop."""

    output: str
    force: bool = False
    batch: BatchOptions = field(default_factory=BatchOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    machine: MachineOptions = field(default_factory=MachineOptions)
    checkpoints: CheckpointOptions = field(default_factory=CheckpointOptions)
    heldout: HeldOutOptions = field(default_factory=HeldOutOptions)
    log: LogOptions = field(default_factory=LogOptions)
    sequences_per_row: int = 1  # a preference pair is two


@dataclass(slots=True)
class Session:
    """A run that is open: this process among others, the directory, and the checkpoint to go on from (None at the
    start).
    """

    options: LoopOptions
    processes: Processes
    directory: RunDirectory
    checkpoint: Path | None = None
    state: TrainerState | None = None
    kept: tuple[str, ...] = ()  # what this call has put into the directory already
    lineage: Lineage = field(default_factory=lambda: Lineage(""))
    say: Callable[[str], None] = lambda text: None
    changed: list[str] = field(default_factory=list)  # accepted changes of the environment
    at_checkpoint: list[Callable[[Any, int], dict[str, float]]] = field(default_factory=list)  # see TrainContext
    _fresh: Callable[[], Decoder] | None = None

    def begin(self, lineage: Lineage, inputs: list[Input], batch_size: int, length: int, config_text: str) -> bool:
        """Settle what the run is; False where it is finished already.

        `lineage` is the record of its models without `inputs`, which are added. Raises LlmkitError where a run that is
        to be resumed was another one.
        """
        self.lineage = lineage
        self.lineage.inputs += inputs
        digests = [item.digest for item in self.lineage.inputs]
        now = environment(self.processes.precision, self.processes.device)
        now["kernels"] = kernels(self.processes.device, self._runtime())
        self.state = TrainerState(lineage.command, lineage.options, digests, 0, 0, 0.0, batch_size, length, now, {})
        self.checkpoint = self._last_intact() if self.options.checkpoints.resume else None
        if self.checkpoint:
            old = load_trainer_state(self.checkpoint)
            refuse_changes(old, self.state)
            if self.directory.finished:
                return False
            now["model"] = model_digest(load_info(self.checkpoint).config.to_hf())
            self.changed = refuse_drift(old.environment, now, accepted_names(self.options.machine.accept_change))
        if self.processes.is_main and not self.checkpoint:
            if self.options.force:  # not earlier: a call that comes to nothing leaves the old run as it is
                self.directory.reset(*self.kept)
            write_config(self.directory, config_text)
        self.processes.barrier()
        return True

    def _last_intact(self) -> Path | None:
        """The last checkpoint whose files are as they were written; those behind it are told of. LlmkitError where
        there are some, all damaged.
        """
        checkpoints = self.directory.checkpoints()
        if self.directory.finished or not checkpoints:  # there is nothing to go on from
            return checkpoints[-1] if checkpoints else None
        passed: list[Path] = []
        if self.processes.is_main:
            left = list(checkpoints)
            while left and (wrong := find_damage(left[-1])):
                passed.append(left.pop())
                self.say(f"{passed[-1]}: {wrong}; going back to the checkpoint before")
                self.directory.event("damaged checkpoint", checkpoint=passed[-1].name, problem=wrong)
            if left and passed:
                self.directory.link_latest(left[-1])
        count = int(self.processes.all_reduce([float(len(passed))])[0])
        if count == len(checkpoints):
            raise LlmkitError(
                f"{self.directory.path}: all {count} checkpoints are damaged",
                "start anew with -f, or from another copy",
            )
        for place in passed:  # all processes have looked
            self.directory.set_aside(place)
        return checkpoints[-1 - count]

    def model(self, fresh: Callable[[], Decoder]) -> Decoder:
        """The model in float32, laid over the processes: that of the last checkpoint, else `fresh()`."""
        self._fresh, processes = fresh, self.processes
        if self.checkpoint and processes.layout.lockstep:  # no process ever holds all of it
            info = load_info(self.checkpoint)
            with torch.device("meta"):
                model = Decoder(info.config)
            self._prepare(model)
            processes.layout.parallelize(model, processes.device, processes.precision)
            model.to_empty(device=processes.device)
            load_tensors(model, open_weights(info))
            return model
        model = load_model(self.checkpoint, torch.float32)[0] if self.checkpoint else fresh()
        for name, weight in () if self.checkpoint else model.named_parameters():
            if not torch.isfinite(weight).all():
                raise LlmkitError(f"tensor {name} of the model to start from holds what is no number", "take another")
        self._prepare(model)
        processes.layout.parallelize(model, processes.device, processes.precision)
        return model

    def _prepare(self, model: Decoder) -> None:
        say = self.say if self.processes.is_main else lambda line: None
        prepare(model, self.processes.device, self._runtime(), say)

    def _runtime(self) -> Runtime:
        machine = self.options.machine
        return Runtime(machine.compile, machine.checkpoint_activations, self.processes.precision == "fp8")

    def train(
        self,
        model: Decoder,
        objective: Objective,
        source: Source,
        schedule: Schedule,
        *,
        figures: tuple[str, ...] = (),
        tokenizer_files: Mapping[str, str],
        stop_ids: list[int] | None = None,
        heldout: Source | None = None,
        optimizer_from: Path | None = None,
        rope_theta: Callable[[int], float] | None = None,
        report: Callable[[dict[str, Any]], None] = lambda record: None,
    ) -> dict[str, Any]:
        """Run the loop. `optimizer_from` is a checkpoint of another run whose moments the first step starts from.
        `rope_theta(step)` is the base of the rotary embedding in that step, where it changes.
        """
        assert self.state is not None
        options, config, of_tokens = self.options, model.config, objective is next_token
        optimization = options.optimizer
        self.state.environment["model"] = model_digest(config.to_hf())
        if optimization.z_loss:
            plain: Callable[..., ObjectiveResult] = objective
            objective, figures = partial(plain, z_loss=optimization.z_loss), (*figures, "z_loss")
        before = self.checkpoint or optimizer_from
        kind = optimization.optimizer or (
            optimizer_of_state(read_layout(before / STATE / OPTIMIZER)) if before else "adamw"
        )
        optimizer = build_optimizer(
            model, kind, optimization.weight_decay or 0.0, parse_betas(optimization.betas or BETAS)
        )
        if optimizer_from and not self.checkpoint:
            restore_optimizer(model, optimizer, load_optimizer_tensors(optimizer_from), str(optimizer_from))

        def configured(step: int) -> ModelConfig:
            return replace(config, rope_theta=rope_theta(step)) if rope_theta else config

        def before_step(step: int) -> None:
            model.config = configured(step)

        def write_model(directory: Path, weights: Tensors, step: int, tokens: int) -> None:
            record = copy.copy(self.lineage)
            record.counts = {"steps": step, "tokens": tokens}
            of_step = configured(max(0, step - 1))
            save_model(directory, weights, of_step, tokenizer_files, record.to_json(), torch.float32, stop_ids)

        def initial() -> tuple[Tensors, Tensors]:
            assert self._fresh is not None
            return self._fresh().state_dict(), load_optimizer_tensors(optimizer_from) if optimizer_from else {}

        return fit(
            TrainContext(
                model=model,
                optimizer=optimizer,
                objective=objective,
                metric_names=figures,
                source=source,
                schedule=schedule,
                processes=self.processes,
                directory=self.directory,
                state=self.state,
                write_model=write_model,
                initial=initial,
                optimization=optimization,
                checkpoints=options.checkpoints,
                evaluation=options.heldout,
                logging=options.log,
                start=self.checkpoint,
                micro_batch=self.micro_batch(),
                uniform_loss=math.log(config.vocab_size) if of_tokens else math.inf,
                decode=_decoder(tokenizer_files),
                notify=self.say if self.processes.is_main else lambda text: None,
                heldout=heldout,
                flops_per_token=config.flops_per_token(self.state.length),
                before_step=before_step,
                at_checkpoint=self.at_checkpoint,
                token_bytes=_token_bytes(tokenizer_files, config.vocab_size),
                report=report,
                changed=self.changed,
            )
        )

    def micro_batch(self) -> int:
        """Rows that go through the model at once."""
        assert self.state is not None
        return self.rows_at_once(self.state.batch_size, self.state.length)

    @property
    def shows_checkpoints(self) -> bool:
        """Whether this process takes part in what is tried with the model at checkpoints."""
        return self.processes.is_main or self.processes.layout.lockstep

    def rows_at_once(self, batch_size: int, length: int) -> int:
        """The same of a run that is not begun."""
        if self.options.batch.micro_batch_size:
            return self.options.batch.micro_batch_size
        limit = MICRO_BATCH_TOKENS.get(self.processes.device.type, 1 << 16)
        return max(1, min(batch_size, limit // length // self.options.sequences_per_row))


@contextmanager
def session(
    options: LoopOptions, dry_run: bool = False, say: Callable[[str], None] = lambda text: None
) -> Iterator[Session]:
    """Join the processes and open the run directory; every process of the group calls this. With `dry_run` nothing is
    written. `say` warns the user.
    """
    machine = options.machine
    if options.log.tracker:
        check_tracker(options.log.tracker)
    accepted_names(machine.accept_change)  # a wrong one is reported first
    if restarted():
        options = replace(options, force=False, checkpoints=replace(options.checkpoints, resume=True))
    if machine.deterministic:
        be_deterministic()
    output, resume, force = options.output, options.checkpoints.resume, options.force
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})  # it is taken when there is something to save
    processes = start(machine.precision, machine.threads, machine.parallel, machine.hang_timeout)
    if dry_run:
        check_run(output, resume=resume, force=force)
        yield Session(options, processes, RunDirectory(output), say=say)
        return
    try:
        with open_run(output, resume=resume, force=force, main=processes.is_main) as directory:
            processes.start_watchdog(machine.hang_timeout, directory.event)
            processes.barrier()  # the main process has made it
            yield Session(options, processes, directory, say=say)
    except BaseException as error:
        processes.leave(failed=True)
        lost_error = as_lost_error(error) if processes.world_size > 1 else None
        if lost_error:
            raise lost_error from error
        raise
    processes.leave()


def _token_bytes(files: Mapping[str, str], vocabulary: int) -> torch.Tensor | None:
    """The text that each id of a model stands for, in bytes, int64 [vocabulary]."""
    known = token_bytes(files)
    return (
        None
        if known is None
        else torch.from_numpy(np.resize(np.append(known, np.zeros(vocabulary, np.int64)), vocabulary))
    )


def _decoder(tokenizer_files: Mapping[str, str]) -> Callable[[list[int]], str] | None:
    """A function that turns ids into text; None where there is no tokenizer."""
    if "tokenizer.json" not in tokenizer_files:
        return None

    def decode(ids: list[int]) -> str:
        text: str = load_tokenizer(tokenizer_files, "the run").decode(ids, skip_special_tokens=False)
        return text

    return decode

"""An open run: the processes, run directory, resumption and model files around the training loop.

    with session(options) as run:
        if not run.begin(record, inputs, batch_size, length, config_text):
            return                                     # already finished
        model = run.model(create_model)                # of the last checkpoint, or else newly created
        outcome = run.train(model, next_token, source, schedule, ...)

`training.runner` does this for every training command.
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
from llmkit.model.pretrained.adapter import save_adapter
from llmkit.model.pretrained.checkpoint import load_info, load_model, load_tokenizer, open_weights, save_model
from llmkit.model.pretrained.directory import is_adapter
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
    load_weights,
    refuse_changes,
)
from llmkit.training.data import Source
from llmkit.training.distributed.elastic import restarted
from llmkit.training.distributed.layout import load_tensors
from llmkit.training.distributed.processes import Processes, as_lost_error, start
from llmkit.training.loop import fit
from llmkit.training.metrics.tracker import check_tracker
from llmkit.training.objectives import Objective, ObjectiveResult, next_token
from llmkit.training.optim.optimizer import build_optimizer, optimizer_of_state, parse_betas, restore_optimizer
from llmkit.training.optim.schedule import Schedule
from llmkit.training.options import (
    BatchOptions,
    CheckpointOptions,
    HeldOutOptions,
    LogOptions,
    MachineOptions,
    OptimizerOptions,
)
from llmkit.training.train_step import Tensors, TrainContext

BETAS = "0.9,0.95"
MICRO_BATCH_TOKENS = {"cpu": 1 << 11, "cuda": 1 << 16}


@dataclass(frozen=True)
class LoopOptions:
    """The options of the loop, common to all training commands."""

    output: str
    force: bool = False
    batch: BatchOptions = field(default_factory=BatchOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    machine: MachineOptions = field(default_factory=MachineOptions)
    checkpoints: CheckpointOptions = field(default_factory=CheckpointOptions)
    heldout: HeldOutOptions = field(default_factory=HeldOutOptions)
    log: LogOptions = field(default_factory=LogOptions)
    sequences_per_row: int = 1  # 2 for preference pairs


@dataclass(slots=True)
class Session:
    """An open run: its processes, its directory, and the checkpoint to resume from (None for a new run)."""

    options: LoopOptions
    processes: Processes
    directory: RunDirectory
    checkpoint: Path | None = None
    state: TrainerState | None = None
    stored: tuple[str, ...] = ()  # entries of the directory that this call has already written
    lineage: Lineage = field(default_factory=lambda: Lineage(""))
    warn: Callable[[str], None] = lambda text: None
    changed: list[str] = field(default_factory=list)  # accepted changes of the environment
    at_checkpoint: list[Callable[[Any, int], dict[str, float]]] = field(default_factory=list)  # see TrainContext
    _create_model: Callable[[], Decoder] | None = None

    def begin(self, lineage: Lineage, inputs: list[Input], batch_size: int, length: int, config_text: str) -> bool:
        """Start or resume the run; returns False if it had already finished.

        `lineage` is the record of its models without `inputs`, which are added. Raises LlmkitError if the run to resume
        has other options or inputs.
        """
        self.lineage = lineage
        self.lineage.inputs += inputs
        digests = [item.digest for item in self.lineage.inputs]
        current = environment(self.processes.precision, self.processes.device)
        current["kernels"] = kernels(self.processes.device, self._runtime())
        self.state = TrainerState(lineage.command, lineage.options, digests, 0, 0, 0.0, batch_size, length, current, {})
        self.checkpoint = self._last_intact() if self.options.checkpoints.resume else None
        if self.checkpoint:
            previous = load_trainer_state(self.checkpoint)
            refuse_changes(previous, self.state)
            if self.directory.finished:
                return False
            if not is_adapter(self.checkpoint):  # the digest of the inputs covers the model of adapters
                current["model"] = model_digest(load_info(self.checkpoint).config.to_hf())
            self.changed = refuse_drift(
                previous.environment, current, accepted_names(self.options.machine.accept_change)
            )
        if self.processes.is_main and not self.checkpoint:
            if self.options.force:  # not earlier: a call that fails before this leaves the old run intact
                self.directory.reset(*self.stored)
            write_config(self.directory, config_text)
        self.processes.barrier()
        return True

    def _last_intact(self) -> Path | None:
        """The last undamaged checkpoint, if any; the damaged ones after it are reported and set aside.

        Raises LlmkitError if all checkpoints are damaged.
        """
        checkpoints = self.directory.checkpoints()
        if self.directory.finished or not checkpoints:  # nothing to resume
            return checkpoints[-1] if checkpoints else None
        damaged: list[Path] = []
        if self.processes.is_main:
            remaining = list(checkpoints)
            while remaining and (problem := find_damage(remaining[-1])):
                damaged.append(remaining.pop())
                self.warn(f"{damaged[-1]}: {problem}; falling back to the previous checkpoint")
                self.directory.event("damaged checkpoint", checkpoint=damaged[-1].name, problem=problem)
            if remaining and damaged:
                self.directory.link_latest(remaining[-1])
        count = int(self.processes.all_reduce([float(len(damaged))])[0])
        if count == len(checkpoints):
            raise LlmkitError(
                f"{self.directory.path}: all {count} checkpoints are damaged",
                "start over with -f, or restore a copy",
            )
        for path in damaged:  # after all processes have listed the checkpoints
            self.directory.set_aside(path)
        return checkpoints[-1 - count]

    def model(self, create_model: Callable[[], Decoder]) -> Decoder:
        """The model in float32, distributed over the processes: that of the last checkpoint, or else `create_model()`.

        Raises LlmkitError if a created model has non-finite weights.
        """
        self._create_model, processes = create_model, self.processes
        if self.checkpoint and processes.layout.lockstep:  # no process ever holds the full model
            info = load_info(self.checkpoint)
            with torch.device("meta"):
                model = Decoder(info.config)
            self._prepare(model)
            processes.layout.parallelize(model, processes.device, processes.precision)
            model.to_empty(device=processes.device)
            load_tensors(model, open_weights(info))
            return model
        adapts = self.checkpoint is not None and is_adapter(self.checkpoint)
        model = load_model(self.checkpoint, torch.float32)[0] if self.checkpoint and not adapts else create_model()
        if self.checkpoint and adapts:
            model.load_state_dict(load_weights(self.checkpoint), strict=False)
        for name, weight in () if self.checkpoint else model.named_parameters():
            if not torch.isfinite(weight).all():
                raise LlmkitError(
                    f"tensor {name} of the initial model has non-finite weights", "start from another model"
                )
        self._prepare(model)
        processes.layout.parallelize(model, processes.device, processes.precision)
        return model

    def _prepare(self, model: Decoder) -> None:
        warn = self.warn if self.processes.is_main else lambda line: None
        prepare(model, self.processes.device, self._runtime(), warn)

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
        metric_names: tuple[str, ...] = (),
        tokenizer_files: Mapping[str, str],
        stop_ids: list[int] | None = None,
        generation: Mapping[str, Any] | None = None,
        heldout: Source | None = None,
        optimizer_from: Path | None = None,
        rope_theta: Callable[[int], float] | None = None,
        report: Callable[[dict[str, Any]], None] = lambda record: None,
    ) -> dict[str, Any]:
        """Run the loop and return its summary.

        `metric_names` are the metrics of the objective. `optimizer_from` is a checkpoint of another run, from whose
        optimizer state the first step starts. `rope_theta(step)` is the base of the rotary embedding in that step, if
        it changes.
        """
        assert self.state is not None
        options, config = self.options, model.config
        predicts_tokens = getattr(objective, "func", objective) is next_token
        optimization = options.optimizer
        self.state.environment["model"] = model_digest(config.to_hf())
        if optimization.z_loss:
            base_objective: Callable[..., ObjectiveResult] = objective
            objective = partial(base_objective, z_loss=optimization.z_loss)
            metric_names = (*metric_names, "z_loss")
        state_from = self.checkpoint or optimizer_from
        kind = optimization.optimizer or (
            optimizer_of_state(read_layout(state_from / STATE / OPTIMIZER)) if state_from else "adamw"
        )
        betas = parse_betas(optimization.betas or BETAS)
        optimizer = build_optimizer(model, kind, optimization.weight_decay or 0.0, betas)
        if optimizer_from and not self.checkpoint:
            restore_optimizer(model, optimizer, load_optimizer_tensors(optimizer_from), str(optimizer_from))

        def config_at(step: int) -> ModelConfig:
            return replace(config, rope_theta=rope_theta(step)) if rope_theta else config

        def before_step(step: int) -> None:
            model.config = config_at(step)

        def write_model(directory: Path, weights: Tensors, step: int, tokens: int) -> None:
            record = copy.copy(self.lineage)
            record.counts = {"steps": step, "tokens": tokens}
            trained_config = config_at(max(0, step - 1))
            description = (stop_ids, generation)
            if model.adapter is None:
                kind = torch.float32
                save_model(directory, weights, trained_config, tokenizer_files, record.to_json(), kind, *description)
            else:
                adapter = (trained_config, model.adapter, tokenizer_files, record.to_json())
                save_adapter(directory, weights, *adapter, *description)

        def initial() -> tuple[Tensors, Tensors]:
            assert self._create_model is not None
            moments = load_optimizer_tensors(optimizer_from) if optimizer_from else {}
            return self._create_model().trained_state(), moments

        return fit(
            TrainContext(
                model=model,
                optimizer=optimizer,
                objective=objective,
                metric_names=metric_names,
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
                uniform_loss=math.log(config.vocab_size) if predicts_tokens else math.inf,
                decode=_decoder(tokenizer_files),
                notify=self.warn if self.processes.is_main else lambda text: None,
                heldout=heldout,
                flops_per_token=_flops_per_token(model, self.state.length),
                before_step=before_step,
                at_checkpoint=self.at_checkpoint,
                token_bytes=_token_bytes(tokenizer_files, config.vocab_size),
                report=report,
                changed=self.changed,
            )
        )

    def micro_batch(self) -> int:
        """Rows per forward pass."""
        assert self.state is not None
        return self.rows_at_once(self.state.batch_size, self.state.length)

    @property
    def shows_checkpoints(self) -> bool:
        """Whether this process takes part in samples and scores at checkpoints."""
        return self.processes.is_main or self.processes.layout.lockstep

    def rows_at_once(self, batch_size: int, length: int) -> int:
        """Rows per forward pass at this batch size and sequence length, also before `begin`."""
        if self.options.batch.micro_batch_size:
            return self.options.batch.micro_batch_size
        limit = MICRO_BATCH_TOKENS.get(self.processes.device.type, 1 << 16)
        return max(1, min(batch_size, limit // length // self.options.sequences_per_row))


@contextmanager
def session(
    options: LoopOptions, dry_run: bool = False, warn: Callable[[str], None] = lambda text: None
) -> Iterator[Session]:
    """Join the processes and open the run directory; every process of the group calls this.

    With `dry_run` nothing is written. `warn` shows a warning to the user.
    """
    machine = options.machine
    if options.log.tracker:
        check_tracker(options.log.tracker)
    accepted_names(machine.accept_change)  # report unknown names first
    if restarted():
        options = replace(options, force=False, checkpoints=replace(options.checkpoints, resume=True))
    if machine.deterministic:
        be_deterministic()
    output, resume, force = options.output, options.checkpoints.resume, options.force
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})  # handled once there is something to save
    processes = start(machine.precision, machine.threads, machine.parallel, machine.hang_timeout)
    if dry_run:
        check_run(output, resume=resume, force=force)
        yield Session(options, processes, RunDirectory(output), warn=warn)
        return
    try:
        with open_run(output, resume=resume, force=force, main=processes.is_main) as directory:
            processes.start_watchdog(machine.hang_timeout, directory.event)
            processes.barrier()  # until the main process has created the directory
            yield Session(options, processes, directory, warn=warn)
    except BaseException as error:
        processes.leave(failed=True)
        lost_error = as_lost_error(error) if processes.world_size > 1 else None
        if lost_error:
            raise lost_error from error
        raise
    processes.leave()


def _flops_per_token(model: Decoder, length: int) -> float:
    """Training FLOPs per token; matrices that are not trained take 4 instead of 6 per weight."""
    config = model.config
    return config.flops_per_token(length) - (config.flops_per_token(0) / 3 if model.adapter else 0)


def _token_bytes(files: Mapping[str, str], vocabulary: int) -> torch.Tensor | None:
    """Length in bytes of the text of each token id, int64 [vocabulary]; None without a tokenizer."""
    lengths = token_bytes(files)
    return (
        None
        if lengths is None
        else torch.from_numpy(np.resize(np.append(lengths, np.zeros(vocabulary, np.int64)), vocabulary))
    )


def _decoder(tokenizer_files: Mapping[str, str]) -> Callable[[list[int]], str] | None:
    """A function from token ids to text; None without a tokenizer."""
    if "tokenizer.json" not in tokenizer_files:
        return None

    def decode(ids: list[int]) -> str:
        text: str = load_tokenizer(tokenizer_files, "the run").decode(ids, skip_special_tokens=False)
        return text

    return decode

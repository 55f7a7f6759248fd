"""Training options, by group: the flags of the command line and the keywords of the Python API.

    options = from_values(PretrainOptions, {"tokens": 20_000, "lr": 3e-4})       # llmkit.options

Imports neither torch nor any other large library.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from llmkit.io.run_layout import checkpoint_name
from llmkit.options import COMMON, NEUTRAL, Formerly, Help, NamesCode, NamesFiles, Without, count_option, parse_share
from llmkit.training.optim.schedule import DECAY_SHAPES, SCHEDULES

DATA, OPTIMIZER, MACHINE, CHECKPOINTS, EVALUATION = (
    "Data and steps",
    "Optimizer",
    "Machine",
    "Checkpoints",
    "Evaluation and logging",
)
_data = partial(typer.Option, rich_help_panel=DATA)
_optimizer = partial(typer.Option, rich_help_panel=OPTIMIZER)
_machine = partial(typer.Option, rich_help_panel=MACHINE)
_checkpoints = partial(typer.Option, rich_help_panel=CHECKPOINTS)
_evaluation = partial(typer.Option, rich_help_panel=EVALUATION)
SCHEDULE_NAMES = ", ".join(SCHEDULES)
LOADED_OPTIMIZER = ""  # OptimizerOptions.optimizer: the optimizer whose state the run starts from


@dataclass(frozen=True)
class BatchOptions:
    """The size of a training step."""

    batch_size: Annotated[
        int | None, _data("--batch-size", "-b", min=1, help="Sequences per step, over all processes"), COMMON
    ] = None
    micro_batch_size: Annotated[
        int | None,
        _data(
            "--micro-batch-size", min=1, help="Sequences per forward pass (default: about 2k tokens on CPU, 64k on GPU)"
        ),
    ] = None
    sequence_length: Annotated[
        int | None,
        _data("--sequence-length", min=8, help="Tokens per sequence (default: the model's context length)"),
        COMMON,
    ] = None


@dataclass(frozen=True)
class StreamOptions:
    """Which part of a token stream is trained on."""

    tokens: Annotated[
        int | None,
        count_option("--tokens", help="Tokens to train on (default: one pass over the data)", rich_help_panel=DATA),
        COMMON,
    ] = None
    document_mask: Annotated[
        bool,
        _data(
            "--document-mask/--no-document-mask",
            help="Attend only within documents, and never predict a document from the previous one",
        ),
    ] = True


@dataclass(frozen=True)
class ScheduleOptions:
    """The learning rate as a function of the tokens seen.

    In pre-training, None means the value of the recipe, or else the default given in the help.
    """

    lr: Annotated[
        float | None,
        _optimizer("--lr", help="Peak learning rate (default: chosen by model size)"),
        COMMON,
    ] = None
    schedule: Annotated[
        str | None, _optimizer("--schedule", metavar="NAME", help=f"One of {SCHEDULE_NAMES}"), COMMON
    ] = None
    warmup: Annotated[
        float | None,
        _optimizer(
            "--warmup",
            parser=parse_share,
            metavar="TOKENS",
            help="Tokens of linear warm-up, or a fraction of all tokens if below 1",
        ),
    ] = None
    final_lr_fraction: Annotated[
        float | None,
        _optimizer("--final-lr-fraction", metavar="X", help="Final learning rate as a fraction of the peak"),
        Formerly("--min-lr"),
    ] = None
    decay: Annotated[float | None, _optimizer("--decay", help="Fraction of all tokens over which wsd decays")] = None
    decay_shape: Annotated[
        str | None,
        _optimizer(
            "--decay-shape",
            metavar="NAME",
            help=f"Shape of the decay of wsd: {', '.join(DECAY_SHAPES)} (default: linear)",
        ),
    ] = None


@dataclass(frozen=True)
class OptimizerOptions:
    """The optimizer and its hyperparameters."""

    optimizer: Annotated[
        str,
        _optimizer(
            "--optimizer", metavar="NAME", help="adamw; or muon for the layers' matrices, with adamw for the rest"
        ),
    ] = "adamw"
    weight_decay: Annotated[
        float | None,
        _optimizer("--weight-decay", min=0, help="Weight decay of matrices; embeddings, norms and biases have none"),
    ] = 0.1
    clip: Annotated[float | None, _optimizer("--clip", min=0, help="Clip gradients to this norm (0 = never)")] = 1.0
    betas: Annotated[str | None, _optimizer("--betas", metavar="A,B", help="Adam betas")] = "0.9,0.95"
    z_loss: Annotated[
        float,
        _optimizer("--z-loss", min=0, help="Weight of the log² Z term that keeps logits from drifting (commonly 1e-4)"),
    ] = 0.0


@dataclass(frozen=True)
class MachineOptions:
    """Hardware, numerical precision, parallelism and fault tolerance."""

    precision: Annotated[
        str,
        _machine(
            "--precision",
            metavar="TYPE",
            help="fp32, bf16, fp16 or fp8 (torchao); auto is bf16 on GPUs that support it, else fp32",
        ),
        COMMON,
    ] = "auto"
    threads: Annotated[int | None, _machine("--threads", min=1, help="CPU threads per process"), NEUTRAL] = None
    processes: Annotated[
        int,
        _machine("--processes", min=1, help="Number of processes on this machine: one per GPU, or gloo on CPU"),
        NEUTRAL,
        COMMON,
    ] = 1
    parallel: Annotated[
        str,
        _machine(
            "--parallel",
            metavar="LAYOUT",
            help="ddp (a full replica in each process) or fsdp (sharded over the processes); auto is ddp",
        ),
        NEUTRAL,
    ] = "auto"
    max_restarts: Annotated[
        int,
        _machine("--max-restarts", min=0, help="Maximum number of times to replace lost or hung processes"),
        NEUTRAL,
    ] = 0
    hang_timeout: Annotated[
        float,
        _machine(
            "--hang-timeout",
            min=0,
            metavar="SECONDS",
            help="Treat a process without progress for this long as hung (0 = never)",
        ),
        NEUTRAL,
    ] = 1800.0
    accept_change: Annotated[
        str,
        _machine(
            "--accept-change",
            metavar="NAMES",
            help="Resume even if these have changed: torch, llmkit, device, precision, ...",
        ),
        NEUTRAL,
    ] = ""
    compile: Annotated[
        bool | None,
        _machine(
            "--compile/--no-compile",
            help="Compile each layer (default: only on GPUs; the CPU kernels are as fast without)",
            show_default=False,
        ),
        NEUTRAL,
    ] = None
    checkpoint_activations: Annotated[
        bool,
        _machine(
            "--checkpoint-activations",
            help="Recompute activations in the backward pass: less memory, a third more compute",
        ),
        NEUTRAL,
    ] = False
    deterministic: Annotated[
        bool,
        _machine("--deterministic", help="Use only bitwise reproducible algorithms; slower on GPUs"),
        NEUTRAL,
    ] = False


@dataclass(frozen=True)
class CheckpointOptions:
    """When a run is saved, resumed, stopped and rolled back."""

    resume: Annotated[
        bool, _checkpoints("--resume", help="Resume the run; start it if there is none yet"), NEUTRAL, COMMON
    ] = False
    save_every: Annotated[
        int,
        _checkpoints("--save-every", min=0, help="Steps between checkpoints (0 = a tenth of the run)"),
        NEUTRAL,
        COMMON,
    ] = 0
    keep: Annotated[int, _checkpoints("--keep", min=0, help="Keep the last N checkpoints (0 = all)"), NEUTRAL] = 0
    keep_every: Annotated[
        int,
        _checkpoints("--keep-every", min=0, help="Also keep every checkpoint whose step is a multiple of N (0 = none)"),
        NEUTRAL,
    ] = 0
    max_hours: Annotated[
        float,
        _checkpoints("--max-hours", min=0, help="Save and stop after this many hours, with exit code 75 (0 = never)"),
        NEUTRAL,
    ] = 0.0
    max_rollbacks: Annotated[
        int,
        _checkpoints(
            "--max-rollbacks",
            min=0,
            help="Maximum number of skipped batches and rollbacks within 128 steps (0 = no guard)",
        ),
    ] = 8


@dataclass(frozen=True)
class HeldOutOptions:
    """The held-out loss."""

    heldout: Annotated[
        list[str] | None,
        _evaluation(
            "--heldout",
            metavar="[NAME=]PATH",
            help="Held-out data; its loss is reported by NAME, or else by the documents' sources",
        ),
        NEUTRAL,
        COMMON,
    ] = None
    eval_every: Annotated[
        int, _evaluation("--eval-every", min=0, help="Steps between evaluations (0 = a tenth of the run)"), NEUTRAL
    ] = 0


@dataclass(frozen=True)
class LogOptions:
    """Logging."""

    log_every: Annotated[
        int,
        _evaluation(
            "--log-every", min=0, help="Steps between the costlier metrics, such as norms and maxima (0 = never)"
        ),
        NEUTRAL,
    ] = 10
    tracker: Annotated[
        str | None,
        _evaluation("--tracker", metavar="NAME", help="Also log to tensorboard (RUN/tracker), wandb or trackio"),
        NEUTRAL,
    ] = None


@dataclass(frozen=True)
class SampleOptions:
    """Samples and scores at every checkpoint."""

    prompts: Annotated[
        Path | None,
        _evaluation(
            "--prompts",
            metavar="FILE",
            help="File of prompts, one per line, completed at every checkpoint into samples.jsonl",
        ),
        Formerly("--samples"),
        NEUTRAL,
    ] = None
    eval_tasks: Annotated[
        str | None,
        _evaluation("--eval-tasks", metavar="LIST", help="lm-eval tasks to score at every checkpoint, comma-separated"),
        NEUTRAL,
    ] = None
    eval_limit: Annotated[int, _evaluation("--eval-limit", min=1, help="Maximum items per task"), NEUTRAL] = 100
    include_path: Annotated[
        list[str] | None,
        _evaluation("--include-path", metavar="DIR", help="Directory of task YAML files"),
        NEUTRAL,
        NamesCode(),
    ] = None


@dataclass(frozen=True)
class StartOptions:
    """The model to pre-train, and where it starts."""

    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            metavar="MODEL",
            help="Preset (tiny, 5m, ..., 1b, llama-tiny, ...) or config.json file (default: tiny)",
        ),
        COMMON,
    ] = None
    from_: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="MODEL",
            help="Initialise from a model directory, run or checkpoint, including optimizer state",
        ),
        COMMON,
    ] = None
    rewarm: Annotated[
        bool, _optimizer("--rewarm", help="With --from: warm the learning rate up again, then decay it")
    ] = False
    recipe: Annotated[
        str | None,
        _optimizer(
            "--recipe",
            metavar="NAME",
            help="Learning rates, sizes and defaults of amber, crystal, olmo, or a TOML file of stages",
        ),
        NamesFiles(),
    ] = None
    batch_warmup: Annotated[
        str | None,
        _data(
            "--batch-warmup",
            metavar="SIZES",
            help="Smaller batches first: 8:1M,16:4M means 8 sequences until 1M tokens, 16 until 4M",
        ),
    ] = None
    length_warmup: Annotated[
        str | None,
        _data(
            "--length-warmup",
            metavar="SIZES",
            help="Shorter sequences first, at the same tokens per step: 512:1M,1024:4M",
        ),
    ] = None


@dataclass(frozen=True)
class PretrainOptions:
    """Options of `llmkit train`. None means the value of the recipe, or else the default given in the help."""

    start: StartOptions = StartOptions()
    stream: StreamOptions = StreamOptions()
    batch: Annotated[
        BatchOptions, Help(batch_size="Sequences per step, over all processes (default: 8, or set by the recipe)")
    ] = BatchOptions()
    schedule: Annotated[
        ScheduleOptions,
        Help(
            schedule=f"One of {SCHEDULE_NAMES} (default: cosine)",
            warmup="Tokens of linear warm-up, or a fraction of all tokens if below 1 (default: 0.05)",
            final_lr_fraction="Final learning rate as a fraction of the peak (default: 0.1)",
            decay="Fraction of all tokens over which wsd decays (default: 0.2)",
        ),
    ] = ScheduleOptions()
    optimizer: Annotated[
        OptimizerOptions,
        Help(
            weight_decay="Weight decay of matrices; embeddings, norms and biases have none (default: 0.1)",
            clip="Clip gradients to this norm (0 = never; default: 1)",
            betas="Adam betas (default: 0.9,0.95)",
        ),
    ] = OptimizerOptions(weight_decay=None, clip=None, betas=None)
    machine: MachineOptions = MachineOptions()
    checkpoints: CheckpointOptions = CheckpointOptions()
    heldout: HeldOutOptions = HeldOutOptions()
    log: LogOptions = LogOptions()
    samples: SampleOptions = SampleOptions()


@dataclass(frozen=True)
class RampOptions:
    """The start and the learning-rate decay of an annealing."""

    step: Annotated[
        str | None,
        _data(
            "--step",
            metavar="STEP",
            help=f"Checkpoint of the run to start from, such as {checkpoint_name(500)} or 500 (default: the last)",
        ),
        Formerly("--from"),
        COMMON,
    ] = None
    lr: Annotated[
        float | None, _optimizer("--lr", help="Initial learning rate (default: that of the checkpoint)"), COMMON
    ] = None
    ramp: Annotated[
        str, _optimizer("--ramp", metavar="NAME", help=f"Shape of the decay: {', '.join(DECAY_SHAPES)}"), COMMON
    ] = "linear"
    final_lr_fraction: Annotated[
        float,
        _optimizer(
            "--final-lr-fraction", min=0, metavar="X", help="Final learning rate as a fraction of the initial one"
        ),
        Formerly("--to"),
    ] = 0.0


@dataclass(frozen=True)
class AnnealOptions:
    """Options of `llmkit anneal`."""

    stream: StreamOptions = StreamOptions()
    ramp: RampOptions = RampOptions()
    batch: Annotated[BatchOptions, Help(batch_size="Sequences per step (default: that of the run)")] = BatchOptions()
    optimizer: Annotated[OptimizerOptions, Without("optimizer", "betas")] = OptimizerOptions(LOADED_OPTIMIZER)
    machine: MachineOptions = MachineOptions()
    checkpoints: CheckpointOptions = CheckpointOptions()
    heldout: HeldOutOptions = HeldOutOptions()
    log: LogOptions = LogOptions()
    samples: SampleOptions = SampleOptions()


def held_out_paths(heldout: list[str] | None) -> dict[str, str]:
    """Path -> domain of each --heldout value; the domain is "" where none is named."""
    result: dict[str, str] = {}
    for text in heldout or []:
        name, equals, path = text.partition("=")
        result |= {path: name} if equals and not os.path.exists(text) else {text: ""}
    return result

"""The options of training, by group: what the command line offers, what a run records, and what Python code sets.

    options = from_values(PretrainOptions, {"tokens": 20_000, "lr": 3e-4})       # llmkit.options

Loads neither torch nor any other large library.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from llmkit.errors import UsageError
from llmkit.io.run_layout import checkpoint_name
from llmkit.options import COMMON, NEUTRAL, Formerly, Help, Without, count_option, parse_share
from llmkit.training.optim.schedule import DECAY_SHAPES, schedule_help

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
LOADED_OPTIMIZER = ""  # OptimizerOptions.optimizer: that of the state that the run starts from


@dataclass(frozen=True)
class BatchOptions:
    """How much one step trains on."""

    batch_size: Annotated[
        int | None, _data("--batch-size", "-b", min=1, help="Sequences per step, over all processes"), COMMON
    ] = None
    micro_batch_size: Annotated[
        int | None,
        _data("--micro-batch-size", min=1, help="Sequences per forward pass; by default as many as fit well"),
    ] = None
    sequence_length: Annotated[
        int | None,
        _data("--sequence-length", min=8, help="Tokens per sequence; by default the model's context length"),
        COMMON,
    ] = None


@dataclass(frozen=True)
class StreamOptions:
    """What of a token stream is trained on."""

    tokens: Annotated[
        int | None,
        count_option("--tokens", help="Tokens to train on; by default one pass over the data", rich_help_panel=DATA),
        COMMON,
    ] = None
    document_mask: Annotated[
        bool,
        _data(
            "--document-mask/--no-document-mask",
            help="Attend within documents only, and predict no document from the one before it",
        ),
    ] = True


@dataclass(frozen=True)
class ScheduleOptions:
    """The learning rate as a function of the tokens seen. In pre-training None leaves a value to the recipe, else to
    the default that its help names.
    """

    lr: Annotated[
        float | None,
        _optimizer("--lr", help="Peak learning rate; by default one that suits the size of the model"),
        COMMON,
    ] = None
    schedule: Annotated[
        str | None, _optimizer("--schedule", metavar="NAME", help=f"One of {schedule_help()}"), COMMON
    ] = None
    warmup: Annotated[
        float | None,
        _optimizer(
            "--warmup",
            parser=parse_share,
            metavar="TOKENS",
            help="Tokens of linear warm-up; below 1 a fraction of all tokens",
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
            help=f"Shape of the decay of wsd: {', '.join(DECAY_SHAPES)}; linear by default",
        ),
    ] = None


@dataclass(frozen=True)
class OptimizerOptions:
    """How gradients become updates."""

    optimizer: Annotated[
        str,
        _optimizer(
            "--optimizer", metavar="NAME", help="adamw, or muon for the matrices of the layers with adamw for the rest"
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
        _optimizer("--z-loss", min=0, help="Weight of the log² Z term that keeps logits from drifting; 1e-4 is usual"),
    ] = 0.0


@dataclass(frozen=True)
class MachineOptions:
    """On what a run is computed, and how it survives the loss of a process."""

    precision: Annotated[
        str,
        _machine(
            "--precision",
            metavar="TYPE",
            help="fp32, bf16, fp16 or fp8 (torchao); auto is bf16 on GPUs that have it, else fp32",
        ),
        COMMON,
    ] = "auto"
    threads: Annotated[int | None, _machine("--threads", min=1, help="CPU threads per process"), NEUTRAL] = None
    processes: Annotated[
        int,
        _machine("--processes", min=1, help="Processes on this machine (one per GPU, or gloo on CPU)"),
        NEUTRAL,
        COMMON,
    ] = 1
    parallel: Annotated[
        str,
        _machine(
            "--parallel",
            metavar="LAYOUT",
            help="ddp: the whole model in each process; fsdp: sharded over them; auto is ddp",
        ),
        NEUTRAL,
    ] = "auto"
    max_restarts: Annotated[
        int, _machine("--max-restarts", min=0, help="Number of times to replace lost or hanging processes"), NEUTRAL
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
            help="Resume although these differ from the start: torch, llmkit, device, precision, ...",
        ),
        NEUTRAL,
    ] = ""
    compile: Annotated[
        bool | None,
        _machine(
            "--compile/--no-compile",
            help="Compile each layer; by default only on GPUs, since the CPU kernels are as fast",
            show_default=False,
        ),
        NEUTRAL,
    ] = None
    checkpoint_activations: Annotated[
        bool,
        _machine(
            "--checkpoint-activations",
            help="Recompute activations in the backward pass: less memory for a third more work",
        ),
        NEUTRAL,
    ] = False
    deterministic: Annotated[
        bool,
        _machine("--deterministic", help="Use only algorithms that always give the same bits; slower on GPUs"),
        NEUTRAL,
    ] = False


@dataclass(frozen=True)
class CheckpointOptions:
    """When a run is saved, resumed, stopped and set back."""

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
        int, _checkpoints("--keep-every", min=0, help="Also keep the checkpoints at multiples of N steps"), NEUTRAL
    ] = 0
    max_hours: Annotated[
        float,
        _checkpoints("--max-hours", min=0, help="Save and stop after so many hours, with exit code 75 (0 = never)"),
        NEUTRAL,
    ] = 0.0
    max_rollbacks: Annotated[
        int,
        _checkpoints(
            "--max-rollbacks",
            min=0,
            help="Skipped batches and rollbacks within 128 steps before giving up (0 = no guard)",
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
            help="Held-out data, by domain where one is named or the documents have sources",
        ),
        NEUTRAL,
        COMMON,
    ] = None
    eval_every: Annotated[
        int, _evaluation("--eval-every", min=0, help="Steps between evaluations (0 = a tenth of the run)"), NEUTRAL
    ] = 0


@dataclass(frozen=True)
class LogOptions:
    """What is logged, and where."""

    log_every: Annotated[
        int,
        _evaluation(
            "--log-every", min=0, help="Steps between metrics that cost a little, such as norms and maxima (0 = never)"
        ),
        NEUTRAL,
    ] = 10
    tracker: Annotated[
        str | None,
        _evaluation("--tracker", metavar="NAME", help="Also log to tensorboard (RUN/tracker), wandb or trackio"),
    ] = None


@dataclass(frozen=True)
class SampleOptions:
    """What is tried with the model at every checkpoint."""

    prompts: Annotated[
        Path | None,
        _evaluation(
            "--prompts",
            metavar="FILE",
            help="Prompts, one per line, to complete at every checkpoint into samples.jsonl",
        ),
        Formerly("--samples"),
        NEUTRAL,
    ] = None
    eval_tasks: Annotated[
        str | None,
        _evaluation(
            "--eval-tasks", metavar="NAMES", help="lm-eval tasks to score at every checkpoint, separated by commas"
        ),
        NEUTRAL,
    ] = None
    eval_limit: Annotated[int, _evaluation("--eval-limit", min=1, help="Items per task"), NEUTRAL] = 100
    include_path: Annotated[
        list[str] | None, _evaluation("--include-path", metavar="DIR", help="Directory of task YAML files"), NEUTRAL
    ] = None


@dataclass(frozen=True)
class StartOptions:
    """Which model is pre-trained, and from where."""

    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Preset (tiny, the default, 5m, ... 1b; llama-tiny) or config.json"),
        COMMON,
    ] = None
    from_: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="MODEL",
            help="Initialise from a model directory, run or checkpoint, optimizer state included",
        ),
        COMMON,
    ] = None
    rewarm: Annotated[
        bool, _optimizer("--rewarm", help="With --from: raise the learning rate again, then decay it")
    ] = False
    recipe: Annotated[
        str | None,
        _optimizer(
            "--recipe",
            metavar="NAME",
            help="amber, crystal, olmo, or a TOML of stages: learning rates, sizes and defaults",
        ),
    ] = None
    batch_warmup: Annotated[
        str | None,
        _data(
            "--batch-warmup",
            metavar="SIZES",
            help="Smaller batches first: 8:1M,16:4M is 8 until 1M tokens, 16 until 4M",
        ),
    ] = None
    length_warmup: Annotated[
        str | None,
        _data(
            "--length-warmup",
            metavar="SIZES",
            help="Shorter sequences first, with as many tokens per step: 512:1M,1024:4M",
        ),
    ] = None


@dataclass(frozen=True)
class PretrainOptions:
    """Options of `llmkit train`. Where a value is None, a recipe decides, else the default that the help names."""

    start: StartOptions = StartOptions()
    stream: StreamOptions = StreamOptions()
    batch: Annotated[
        BatchOptions, Help(batch_size="Sequences per step, over all processes; by default 8, or as the recipe has it")
    ] = BatchOptions()
    schedule: Annotated[
        ScheduleOptions,
        Help(
            schedule=f"One of {schedule_help()}; cosine by default",
            warmup="Tokens of linear warm-up, below 1 a fraction of all tokens; 0.05 by default",
            final_lr_fraction="Final learning rate as a fraction of the peak; 0.1 by default",
            decay="Fraction of all tokens over which wsd decays; 0.2 by default",
        ),
    ] = ScheduleOptions()
    optimizer: Annotated[
        OptimizerOptions,
        Help(
            weight_decay="Weight decay of matrices; embeddings, norms and biases have none; 0.1 by default",
            clip="Clip gradients to this norm (0 = never); 1 by default",
            betas="Adam betas; 0.9,0.95 by default",
        ),
    ] = OptimizerOptions(weight_decay=None, clip=None, betas=None)
    machine: MachineOptions = MachineOptions()
    checkpoints: CheckpointOptions = CheckpointOptions()
    heldout: HeldOutOptions = HeldOutOptions()
    log: LogOptions = LogOptions()
    samples: SampleOptions = SampleOptions()


@dataclass(frozen=True)
class RampOptions:
    """How the learning rate of an annealing falls."""

    step: Annotated[
        str | None,
        _data(
            "--step",
            metavar="STEP",
            help=f"Checkpoint of the run to start from, such as {checkpoint_name(500)} or 500; by default its last",
        ),
        Formerly("--from"),
        COMMON,
    ] = None
    lr: Annotated[
        float | None, _optimizer("--lr", help="Initial learning rate; by default that of the checkpoint"), COMMON
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
    batch: Annotated[BatchOptions, Help(batch_size="Sequences per step; by default that of the run")] = BatchOptions()
    optimizer: Annotated[OptimizerOptions, Without("optimizer", "betas")] = OptimizerOptions(LOADED_OPTIMIZER)
    machine: MachineOptions = MachineOptions()
    checkpoints: CheckpointOptions = CheckpointOptions()
    heldout: HeldOutOptions = HeldOutOptions()
    log: LogOptions = LogOptions()
    samples: SampleOptions = SampleOptions()


def parse_betas(text: str) -> tuple[float, float]:
    """`0.9,0.95` as two numbers; UsageError where they are not."""
    try:
        first, second = map(float, text.split(","))
    except ValueError:
        first = second = -1.0
    if not (0 <= first < 1 and 0 <= second < 1):
        raise UsageError(f"--betas {text!r}: expected two numbers in [0, 1)", "such as 0.9,0.95")
    return first, second


def held_out_paths(heldout: list[str] | None) -> dict[str, str]:
    """Path -> domain ("" where none is named) of each --heldout."""
    result: dict[str, str] = {}
    for text in heldout or []:
        name, equals, path = text.partition("=")
        result |= {path: name} if equals and not os.path.exists(text) else {text: ""}
    return result

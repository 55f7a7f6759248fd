"""The options of training, by group: what the command line offers, what a run records, and what Python code sets.

    options = from_values(PretrainOptions, {"tokens": 20_000, "lr": 3e-4})       # llmkit.options

Loads neither torch nor any other large library.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from llmkit.errors import UsageError
from llmkit.options import COMMON, NEUTRAL, Formerly, Help, Without, count_option, parse_count, parse_share
from llmkit.training.optim.schedule import NAMES as SCHEDULES
from llmkit.training.optim.schedule import RAMPS as DECAY_SHAPES

DATA, OPTIMIZER, MACHINE, CHECKPOINTS, EVALUATION = (
    "Data and steps",
    "Optimizer",
    "Machine",
    "Checkpoints",
    "Evaluation and logging",
)
SCHEDULE_NAMES = ", ".join(SCHEDULES)
LOADED_OPTIMIZER = ""  # OptimizerOptions.optimizer: that of the state that the run starts from


@dataclass(frozen=True)
class BatchOptions:
    """How much one step trains on."""

    batch_size: Annotated[
        int | None,
        typer.Option("--batch-size", "-b", min=1, help="Sequences per step, over all processes", rich_help_panel=DATA),
        COMMON,
    ] = None
    micro_batch_size: Annotated[
        int | None,
        typer.Option(
            "--micro-batch-size",
            min=1,
            help="Sequences per forward pass; by default as many as fit well",
            rich_help_panel=DATA,
        ),
    ] = None
    sequence_length: Annotated[
        int | None,
        typer.Option(
            "--sequence-length",
            min=8,
            help="Tokens per sequence; by default the model's context length",
            rich_help_panel=DATA,
        ),
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
        typer.Option(
            "--document-mask/--no-document-mask",
            help="Attend within documents only, and predict no document from the one before it",
            rich_help_panel=DATA,
        ),
    ] = True


@dataclass(frozen=True)
class RowOptions:
    """How rows of a file become sequences."""

    epochs: Annotated[int, typer.Option("--epochs", min=1, help="Number of epochs", rich_help_panel=DATA), COMMON] = 1
    chat_template: Annotated[
        Path | None,
        typer.Option("--chat-template", metavar="FILE", help="Jinja template to use instead of the model's own"),
        COMMON,
    ] = None
    too_long: Annotated[
        str,
        typer.Option(
            "--too-long",
            metavar="HOW",
            help="Rows longer than the sequence: drop, or truncate at the end",
            rich_help_panel=DATA,
        ),
        COMMON,
    ] = "drop"


@dataclass(frozen=True)
class ScheduleOptions:
    """The learning rate as a function of the tokens seen. In pre-training None leaves a value to the recipe, else to the default that its help names."""

    lr: Annotated[
        float | None,
        typer.Option(
            "--lr",
            help="Peak learning rate; by default one that suits the size of the model",
            rich_help_panel=OPTIMIZER,
        ),
        COMMON,
    ] = None
    schedule: Annotated[
        str | None,
        typer.Option("--schedule", metavar="NAME", help=f"One of {SCHEDULE_NAMES}", rich_help_panel=OPTIMIZER),
        COMMON,
    ] = None
    warmup: Annotated[
        float | None,
        typer.Option(
            "--warmup",
            parser=parse_share,
            metavar="TOKENS",
            help="Tokens of linear warm-up; below 1 a fraction of all tokens",
            rich_help_panel=OPTIMIZER,
        ),
    ] = None
    final_lr_fraction: Annotated[
        float | None,
        typer.Option(
            "--final-lr-fraction",
            metavar="X",
            help="Final learning rate as a fraction of the peak",
            rich_help_panel=OPTIMIZER,
        ),
        Formerly("--min-lr"),
    ] = None
    decay: Annotated[
        float | None,
        typer.Option("--decay", help="Fraction of all tokens over which wsd decays", rich_help_panel=OPTIMIZER),
    ] = None
    decay_shape: Annotated[
        str | None,
        typer.Option(
            "--decay-shape",
            metavar="NAME",
            help=f"Shape of the decay of wsd: {', '.join(DECAY_SHAPES)}; linear by default",
            rich_help_panel=OPTIMIZER,
        ),
    ] = None


@dataclass(frozen=True)
class OptimizerOptions:
    """How gradients become updates."""

    optimizer: Annotated[
        str,
        typer.Option(
            "--optimizer",
            metavar="NAME",
            help="adamw, or muon for the matrices of the layers with adamw for the rest",
            rich_help_panel=OPTIMIZER,
        ),
    ] = "adamw"
    weight_decay: Annotated[
        float | None,
        typer.Option(
            "--weight-decay",
            min=0,
            help="Weight decay of matrices; embeddings, norms and biases have none",
            rich_help_panel=OPTIMIZER,
        ),
    ] = 0.1
    clip: Annotated[
        float | None,
        typer.Option("--clip", min=0, help="Clip gradients to this norm (0 = never)", rich_help_panel=OPTIMIZER),
    ] = 1.0
    betas: Annotated[
        str | None,
        typer.Option("--betas", metavar="A,B", help="Adam betas", rich_help_panel=OPTIMIZER),
    ] = "0.9,0.95"
    z_loss: Annotated[
        float,
        typer.Option(
            "--z-loss",
            min=0,
            help="Weight of the log² Z term that keeps logits from drifting; 1e-4 is usual",
            rich_help_panel=OPTIMIZER,
        ),
    ] = 0.0


@dataclass(frozen=True)
class MachineOptions:
    """On what a run is computed, and how it survives the loss of a process."""

    precision: Annotated[
        str,
        typer.Option(
            "--precision",
            metavar="TYPE",
            help="fp32, bf16, fp16 or fp8 (torchao); auto is bf16 on GPUs that have it, else fp32",
            rich_help_panel=MACHINE,
        ),
        COMMON,
    ] = "auto"
    threads: Annotated[
        int | None,
        typer.Option("--threads", min=1, help="CPU threads per process", rich_help_panel=MACHINE),
        NEUTRAL,
    ] = None
    processes: Annotated[
        int,
        typer.Option(
            "--processes",
            min=1,
            help="Processes on this machine (one per GPU, or gloo on CPU)",
            rich_help_panel=MACHINE,
        ),
        NEUTRAL,
        COMMON,
    ] = 1
    parallel: Annotated[
        str,
        typer.Option(
            "--parallel",
            metavar="LAYOUT",
            help="ddp: the whole model in each process; fsdp: sharded over them; auto is ddp",
            rich_help_panel=MACHINE,
        ),
        NEUTRAL,
    ] = "auto"
    max_restarts: Annotated[
        int,
        typer.Option(
            "--max-restarts",
            min=0,
            help="Number of times to replace lost or hanging processes",
            rich_help_panel=MACHINE,
        ),
        NEUTRAL,
    ] = 0
    hang_timeout: Annotated[
        float,
        typer.Option(
            "--hang-timeout",
            min=0,
            metavar="SECONDS",
            help="Treat a process without progress for this long as hung (0 = never)",
            rich_help_panel=MACHINE,
        ),
        NEUTRAL,
    ] = 1800.0
    accept_change: Annotated[
        str,
        typer.Option(
            "--accept-change",
            metavar="NAMES",
            help="Resume although these differ from the start: torch, llmkit, device, precision, ...",
            rich_help_panel=MACHINE,
        ),
        NEUTRAL,
    ] = ""
    compile: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile",
            help="Compile each layer; by default only on GPUs, since the CPU kernels are as fast",
            show_default=False,
            rich_help_panel=MACHINE,
        ),
        NEUTRAL,
    ] = None
    checkpoint_activations: Annotated[
        bool,
        typer.Option(
            "--checkpoint-activations",
            help="Recompute activations in the backward pass: less memory for a third more work",
            rich_help_panel=MACHINE,
        ),
        NEUTRAL,
    ] = False
    deterministic: Annotated[
        bool,
        typer.Option(
            "--deterministic",
            help="Use only algorithms that always give the same bits; slower on GPUs",
            rich_help_panel=MACHINE,
        ),
        NEUTRAL,
    ] = False


@dataclass(frozen=True)
class CheckpointOptions:
    """When a run is saved, resumed, stopped and set back."""

    resume: Annotated[
        bool,
        typer.Option("--resume", help="Resume the run; start it if there is none yet", rich_help_panel=CHECKPOINTS),
        NEUTRAL,
        COMMON,
    ] = False
    save_every: Annotated[
        int,
        typer.Option(
            "--save-every",
            min=0,
            help="Steps between checkpoints (0 = a tenth of the run)",
            rich_help_panel=CHECKPOINTS,
        ),
        NEUTRAL,
        COMMON,
    ] = 0
    keep: Annotated[
        int,
        typer.Option("--keep", min=0, help="Keep the last N checkpoints (0 = all)", rich_help_panel=CHECKPOINTS),
        NEUTRAL,
    ] = 0
    keep_every: Annotated[
        int,
        typer.Option(
            "--keep-every",
            min=0,
            help="Also keep the checkpoints at multiples of N steps",
            rich_help_panel=CHECKPOINTS,
        ),
        NEUTRAL,
    ] = 0
    max_hours: Annotated[
        float,
        typer.Option(
            "--max-hours",
            min=0,
            help="Save and stop after so many hours, with exit code 75 (0 = never)",
            rich_help_panel=CHECKPOINTS,
        ),
        NEUTRAL,
    ] = 0.0
    max_rollbacks: Annotated[
        int,
        typer.Option(
            "--max-rollbacks",
            min=0,
            help="Skipped batches and rollbacks within 128 steps before giving up (0 = no guard)",
            rich_help_panel=CHECKPOINTS,
        ),
    ] = 8


@dataclass(frozen=True)
class HeldOutOptions:
    """The held-out loss."""

    heldout: Annotated[
        list[str] | None,
        typer.Option(
            "--heldout",
            metavar="[NAME=]PATH",
            help="Held-out data, by domain where one is named or the documents have sources",
            rich_help_panel=EVALUATION,
        ),
        NEUTRAL,
        COMMON,
    ] = None
    eval_every: Annotated[
        int,
        typer.Option(
            "--eval-every", min=0, help="Steps between evaluations (0 = a tenth of the run)", rich_help_panel=EVALUATION
        ),
        NEUTRAL,
    ] = 0


@dataclass(frozen=True)
class LogOptions:
    """What is logged, and where."""

    log_every: Annotated[
        int,
        typer.Option(
            "--log-every",
            min=0,
            help="Steps between metrics that cost a little, such as norms and maxima (0 = never)",
            rich_help_panel=EVALUATION,
        ),
        NEUTRAL,
    ] = 10
    tracker: Annotated[
        str | None,
        typer.Option(
            "--tracker",
            metavar="NAME",
            help="Also log to tensorboard (RUN/tracker), wandb or trackio",
            rich_help_panel=EVALUATION,
        ),
    ] = None


@dataclass(frozen=True)
class SampleOptions:
    """What is tried with the model at every checkpoint."""

    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            metavar="FILE",
            help="Prompts, one per line, to complete at every checkpoint into samples.jsonl",
            rich_help_panel=EVALUATION,
        ),
        Formerly("--samples"),
        NEUTRAL,
    ] = None
    eval_tasks: Annotated[
        str | None,
        typer.Option(
            "--eval-tasks",
            metavar="NAMES",
            help="lm-eval tasks to score at every checkpoint, separated by commas",
            rich_help_panel=EVALUATION,
        ),
        NEUTRAL,
    ] = None
    eval_limit: Annotated[
        int,
        typer.Option("--eval-limit", min=1, help="Items per task", rich_help_panel=EVALUATION),
        NEUTRAL,
    ] = 100
    include_path: Annotated[
        list[str] | None,
        typer.Option("--include-path", metavar="DIR", help="Directory of task YAML files", rich_help_panel=EVALUATION),
        NEUTRAL,
    ] = None


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
        bool,
        typer.Option(
            "--rewarm", help="With --from: raise the learning rate again, then decay it", rich_help_panel=OPTIMIZER
        ),
    ] = False
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            metavar="NAME",
            help="amber, crystal, olmo, or a TOML of stages: learning rates, sizes and defaults",
            rich_help_panel=OPTIMIZER,
        ),
    ] = None
    batch_warmup: Annotated[
        str | None,
        typer.Option(
            "--batch-warmup",
            metavar="SIZES",
            help="Smaller batches first: 8:1M,16:4M is 8 until 1M tokens, 16 until 4M",
            rich_help_panel=DATA,
        ),
    ] = None
    length_warmup: Annotated[
        str | None,
        typer.Option(
            "--length-warmup",
            metavar="SIZES",
            help="Shorter sequences first, with as many tokens per step: 512:1M,1024:4M",
            rich_help_panel=DATA,
        ),
    ] = None


@dataclass(frozen=True)
class PretrainOptions:
    """Options of `llmkit train`. Where a value is None, a recipe decides, else the default that the help names."""

    start: StartOptions = StartOptions()
    stream: StreamOptions = StreamOptions()
    batch: Annotated[
        BatchOptions,
        Help(batch_size="Sequences per step, over all processes; by default 8, or as the recipe has it"),
    ] = BatchOptions()
    schedule: Annotated[
        ScheduleOptions,
        Help(
            schedule=f"One of {SCHEDULE_NAMES}; cosine by default",
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
        typer.Option(
            "--step",
            metavar="STEP",
            help="Checkpoint of the run to start from, such as step-00000500 or 500; by default its last",
            rich_help_panel=DATA,
        ),
        Formerly("--from"),
        COMMON,
    ] = None
    lr: Annotated[
        float | None,
        typer.Option(
            "--lr", help="Initial learning rate; by default that of the checkpoint", rich_help_panel=OPTIMIZER
        ),
        COMMON,
    ] = None
    ramp: Annotated[
        str,
        typer.Option(
            "--ramp",
            metavar="NAME",
            help=f"Shape of the decay: {', '.join(DECAY_SHAPES)}",
            rich_help_panel=OPTIMIZER,
        ),
        COMMON,
    ] = "linear"
    final_lr_fraction: Annotated[
        float,
        typer.Option(
            "--final-lr-fraction",
            min=0,
            metavar="X",
            help="Final learning rate as a fraction of the initial one",
            rich_help_panel=OPTIMIZER,
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


def parse_sizes(text: str | None, option: str) -> list[tuple[int, int]]:
    """`8:1M,16:4M` as sizes with the token until which each holds; UsageError where it has another form."""
    sizes = []
    for part in text.split(",") if text else []:
        size, _, until = part.strip().partition(":")
        try:
            sizes.append((int(size), parse_count(until)))
        except (ValueError, typer.BadParameter):
            raise UsageError(f"{option}: {part!r} is not a size with its tokens", "such as 8:1M,16:4M") from None
    if any(size < 1 for size, _ in sizes):
        raise UsageError(f"{option}: a size below 1", "such as 8:1M,16:4M")
    return sizes


def held_out_paths(heldout: list[str] | None) -> dict[str, str]:
    """Path -> domain ("" where none is named) of each --heldout."""
    result: dict[str, str] = {}
    for text in heldout or []:
        name, equals, path = text.partition("=")
        result |= {path: name} if equals and not os.path.exists(text) else {text: ""}
    return result


def check_positive(**values: float | None) -> None:
    """UsageError for an option that has to be above 0 and is not."""
    for name, value in values.items():
        if value is not None and value <= 0:
            raise UsageError(f"--{name.replace('_', '-')} {value} is not above 0", "see --help")

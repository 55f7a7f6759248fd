"""Options of fine-tuning and preference optimization, built on the training options. Imports no large library."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from llmkit.chat.builtin import names
from llmkit.model.lora.config import GROUPS, MAX_RANK
from llmkit.options import COMMON, NEUTRAL, Help, Without
from llmkit.training.options import (
    DATA,
    BatchOptions,
    CheckpointOptions,
    HeldOutOptions,
    LogOptions,
    MachineOptions,
    OptimizerOptions,
    SampleOptions,
    ScheduleOptions,
)

PROMPTS = "File of prompts, one per line or as rows, answered in the chat template at every checkpoint: samples.jsonl"
_lora = partial(typer.Option, rich_help_panel="Adapters")


@dataclass(frozen=True)
class RowOptions:
    """How rows become sequences."""

    epochs: Annotated[
        int, typer.Option("--epochs", min=1, help="Number of passes over the rows", rich_help_panel=DATA), COMMON
    ] = 1
    chat_template: Annotated[
        str | None,
        typer.Option(
            "--chat-template",
            metavar="NAME|FILE",
            help=f"Template to use instead of the model's own: {', '.join(names())}, whose tokens are added to the"
            " model, or a Jinja file",
        ),
        COMMON,
    ] = None
    too_long: Annotated[
        str,
        typer.Option(
            "--too-long",
            metavar="HOW",
            help="What to do with rows longer than the sequence: drop, truncate (at the end), truncate-turns (after"
            " the last trained turn that fits), or error",
            rich_help_panel=DATA,
        ),
        COMMON,
    ] = "drop"
    group_by_length: Annotated[
        bool,
        typer.Option(
            "--group-by-length",
            help="Put rows of similar length into the same step, in random order, for less padding (with --no-pack)",
            rich_help_panel=DATA,
        ),
    ] = False
    row_cache: Annotated[
        Path | None,
        typer.Option(
            "--row-cache",
            metavar="DIR",
            help="Keep encoded rows in this directory, for later runs and for one that was killed",
            rich_help_panel=DATA,
        ),
        NEUTRAL,
    ] = None
    map: Annotated[
        list[str] | None,
        typer.Option(
            "--map",
            metavar="NAME=FIELD",
            help="Where rows have fields under other names: messages=chat,system=meta.system (repeatable)",
            rich_help_panel=DATA,
        ),
        COMMON,
    ] = None
    lossy: Annotated[
        bool,
        typer.Option(
            "--lossy",
            help="Train on rows of which the chat template does not show a field, such as tool calls or reasoning",
            rich_help_panel=DATA,
        ),
    ] = False


@dataclass(frozen=True)
class TemplateOptions:
    """How rows become text, and which turns are trained on."""

    template: Annotated[
        bool,
        typer.Option(
            "--template/--no-template", help="Treat prompt and completion strings as chat turns, not as plain text"
        ),
        COMMON,
    ] = True
    train_on: Annotated[
        str,
        typer.Option(
            "--train-on",
            metavar="WHICH",
            help="Which assistant turns to train on: all, the last, or turns (each as the last one of its own row)",
            rich_help_panel=DATA,
        ),
    ] = "all"
    neftune: Annotated[
        float | None,
        typer.Option(
            "--neftune",
            metavar="ALPHA",
            max=1e6,
            help="Add uniform noise of ALPHA / sqrt(tokens x width) to the embeddings of a row (NEFTune: about 5)",
            rich_help_panel=DATA,
        ),
    ] = None


@dataclass(frozen=True)
class SequenceOptions:
    """How many rows a sequence has."""

    pack: Annotated[
        bool,
        typer.Option(
            "--pack/--no-pack",
            help="Pack rows into sequences, or have one in each, so that --batch-size counts rows",
            rich_help_panel=DATA,
        ),
    ] = True


@dataclass(frozen=True)
class LoraOptions:
    """Low-rank adapters that are trained instead of the weights (model/lora/config.py)."""

    lora: Annotated[
        int | None,
        _lora("--lora", metavar="RANK", min=1, max=MAX_RANK, help="Train adapters of this rank, and not the weights"),
        COMMON,
    ] = None
    lora_alpha: Annotated[
        float | None,
        _lora("--lora-alpha", min=0, help="Adapters are multiplied by this over their rank (default: twice the rank)"),
    ] = None
    lora_targets: Annotated[
        str,
        _lora(
            "--lora-targets",
            metavar="NAMES",
            help=f"Layers with adapters: {', '.join(GROUPS)}, or names such as q_proj,v_proj",
        ),
    ] = GROUPS[0]
    dora: Annotated[bool, _lora("--dora", help="Train the norm of each row of an adapted matrix as well")] = False
    rslora: Annotated[bool, _lora("--rslora", help="Divide by the square root of the rank, for high ranks")] = False
    lora_plus: Annotated[
        float,
        _lora("--lora-plus", min=0, metavar="RATIO", help="Learning rate of B over that of A (LoRA+: about 16)"),
    ] = 1.0


@dataclass(frozen=True)
class SftOptions:
    """Options of `llmkit sft`."""

    rows: RowOptions = RowOptions()
    template: TemplateOptions = TemplateOptions()
    sequences: SequenceOptions = SequenceOptions()
    lora: LoraOptions = LoraOptions()
    batch: BatchOptions = BatchOptions(batch_size=8)
    schedule: ScheduleOptions = ScheduleOptions(schedule="linear", warmup=0.03, final_lr_fraction=0.0, decay=0.2)
    optimizer: Annotated[OptimizerOptions, Without("optimizer", "betas")] = OptimizerOptions(weight_decay=0.0)
    machine: MachineOptions = MachineOptions()
    checkpoints: CheckpointOptions = CheckpointOptions()
    heldout: Annotated[HeldOutOptions, Help(heldout="Held-out rows")] = HeldOutOptions()
    samples: Annotated[SampleOptions, Help(prompts=PROMPTS)] = SampleOptions()
    log: LogOptions = LogOptions()


@dataclass(frozen=True)
class LossOptions:
    """The preference loss: the arguments of `preference_objective`."""

    beta: Annotated[
        float,
        typer.Option(
            "--beta",
            help="Strength of the pull towards the reference model; smaller values let the policy move further",
        ),
        COMMON,
    ] = 0.1


@dataclass(frozen=True)
class DpoOptions:
    """Options of `llmkit dpo`."""

    SEQUENCES_PER_ROW = 2  # a pair has a chosen and a rejected one

    loss: LossOptions = LossOptions()
    rows: Annotated[
        RowOptions,
        Help(
            too_long="What to do with pairs of which an answer, with its prompt, is longer than the sequence: drop,"
            " truncate (both at the end), or error",
            group_by_length="Put pairs of similar length into the same step, in random order, for less padding",
        ),
    ] = RowOptions()
    lora: LoraOptions = LoraOptions()
    batch: Annotated[
        BatchOptions,
        Help(
            batch_size="Preference pairs per step, over all processes",
            micro_batch_size="Pairs per forward pass (default: about 2k tokens on CPU, 64k on GPU)",
        ),
    ] = BatchOptions(batch_size=16)
    schedule: ScheduleOptions = ScheduleOptions(schedule="linear", warmup=0.1, final_lr_fraction=0.0, decay=0.2)
    optimizer: Annotated[OptimizerOptions, Without("optimizer", "betas", "z_loss")] = OptimizerOptions(weight_decay=0.0)
    machine: MachineOptions = MachineOptions()
    checkpoints: CheckpointOptions = CheckpointOptions()
    samples: Annotated[SampleOptions, Help(prompts=PROMPTS)] = SampleOptions()
    log: LogOptions = LogOptions()

"""`llmkit dpo`: align a model with preference pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmkit.cli import fitting, live
from llmkit.cli.options import ModelPath, Run, command


@command(
    examples=(
        "llmkit dpo sft/ pairs.jsonl --beta 0.1 -o chat/",
        "llmkit dpo sft/ pairs.jsonl --lr 1e-4 --batch-size 4 -o chat2/ --resume",
    ),
    neutral=tuple(name for name in fitting.NEUTRAL_OPTIONS if name not in ("heldout", "eval_every")),
    reads=True,
)
def main(
    run: Run,
    model: ModelPath,
    rows: Annotated[
        list[str] | None,
        typer.Argument(metavar="ROWS", help="Preference pairs as JSON lines or Parquet; '-' or nothing is stdin"),
    ] = None,
    beta: Annotated[
        float, typer.Option("--beta", help="How strongly the model is held to the reference; small lets it move far")
    ] = 0.1,
    epochs: fitting.Epochs = 1,
    chat_template: Annotated[
        Path | None, typer.Option("--chat-template", metavar="FILE", help="Jinja template instead of the model's own")
    ] = None,
    too_long: fitting.TooLong = "drop",
    batch_size: Annotated[
        int,
        typer.Option(
            "--batch-size", "-b", min=1, help="Pairs a step, over all processes", rich_help_panel=fitting.STEPS
        ),
    ] = 16,
    micro_batch_size: Annotated[
        int | None,
        typer.Option(
            "--micro-batch-size",
            min=1,
            help="Pairs that go through the model at once; by default what fits well",
            rich_help_panel=fitting.STEPS,
        ),
    ] = None,
    sequence_length: fitting.SequenceLength = None,
    lr: fitting.Rate = None,
    schedule: fitting.ScheduleName = "linear",
    warmup: fitting.Warmup = 0.1,
    min_lr: fitting.Floor = 0.0,
    decay: fitting.Decay = 0.2,
    weight_decay: fitting.WeightDecay = 0.0,
    clip: fitting.Clip = 1.0,
    precision: fitting.Precision = "auto",
    threads: fitting.Threads = None,
    processes: fitting.ProcessCount = 1,
    parallel: fitting.Parallel = "auto",
    max_restarts: fitting.MaxRestarts = 0,
    hang_timeout: fitting.HangTimeout = 1800.0,
    accept_change: fitting.AcceptChange = "",
    compile: fitting.Compile = None,
    checkpoint_activations: fitting.CheckpointActivations = False,
    deterministic: fitting.Deterministic = False,
    resume: fitting.Resume = False,
    save_every: fitting.SaveEvery = 0,
    keep: fitting.Keep = 0,
    keep_every: fitting.KeepEvery = 0,
    max_hours: fitting.MaxHours = 0.0,
    max_rollbacks: fitting.MaxRollbacks = 8,
    log_every: fitting.LogEvery = 10,
    tracker: fitting.TrackerName = None,
) -> None:
    """Align a model by direct preference optimisation: make chosen answers more probable, rejected ones less, relative to the model as it was.

    Rows hold `chosen` and `rejected`, as strings or lists of messages, with or without `prompt` (then what both begin with); turns in one string
    (hh-rlhf) are understood. The reference log-probabilities are computed once before the first step and kept in the run. The log shows the
    rewards of both sides, their margin, and how often the chosen one is ahead.
    """
    if fitting.launched(run, [model, *(rows or [])], resume=resume, processes=processes, max_restarts=max_restarts):
        return
    from functools import cache

    import torch

    from llmkit.alignment.preference import FIGURES, PairSource, dpo, reference_log_probabilities
    from llmkit.chat import templates
    from llmkit.chat.encode import encode_preferences
    from llmkit.model.decoder import Decoder
    from llmkit.model.pretrained.checkpoint import load_model
    from llmkit.training import session as sessions
    from llmkit.training.optim.schedule import PREFERENCE, default_rate, named, warmup_tokens

    sessions.check_positive(lr=lr, beta=beta)
    settings = sessions.Settings(
        run.output or "", resume, run.force, precision, threads, micro_batch_size, clip, weight_decay, save_every, keep, sequences_a_row=2, log_every=log_every, tracker=tracker, keep_every=keep_every, max_hours=max_hours, max_rollbacks=max_rollbacks,
        parallel=parallel, hang_timeout=hang_timeout, accept_change=accept_change,
        compile=compile, checkpoint_activations=checkpoint_activations, deterministic=deterministic,
    )  # fmt: skip
    with fitting.opened(run, settings) as opened:
        info, files, length = fitting.chat_model(run, model, chat_template, sequence_length)
        templates.check_template(files)
        reader = fitting.row_reader(run, opened, rows)
        encoded = encode_preferences(reader, files, length, too_long=too_long)
        row_inputs = fitting.row_inputs(reader)
        fitting.say_rows(run, encoded, length, too_long)
        rate = lr or default_rate(info.config.parameters()) * PREFERENCE
        empty = torch.zeros(len(encoded.rows) // 2, 2)
        planned = PairSource(encoded.rows, empty, batch_size, epochs=epochs, seed=run.seed)
        total = planned.tokens(planned.steps)
        if run.dry_run:
            fitting.show_plan(run, opened, info.config, planned, rate, length)
            return
        text = fitting.config_text(run, ("model", "rows"), lr=rate)
        source_model = fitting.model_input(model)
        if not opened.begin(run.lineage(), [source_model, *row_inputs], batch_size, length, text):
            fitting.nothing_to_do(run)
            return

        @cache
        def initial() -> Decoder:
            return load_model(model, torch.float32)[0].to(opened.processes.device)

        fitting.say_start(run, opened, total)
        reference = reference_log_probabilities(
            initial,
            encoded.rows,
            opened.processes,
            opened.micro_batch(),
            opened.directory.path / "reference.safetensors",
            source_model.digest,
        )
        source = PairSource(encoded.rows, reference, batch_size, epochs=epochs, seed=run.seed)
        with live.shown(run, opened, total) as report:
            outcome = opened.train(
                opened.model(initial),
                dpo(beta),
                source,
                named(schedule, rate, total, warmup_tokens(warmup, total), min_lr, decay),
                figures=FIGURES,
                tokenizer_files=files,
                stop_ids=fitting.stop_ids(info, files),
                report=report,
            )
        fitting.finish(run, outcome, **encoded.counts)

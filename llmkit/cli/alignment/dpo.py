"""`llmkit dpo`: align a model with preference pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmkit.cli.shared import live_view, training_options
from llmkit.cli.shared.options import ModelPath, Run, command


@command(
    examples=(
        "llmkit dpo sft/ pairs.jsonl --beta 0.1 -o chat/",
        "llmkit dpo sft/ pairs.jsonl --lr 1e-4 --batch-size 4 -o chat2/ --resume",
    ),
    neutral=tuple(name for name in training_options.NEUTRAL_OPTIONS if name not in ("heldout", "eval_every")),
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
    epochs: training_options.Epochs = 1,
    chat_template: Annotated[
        Path | None, typer.Option("--chat-template", metavar="FILE", help="Jinja template instead of the model's own")
    ] = None,
    too_long: training_options.TooLong = "drop",
    batch_size: Annotated[
        int,
        typer.Option(
            "--batch-size", "-b", min=1, help="Pairs a step, over all processes", rich_help_panel=training_options.STEPS
        ),
    ] = 16,
    micro_batch_size: Annotated[
        int | None,
        typer.Option(
            "--micro-batch-size",
            min=1,
            help="Pairs that go through the model at once; by default what fits well",
            rich_help_panel=training_options.STEPS,
        ),
    ] = None,
    sequence_length: training_options.SequenceLength = None,
    lr: training_options.Rate = None,
    schedule: training_options.ScheduleName = "linear",
    warmup: training_options.Warmup = 0.1,
    min_lr: training_options.Floor = 0.0,
    decay: training_options.Decay = 0.2,
    weight_decay: training_options.WeightDecay = 0.0,
    clip: training_options.Clip = 1.0,
    precision: training_options.Precision = "auto",
    threads: training_options.Threads = None,
    processes: training_options.ProcessCount = 1,
    parallel: training_options.Parallel = "auto",
    max_restarts: training_options.MaxRestarts = 0,
    hang_timeout: training_options.HangTimeout = 1800.0,
    accept_change: training_options.AcceptChange = "",
    compile: training_options.Compile = None,
    checkpoint_activations: training_options.CheckpointActivations = False,
    deterministic: training_options.Deterministic = False,
    resume: training_options.Resume = False,
    save_every: training_options.SaveEvery = 0,
    keep: training_options.Keep = 0,
    keep_every: training_options.KeepEvery = 0,
    max_hours: training_options.MaxHours = 0.0,
    max_rollbacks: training_options.MaxRollbacks = 8,
    log_every: training_options.LogEvery = 10,
    tracker: training_options.TrackerName = None,
) -> None:
    """Align a model by direct preference optimisation: make chosen answers more probable, rejected ones less, relative to the model as it was.

    Rows hold `chosen` and `rejected`, as strings or lists of messages, with or without `prompt` (then what both begin with); turns in one string
    (hh-rlhf) are understood. The reference log-probabilities are computed once before the first step and kept in the run. The log shows the
    rewards of both sides, their margin, and how often the chosen one is ahead.
    """
    if training_options.launched(
        run, [model, *(rows or [])], resume=resume, processes=processes, max_restarts=max_restarts
    ):
        return
    from functools import cache

    import torch

    from llmkit.alignment.preference import FIGURES, PairSource, dpo, reference_log_probabilities
    from llmkit.chat import templates
    from llmkit.chat.encode import encode_preferences
    from llmkit.model.decoder import Decoder
    from llmkit.model.pretrained.checkpoint import load_model
    from llmkit.training import session as sessions
    from llmkit.training.optim.schedule import PREFERENCE, build_schedule, default_rate, warmup_tokens

    sessions.check_positive(lr=lr, beta=beta)
    settings = sessions.Settings(
        run.output or "", resume, run.force, precision, threads, micro_batch_size, clip, weight_decay, save_every, keep, sequences_a_row=2, log_every=log_every, tracker=tracker, keep_every=keep_every, max_hours=max_hours, max_rollbacks=max_rollbacks,
        parallel=parallel, hang_timeout=hang_timeout, accept_change=accept_change,
        compile=compile, checkpoint_activations=checkpoint_activations, deterministic=deterministic,
    )  # fmt: skip
    with training_options.opened(run, settings) as opened:
        info, files, length = training_options.chat_model(run, model, chat_template, sequence_length)
        templates.check_template(files)
        reader = training_options.row_reader(run, opened, rows)
        encoded = encode_preferences(reader, files, length, too_long=too_long)
        row_inputs = training_options.row_inputs(reader)
        training_options.say_rows(run, encoded, length, too_long)
        rate = lr or default_rate(info.config.parameters()) * PREFERENCE
        empty = torch.zeros(len(encoded.rows) // 2, 2)
        planned = PairSource(encoded.rows, empty, batch_size, epochs=epochs, seed=run.seed)
        total = planned.tokens(planned.steps)
        if run.dry_run:
            training_options.show_plan(run, opened, info.config, planned, rate, length)
            return
        text = training_options.config_text(run, ("model", "rows"), lr=rate)
        source_model = training_options.model_input(model)
        if not opened.begin(run.lineage(), [source_model, *row_inputs], batch_size, length, text):
            training_options.nothing_to_do(run)
            return

        @cache
        def initial() -> Decoder:
            return load_model(model, torch.float32)[0].to(opened.processes.device)

        training_options.say_start(run, opened, total)
        reference = reference_log_probabilities(
            initial,
            encoded.rows,
            opened.processes,
            opened.micro_batch(),
            opened.directory.path / "reference.safetensors",
            source_model.digest,
        )
        source = PairSource(encoded.rows, reference, batch_size, epochs=epochs, seed=run.seed)
        with live_view.shown(run, opened, total) as report:
            outcome = opened.train(
                opened.model(initial),
                dpo(beta),
                source,
                build_schedule(schedule, rate, total, warmup_tokens(warmup, total), min_lr, decay),
                figures=FIGURES,
                tokenizer_files=files,
                stop_ids=training_options.stop_ids(info, files),
                report=report,
            )
        training_options.finish(run, outcome, **encoded.counts)

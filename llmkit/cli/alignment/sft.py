"""`llmkit sft`: fine-tune a model on conversations, with the loss on what the assistant says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmkit.cli.shared import live_view, training_options
from llmkit.cli.shared.options import ModelPath, Run, command


@command(
    examples=(
        "llmkit sft run/ chat.jsonl --epochs 2 -o sft/",
        "llmkit sft run/ chat.jsonl --lr 1e-3 --batch-size 4 --too-long truncate -o sft2/",
    ),
    neutral=training_options.NEUTRAL_OPTIONS,
    reads=True,
)
def main(
    run: Run,
    model: ModelPath,
    rows: Annotated[
        list[str] | None,
        typer.Argument(metavar="ROWS", help="Conversations as JSON lines or Parquet; '-' or nothing is stdin"),
    ] = None,
    epochs: training_options.Epochs = 1,
    chat_template: Annotated[
        Path | None, typer.Option("--chat-template", metavar="FILE", help="Jinja template instead of the model's own")
    ] = None,
    template: Annotated[
        bool, typer.Option("--template/--no-template", help="Prompt and completion strings as turns, or as plain text")
    ] = True,
    too_long: training_options.TooLong = "drop",
    batch_size: training_options.BatchSize = 8,
    micro_batch_size: training_options.MicroBatch = None,
    sequence_length: training_options.SequenceLength = None,
    lr: training_options.Rate = None,
    schedule: training_options.ScheduleName = "linear",
    warmup: training_options.Warmup = 0.03,
    min_lr: training_options.Floor = 0.0,
    decay: training_options.Decay = 0.2,
    weight_decay: training_options.WeightDecay = 0.0,
    clip: training_options.Clip = 1.0,
    z_loss: training_options.ZLoss = 0.0,
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
    heldout: training_options.HeldOut = None,
    eval_every: training_options.EvalEvery = 0,
    log_every: training_options.LogEvery = 10,
    tracker: training_options.TrackerName = None,
) -> None:
    """Fine-tune a model on rows of messages, ShareGPT conversations, Alpaca instructions, prompts with completions, or plain text.

    The chat template is the model's own; the loss counts the assistant's content, its tool calls and its stop token, and nothing else. Rows are
    packed into sequences in which none sees another, and every step's loss is the mean over its counted tokens. A message may carry its own
    `weight`, or `train: false`. The model that comes out stops at its end of turn (generation_config.json).
    """
    if training_options.launched(
        run, [model, *(rows or []), *(heldout or [])], resume=resume, processes=processes, max_restarts=max_restarts
    ):
        return
    import torch

    from llmkit.chat import templates
    from llmkit.chat.encode import encode_conversations
    from llmkit.model.pretrained.checkpoint import load_model
    from llmkit.training import session as sessions
    from llmkit.training.data import PackedSource
    from llmkit.training.objectives import next_token
    from llmkit.training.optim.schedule import FINE_TUNING, build_schedule, default_rate, warmup_tokens

    sessions.check_positive(lr=lr)
    settings = sessions.Settings(
        run.output or "", resume, run.force, precision, threads, micro_batch_size, clip, weight_decay, save_every, keep, eval_every, z_loss=z_loss, log_every=log_every, tracker=tracker, keep_every=keep_every, max_hours=max_hours, max_rollbacks=max_rollbacks,
        parallel=parallel, hang_timeout=hang_timeout, accept_change=accept_change,
        compile=compile, checkpoint_activations=checkpoint_activations, deterministic=deterministic,
    )  # fmt: skip
    with training_options.opened(run, settings) as opened:
        info, files, length = training_options.chat_model(run, model, chat_template, sequence_length)
        if template:
            templates.check_template(files)
        reader = training_options.row_reader(run, opened, rows)
        encoded = encode_conversations(reader, files, length, too_long=too_long, template=template)
        row_inputs = training_options.row_inputs(reader)
        training_options.say_rows(run, encoded, length, too_long)
        source = PackedSource(encoded.pairs(), length, batch_size, epochs=epochs, seed=run.seed)
        planned = source.tokens(source.steps)
        rate = lr or default_rate(info.config.parameters()) * FINE_TUNING
        plan = build_schedule(schedule, rate, planned, warmup_tokens(warmup, planned), min_lr, decay)
        held_out = None
        if heldout:
            reader = run.reader(heldout, text_key=None, files_from=None)
            other = encode_conversations(reader, files, length, too_long=too_long, template=template)
            held_out = PackedSource(other.pairs(), length, batch_size, shuffle=False)
        if run.dry_run:
            training_options.show_plan(run, opened, info.config, source, rate, length)
            return
        text = training_options.config_text(run, ("model", "rows"), lr=rate)
        if not opened.begin(
            run.lineage(), [training_options.model_input(model), *row_inputs], batch_size, length, text
        ):
            training_options.nothing_to_do(run)
            return
        training_options.say_start(run, opened, planned)
        run.detail(f"{source.padding:.1%} of the positions are padding")
        with live_view.shown(run, opened, planned) as report:
            outcome = opened.train(
                opened.model(lambda: load_model(model, torch.float32)[0]),
                next_token,
                source,
                plan,
                tokenizer_files=files,
                stop_ids=training_options.stop_ids(info, files),
                heldout=held_out,
                report=report,
            )
        training_options.finish(run, outcome, **encoded.counts)

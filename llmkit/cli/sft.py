"""`llmkit sft`: fine-tune a model on conversations, with the loss on what the assistant says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmkit.cli import fitting, live
from llmkit.cli.options import ModelPath, Run, command


@command(
    examples=(
        "llmkit sft run/ chat.jsonl --epochs 2 -o sft/",
        "llmkit sft run/ chat.jsonl --lr 1e-3 --batch-size 4 --too-long truncate -o sft2/",
    ),
    neutral=fitting.NEUTRAL_OPTIONS,
    reads=True,
)
def main(
    run: Run,
    model: ModelPath,
    rows: Annotated[
        list[str] | None,
        typer.Argument(metavar="ROWS", help="Conversations as JSON lines or Parquet; '-' or nothing is stdin"),
    ] = None,
    epochs: fitting.Epochs = 1,
    chat_template: Annotated[
        Path | None, typer.Option("--chat-template", metavar="FILE", help="Jinja template instead of the model's own")
    ] = None,
    template: Annotated[
        bool, typer.Option("--template/--no-template", help="Prompt and completion strings as turns, or as plain text")
    ] = True,
    too_long: fitting.TooLong = "drop",
    batch_size: fitting.BatchSize = 8,
    micro_batch_size: fitting.MicroBatch = None,
    sequence_length: fitting.SequenceLength = None,
    lr: fitting.Rate = None,
    schedule: fitting.ScheduleName = "linear",
    warmup: fitting.Warmup = 0.03,
    min_lr: fitting.Floor = 0.0,
    decay: fitting.Decay = 0.2,
    weight_decay: fitting.WeightDecay = 0.0,
    clip: fitting.Clip = 1.0,
    z_loss: fitting.ZLoss = 0.0,
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
    heldout: fitting.HeldOut = None,
    eval_every: fitting.EvalEvery = 0,
    log_every: fitting.LogEvery = 10,
    tracker: fitting.TrackerName = None,
) -> None:
    """Fine-tune a model on rows of messages, ShareGPT conversations, Alpaca instructions, prompts with completions, or plain text.

    The chat template is the model's own; the loss counts the assistant's content, its tool calls and its stop token, and nothing else. Rows are
    packed into sequences in which none sees another, and every step's loss is the mean over its counted tokens. A message may carry its own
    `weight`, or `train: false`. The model that comes out stops at its end of turn (generation_config.json).
    """
    if fitting.launched(
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
    from llmkit.training.optim.schedule import FINE_TUNING, default_rate, named, warmup_tokens

    sessions.check_positive(lr=lr)
    settings = sessions.Settings(
        run.output or "", resume, run.force, precision, threads, micro_batch_size, clip, weight_decay, save_every, keep, eval_every, z_loss=z_loss, log_every=log_every, tracker=tracker, keep_every=keep_every, max_hours=max_hours, max_rollbacks=max_rollbacks,
        parallel=parallel, hang_timeout=hang_timeout, accept_change=accept_change,
        compile=compile, checkpoint_activations=checkpoint_activations, deterministic=deterministic,
    )  # fmt: skip
    with fitting.opened(run, settings) as opened:
        info, files, length = fitting.chat_model(run, model, chat_template, sequence_length)
        if template:
            templates.check_template(files)
        reader = fitting.row_reader(run, opened, rows)
        encoded = encode_conversations(reader, files, length, too_long=too_long, template=template)
        row_inputs = fitting.row_inputs(reader)
        fitting.say_rows(run, encoded, length, too_long)
        source = PackedSource(encoded.pairs(), length, batch_size, epochs=epochs, seed=run.seed)
        planned = source.tokens(source.steps)
        rate = lr or default_rate(info.config.parameters()) * FINE_TUNING
        plan = named(schedule, rate, planned, warmup_tokens(warmup, planned), min_lr, decay)
        held_out = None
        if heldout:
            reader = run.reader(heldout, text_key=None, files_from=None)
            other = encode_conversations(reader, files, length, too_long=too_long, template=template)
            held_out = PackedSource(other.pairs(), length, batch_size, shuffle=False)
        if run.dry_run:
            fitting.show_plan(run, opened, info.config, source, rate, length)
            return
        text = fitting.config_text(run, ("model", "rows"), lr=rate)
        if not opened.begin(run.lineage(), [fitting.model_input(model), *row_inputs], batch_size, length, text):
            fitting.nothing_to_do(run)
            return
        fitting.say_start(run, opened, planned)
        run.detail(f"{source.padding:.1%} of the positions are padding")
        with live.shown(run, opened, planned) as report:
            outcome = opened.train(
                opened.model(lambda: load_model(model, torch.float32)[0]),
                next_token,
                source,
                plan,
                tokenizer_files=files,
                stop_ids=fitting.stop_ids(info, files),
                heldout=held_out,
                report=report,
            )
        fitting.finish(run, outcome, **encoded.counts)

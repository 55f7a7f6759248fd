"""`llmkit train`: pre-train a decoder from scratch."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer

from llmkit.cli import fitting
from llmkit.cli.options import Run, command, count_option

if TYPE_CHECKING:
    from llmkit.io.tokenizer import TokenizerInfo
    from llmkit.model.config import ModelConfig


@command(
    examples=(
        "llmkit train mix/ -m tiny --tokens 20k -o run/",
        "llmkit train mix/ -m tiny --tokens 20k -o run/ --resume",
        "llmkit train mix/ -m tiny --tokens 20k --schedule wsd --heldout heldout/ -o run2/",
    ),
    neutral=fitting.NEUTRAL_OPTIONS,
)
def main(
    run: Run,
    data: Annotated[
        str, typer.Argument(metavar="DATA", help="Token shards, a mix, its plan, or '-' for a stream")
    ] = "-",
    model: Annotated[
        str, typer.Option("--model", "-m", help="Preset (tiny, 5m, ... 1b; llama-tiny) or config.json")
    ] = "tiny",
    tokens: Annotated[
        int | None,
        count_option("--tokens", help="Tokens to train on; by default the data once", rich_help_panel=fitting.STEPS),
    ] = None,
    batch_size: fitting.BatchSize = 8,
    micro_batch_size: fitting.MicroBatch = None,
    sequence_length: fitting.SequenceLength = None,
    document_mask: fitting.DocumentMask = True,
    lr: fitting.Rate = None,
    schedule: fitting.ScheduleName = "cosine",
    warmup: fitting.Warmup = 0.05,
    min_lr: fitting.Floor = 0.1,
    decay: fitting.Decay = 0.2,
    weight_decay: fitting.WeightDecay = 0.1,
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
) -> None:
    """Train a decoder on token shards in their order, which is that of `mix`.

    The run directory holds a Hugging Face model directory for every checkpoint, the log (metrics.jsonl), and at the end the link `final`. A run
    that was killed goes on with --resume and ends in the same bytes. Step s reads the same tokens whatever the number of processes. torchrun
    and `accelerate launch -m llmkit train ...` may start them instead of --processes (on CPU, Accelerate starts several only through MPI).
    """
    if fitting.launched(run, [data, *(heldout or [])], resume=resume, processes=processes, max_restarts=max_restarts):
        return
    from llmkit.io.lineage import base_name, describe_input
    from llmkit.model.decoder import Decoder
    from llmkit.training import session as sessions
    from llmkit.training.data import StreamSource
    from llmkit.training.objectives import next_token
    from llmkit.training.schedule import Schedule, default_rate, warmup_tokens

    sessions.check_positive(lr=lr, tokens=tokens)
    settings = sessions.Settings(
        run.output or "", resume, run.force, precision, threads, micro_batch_size, clip, weight_decay, save_every, keep, eval_every, z_loss=z_loss, keep_every=keep_every, max_hours=max_hours, max_rollbacks=max_rollbacks,
        parallel=parallel, hang_timeout=hang_timeout, accept_change=accept_change,
        compile=compile, checkpoint_activations=checkpoint_activations, deterministic=deterministic,
    )  # fmt: skip
    with fitting.opened(run, settings) as opened:
        stream = fitting.open_stream(data, opened, run.dry_run)
        asked = fitting.packed_length(data, stream.sequence_length, sequence_length, document_mask)
        config = _config(model, stream.tokenizer, asked)
        length, total, rate = (
            config.max_position_embeddings,
            tokens or stream.tokens,
            lr or default_rate(config.parameters()),
        )
        source = StreamSource(
            stream, length, batch_size, total, document_mask=document_mask, vocabulary=config.vocab_size
        )
        planned = source.tokens(source.steps)
        plan = Schedule(schedule, rate, planned, warmup_tokens(warmup, planned), min_lr, decay)
        held_out = fitting.held_out(heldout, stream.tokenizer.digest, length, document_mask)
        if run.dry_run:
            fitting.show_plan(run, config, source, rate, length)
            return
        record, inputs = run.lineage(), list(stream.inputs)
        if os.path.isfile(model):
            record.options["model"] = base_name(model)
            inputs.append(describe_input(model, "model"))
        text = fitting.config_text(run, ("data",), lr=rate, tokens=total)
        if not opened.begin(record, inputs, batch_size, length, text):
            fitting.nothing_to_do(run)
            return
        fitting.say_start(run, opened, planned, stream.tokens)

        def fresh() -> Decoder:
            new = Decoder(config)
            new.initialise(run.seed)
            return new

        with run.progress(planned, "tokens") as bar:
            outcome = opened.train(
                opened.model(fresh),
                next_token,
                source,
                plan,
                tokenizer_files=stream.tokenizer.files,
                heldout=held_out,
                report=fitting.reporter(bar),
            )
        fitting.finish(run, outcome, parameters=config.parameters())


def _config(model: str, tokenizer: TokenizerInfo, sequence_length: int | None) -> ModelConfig:
    """The preset or file, for this tokenizer; the model's context is what it is trained with."""
    import dataclasses

    from llmkit.model.config import load_config

    config = load_config(model, tokenizer.vocab_size)
    return dataclasses.replace(
        config,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.pad_id,
        max_position_embeddings=sequence_length or config.max_position_embeddings,
    )

"""`llmkit anneal`: continue a run while its learning rate falls to zero."""

from __future__ import annotations

from typing import Annotated

import typer

from llmkit.cli.shared import live_view, training_options
from llmkit.cli.shared.options import Run, command, count_option
from llmkit.errors import UsageError, unknown_name


@command(
    examples=(
        "llmkit anneal run/ shards/ --tokens 10k -o annealed/",
        "llmkit anneal run/ shards/ --tokens 10k --from step-00000002 --ramp sqrt -o annealed2/",
    ),
    neutral=training_options.NEUTRAL_OPTIONS,
)
def main(
    run: Run,
    start: Annotated[
        str, typer.Argument(metavar="RUN", help="A run, one of its checkpoints, or a model directory (then give --lr)")
    ],
    data: Annotated[
        str, typer.Argument(metavar="DATA", help="Token shards, a mix, its plan, or '-' for a stream")
    ] = "-",
    tokens: Annotated[
        int | None,
        count_option(
            "--tokens", help="Tokens to train on; by default the data once", rich_help_panel=training_options.STEPS
        ),
    ] = None,
    from_: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="STEP",
            help="Checkpoint of the run to start from, such as step-00000500 or 500; by default its last",
            rich_help_panel=training_options.STEPS,
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size",
            "-b",
            min=1,
            help="Sequences a step; by default that of the run",
            rich_help_panel=training_options.STEPS,
        ),
    ] = None,
    micro_batch_size: training_options.MicroBatch = None,
    sequence_length: training_options.SequenceLength = None,
    document_mask: training_options.DocumentMask = True,
    lr: Annotated[
        float | None,
        typer.Option(
            "--lr",
            help="First learning rate; by default that of the checkpoint",
            rich_help_panel=training_options.OPTIMISER,
        ),
    ] = None,
    ramp: Annotated[
        str,
        typer.Option(
            "--ramp",
            metavar="NAME",
            help="How the rate falls: linear, sqrt or cosine",
            rich_help_panel=training_options.OPTIMISER,
        ),
    ] = "linear",
    to: Annotated[
        float,
        typer.Option(
            "--to", min=0, help="Last learning rate, relative to the first", rich_help_panel=training_options.OPTIMISER
        ),
    ] = 0.0,
    weight_decay: training_options.WeightDecay = 0.1,
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
    samples: training_options.Samples = None,
    eval_tasks: training_options.EvalTasks = None,
    eval_limit: training_options.EvalLimit = 100,
    include_path: training_options.IncludePath = None,
) -> None:
    """Continue from a checkpoint, optimiser included, on data of its own, while the learning rate falls to zero.

    The rate starts where the checkpoint's step had it. One trunk may be annealed any number of times, on different data and from different steps;
    `llmkit average` brings the branches together. From a model directory without the state of an optimiser the moments start at zero, and --lr is needed.
    """
    if training_options.launched(
        run,
        [start, data, *training_options.held_out_paths(heldout)],
        resume=resume,
        processes=processes,
        max_restarts=max_restarts,
    ):
        return
    import torch

    from llmkit.model.pretrained.checkpoint import load_info, load_model
    from llmkit.shards.tokenizer_info import parse_tokenizer
    from llmkit.training import session as sessions
    from llmkit.training.checkpoint.run_directory import starting_point
    from llmkit.training.data import StreamSource
    from llmkit.training.objectives import next_token
    from llmkit.training.optim.schedule import DECAY_SHAPES, build_schedule

    sessions.check_positive(lr=lr, tokens=tokens)
    if ramp not in DECAY_SHAPES:
        raise unknown_name("ramp", ramp, DECAY_SHAPES)
    if to > 1:
        raise UsageError(f"--to {to} is above 1", "it is the last learning rate over the first")
    step = from_.removeprefix("step-") if from_ else ""
    if from_ and not (step.isascii() and step.isdigit()):
        raise UsageError(f"--from {from_}: no checkpoint is called so", "such as step-00000500, or 500")
    settings = sessions.Settings(
        run.output or "", resume, run.force, precision, threads, micro_batch_size, clip, weight_decay, save_every, keep, eval_every, z_loss=z_loss, log_every=log_every, tracker=tracker, keep_every=keep_every, max_hours=max_hours, max_rollbacks=max_rollbacks,
        parallel=parallel, hang_timeout=hang_timeout, accept_change=accept_change, optimizer="",
        compile=compile, checkpoint_activations=checkpoint_activations, deterministic=deterministic,
    )  # fmt: skip
    with training_options.opened(run, settings) as opened:
        directory, before = starting_point(start, int(step) if step else None)
        info = load_info(directory)
        rate = lr or (before.rate if before else None)
        if not rate:
            why = "its last step had a learning rate of 0" if before else "it holds no state of an optimiser"
            raise UsageError(f"{start}: {why}", "name the learning rate to start from with --lr")
        batch = batch_size or (before.batch_size if before else 8)
        stream = training_options.open_stream(data, opened, run.dry_run)
        asked = training_options.packed_length(data, stream.sequence_length, sequence_length, document_mask)
        length = training_options.context(info, asked)
        digest = parse_tokenizer(info.tokenizer_files, start).digest
        training_options.refuse_other_tokenizer(data, stream.tokenizer.digest, digest)
        source = StreamSource(
            stream,
            length,
            batch,
            tokens or stream.tokens,
            document_mask=document_mask,
            vocabulary=info.config.vocab_size,
            groups=training_options.groups(stream),
        )
        if length > stream.tokens:
            raise UsageError(
                f"sequences of {length:,} tokens, but {data} holds {stream.tokens:,}",
                "give a shorter --sequence-length",
            )
        planned = source.tokens(source.steps)
        held_out = training_options.held_out(heldout, digest, length, document_mask)
        training_options.at_checkpoints(
            run, opened, info.tokenizer_files, info.stop_ids, samples, eval_tasks, eval_limit, include_path
        )
        if run.dry_run:
            training_options.show_plan(run, opened, info.config, source, rate, length)
            return
        text = training_options.config_text(
            run, ("start", "data"), lr=rate, batch_size=batch, tokens=tokens or stream.tokens
        )
        inputs = [training_options.model_input(start, directory), *stream.inputs]
        if not opened.begin(run.lineage(), inputs, batch, length, text):
            training_options.keep_trace(opened, stream, source)  # the data may lie elsewhere now
            training_options.nothing_to_do(run)
            return
        training_options.say_start(run, opened, planned, stream.tokens)
        training_options.keep_trace(opened, stream, source)
        with live_view.shown(run, opened, planned) as report:
            outcome = opened.train(
                opened.model(lambda: load_model(directory, torch.float32)[0]),
                next_token,
                source,
                build_schedule(ramp, rate, planned, floor=to),
                tokenizer_files=info.tokenizer_files,
                stop_ids=info.stop_ids,
                heldout=held_out,
                optimizer_from=directory if before else None,
                report=report,
            )
        training_options.finish(run, outcome)

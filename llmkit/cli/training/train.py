"""`llmkit train`: pre-train a decoder, from scratch or from another model."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer

from llmkit.cli.shared import live_view, recipe_options, training_options
from llmkit.cli.shared.options import Run, command, count_option
from llmkit.errors import UsageError

if TYPE_CHECKING:
    from llmkit.model.config import ModelConfig
    from llmkit.shards.tokenizer_info import TokenizerInfo


@command(
    examples=(
        "llmkit train mix/ -m tiny --tokens 20k -o run/",
        "llmkit train mix/ -m tiny --tokens 20k -o run/ --resume",
        "llmkit train mix/ -m tiny --tokens 20k --schedule wsd --heldout heldout/ -o run2/",
        "llmkit train mix/ -m tiny --tokens 20k --recipe amber --sequence-length 256 -o run3/",
        "llmkit train --from run/ shards/ --tokens 20k --rewarm --lr 1e-3 -o on/",
    ),
    neutral=training_options.NEUTRAL_OPTIONS,
)
def main(
    run: Run,
    data: Annotated[
        str, typer.Argument(metavar="DATA", help="Token shards, a mix, its plan, or '-' for a stream")
    ] = "-",
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Preset (tiny, the default, 5m, ... 1b; llama-tiny) or config.json"),
    ] = None,
    from_: Annotated[
        str | None,
        typer.Option(
            "--from", metavar="MODEL", help="Go on from a model directory, run or checkpoint, with its moments"
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        count_option(
            "--tokens", help="Tokens to train on; by default the data once", rich_help_panel=training_options.STEPS
        ),
    ] = None,
    batch_size: recipe_options.BatchSize = None,
    batch_warmup: recipe_options.BatchWarmup = None,
    micro_batch_size: training_options.MicroBatch = None,
    sequence_length: training_options.SequenceLength = None,
    length_warmup: recipe_options.LengthWarmup = None,
    document_mask: training_options.DocumentMask = True,
    recipe: recipe_options.RecipeName = None,
    lr: training_options.Rate = None,
    schedule: recipe_options.ScheduleName = None,
    warmup: recipe_options.Warmup = None,
    rewarm: Annotated[
        bool,
        typer.Option(
            "--rewarm",
            help="With --from: raise the rate again, then let it fall",
            rich_help_panel=training_options.OPTIMISER,
        ),
    ] = False,
    min_lr: recipe_options.Floor = None,
    decay: recipe_options.Decay = None,
    decay_shape: recipe_options.DecayShape = None,
    optimizer: training_options.OptimizerName = "adamw",
    weight_decay: recipe_options.WeightDecay = None,
    clip: recipe_options.Clip = None,
    betas: recipe_options.Betas = None,
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
    """Train a decoder on token shards in their order, which is that of `mix`.

    The run directory holds a Hugging Face model directory for every checkpoint, the log (metrics.jsonl; llmkit/training/metrics/curves.py says what each
    name in it means), and at the end the link `final`. A run that was killed goes on with --resume and ends in the same bytes. Step s reads the
    same tokens whatever the number of processes. torchrun and `accelerate launch -m llmkit train ...` may start them instead of --processes (on
    CPU, Accelerate starts several only through MPI).

    --recipe takes rates, sizes and defaults from a model that was published, scaled to --tokens, or from a TOML of stages, each with its rates,
    sequence length and rope_theta; where the data is a mix of as many --stages, these say where each ends. --lr stretches its curve to another
    peak. --from goes on from any model directory or run: at the run's last rate, or with --rewarm up to --lr and down again (arXiv:2403.08763).
    Moments are kept where the start has them.
    """
    inputs = [data, *([from_] if from_ else []), *training_options.held_out_paths(heldout)]
    if training_options.launched(run, inputs, resume=resume, processes=processes, max_restarts=max_restarts):
        return
    import dataclasses

    import torch

    from llmkit.io.record import base_name
    from llmkit.lineage.formats import describe_input
    from llmkit.model.decoder import Decoder
    from llmkit.model.pretrained.checkpoint import load_info, load_model
    from llmkit.shards.tokenizer_info import parse_tokenizer
    from llmkit.training import session as sessions
    from llmkit.training.checkpoint.run_directory import starting_point
    from llmkit.training.objectives import next_token
    from llmkit.training.optim.schedule import default_rate
    from llmkit.training.recipe import is_path, read_recipe

    sessions.check_positive(lr=lr, tokens=tokens)
    if from_ and model:
        raise UsageError("--model together with --from", "the start says what the model is")
    if rewarm and not from_:
        raise UsageError("--rewarm without --from", "a new model is warmed up anyway")
    known = read_recipe(recipe) if recipe else None
    given = {
        "batch_size": batch_size, "weight_decay": weight_decay, "clip": clip, "betas": betas, "schedule": schedule,
        "warmup": warmup, "min_lr": min_lr, "decay": decay, "decay_shape": decay_shape, "rewarm": rewarm,
    }  # fmt: skip
    asked = recipe_options.resolve(
        run, known, given, recipe_options.CONTINUED if from_ and not rewarm else recipe_options.CURVE
    )
    settings = sessions.Settings(
        run.output or "", resume, run.force, precision, threads, micro_batch_size, asked["clip"], asked["weight_decay"], save_every, keep, eval_every,
        betas=recipe_options.parse_betas(asked["betas"]), z_loss=z_loss, log_every=log_every, tracker=tracker, keep_every=keep_every, max_hours=max_hours,
        max_rollbacks=max_rollbacks, parallel=parallel, hang_timeout=hang_timeout, accept_change=accept_change, optimizer=optimizer,
        compile=compile, checkpoint_activations=checkpoint_activations, deterministic=deterministic,
    )  # fmt: skip
    with training_options.opened(run, settings) as opened:
        start, before = starting_point(from_, None) if from_ else (None, None)
        info = load_info(start) if start else None
        stream = training_options.open_stream(data, opened, run.dry_run)
        wanted = training_options.packed_length(data, stream.sequence_length, sequence_length, document_mask)
        usual = asked.get("sequence_length")
        total, files, stop_ids = tokens or stream.tokens, stream.tokenizer.files, None
        if info:
            digest = parse_tokenizer(info.tokenizer_files, from_ or "").digest
            training_options.refuse_other_tokenizer(data, stream.tokenizer.digest, digest)
            config, files, stop_ids = info.config, info.tokenizer_files, info.stop_ids
            length = training_options.context(
                info, wanted or (min(usual, config.max_position_embeddings) if usual else None)
            )
        else:
            run.options["model"] = model = model or "tiny"
            config = _config(model, stream.tokenizer, wanted or usual)
            length = config.max_position_embeddings
        if batch_size is None:
            scaled = known.scaled_batch_size(total) if known else None
            asked["batch_size"] = scaled or (before.batch_size if before else asked["batch_size"])
        run.options["batch_size"] = asked["batch_size"]
        last = before.rate if before else None
        rate = lr or (default_rate(config.parameters()) if rewarm or last is None else last)
        if not rate:
            raise UsageError(f"{from_}: its last step had a learning rate of 0", "raise it again: --rewarm, or --lr")
        course = recipe_options.plan_course(
            stream, data, config, length, asked, total=total, recipe=known, lr=rate, stretch=lr, first=last or 0.0,
            batch_warmup=batch_warmup, length_warmup=length_warmup, document_mask=document_mask, fixed_context=bool(info),
        )  # fmt: skip
        source, config = course.source, course.config
        planned, length = source.tokens(source.steps), max(phase.length for phase in source.phases)
        held_out = training_options.held_out(heldout, stream.tokenizer.digest, length, document_mask)
        training_options.at_checkpoints(
            run,
            opened,
            files,
            stop_ids or [stream.tokenizer.eos_id],
            samples,
            eval_tasks,
            eval_limit,
            include_path,
        )
        if run.dry_run:
            recipe_options.show_course(run, course, asked)
            training_options.show_plan(run, opened, config, source, course.schedule.peak, length)
            return
        record, read = run.lineage(), list(stream.inputs)
        for option, path in (("model", model), ("recipe", recipe)):
            if path and os.path.isfile(path) and (option == "model" or is_path(path)):
                record.options[option] = base_name(path)
                read.append(describe_input(path, option))
        if start:
            record.options["from_"] = base_name(from_ or "")
            read.append(dataclasses.replace(training_options.model_input(from_ or "", start), role="from_"))
        text = training_options.config_text(run, ("data",), **asked | {"lr": course.schedule.peak, "tokens": total})
        if not opened.begin(record, read, asked["batch_size"], length, text):
            training_options.keep_trace(opened, stream, source)  # the data may lie elsewhere now
            training_options.nothing_to_do(run)
            return
        training_options.say_start(run, opened, planned, stream.tokens)
        training_options.keep_trace(opened, stream, source)

        def fresh() -> Decoder:
            if start:
                started = load_model(start, torch.float32)[0]
                started.config = config
                return started
            new = Decoder(config)
            new.initialise(run.seed)
            return new

        with live_view.shown(run, opened, planned) as report:
            outcome = opened.train(
                opened.model(fresh),
                next_token,
                source,
                course.schedule,
                tokenizer_files=files,
                stop_ids=stop_ids,
                heldout=held_out,
                optimizer_from=start if before else None,
                rope_theta=course.theta if course.thetas else None,
                report=report,
            )
        training_options.finish(run, outcome, parameters=config.parameters())


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

"""Pre-training and annealing: from a token stream and options to a run.

    outcome = pretrain("mix/", "run/", model="tiny", tokens=20_000, lr=3e-4)
    outcome = anneal("run/", "mix/", "annealed/", tokens=5_000)

The keyword options are those of `llmkit train` and `llmkit anneal`, and give byte-identical output.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from llmkit.errors import UsageError, unknown_name
from llmkit.io.record import Input, base_name
from llmkit.io.run_layout import checkpoint_name, parse_step
from llmkit.lineage.formats import describe_input
from llmkit.mixing.order import OrderedTokens
from llmkit.model.config import ModelConfig, load_config
from llmkit.model.decoder import Decoder
from llmkit.model.pretrained.adapter import refuse_adapter
from llmkit.model.pretrained.checkpoint import load_info, load_model
from llmkit.options import check_positive, from_values
from llmkit.shards.reader import TokenStore
from llmkit.shards.tokenizer_info import TokenizerInfo, parse_tokenizer
from llmkit.tokens.pretokenize import pattern_name
from llmkit.training.batch_schedule import parse_sizes, size_changes
from llmkit.training.checkpoint.run_directory import starting_point
from llmkit.training.checkpoint.trainer_state import TrainerState
from llmkit.training.data import StreamSource
from llmkit.training.inputs import (
    check_stream_length,
    check_tokenizer,
    context_length,
    held_out_source,
    model_input,
    open_stream,
    packed_length,
    source_groups,
)
from llmkit.training.optim.optimizer import parse_betas
from llmkit.training.optim.recipe import Recipe, RopeThetas, is_path, read_recipe
from llmkit.training.optim.schedule import DECAY_SHAPES, Schedule, build_schedule, default_rate, warmup_tokens
from llmkit.training.options import AnnealOptions, PretrainOptions
from llmkit.training.runner import AtCheckpoint, Prepared, Record, Request, open_session, run_training
from llmkit.training.session import Session

# Values used where neither an option nor a recipe has one.
DEFAULTS: dict[str, Any] = {"batch_size": 8, "weight_decay": 0.1, "clip": 1.0, "betas": "0.9,0.95"}
CURVE: dict[str, Any] = {
    "schedule": "cosine",
    "warmup": 0.05,
    "final_lr_fraction": 0.1,
    "decay": 0.2,
    "decay_shape": "linear",
}
# Continuing from a checkpoint: its learning rate stays constant unless another schedule is given.
CONTINUED = CURVE | {"schedule": "constant", "warmup": 0.0}


def pretrain(
    data: str,
    output: str,
    *,
    seed: int = 0,
    force: bool = False,
    at_checkpoint: list[AtCheckpoint] | None = None,
    report: Callable[[Record], None] = lambda record: None,
    **options: Any,
) -> Record | None:
    """Train a decoder on token shards, like `llmkit train`; `report` is called with every record of metrics.jsonl.

    Returns steps, tokens, losses and tokens per second, or None if the run had already finished. Raises the LlmkitError
    and UsageError of the command.
    """
    request = Request.of("train", from_values(PretrainOptions, options), output, seed=seed, force=force)
    resolved = resolve_pretraining(request)
    with open_session(request) as session:
        prepared = prepare_pretraining(request, session, data, resolved).prepared
        return run_training(
            request, session, prepared, at_checkpoint=at_checkpoint, observe=lambda: nullcontext(report)
        )


def anneal(
    start: str,
    data: str,
    output: str,
    *,
    seed: int = 0,
    force: bool = False,
    at_checkpoint: list[AtCheckpoint] | None = None,
    report: Callable[[Record], None] = lambda record: None,
    **options: Any,
) -> Record | None:
    """Continue a run while its learning rate decays, like `llmkit anneal`; otherwise as `pretrain`."""
    request = Request.of("anneal", from_values(AnnealOptions, options), output, seed=seed, force=force)
    check_annealing(request.options)
    with open_session(request) as session:
        prepared = prepare_annealing(request, session, start, data)
        return run_training(
            request, session, prepared, at_checkpoint=at_checkpoint, observe=lambda: nullcontext(report)
        )


@dataclass(frozen=True, slots=True)
class Resolved:
    """A recipe, if any, and the values of the options in DEFAULTS and CURVE."""

    recipe: Recipe | None
    values: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Plan:
    """A prepared pre-training run, its rope_theta over time, and its resolved options."""

    prepared: Prepared
    thetas: RopeThetas | None
    resolved: dict[str, Any]

    def theta(self, step: int) -> float:
        """The base of the rotary embedding in `step`."""
        tokens = self.prepared.source.tokens(step)
        return self.thetas.at(tokens) if self.thetas else self.prepared.config.rope_theta


@dataclass(frozen=True, slots=True)
class _Schedules:
    """Batches, learning rates, the model configuration with its longest context, and rope_theta over time."""

    source: StreamSource
    schedule: Schedule
    config: ModelConfig
    thetas: RopeThetas | None


def resolve_pretraining(request: Request) -> Resolved:
    """Resolve each option to the given value, or else the recipe's, or else the default.

    The values are added to the record and passed on to the loop. Options of a curve that the recipe defines are left
    out and must not be given. Raises UsageError for these, and for options that are mutually exclusive.
    """
    options: PretrainOptions = request.options
    start = options.start
    check_positive(lr=options.schedule.lr, tokens=options.stream.tokens)
    if start.from_ and start.model:
        raise UsageError("--model and --from are mutually exclusive", "--from uses the configuration of its model")
    if start.rewarm and not start.from_:
        raise UsageError("--rewarm requires --from", "a new model is warmed up anyway")
    recipe = read_recipe(start.recipe) if start.recipe else None
    explicit = dataclasses.asdict(options.schedule) | {
        "batch_size": options.batch.batch_size,
        "weight_decay": options.optimizer.weight_decay,
        "clip": options.optimizer.clip,
        "betas": options.optimizer.betas,
        "rewarm": start.rewarm,
    }
    curve = CONTINUED if start.from_ and not start.rewarm else CURVE
    has_curve = recipe is not None and any(stage.lr is not None for stage in recipe.stages)
    named_options = [key for key in (*CURVE, "rewarm") if explicit.get(key) is not None and explicit[key] is not False]
    if has_curve and named_options:
        raise UsageError(
            f"--{named_options[0].replace('_', '-')} cannot be combined with this --recipe",
            "the recipe defines the learning-rate curve; --lr scales it",
        )
    from_recipe = dict(recipe.defaults) if recipe else {}
    if "betas" in from_recipe:
        from_recipe["betas"] = ",".join(map(str, from_recipe["betas"]))
    resolved = (DEFAULTS if has_curve else DEFAULTS | curve) | from_recipe
    resolved |= {key: value for key, value in explicit.items() if key in resolved and value is not None}
    request.record.options |= {
        key: value for key, value in resolved.items() if key not in ("batch_size", "sequence_length")
    }
    parse_betas(resolved["betas"])  # a wrong value is refused before anything is opened
    optimizer = dataclasses.replace(
        request.loop.optimizer, **{key: resolved[key] for key in ("weight_decay", "clip", "betas")}
    )
    request.loop = dataclasses.replace(request.loop, optimizer=optimizer)
    return Resolved(recipe, resolved)


def prepare_pretraining(request: Request, session: Session, data: str, values: Resolved) -> Plan:
    """Data, model, schedule and record of a pre-training run.

    Raises UsageError for options that do not fit each other or the data, and LlmkitError for unreadable data or models.
    """
    options: PretrainOptions = request.options
    recipe, resolved = values.recipe, dict(values.values)
    from_ = options.start.from_
    start, previous = starting_point(from_, None) if from_ else (None, None)
    info = load_info(start) if start else None
    if info:
        refuse_adapter(info, from_ or "")
    stream = open_stream(data, session, request.dry_run)
    mask = options.stream.document_mask
    requested = packed_length(data, stream.sequence_length, options.batch.sequence_length, mask)
    recipe_length = resolved.get("sequence_length")
    total = options.stream.tokens or stream.tokens
    model = options.start.model
    if info:
        digest = parse_tokenizer(info.tokenizer_files, from_ or "").digest
        check_tokenizer(data, stream.tokenizer.digest, digest)
        config, files, stop_ids = info.config, info.tokenizer_files, info.stop_ids
        length = context_length(info, requested or (min(recipe_length, config.context) if recipe_length else None))
    else:
        request.record.options["model"] = model = model or "tiny"
        config, files, stop_ids = (
            _config(model, stream.tokenizer, requested or recipe_length),
            stream.tokenizer.files,
            None,
        )
        length = config.max_position_embeddings
        if config.architecture == "qwen2" and not _splits_like_qwen2(files):
            request.warn("transformers applies Qwen's own pattern to a qwen2 model's text: use `vocab --pattern qwen2`")
    if options.batch.batch_size is None:
        scaled = recipe.scaled_batch_size(total) if recipe else None
        resolved["batch_size"] = scaled or (previous.batch_size if previous else resolved["batch_size"])
    request.record.options["batch_size"] = resolved["batch_size"]
    schedules = _plan_schedules(options, recipe, resolved, stream, data, config, length, total, previous, bool(info))
    source, config = schedules.source, schedules.config
    length = max(phase.length for phase in source.phases)
    held_out = held_out_source(options.heldout.heldout, stream.tokenizer.digest, length, mask)
    option_files = {"model": model, "recipe": options.start.recipe}
    option_files = {
        option: path
        for option, path in option_files.items()
        if path and os.path.isfile(path) and (option == "model" or is_path(path))
    }
    request.record.options |= {option: base_name(path) for option, path in option_files.items() if path}
    if start:
        request.record.options["from_"] = base_name(from_ or "")

    def inputs() -> list[Input]:
        option_inputs = [describe_input(path or "", option) for option, path in option_files.items()]
        initial_model = [dataclasses.replace(model_input(from_ or "", start), role="from_")] if start else []
        return [*stream.inputs, *option_inputs, *initial_model]

    def create_model() -> Decoder:
        if start:
            model = load_model(start, torch.float32)[0]
            model.config = config
            return model
        model = Decoder(config)
        model.initialize(request.seed)
        return model

    thetas = schedules.thetas
    prepared = Prepared(
        config=config,
        source=source,
        schedule=schedules.schedule,
        batch_size=resolved["batch_size"],
        length=length,
        inputs=inputs,
        tokenizer_files=files,
        stop_ids=stop_ids or [stream.tokenizer.eos_id],
        generation=info.generation if info else {},
        create_model=create_model,
        heldout=held_out,
        optimizer_from=start if previous else None,
        rope_theta=(lambda step: thetas.at(source.tokens(step))) if thetas else None,
        stream=stream,
        resolved=resolved | {"lr": schedules.schedule.peak, "tokens": total},
        positional=("data",),
        counts={"parameters": config.parameters()},
    )
    return Plan(prepared, thetas, resolved)


def _config(model: str, tokenizer: TokenizerInfo, sequence_length: int | None) -> ModelConfig:
    """The configuration of a preset or file, for this tokenizer and sequence length."""
    config = load_config(model, tokenizer.vocab_size)
    return dataclasses.replace(
        config,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.pad_id,
        max_position_embeddings=sequence_length or config.max_position_embeddings,
    )


def _splits_like_qwen2(files: Mapping[str, str]) -> bool:
    described = json.loads(files.get("tokenizer.json", "{}")).get("pre_tokenizer")
    return described is not None and pattern_name(described) == "qwen2"


def _plan_schedules(
    options: PretrainOptions,
    recipe: Recipe | None,
    resolved: dict[str, Any],
    stream: OrderedTokens | TokenStore,
    data: str,
    config: ModelConfig,
    length: int,
    total: int,
    previous: TrainerState | None,
    loaded: bool,
) -> _Schedules:
    """Batches and learning rates over `total` tokens.

    Only a stage with a rope_theta may exceed the context length of a `loaded` model. Raises UsageError for options that
    do not fit each other or the data.
    """
    start, lr = options.start, options.schedule.lr
    last_lr = previous.rate if previous else None
    rate = lr or (default_rate(config.parameters()) if start.rewarm or last_lr is None else last_lr)
    if not rate:
        raise UsageError(f"{start.from_}: its last step had a learning rate of 0", "raise it with --rewarm or --lr")
    ends = recipe.stage_ends(total, stream.stages) if recipe else [total]
    stages = recipe.sequence_lengths(ends, length) if recipe else []
    thetas = recipe.rope_thetas(ends, config.rope_theta) if recipe else None
    shorter = parse_sizes(start.length_warmup, "--length-warmup")
    longest = max([length, *(size for size, _ in stages)])
    check_stream_length(data, stream.tokens, longest)
    if stream.sequence_length and (shorter or any(size != length for size, _ in stages)):
        raise UsageError(
            f"{data} is packed for sequences of {length:,} tokens, but some would have another length",
            "mix with --pack concat",
        )
    if loaded and longest > config.context and not thetas:
        raise UsageError(
            f"sequences of {longest:,} tokens exceed the model's context of {config.context:,} tokens",
            "only a stage with its own rope_theta may be longer",
        )
    batches, batch_size = parse_sizes(start.batch_warmup, "--batch-warmup"), resolved["batch_size"]
    source = StreamSource(
        stream,
        longest,
        batch_size,
        total,
        changes=size_changes(batch_size, length, total, batches=batches, lengths=shorter, stages=stages),
        document_mask=options.stream.document_mask,
        vocabulary=config.vocab_size,
        groups=source_groups(stream),
    )
    schedule = recipe.schedule(ends, lr) if recipe else None
    if schedule is None:
        planned = source.tokens(source.steps)
        schedule = build_schedule(
            resolved["schedule"],
            rate,
            planned,
            warmup_tokens(resolved["warmup"], planned),
            resolved["final_lr_fraction"],
            resolved["decay"],
            resolved["decay_shape"],
            first=last_lr or 0.0,
        )
    context = longest if not loaded or longest > config.context else config.max_position_embeddings
    return _Schedules(source, schedule, dataclasses.replace(config, max_position_embeddings=context), thetas)


def prepare_annealing(request: Request, session: Session, start: str, data: str) -> Prepared:
    """Data, model and schedule of an annealing run; raises the errors of `prepare_pretraining`."""
    options: AnnealOptions = request.options
    directory, previous = starting_point(start, parse_step(options.ramp.step) if options.ramp.step else None)
    info = load_info(directory)
    refuse_adapter(info, start)
    rate = options.ramp.lr or (previous.rate if previous else None)
    if not rate:
        reason = "its last step had a learning rate of 0" if previous else "it has no optimizer state"
        raise UsageError(f"{start}: {reason}", "give the initial learning rate with --lr")
    batch_size = options.batch.batch_size or (previous.batch_size if previous else 8)
    stream, mask = open_stream(data, session, request.dry_run), options.stream.document_mask
    requested = packed_length(data, stream.sequence_length, options.batch.sequence_length, mask)
    length = context_length(info, requested)
    digest = parse_tokenizer(info.tokenizer_files, start).digest
    check_tokenizer(data, stream.tokenizer.digest, digest)
    total = options.stream.tokens or stream.tokens
    source = StreamSource(
        stream,
        length,
        batch_size,
        total,
        document_mask=mask,
        vocabulary=info.config.vocab_size,
        groups=source_groups(stream),
    )
    check_stream_length(data, stream.tokens, length)
    planned = source.tokens(source.steps)
    return Prepared(
        config=info.config,
        source=source,
        schedule=build_schedule(options.ramp.ramp, rate, planned, floor=options.ramp.final_lr_fraction),
        batch_size=batch_size,
        length=length,
        inputs=lambda: [model_input(start, directory), *stream.inputs],
        tokenizer_files=info.tokenizer_files,
        stop_ids=info.stop_ids,
        generation=info.generation,
        create_model=lambda: load_model(directory, torch.float32)[0],
        heldout=held_out_source(options.heldout.heldout, digest, length, mask),
        optimizer_from=directory if previous else None,
        stream=stream,
        resolved={"lr": rate, "batch_size": batch_size, "tokens": total},
        positional=("start", "data"),
    )


def check_annealing(options: AnnealOptions) -> None:
    """Raise UsageError for options that are out of range."""
    check_positive(lr=options.ramp.lr, tokens=options.stream.tokens)
    if options.ramp.ramp not in DECAY_SHAPES:
        raise unknown_name("ramp", options.ramp.ramp, DECAY_SHAPES)
    if options.ramp.final_lr_fraction > 1:
        raise UsageError(
            f"--final-lr-fraction {options.ramp.final_lr_fraction} is above 1",
            "it is the ratio of the final to the initial learning rate",
        )
    if options.ramp.step and parse_step(options.ramp.step) is None:
        raise UsageError(
            f"--step {options.ramp.step} is not the name of a checkpoint", f"such as {checkpoint_name(500)}, or 500"
        )

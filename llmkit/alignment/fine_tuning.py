"""Fine-tuning and preference optimization: from a model, rows and options to a run.

    outcome = fine_tune("run/", ["chat.jsonl"], "sft/", epochs=2, lr=1e-4)
    outcome = align("sft/", ["pairs.jsonl"], "chat/", beta=0.1)

The keyword options are those of `llmkit sft` and `llmkit dpo`, and give the same lineage record.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import fields
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch

from llmkit.alignment.chat_model import ChatModel, open_chat_model
from llmkit.alignment.options import DpoOptions, LoraOptions, RowOptions, SftOptions
from llmkit.alignment.pairs import FIGURES, PairSource, preference_objective, reference_log_probabilities
from llmkit.alignment.row_cache import RowCache
from llmkit.alignment.sources import RowMixture, RowSource, encoded_rows, read_sources, row_sources
from llmkit.chat import masks
from llmkit.chat.encode import TRUNCATE_TURNS, Encode, pair_encoding, row_encoder, row_encoding
from llmkit.chat.rows import CONVERSATIONS, PREFERENCES, field_names, listed
from llmkit.errors import UsageError
from llmkit.io.run_layout import resolve_model
from llmkit.model.decoder import Decoder
from llmkit.model.lora.config import LoraConfig, target_modules
from llmkit.model.pretrained.adapter import refuse_adapter
from llmkit.options import check_positive, from_values, values_of
from llmkit.training.data import PackedSource
from llmkit.training.inputs import model_input
from llmkit.training.objectives import EmbeddingNoise, next_token
from llmkit.training.optim.schedule import (
    ADAPTERS,
    FINE_TUNING,
    PREFERENCE,
    Schedule,
    build_schedule,
    default_rate,
    warmup_tokens,
)
from llmkit.training.options import ScheduleOptions, held_out_paths
from llmkit.training.runner import Prepared, Record, Request, open_session, run_training

if TYPE_CHECKING:
    from llmkit.training.session import Session

MOST_FIELDS = 8  # that are not used, by name
FEW_STEPS = 20  # in which a schedule with warm-up learns little


def fine_tune(
    model: str,
    rows: list[str],
    output: str,
    *,
    seed: int = 0,
    force: bool = False,
    report: Callable[[Record], None] = lambda record: None,
    **options: Any,
) -> Record | None:
    """Fine-tune a model directory or run on files of conversations, like `llmkit sft`.

    `report` is called with every record of metrics.jsonl. Returns steps, tokens, losses and counts of rows, or None if
    the run had already finished. Raises the LlmkitError and UsageError of the command.
    """
    request = Request.of("sft", from_values(SftOptions, options), output, seed=seed, force=force)
    with open_session(request) as session:
        prepared = prepare_fine_tuning(request, session, model, _named(rows))
        return run_training(request, session, prepared, observe=lambda: nullcontext(report))


def align(
    model: str,
    rows: list[str],
    output: str,
    *,
    seed: int = 0,
    force: bool = False,
    report: Callable[[Record], None] = lambda record: None,
    **options: Any,
) -> Record | None:
    """Optimize a model on files of preference pairs, like `llmkit dpo`; otherwise as `fine_tune`."""
    request = Request.of("dpo", from_values(DpoOptions, options), output, seed=seed, force=force)
    with open_session(request) as session:
        prepared = prepare_alignment(request, session, model, _named(rows))
        return run_training(request, session, prepared, observe=lambda: nullcontext(report))


def _named(rows: list[str]) -> list[RowSource]:
    return row_sources(rows, lambda paths: list(rows) if paths is None else paths)


def prepare_fine_tuning(request: Request, session: Session, model: str, sources: list[RowSource]) -> Prepared:
    """Rows, model and schedule of a fine-tuning run.

    Raises UsageError for options that do not fit the model, and LlmkitError for unreadable rows or models.
    """
    options: SftOptions = request.options
    noise = options.template.neftune
    check_positive(lr=options.schedule.lr, neftune=noise)
    if options.rows.group_by_length and options.sequences.pack:
        raise UsageError("--group-by-length needs --no-pack", "packed sequences have little padding")
    chat = open_chat_model(request, model, options.rows.chat_template, options.batch.sequence_length)
    info, files, length = chat.info, chat.files, chat.length
    with_template = options.template.template
    if with_template:
        masks.check_template(files)

    encoding = row_encoding(
        files,
        length,
        too_long=options.rows.too_long,
        template=with_template,
        train_on=options.template.train_on,
        lossy=options.rows.lossy,
        names=field_names(CONVERSATIONS, options.rows.map or []),
    )
    row_cache = _row_cache(request, session, options.rows)
    epochs = options.rows.epochs
    mixture = read_sources(request, session, sources, encoding, epochs, row_cache)
    _announce_rows(request, mixture, length, options.rows.too_long)
    batch_size = options.batch.batch_size or 8
    source = PackedSource(
        mixture.encoded.pairs(),
        length,
        batch_size,
        epochs=epochs,
        seed=request.seed,
        taken=mixture.epochs,
        pack=options.sequences.pack,
        group_by_length=options.rows.group_by_length,
    )
    _announce_padding(request, session, source, batch_size, length)
    if source.steps < FEW_STEPS:
        hint = "for more, lower --batch-size or --sequence-length, use --no-pack, or raise --epochs"
        request.note(f"only {source.steps} steps; {hint}")
    held_out = None
    if options.heldout.heldout:
        paths = list(held_out_paths(options.heldout.heldout))
        encoded = encoded_rows(request.reader(paths), encoding, row_cache)
        encoding.refuse_empty(encoded)
        held_out = PackedSource(encoded.pairs(), length, batch_size, shuffle=False)
    lora = _adapters(request, session, chat)
    rate = options.schedule.lr or default_rate(info.config.parameters()) * FINE_TUNING * (ADAPTERS if lora else 1)
    return Prepared(
        config=info.config,
        source=source,
        schedule=_schedule(options.schedule, rate, source.tokens(source.steps)),
        batch_size=batch_size,
        length=length,
        inputs=lambda: [model_input(model), *mixture.inputs],
        tokenizer_files=files,
        stop_ids=chat.stop_ids,
        generation=info.generation,
        create_model=lambda: chat.create(lora, request.seed),
        heldout=held_out,
        objective=partial(next_token, noise=EmbeddingNoise(noise, request.seed)) if noise else next_token,
        adapter=lora,
        chat=with_template,
        resolved={"lr": rate},
        positional=("model", "rows"),
        counts=mixture.counts,
    )


def prepare_inspection(request: Request, model: str) -> tuple[Encode, dict[str, str], dict[str, str], int]:
    """What a fine-tuning run would do with a row: the function that encodes it, whatever the template does not show of
    it; the names of its fields by those here; the tokenizer's files; the tokens per sequence.
    """
    options: SftOptions = request.options
    chat = open_chat_model(request, model, options.rows.chat_template, options.batch.sequence_length)
    how = options.template
    names = field_names(CONVERSATIONS, options.rows.map or [])
    encode = row_encoder(chat.files, template=how.template, train_on=how.train_on, lossy=True)
    return encode, names, chat.files, chat.length


def prepare_alignment(request: Request, session: Session, model: str, sources: list[RowSource]) -> Prepared:
    """Pairs, model and schedule of a preference run; raises the errors of `prepare_fine_tuning`."""
    options: DpoOptions = request.options
    check_positive(lr=options.schedule.lr, beta=options.loss.beta)
    objective = preference_objective(**values_of(options.loss))
    chat = open_chat_model(request, model, options.rows.chat_template, options.batch.sequence_length)
    info, files, length = chat.info, chat.files, chat.length
    masks.check_template(files)
    encoding = pair_encoding(
        files,
        length,
        too_long=options.rows.too_long,
        lossy=options.rows.lossy,
        names=field_names(PREFERENCES, options.rows.map or []),
    )
    row_cache = _row_cache(request, session, options.rows)
    epochs = options.rows.epochs
    mixture = read_sources(request, session, sources, encoding, epochs, row_cache)
    pairs = mixture.encoded.rows
    _announce_rows(request, mixture, length, options.rows.too_long)
    lora = _adapters(request, session, chat)
    rate = options.schedule.lr or default_rate(info.config.parameters()) * PREFERENCE * (ADAPTERS if lora else 1)
    batch_size = options.batch.batch_size or 16

    def source_with(reference: torch.Tensor) -> PairSource:
        return PairSource(
            pairs,
            reference,
            batch_size,
            epochs=epochs,
            seed=request.seed,
            taken=mixture.epochs,
            group_by_length=options.rows.group_by_length,
        )

    @cache
    def initial_model() -> Decoder:
        return chat.create(lora, request.seed).to(session.processes.device)

    def source_with_reference() -> PairSource:
        return source_with(
            reference_log_probabilities(
                initial_model,
                pairs,
                session.processes,
                session.micro_batch(),
                session.directory.path / "reference.safetensors",
                source_model().digest,
            )
        )

    source_model = cache(lambda: model_input(model))
    planned = source_with(torch.zeros(len(pairs) // 2, 2))
    _announce_padding(request, session, planned, batch_size, length)
    return Prepared(
        config=info.config,
        source=planned,
        schedule=_schedule(options.schedule, rate, planned.tokens(planned.steps)),
        batch_size=batch_size,
        length=length,
        inputs=lambda: [source_model(), *mixture.inputs],
        tokenizer_files=files,
        stop_ids=chat.stop_ids,
        generation=info.generation,
        create_model=initial_model,
        adapter=lora,
        chat=True,
        objective=objective,
        metric_names=FIGURES,
        deferred_source=source_with_reference,
        resolved={"lr": rate},
        positional=("model", "rows"),
        counts=mixture.counts,
    )


def _row_cache(request: Request, session: Session, options: RowOptions) -> RowCache | None:
    if options.row_cache is None:
        return None
    return RowCache(options.row_cache, session.processes, request.warn, request.dry_run)


def _adapters(request: Request, session: Session, chat: ChatModel) -> LoraConfig | None:
    """The adapters that the options ask for; None to train all weights. UsageError if they cannot be trained here."""
    given: LoraOptions = request.options.lora
    if given.lora is None:
        for field in fields(given):
            if getattr(given, field.name) != field.default:
                raise UsageError(f"--{field.name.replace('_', '-')} needs --lora RANK", "it is about adapters")
        return None
    if chat.info.adapter is not None:
        refuse_adapter(chat.info, chat.path)
    if session.processes.layout.lockstep:
        raise UsageError("--lora does not support --parallel fsdp", "adapters are small: use --parallel ddp")
    if session.processes.precision == "fp8":
        raise UsageError("--lora does not support --precision fp8", "train adapters in bf16")
    check_positive(lora_alpha=given.lora_alpha, lora_plus=given.lora_plus)
    targets = target_modules(chat.info.config, given.lora_targets)
    alpha = given.lora_alpha or 2.0 * given.lora
    lora = chat.adapted(LoraConfig(given.lora, alpha, targets, given.dora, given.rslora, b_rate=given.lora_plus))
    grown = f", .resize_token_embeddings({chat.info.config.vocab_size})" if chat.new.pieces else ""
    base = f"AutoModelForCausalLM.from_pretrained({str(resolve_model(chat.path))!r}){grown}"
    request.detail(f"to load the adapters in PEFT: {base}, then PeftModel.from_pretrained(..., 'RUN/final')")
    return lora


def _schedule(options: ScheduleOptions, rate: float, total: int) -> Schedule:
    """The learning rate over `total` tokens, with the defaults of sft and dpo."""
    warmup = warmup_tokens(options.warmup or 0.0, total)
    return build_schedule(
        options.schedule or "linear",
        rate,
        total,
        warmup,
        options.final_lr_fraction or 0.0,
        0.2 if options.decay is None else options.decay,
        options.decay_shape or "linear",
    )


def _announce_rows(request: Request, mixture: RowMixture, length: int, too_long: str) -> None:
    """Report the number of rows, what happens to those that are too long, and what is taken of each source."""
    encoded, counts = mixture.encoded, mixture.encoded.counts
    request.note(f"{counts['rows']:,} rows, {counts['row_tokens']:,} tokens, {counts['trained']:,} of them trained on")
    for row in mixture.shares:
        taken = f"{row['rows']:,} rows, {row['tokens']:,} tokens ({row['share']:.1%}), {row['passes']:.2f} passes"
        request.note(f"{row['source']}: {taken}")
    if encoded.left_out:
        request.note(f"left out: {listed(encoded.left_out)}")
    if encoded.unused:
        request.note(f"fields that are not used: {_listed(encoded.unused)}")
    if encoded.lost:
        request.warn(f"the chat template does not show: {_listed(encoded.lost)}")
    if counts["too_long"]:
        action = {"drop": "dropped", TRUNCATE_TURNS: "truncated after a turn"}.get(too_long, "truncated at the end")
        alternative = "--too-long truncate truncates them" if too_long == "drop" else "--too-long drop drops them"
        dropped = ""
        if too_long != "drop" and counts["dropped"]:
            dropped = f", {counts['dropped']:,} of them dropped because no trained tokens were left"
        request.warn(f"{counts['too_long']:,} rows longer than {length:,} tokens were {action}{dropped}; {alternative}")


def _announce_padding(
    request: Request, session: Session, source: PackedSource | PairSource, batch_size: int, length: int
) -> None:
    padding = source.padding(session.rows_at_once(batch_size, length))
    request.detail(f"{padding:.1%} of the positions are padding")


def _listed(rows: Counter[str]) -> str:
    """The commonest names with their numbers of rows."""
    listed = [f"{name:.60} ({count:,} rows)" for name, count in rows.most_common(MOST_FIELDS)]
    return ", ".join(listed) + (f" and {len(rows) - MOST_FIELDS:,} more" if len(rows) > MOST_FIELDS else "")

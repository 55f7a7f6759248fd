"""Runs a training command from its options to its outcome, for the command line and for Python callers.

    request = Request.of("train", options, "run/", seed=0)
    with open_session(request) as session:
        plan = prepare_pretraining(request, session, "mix/", resolve_pretraining(request))  # nothing is written yet
        outcome = run_training(request, session, plan.prepared)                             # None: already finished

`pretrain` and `anneal` (training.pretraining), `fine_tune` and `align` (alignment.fine_tuning) do all of this.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from llmkit.errors import UsageError
from llmkit.io.documents import DocumentReader, ReadOptions
from llmkit.io.record import Input, Lineage, recorded
from llmkit.lineage.formats import describe_input
from llmkit.model.config import ModelConfig
from llmkit.model.decoder import Decoder
from llmkit.model.lora.config import LoraConfig
from llmkit.options import neutral_names, option_fields, toml_value, values_of
from llmkit.training.data import Source, StreamSource, TokenStream
from llmkit.training.objectives import Objective, next_token
from llmkit.training.optim.schedule import Schedule
from llmkit.training.session import LoopOptions, Session, session

if TYPE_CHECKING:
    from llmkit.chat.prompts import Prompt

Record = dict[str, Any]
Reader = Callable[[list[str] | None], DocumentReader]
AtCheckpoint = Callable[[Any, int], dict[str, float]]
PATHS = ("from_", "model", "recipe")  # options that may name a file
PER_CALL = ("resume", "accept_change")  # options of a call, not of the run


def _ignore(text: str) -> None:
    pass


@dataclass
class Request:
    """One call: the command, its options, the output, and the lineage record of its models."""

    command: str
    options: Any  # PretrainOptions, AnnealOptions, ...
    loop: LoopOptions
    record: Lineage
    values: dict[str, Any]  # every option of config.toml, by name
    seed: int = 0
    dry_run: bool = False
    note: Callable[[str], None] = _ignore
    warn: Callable[[str], None] = _ignore
    detail: Callable[[str], None] = _ignore
    reader: Reader = field(default=lambda paths: _plain_reader(paths))

    @classmethod
    def of(
        cls, command: str, options: Any, output: str, *, seed: int = 0, force: bool = False, **callbacks: Any
    ) -> Request:
        """The request that `llmkit COMMAND` makes from these options; `callbacks` are note, warn, detail and reader."""
        values = values_of(options)
        if values["processes"] > 1 or values["max_restarts"]:
            raise UsageError(
                "only the command line starts several processes", "use llmkit, torchrun or accelerate launch"
            )
        neutral = neutral_names(type(options))
        decisive = {name: value for name, value in values.items() if name not in neutral and value is not None}
        inputs = [describe_input(value, name) for name, value in decisive.items() if isinstance(value, Path)]
        marks = {field.name: field.marks() for field in option_fields(cast(Any, type(options)))}
        record = {name: recorded(value, marks[name]) for name, value in decisive.items()} | {"seed": seed}
        loop = loop_options(options, output, force)
        return cls(command, options, loop, Lineage(command, record, inputs), values | {"seed": seed}, seed, **callbacks)


def loop_options(options: Any, output: str, force: bool = False) -> LoopOptions:
    """The option groups that the loop takes; groups that the command lacks have their defaults."""
    names = ("batch", "optimizer", "machine", "checkpoints", "heldout", "log")
    groups = {name: getattr(options, name) for name in names if hasattr(options, name)}
    return LoopOptions(output, force, sequences_per_row=getattr(options, "SEQUENCES_PER_ROW", 1), **groups)


@dataclass
class Prepared:
    """Model, data and schedule of a run, before anything is written."""

    config: ModelConfig
    source: Source
    schedule: Schedule
    batch_size: int
    length: int  # tokens of the longest sequence
    inputs: Callable[[], list[Input]]  # computes their digests, which takes a while
    tokenizer_files: Mapping[str, str]
    stop_ids: list[int]
    generation: Mapping[str, Any]  # other settings of the model that it starts from
    create_model: Callable[[], Decoder]
    objective: Objective = next_token
    metric_names: tuple[str, ...] = ()
    heldout: Source | None = None
    optimizer_from: Path | None = None
    rope_theta: Callable[[int], float] | None = None
    stream: TokenStream | None = None  # the documents of the run's trace
    deferred_source: Callable[[], Source] | None = None  # replaces `source` once the run directory exists
    resolved: dict[str, Any] = field(default_factory=dict)  # values chosen for options that were not given
    positional: tuple[str, ...] = ()  # positional arguments, which config.toml leaves out
    counts: dict[str, Any] = field(default_factory=dict)  # added to the summary
    adapter: LoraConfig | None = None  # of a run that trains adapters only
    chat: bool = False  # whether --prompts are messages for the model's chat template

    @property
    def planned_tokens(self) -> int:
        return self.source.tokens(self.source.steps)


@contextmanager
def open_session(request: Request) -> Iterator[Session]:
    """The session of a request; every process of the group joins it."""
    with session(request.loop, request.dry_run, request.warn) as current:
        yield current


def run_training(
    request: Request,
    session: Session,
    prepared: Prepared,
    *,
    at_checkpoint: list[AtCheckpoint] | None = None,
    observe: Callable[[], AbstractContextManager[Callable[[Record], None]]] = lambda: nullcontext(lambda record: None),
) -> Record | None:
    """Train a prepared run. Returns its summary, or None if it had already finished.

    Each of `at_checkpoint` is called with (model, step) at every checkpoint, and its result is logged. `observe()`
    yields a function that is called with every record of the log. Raises LlmkitError if the run to resume has other
    options or inputs, if the guard gives up, or if the disk is full.
    """
    from llmkit.training.trace import write_trace

    p, loop = prepared, request.loop
    started = session.begin(request.record, p.inputs(), p.batch_size, p.length, config_text(request, p))
    if p.stream is not None and session.processes.is_main:  # for a finished run too: the data may have moved
        assert isinstance(p.source, StreamSource)
        phases = [(phase.step, phase.token, phase.rows, phase.length) for phase in p.source.phases]
        write_trace(session.directory.path, p.stream, phases, p.planned_tokens)
    if not started:
        return None
    _announce(request, session, p)
    session.at_checkpoint += [*_samples(request, session, p), *(at_checkpoint or [])]
    with observe() as show, _tracked(request, session) as track:
        source = p.deferred_source() if p.deferred_source else p.source
        outcome = session.train(
            session.model(p.create_model),
            p.objective,
            source,
            p.schedule,
            metric_names=p.metric_names,
            tokenizer_files=p.tokenizer_files,
            stop_ids=p.stop_ids,
            generation=p.generation,
            heldout=p.heldout,
            optimizer_from=p.optimizer_from,
            rope_theta=p.rope_theta,
            report=report_to([show, track] if loop.log.tracker else [show], request.warn),
        )
    return {key: value for key, value in (outcome | p.counts).items() if value is not None}


def prompts_of(request: Request, prepared: Prepared) -> list[Prompt]:
    """The prompts of --prompts; [] if there are none. Raises the errors of `read_prompts`."""
    file = getattr(getattr(request.options, "samples", None), "prompts", None)
    if not file:
        return []
    from llmkit.training.metrics.samples import read_prompts

    return read_prompts(file, dict(prepared.tokenizer_files), chat=prepared.chat)


def _samples(request: Request, session: Session, prepared: Prepared) -> list[AtCheckpoint]:
    """The gallery that completes --prompts at every checkpoint, on each process that takes part in generation."""
    prompts = prompts_of(request, prepared) if session.shows_checkpoints else []
    if not prompts:
        return []
    from llmkit.training.metrics.samples import PromptGallery

    path = session.directory.path / "samples.jsonl" if session.processes.is_main else None
    return [PromptGallery(path, prompts, dict(prepared.tokenizer_files), prepared.stop_ids, request.seed)]


def _announce(request: Request, session: Session, prepared: Prepared) -> None:
    available = prepared.stream.tokens if prepared.stream is not None else None
    planned = prepared.planned_tokens
    if available and planned > 1.01 * available:
        request.note(
            f"{planned:,} tokens are {planned / available:.2f} passes over the {available:,} tokens of the data"
        )
    if session.checkpoint:
        request.note(f"resuming from {session.checkpoint.name}")
    processes = session.processes
    where = f"{processes.world_size} x {processes.device.type}, {processes.precision}"
    request.detail(f"{where}, {session.micro_batch()} sequences per forward pass")


@contextmanager
def _tracked(request: Request, session: Session) -> Iterator[Callable[[Record], None]]:
    """Yields a function that sends records to the tracker of the run, on the main process."""
    name = request.loop.log.tracker
    if not name or not session.processes.is_main:
        yield lambda record: None
        return
    from llmkit.training.metrics.tracker import Tracker

    options = session.state.options if session.state else {}
    tracker = Tracker(name, session.processes.accelerator, session.directory.path, options)
    try:
        yield tracker.log
    finally:
        tracker.finish()


def report_to(shows: list[Callable[[Record], None]], warn: Callable[[str], None]) -> Callable[[Record], None]:
    """A function that passes a record to each of `shows`; one that fails is dropped, and the run continues."""

    def report(record: Record) -> None:
        for show in [*shows]:
            try:
                show(record)
            except Exception as error:  # a full disk or unreachable server of a tracker, a closed terminal
                shows.remove(show)
                with suppress(OSError):
                    warn(f"step {record['step']:,}: metrics are no longer shown here ({error})")

    return report


def config_text(request: Request, prepared: Prepared) -> str:
    """The config.toml of a run: every option with its value, so that `-c config.toml` repeats the run.

    The chosen value of an option that was not given is a comment, since setting it would change the record.
    """
    lines = [f"# llmkit {request.command} ... -c config.toml -o RUN trains the same again"]
    for key, value in request.values.items():
        name = key.rstrip("_").replace("_", "-")
        if key in PATHS and value and os.path.exists(value):
            value = os.path.abspath(value)
        if key in prepared.positional or key in PER_CALL:
            continue
        if value is None or value == []:
            if key in prepared.resolved:
                lines.append(f"# {name} came to {toml_value(prepared.resolved[key])}")
            continue
        lines.append(f"{name} = {toml_value(str(value.absolute()) if isinstance(value, Path) else value)}")
    return "\n".join(lines) + "\n"


def _plain_reader(paths: list[str] | None) -> DocumentReader:
    return DocumentReader(list(paths or []), ReadOptions(text_key=None))

"""Options and steps that train, anneal, sft and dpo have in common. Not a command."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmkit.cli.shared.options import NEUTRAL, Run, parse_share, toml_value
from llmkit.errors import LlmkitError, UsageError
from llmkit.io.atomic import atomic_file
from llmkit.io.inputs import STDIN, open_raw

if TYPE_CHECKING:
    from llmkit.chat.encode import Encoded
    from llmkit.io.documents import DocumentReader
    from llmkit.io.record import Input
    from llmkit.mixing.order import OrderedTokens
    from llmkit.model.config import ModelConfig
    from llmkit.model.pretrained.checkpoint import LoadedModel
    from llmkit.shards.reader import TokenStore
    from llmkit.training.data import HeldOutSource, Source, StreamSource
    from llmkit.training.session import Session, Settings
    from llmkit.training.source_groups import SourceGroups

ROWS = "stdin.jsonl"  # what a kept stream of rows is called
STEPS, OPTIMISER, MACHINE, KEEPING = "Data and steps", "Optimiser", "Machine", "Checkpoints and evaluation"

# fmt: off
BatchSize = Annotated[int, typer.Option("--batch-size", "-b", min=1, help="Sequences a step, over all processes", rich_help_panel=STEPS)]
MicroBatch = Annotated[int | None, typer.Option("--micro-batch-size", min=1, help="Sequences that go through the model at once; by default what fits well", rich_help_panel=STEPS)]
SequenceLength = Annotated[int | None, typer.Option("--sequence-length", min=8, help="Tokens in a sequence; by default the model's context", rich_help_panel=STEPS)]
DocumentMask = Annotated[bool, typer.Option("--document-mask/--no-document-mask", help="Attend within documents only, and predict none from the one before", rich_help_panel=STEPS)]
Epochs = Annotated[int, typer.Option("--epochs", min=1, help="Times that every row is seen", rich_help_panel=STEPS)]
TooLong = Annotated[str, typer.Option("--too-long", metavar="HOW", help="Rows longer than the sequence: drop, or truncate at the end", rich_help_panel=STEPS)]
Rate = Annotated[float | None, typer.Option("--lr", help="Highest learning rate; by default one that suits the model's size", rich_help_panel=OPTIMISER)]
ScheduleName = Annotated[str, typer.Option("--schedule", metavar="NAME", help="cosine, linear, wsd (warm-up, stable, decay) or constant", rich_help_panel=OPTIMISER)]
Warmup = Annotated[float, typer.Option("--warmup", parser=parse_share, metavar="TOKENS", help="Tokens over which the rate rises; below 1 a share of all", rich_help_panel=OPTIMISER)]
Floor = Annotated[float, typer.Option("--min-lr", help="Last learning rate, relative to the highest", rich_help_panel=OPTIMISER)]
Decay = Annotated[float, typer.Option("--decay", help="Share of all tokens over which wsd decays", rich_help_panel=OPTIMISER)]
WeightDecay = Annotated[float, typer.Option("--weight-decay", min=0, help="On matrices; never on embeddings, norms and biases", rich_help_panel=OPTIMISER)]
OptimizerName = Annotated[str, typer.Option("--optimizer", metavar="NAME", help="adamw, or muon for the matrices of the layers and adamw for the rest", rich_help_panel=OPTIMISER)]
Clip = Annotated[float, typer.Option("--clip", min=0, help="Largest gradient norm; 0 does not clip", rich_help_panel=OPTIMISER)]
ZLoss = Annotated[float, typer.Option("--z-loss", min=0, help="Weight of log² Z in the loss, which holds logits down; 1e-4 is usual", rich_help_panel=OPTIMISER)]
Precision = Annotated[str, typer.Option("--precision", metavar="TYPE", help="fp32, bf16, fp16, fp8 (torchao, on GPUs that have it); auto is bf16 on GPUs that have it, else fp32", rich_help_panel=MACHINE)]
Compile = Annotated[bool | None, typer.Option("--compile/--no-compile", help="Compile each layer; by default on a GPU only, a CPU has kernels as fast", show_default=False, rich_help_panel=MACHINE)]
CheckpointActivations = Annotated[bool, typer.Option("--checkpoint-activations", help="Less memory for a third more work: keep the inputs of layers only", rich_help_panel=MACHINE)]
Deterministic = Annotated[bool, typer.Option("--deterministic", help="Only algorithms that give the same bits every time; slower on a GPU", rich_help_panel=MACHINE)]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads of each process", rich_help_panel=MACHINE)]
ProcessCount = Annotated[int, typer.Option("--processes", min=1, help="Processes on this machine (GPUs, or gloo on CPU)", rich_help_panel=MACHINE)]
Parallel = Annotated[str, typer.Option("--parallel", metavar="LAYOUT", help="ddp: the whole model in each process; fsdp: its shards; auto is ddp", rich_help_panel=MACHINE)]
MaxRestarts = Annotated[int, typer.Option("--max-restarts", min=0, help="Times that lost or hanging processes are replaced", rich_help_panel=MACHINE)]
HangTimeout = Annotated[float, typer.Option("--hang-timeout", min=0, metavar="SECONDS", help="Without progress for so long a process counts as hung; 0 waits for ever", rich_help_panel=MACHINE)]
AcceptChange = Annotated[str, typer.Option("--accept-change", metavar="NAMES", help="Go on though these differ from the start: torch, llmkit, device, precision, ...", rich_help_panel=MACHINE)]
Resume = Annotated[bool, typer.Option("--resume", help="Go on where the run stopped; start it where there is none", rich_help_panel=KEEPING)]
SaveEvery = Annotated[int, typer.Option("--save-every", min=0, help="Steps between checkpoints; 0 is a tenth of the run", rich_help_panel=KEEPING)]
Keep = Annotated[int, typer.Option("--keep", min=0, help="Checkpoints that stay; 0 is all", rich_help_panel=KEEPING)]
KeepEvery = Annotated[int, typer.Option("--keep-every", min=0, help="Checkpoints of every so many steps stay, whatever --keep says", rich_help_panel=KEEPING)]
MaxHours = Annotated[float, typer.Option("--max-hours", min=0, help="Save and stop after so many hours, with exit code 75; 0 is never", rich_help_panel=KEEPING)]
MaxRollbacks = Annotated[int, typer.Option("--max-rollbacks", min=0, help="Bad batches skipped and spikes undone within 128 steps before giving up; 0 lets all pass", rich_help_panel=KEEPING)]
EvalEvery = Annotated[int, typer.Option("--eval-every", min=0, help="Steps between evaluations; 0 is a tenth of the run", rich_help_panel=KEEPING)]
LogEvery = Annotated[int, typer.Option("--log-every", min=0, help="Steps between figures that cost a little (norms, maxima); 0 leaves them out", rich_help_panel=KEEPING)]
Samples = Annotated[Path | None, typer.Option("--samples", metavar="PROMPTS", help="Prompts, one a line, to complete at every checkpoint into samples.jsonl", rich_help_panel=KEEPING)]
EvalTasks = Annotated[str | None, typer.Option("--eval-tasks", metavar="NAMES", help="lm-eval tasks to score at every checkpoint, separated by commas", rich_help_panel=KEEPING)]
EvalLimit = Annotated[int, typer.Option("--eval-limit", min=1, help="Items of each of these tasks", rich_help_panel=KEEPING)]
IncludePath = Annotated[list[str] | None, typer.Option("--include-path", metavar="DIR", help="Directory of your own task YAML files", rich_help_panel=KEEPING)]
TrackerName = Annotated[str | None, typer.Option("--tracker", metavar="NAME", help="Send the figures to tensorboard (RUN/tracker), wandb or trackio too", rich_help_panel=KEEPING)]
HeldOut = Annotated[list[str] | None, typer.Option("--heldout", metavar="[NAME=]PATH", help="Data for the held-out loss, by domain where it is named or its documents are", rich_help_panel=KEEPING)]
# fmt: on

# Where launchers (torchrun, accelerate, Slurm's and other MPIs) tell a process which one it is.
RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
PATHS = ("from_", "model", "recipe")  # options that may name a file
# How and where a run is carried out, not what it is: outside the lineage, and free to change on --resume.
NEUTRAL_OPTIONS = (
    "processes", "threads", "parallel", "max_restarts", "hang_timeout", "accept_change",
    "compile", "checkpoint_activations", "deterministic",
    "resume", "save_every", "keep", "keep_every", "max_hours", "heldout", "eval_every",
    "log_every", "samples", "eval_tasks", "eval_limit", "include_path",
)  # fmt: skip


def launched(run: Run, inputs: list[str], *, resume: bool, processes: int, max_restarts: int = 0) -> bool:
    """Check the call, which reads `inputs`; with several `processes`, or restarts, run it again in as many, and say whether this one is done with that."""
    from llmkit.training.checkpoint.run_directory import check_run

    if run.output is None:
        raise UsageError("no output", "name the directory of the run with -o")
    refuse_own_inputs(run, inputs)
    rank = next((os.environ[name] for name in RANKS if name in os.environ), None)
    if (processes == 1 and not max_restarts) or rank is not None or run.dry_run:
        if rank not in (None, "0"):
            run.quiet = True  # the first process speaks for all, and keeps what is put aside
            if str(run._values.get("on_bad_line", "")).startswith("quarantine"):
                run._values["on_bad_line"] = "skip"
        return False
    check_run(run.output, resume=resume, force=run.force)
    from llmkit.training.distributed.elastic import launch

    code = launch(processes, sys.argv[1:], run.output, max_restarts)
    if code:
        raise SystemExit(code)
    return True


def refuse_own_inputs(run: Run, inputs: Iterable[str]) -> None:
    """UsageError where a directory would be replaced by what is made of it."""
    place = Path(run.output or "").resolve()
    for path in inputs if run.force and place.is_dir() else ():
        where = Path(path).resolve()
        if path != STDIN and place in (where, *where.parents):
            raise UsageError(f"{path} is in the output {run.output}, which -f replaces", "choose another output")


def config_text(run: Run, arguments: tuple[str, ...], **came_to: Any) -> str:
    """config.toml of a run: every option with its value. What an option that was not given `came_to` stands in a comment, since
    naming it would be another record of the run."""
    lines = [f"# llmkit {run.command} ... -c config.toml -o RUN trains the same again"]
    for key, value in run._values.items():
        name = key.rstrip("_").replace("_", "-")
        if key in PATHS and value and os.path.exists(value):
            value = os.path.abspath(value)
        if key in NEUTRAL or key in arguments or key in ("resume", "accept_change"):
            continue
        if value is None or value == []:
            if key in came_to:
                lines.append(f"# {name} came to {toml_value(came_to[key])}")
            continue
        lines.append(f"{name} = {toml_value(str(value.absolute()) if isinstance(value, Path) else value)}")
    return "\n".join(lines) + "\n"


@contextmanager
def opened(run: Run, settings: Settings) -> Iterator[Session]:
    """The session of the run, which says where it goes on."""
    from llmkit.training.session import session

    with session(settings, run.dry_run, run.warn) as found:
        yield found


def open_stream(data: str, session: Session, dry_run: bool = False) -> OrderedTokens | TokenStore:
    """The training data in its order; a stream on stdin is kept in the run directory first, so that a resumed run finds it."""
    from llmkit.mixing.order import OrderedTokens

    if data != STDIN or dry_run:
        return OrderedTokens.open(data)
    kept = _keep_stdin(session, "stdin.arrow")
    stream = OrderedTokens.open(str(kept))
    for item in stream.inputs:
        item.name = STDIN
    return stream


def groups(stream: OrderedTokens | TokenStore) -> SourceGroups:
    """By what the losses on a stream are told apart."""
    import numpy as np

    from llmkit.training.source_groups import document_groups

    return document_groups(np.diff(stream.offsets), *stream.origins())


def at_checkpoints(
    run: Run,
    session: Session,
    files: dict[str, str],
    stop_ids: list[int],
    samples: Path | None,
    tasks: str | None,
    limit: int,
    include: list[str] | None,
) -> None:
    """Let checkpoints show what the model says to prompts, and how it does on tasks."""
    main = session.processes.is_main
    if not main and not session.processes.layout.lockstep:
        return
    acts = session.settings.at_checkpoint
    if samples:
        from llmkit.training.samples import PromptGallery, read_prompts

        path = session.directory.path / "samples.jsonl" if main else None
        acts.append(PromptGallery(path, read_prompts(samples), files, stop_ids, run.seed))
    if tasks:
        acts.append(_scorer(run, files, stop_ids, [name for name in tasks.split(",") if name], limit, include or []))


def _scorer(
    run: Run, files: dict[str, str], stop_ids: list[int], names: list[str], limit: int, include: list[str]
) -> Callable[[Any, int], dict[str, float]]:
    os.environ.setdefault("TQDM_DISABLE", "1")  # read when lm-eval's libraries are imported: progress is ours to show
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    from llmkit.evaluation.harness import DecoderLM, evaluate, task_names
    from llmkit.model.pretrained.checkpoint import LoadedModel
    from llmkit.training.samples import preserved_state

    manager = task_names(names, include)

    def score(model: Any, step: int) -> dict[str, float]:
        lm = DecoderLM(model, LoadedModel(Path(str(run.output)), model.config, files, stop_ids), seed=run.seed)
        try:
            with preserved_state(model):
                found = evaluate(lm, names, manager, limit=limit, seed=run.seed)
        except LlmkitError as error:  # no reason to end a run
            run.warn(f"--eval-tasks at step {step:,}: {error.message}")
            return {}
        return {
            f"eval/{task}/{metric}": value
            for task, metrics in found.items()
            for metric, value in metrics.items()
            if "_stderr" not in metric and metric != "items"
        }

    return score


def keep_trace(session: Session, stream: OrderedTokens | TokenStore, source: StreamSource) -> None:
    """Leave in the run what leads from its steps to the documents (main process)."""
    from llmkit.training.trace import write_trace

    if session.processes.is_main:
        phases = [(phase.step, phase.token, phase.rows, phase.length) for phase in source.phases]
        write_trace(session.directory.path, stream, phases, source.tokens(source.steps))


def packed_length(data: str, packed: int | None, asked: int | None, document_mask: bool) -> int | None:
    """Tokens in a sequence: as the data was packed for, if it was, else as asked. UsageError where these differ."""
    if packed and asked not in (None, packed):
        raise UsageError(
            f"--sequence-length {asked:,}, but {data} is packed for sequences of {packed:,}",
            f"leave the option out, or mix again with --sequence-length {asked}",
        )
    if packed and not document_mask:
        raise UsageError(
            f"{data} is packed: --no-document-mask would let documents see the padding", "mix with --pack concat"
        )
    return packed or asked


def _keep_stdin(session: Session, name: str) -> Path:
    """A file of the run that holds what came on stdin; read once, by the first process."""
    kept = session.directory.path / "data" / name
    if session.processes.is_main and not (kept.exists() and session.settings.resume):
        if sys.stdin is None or sys.stdin.isatty():
            raise UsageError("no input: stdin is a terminal", "name the data, or pipe it in")
        kept.parent.mkdir(exist_ok=True)
        with atomic_file(kept, force=True) as sink:
            shutil.copyfileobj(open_raw(STDIN), sink, 1 << 20)
            if not sink.tell():
                raise LlmkitError("standard input is empty", "name the data, or pipe it in")
    session.kept = (kept.parent.name,)
    session.processes.barrier()
    return kept


def held_out_paths(named: list[str] | None) -> dict[str, str]:
    """Path to domain ("" where none is named) of each --heldout."""
    found: dict[str, str] = {}
    for text in named or []:
        name, equals, path = text.partition("=")
        found |= {path: name} if equals and not os.path.exists(text) else {text: ""}
    return found


def held_out(named: list[str] | None, digest: str, length: int, document_mask: bool) -> HeldOutSource | None:
    """Source of the held-out loss over token shards, None where none are named. Domains are those named, else the documents' sources."""
    paths = held_out_paths(named)
    if not paths:
        return None
    import numpy as np

    from llmkit.shards.reader import TokenStore
    from llmkit.shards.shard import PADDING_SOURCE
    from llmkit.training.data import HeldOutSource
    from llmkit.training.source_groups import document_groups

    codes, names = [], {PADDING_SOURCE: 0}
    for path, name in paths.items():
        one = TokenStore.open(path)
        refuse_other_tokenizer(path, one.tokenizer.digest, digest)
        packed_length(path, one.sequence_length, None, document_mask)
        own, known, _ = one.origins()
        table = [
            names.setdefault(name if name and source != PADDING_SOURCE else source, len(names)) for source in known
        ]
        codes.append(np.array(table, np.int32)[own])
    store = TokenStore.open(list(paths))
    groups = document_groups(np.diff(store.offsets), np.concatenate(codes), list(names), None)
    return HeldOutSource(
        store, length, document_mask=document_mask, vocabulary=store.tokenizer.vocab_size, groups=groups
    )


def refuse_other_tokenizer(what: str, found: str, expected: str) -> None:
    """LlmkitError where `what` was not made with the model's tokenizer."""
    if found != expected:
        raise LlmkitError(
            f"{what}: made with another tokenizer than the model's", "tokenize the documents again with the model's own"
        )


def context(info: LoadedModel, sequence_length: int | None) -> int:
    """Tokens in a sequence: as asked, at most the model's context, which is the default."""
    most = info.config.max_position_embeddings
    if sequence_length is not None and sequence_length > most:
        raise UsageError(
            f"--sequence-length {sequence_length:,} is beyond the model's context of {most:,}", f"at most {most}"
        )
    return sequence_length or most


def chat_model(
    run: Run, model: str, template: Path | None, sequence_length: int | None
) -> tuple[LoadedModel, dict[str, str], int]:
    """What the model directory says, its tokenizer files with a chat template, and the length of sequences."""
    from llmkit.chat import templates
    from llmkit.model.pretrained.checkpoint import load_info

    info = load_info(model)
    files = info.tokenizer_files
    if "tokenizer.json" not in files:
        raise LlmkitError(f"{model}: no tokenizer.json", "copy the tokenizer's files into the model directory")
    if template is not None:
        files = templates.with_template(files, template.read_text(encoding="utf-8"))
    elif templates.chat_template(files) is None:
        name, text = templates.default_template(files)
        files = templates.with_template(files, text)
        run.note(f"the model has no chat template: {name}'s is used and stored with it")
    return info, files, context(info, sequence_length)


def row_reader(run: Run, session: Session, rows: list[str] | None) -> DocumentReader:
    """Reader of rows; stdin is kept in the run directory first, so that every process and a resumed run find it."""
    paths = run.inputs(rows)
    if STDIN in paths and not run.dry_run:
        kept = str(_keep_stdin(session, ROWS))
        paths = [kept if path == STDIN else path for path in paths]
    return run.reader(paths, text_key=None, files_from=None)


def row_inputs(reader: DocumentReader) -> list[Input]:
    """What was read, for the lineage; kept stdin by its own name."""
    for item in reader.inputs:
        if item.name == ROWS:
            item.name = STDIN
    return reader.inputs


def say_rows(run: Run, encoded: Encoded, length: int, too_long: str) -> None:
    """How many rows there are, and what happened to those that are too long."""
    counts = encoded.counts
    run.note(f"{counts['rows']:,} rows, {counts['row_tokens']:,} tokens, {counts['trained']:,} of them to learn")
    if counts["too_long"]:
        done = "dropped" if too_long == "drop" else "cut at the end"
        other = "--too-long truncate cuts them" if too_long == "drop" else "--too-long drop leaves them out"
        lost = f", {counts['dropped']:,} of them dropped since nothing to learn was left" if counts["dropped"] else ""
        lost = "" if too_long == "drop" else lost
        run.warn(f"{counts['too_long']:,} rows longer than {length:,} tokens were {done}{lost}; {other}")


def stop_ids(info: LoadedModel, files: dict[str, str]) -> list[int]:
    """Every id that ends a generation of the fine-tuned model, end of turn first."""
    from llmkit.chat.templates import stop_token_ids

    return list(dict.fromkeys([*stop_token_ids(files), *info.stop_ids]))


def model_input(path: str, directory: Path | None = None) -> Input:
    """The model that a run starts from, by the name it was given; `directory` where that name stands for a checkpoint in it."""
    from llmkit.io.record import Input, base_name
    from llmkit.lineage.formats import digest_path, read_lineage
    from llmkit.model.pretrained.checkpoint import resolve_model

    place = directory or resolve_model(path)
    return Input("input", base_name(path), digest_path(place), read_lineage(place))


def say_start(run: Run, session: Session, planned: int, available: int | None = None) -> None:
    """What is about to happen."""
    if available and planned > 1.01 * available:
        run.note(f"{planned:,} tokens are {planned / available:.2f} rounds through {available:,}")
    if session.checkpoint:
        run.note(f"going on from {session.checkpoint.name}")
    where = f"{session.processes.world_size} x {session.processes.device.type}, {session.processes.precision}"
    run.detail(f"{where}, {session.micro_batch()} sequences at once")


def nothing_to_do(run: Run) -> None:
    """The summary of a run that was finished before."""
    run.finish({"up_to_date": True}, f"{run.output} is finished: nothing to do")


def show_plan(run: Run, session: Session, config: ModelConfig, source: Source, rate: float, length: int) -> None:
    """What --dry-run prints: sizes, steps, FLOPs, memory, and what is done with each kind of tensor."""
    from llmkit.model.decoder import expected_tensors
    from llmkit.training.memory_estimate import estimate_memory, training_flops
    from llmkit.training.optim.parameter_groups import merge_layers, tensor_table

    settings, processes = session.settings, session.processes
    parameters, tokens = config.parameters(), source.tokens(source.steps)
    tensors = tensor_table(
        expected_tensors(config), config, settings.optimizer or "adamw", settings.weight_decay, processes.precision
    )
    at_once = session.rows_at_once(source.rows(0), length) * length * settings.sequences_a_row
    needs = estimate_memory(tensors, config, at_once, processes.precision, processes.device.type)
    full, half = (count * tokens for count in training_flops(config, length))
    rows: list[list[Any]] = [
        ["architecture", config.architecture],
        ["parameters", parameters],
        ["tokens", tokens],
        ["steps", source.steps],
        ["tokens at once", at_once],
        ["learning rate", f"{rate:.2e}"],
        ["FLOPs, 6N and causal attention at half", f"{half:.2e}"],
        ["FLOPs, 6N and attention in full", f"{full:.2e}"],
        *([name, f"{size / 1e9:,.2f} GB" if size >= 1e8 else f"{size / 1e6:,.2f} MB"] for name, size in needs.items()),
    ]
    run.table(f"llmkit {run.command}: plan", ["", ""], rows)
    columns = ["tensor", "x", "shape", "start", "lr", "decay", "optimizer", "type", "computed in"]
    cells = [
        [row.name, count, "x".join(map(str, row.shape)), row.initial, f"x{row.rate:g}", f"{row.decay:g}", row.optimizer, row.stored, row.computed]
        for row, count in merge_layers(tensors)
    ]  # fmt: skip
    run.table("tensors", columns, cells)
    counts = {"parameters": parameters, "tokens": tokens, "steps": source.steps, "flops": half, "bytes": needs}
    run.finish(counts, "dry run: nothing was written")


def finish(run: Run, outcome: dict[str, Any], **more: Any) -> None:
    """The summary of a run that came to its end."""
    heldout = outcome.get("heldout_loss")
    line = f"{outcome['steps']:,} steps, {outcome['tokens']:,} tokens"
    if outcome.get("loss") is not None:
        line += f", loss {outcome['loss']:.4f}"
    if heldout is not None:
        line += f", held-out {heldout:.4f}"
    line += f", {outcome['tokens_per_second']:,} tokens/s: {run.output}"
    run.finish({k: v for k, v in (outcome | more).items() if v is not None}, line)

"""The shared part of train, anneal, sft and dpo: launching processes, the tables of --dry-run, progress, the summary.

Model, data and schedule are prepared by training.pretraining and alignment.fine_tuning, and trained by training.runner.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit.cli.shared.messages import counted
from llmkit.cli.shared.options import NEUTRAL, Run
from llmkit.errors import LlmkitError, UsageError
from llmkit.io.inputs import STDIN
from llmkit.mixing.specs import parse_spec

if TYPE_CHECKING:
    from llmkit.alignment.sources import RowSource
    from llmkit.io.documents import DocumentReader
    from llmkit.training.pretraining import Plan
    from llmkit.training.runner import AtCheckpoint, Prepared, Request
    from llmkit.training.session import Session

# Environment variables in which launchers (torchrun, accelerate, Slurm and other MPIs) give a process its rank.
RANK_VARIABLES = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")


def launch_processes(run: Run, options: Any, inputs: list[str]) -> bool:
    """Check the call, which reads `inputs`. With --processes or --max-restarts, run it in new processes to its end.

    Returns True if it ran in new processes, False if the caller is to train in this one.
    """
    machine = options.machine
    if run.output is None:
        raise UsageError("no output", "name the directory of the run with -o")
    refuse_own_inputs(run, inputs)
    rank = next((os.environ[name] for name in RANK_VARIABLES if name in os.environ), None)
    if (machine.processes == 1 and not machine.max_restarts) or rank is not None or run.dry_run:
        if rank not in (None, "0"):
            run.quiet = True  # the first process reports for all, and writes the quarantine
            for name in ("on_bad_line", "on_bad_file"):
                if str(run._values.get(name, "")).startswith("quarantine"):
                    run._values[name] = "skip"
        return False
    from llmkit.training.checkpoint.run_directory import check_run

    check_run(run.output, resume=options.checkpoints.resume, force=run.force)
    from llmkit.training.distributed.elastic import launch

    code = launch(machine.processes, sys.argv[1:], run.output, machine.max_restarts)
    if code:
        raise SystemExit(code)
    return True


def paths_of(rows: list[str] | None) -> list[str]:
    """The paths of the sources of rows that a call names, without their amounts."""
    return [parse_spec(text).path for text in rows or []]


def sources_of(run: Run, rows: list[str] | None) -> list[RowSource]:
    """The sources of rows that a call names, with their files."""
    from llmkit.alignment.sources import row_sources

    def files(paths: list[str] | None) -> list[str]:
        return run.inputs(rows) if paths is None else run.inputs(paths, files_from=None)

    return row_sources([*(rows or []), *(run.listed(run.files_from) if run.files_from else [])], files)


def refuse_own_inputs(run: Run, inputs: Iterable[str]) -> None:
    """Raise UsageError if -f would replace a directory that is, or contains, an input."""
    target = Path(run.output or "").resolve()
    for path in inputs if run.force and target.is_dir() else ():
        source = Path(path).resolve()
        if path != STDIN and target in (source, *source.parents):
            raise UsageError(f"{path} is in the output {run.output}, which -f would replace", "choose another output")


def training_request(run: Run, options: Any) -> Request:
    """The request to training.runner, with the messages, the reader and the lineage record of this call."""
    from llmkit.training.runner import Request, loop_options

    def reader(paths: list[str] | None) -> DocumentReader:
        return run.reader(paths, text_key=None, files_from=None)

    return Request(
        command=run.command,
        options=options,
        loop=loop_options(options, run.output or "", run.force),
        record=run.lineage(),
        values={name: value for name, value in run._values.items() if name not in NEUTRAL},
        seed=run.seed,
        dry_run=run.dry_run,
        note=run.note,
        warn=run.warn,
        detail=run.detail,
        reader=reader,
    )


def train_or_plan(
    run: Run, request: Request, session: Session, prepared: Prepared, show: Callable[[], None] = lambda: None
) -> None:
    """Train the prepared run and print the summary; with --dry-run call `show`, then print the plan."""
    if run.dry_run:
        from llmkit.training.runner import prompts_of

        prompts_of(request, prepared)  # raises for a file that is none
        show()
        show_plan(run, session, prepared)
        return
    from llmkit.cli.shared import live_view
    from llmkit.training.runner import run_training

    outcome = run_training(
        request,
        session,
        prepared,
        at_checkpoint=_scorers(run, request, session, prepared),
        observe=lambda: live_view.display(run, session, prepared.planned_tokens),
    )
    if outcome is None:
        run.finish({"up_to_date": True}, f"{run.output} is finished: nothing to do")
        return
    line = f"{counted(outcome['steps'], 'step')}, {counted(outcome['tokens'], 'token')}"
    if "loss" in outcome:
        line += f", loss {outcome['loss']:.4f}"
    if "heldout_loss" in outcome:
        line += f", held-out {outcome['heldout_loss']:.4f}"
    run.finish(outcome, f"{line}, {outcome['tokens_per_second']:,} tokens/s: {run.output}")


def _scorers(run: Run, request: Request, session: Session, prepared: Prepared) -> list[AtCheckpoint]:
    """Functions that score --eval-tasks at every checkpoint; handed in, since training does not import evaluation."""
    samples = getattr(request.options, "samples", None)
    if samples is None or not samples.eval_tasks or not session.shows_checkpoints:
        return []
    os.environ.setdefault(
        "TQDM_DISABLE", "1"
    )  # read when lm-eval's libraries are imported; llmkit shows its own progress
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    from llmkit.evaluation.harness import DecoderLM, evaluate, task_manager
    from llmkit.model.pretrained.checkpoint import LoadedModel
    from llmkit.training.metrics.samples import preserved_state

    names = [name for name in samples.eval_tasks.split(",") if name]
    manager = task_manager(names, samples.include_path or [])
    files, stop_ids = dict(prepared.tokenizer_files), prepared.stop_ids

    def score(model: Any, step: int) -> dict[str, float]:
        lm = DecoderLM(model, LoadedModel(Path(str(run.output)), model.config, files, stop_ids), seed=run.seed)
        try:
            with preserved_state(model):
                scores = evaluate(lm, names, manager, limit=samples.eval_limit, seed=run.seed)
        except LlmkitError as error:  # must not end the run
            run.warn(f"--eval-tasks at step {step:,}: {error.message}")
            return {}
        return {
            f"eval/{task}/{metric}": value
            for task, metrics in scores.items()
            for metric, value in metrics.items()
            if "_stderr" not in metric and metric != "items"
        }

    return [score]


def show_plan(run: Run, session: Session, prepared: Prepared) -> None:
    """Print the plan of --dry-run: sizes, steps, FLOPs, memory, and the optimizer settings of each kind of tensor."""
    from llmkit.model.family import expected_tensors
    from llmkit.training.memory_estimate import estimate_memory, training_flops
    from llmkit.training.optim.parameter_groups import merge_layers, tensor_table

    options, processes = session.options, session.processes
    config, source, length = prepared.config, prepared.source, prepared.length
    parameters, tokens = config.parameters(), prepared.planned_tokens
    adapter = prepared.adapter
    tensors = tensor_table(
        adapter.tensors(config) if adapter else expected_tensors(config),
        config,
        options.optimizer.optimizer or "adamw",
        options.optimizer.weight_decay or 0.0,
        processes.precision,
        adapter.b_rate if adapter else 1.0,
    )
    tokens_per_forward = session.rows_at_once(source.rows(0), length) * length * options.sequences_per_row
    memory_needs = estimate_memory(tensors, config, tokens_per_forward, processes.precision, processes.device.type)
    if adapter:  # in float32 at most: matrices keep the type that they are stored in
        memory_needs = {"frozen weights, at most": 4 * parameters} | memory_needs
    full_flops, causal_flops = (count * tokens for count in training_flops(config, length))
    rows: list[list[Any]] = [
        ["architecture", config.architecture],
        ["parameters", parameters],
        *([["trained", sum(math.prod(row.shape) for row in tensors)]] if adapter else []),
        ["tokens", tokens],
        ["steps", source.steps],
        ["tokens per forward pass", tokens_per_forward],
        ["peak learning rate", f"{prepared.schedule.peak:.2e}"],
        ["FLOPs, 6N + causal attention", f"{causal_flops:.2e}"],
        ["FLOPs, 6N + full attention", f"{full_flops:.2e}"],
        *([name, f"{n / 1e9:,.2f} GB" if n >= 1e8 else f"{n / 1e6:,.2f} MB"] for name, n in memory_needs.items()),
    ]
    run.table(f"llmkit {run.command}: plan", ["", ""], rows)
    trained_before = "model" in prepared.positional and not adapter
    columns = ["tensor", "x", "shape", "start", "lr", "decay", "optimizer", "type", "computed in"]
    cells = [
        [
            row.name,
            count,
            "x".join(map(str, row.shape)),
            "as it is" if trained_before else row.initial,
            f"x{row.rate:g}",
            f"{row.decay:g}",
            row.optimizer,
            row.stored,
            row.computed,
        ]
        for row, count in merge_layers(tensors)
    ]
    run.table("tensors", columns, cells)
    counts = {
        "parameters": parameters,
        "tokens": tokens,
        "steps": source.steps,
        "flops": causal_flops,
        "bytes": memory_needs,
    }
    run.finish(counts, "dry run: nothing was written")


def show_schedules(run: Run, plan: Plan) -> None:
    """Further tables of --dry-run: learning rates by segment, batch sizes by phase, and resolved options."""
    prepared = plan.prepared
    rates = [
        [f"{s.start:,}", f"{s.end:,}", f"{s.first:.4g}", f"{s.last:.4g}", s.shape] for s in prepared.schedule.segments
    ]
    run.table("learning rate", ["from token", "to token", "first", "last", "shape"], rates)
    phases = [
        [f"{phase.step:,}", f"{phase.token:,}", phase.rows, phase.length, f"{plan.theta(phase.step):g}"]
        for phase in prepared.source.phases  # type: ignore[attr-defined]
    ]
    run.table("steps", ["from step", "from token", "sequences", "of tokens", "rope theta"], phases)
    options = [[key.replace("_", "-"), str(value)] for key, value in sorted(plan.resolved.items())]
    run.table("options", ["", ""], options)

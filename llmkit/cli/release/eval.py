"""`llmkit eval`: score models on tasks and by perplexity."""

from __future__ import annotations

import json as jsonlib
import os
import shutil
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from llmkit.cli.shared.messages import counted
from llmkit.cli.shared.options import Run, command, count_option
from llmkit.errors import UsageError
from llmkit.io.inputs import STDIN, open_raw
from llmkit.options import NamesCode

FORMATS = ("table", "json")


@command(
    reads=True,
    neutral=("format",),
    examples=(
        "llmkit eval run/ --perplexity heldout.jsonl",
        "llmkit eval base/ chat/ chat-int4/ --tasks my_task --include-path tasks/ -o scores.json",
    ),
)
def main(
    run: Run,
    models: Annotated[list[str], typer.Argument(metavar="MODEL", help="Model directories or runs")],
    tasks: Annotated[str, typer.Option("--tasks", metavar="LIST", help="lm-eval tasks, comma-separated")] = "",
    include_path: Annotated[
        list[str] | None,
        typer.Option("--include-path", metavar="DIR", help="Directory of task YAML files (repeatable)"),
        NamesCode(),
    ] = None,
    perplexity: Annotated[
        list[str] | None, typer.Option("--perplexity", metavar="DOCS", help="Documents to score (repeatable)")
    ] = None,
    shots: Annotated[
        int | None, typer.Option("--shots", min=0, help="Number of few-shot examples (default: set by the task)")
    ] = None,
    limit: Annotated[
        int | None, count_option("--limit", help="Use only the first items of each task and documents of each file")
    ] = None,
    apply_chat_template: Annotated[
        bool,
        typer.Option("--apply-chat-template", help="Format prompts as user messages, with the model's chat template"),
    ] = False,
    stride: Annotated[
        int | None,
        count_option("--stride", help="Stride of the windows over long documents (default: half the context)"),
    ] = None,
    format: Annotated[
        str,
        typer.Option("--format", metavar="FORMAT", help="table or json (default: table on a terminal, otherwise json)"),
    ] = "",
    dtype: Annotated[
        str, typer.Option("--dtype", metavar="TYPE", help="fp32, bf16 or fp16 (default: fp32 on CPU, as stored on GPU)")
    ] = "",
    device: Annotated[
        str, typer.Option("--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: cuda if available)")
    ] = "",
) -> None:
    """Score one or more models on lm-eval tasks (--tasks) and by perplexity on documents (--perplexity).

    The scores go to stdout or -o: for each model, each task's metrics with their standard errors, and for each file of
    documents nats per token, bits per byte and perplexity. As JSON they are one document, and the table is shown on
    stderr. Task YAML files can name local JSONL files (dataset_path: json), so that nothing is downloaded.
    """
    os.environ.setdefault(
        "TQDM_DISABLE", "1"
    )  # read when lm-eval's libraries are imported; llmkit shows its own progress
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    names = [name for name in tasks.split(",") if name]
    if not names and not perplexity:
        raise UsageError("nothing to do", "give --tasks, --perplexity, or both")
    if format not in ("", *FORMATS):
        raise UsageError(f"unknown --format {format!r}", "one of: " + ", ".join(FORMATS))
    from llmkit.io.run_layout import resolve_model
    from llmkit.model.pretrained.checkpoint import load_for_inference, load_info

    for model in models:  # report mistakes before the first model is scored
        load_info(model)
        resolve_model(model)
    for name in perplexity or []:
        run.inputs([name], files_from=None)
    manager = None
    if names:
        from llmkit.evaluation.harness import task_manager

        manager = task_manager(names, include_path or [])
    if run.dry_run:
        run.note(f"would score {len(models)} models on {len(names)} tasks and {len(perplexity or [])} document sets")
        return
    from llmkit.io.atomic import check_output, is_special

    if run.output:
        check_output(run.output, run.force)
    from llmkit.evaluation.score_model import score_documents, score_tasks

    results: dict[str, dict[str, Any]] = {}
    with ExitStack() as stack:
        documents = {
            name: _spool(stack, name) if len(models) > 1 and (name == STDIN or is_special(Path(name))) else name
            for name in perplexity or []
        }
        for model in models:
            run.detail(f"loading {model}")
            loaded = load_for_inference(model, dtype, device)
            scores: dict[str, Any] = {}
            for name, path in documents.items():
                texts = (document.text for document in run.reader([path], files_from=None).documents())
                with run.progress(None, "documents") as bar:
                    scores.setdefault("perplexity", {})[name] = score_documents(
                        loaded, texts, stride=stride, limit=limit, advance=bar.advance
                    )
            if names:
                with run.progress(None, "requests") as bar:
                    scores["tasks"] = score_tasks(
                        loaded,
                        names,
                        manager,
                        limit=limit,
                        shots=shots,
                        chat=apply_chat_template,
                        seed=run.seed,
                        advance=bar.advance,
                    )
            results[model] = scores
    _write(run, results, format or ("json" if run.output or not sys.stdout.isatty() else "table"))
    run.finish({"models": len(models), "tasks": len(names)}, f"{counted(len(models), 'model')} scored")


def _version() -> str:
    from llmkit import __version__

    return __version__


def _spool(stack: ExitStack, path: str) -> str:
    """A temporary file with the content of stdin or a pipe, for every model to read."""
    file = stack.enter_context(tempfile.NamedTemporaryFile(prefix="llmkit-", suffix=".jsonl"))
    shutil.copyfileobj(open_raw(path), file, 1 << 20)
    file.flush()
    return file.name


def _write(run: Run, results: dict[str, dict[str, Any]], format: str) -> None:
    """Write the scores to stdout or -o; for JSON, also show the table on stderr."""
    from llmkit.evaluation.score_table import as_text, score_table
    from llmkit.io.names import escape_names

    results = escape_names(results)
    columns, rows = score_table(results)
    if format == "json":
        run.table("Scores", columns, rows)
        report = {"llmkit": _version(), "options": run.options, "models": results}
        text = jsonlib.dumps(report, indent=2, ensure_ascii=False) + "\n"
    else:
        text = as_text(columns, rows)
    if run.output:
        from llmkit.io.atomic import atomic_file

        with atomic_file(run.output, run.force) as sink:
            sink.write(text.encode())
    else:
        sys.stdout.write(text)
        sys.stdout.flush()

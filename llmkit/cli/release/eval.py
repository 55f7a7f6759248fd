"""`llmkit eval`: score models on tasks and by perplexity."""

from __future__ import annotations

import json as jsonlib
import os
import shutil
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmkit.cli.shared.options import Run, command, count_option
from llmkit.errors import UsageError
from llmkit.io.inputs import STDIN, open_raw

if TYPE_CHECKING:
    from llmkit.model.decoder import Decoder
    from llmkit.model.pretrained.checkpoint import LoadedModel


@command(
    reads=True,
    examples=(
        "llmkit eval run/ --perplexity heldout.jsonl",
        "llmkit eval base/ chat/ chat-int4/ --tasks my_task --include-path tasks/ -o scores.json",
    ),
)
def main(
    run: Run,
    models: Annotated[list[str], typer.Argument(metavar="MODEL", help="Model directories or runs")],
    tasks: Annotated[str, typer.Option("--tasks", metavar="LIST", help="lm-eval tasks, separated by commas")] = "",
    include_path: Annotated[
        list[str] | None, typer.Option("--include-path", metavar="DIR", help="Directory of task YAML files")
    ] = None,
    perplexity: Annotated[
        list[str] | None, typer.Option("--perplexity", metavar="DOCS", help="Documents to score")
    ] = None,
    shots: Annotated[
        int | None, typer.Option("--shots", min=0, help="Examples in the prompt; default: the task's")
    ] = None,
    limit: Annotated[
        int | None, count_option("--limit", help="Only the first items of each task, documents of each file")
    ] = None,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Ask as a user would, in the model's template")
    ] = False,
    stride: Annotated[
        int | None, count_option("--stride", help="Step of the windows over long documents; default: half the context")
    ] = None,
    dtype: Annotated[
        str, typer.Option("--dtype", help="fp32, bf16 or fp16; default: fp32 on CPU, as stored on GPU")
    ] = "",
    device: Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1; default: cuda where there is one")] = "",
) -> None:
    """Score models on lm-eval tasks (--tasks) and by perplexity on documents (--perplexity), several models in one call.

    A table goes to stderr, one JSON document to stdout or -o: for each model, each task's metrics with their standard errors, and for each file
    of documents nats a token, bits a byte and perplexity. Task YAML files may name local JSONL (dataset_path: json), so nothing is fetched.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")  # read when lm-eval's libraries are imported: progress is ours to show
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    names = [name for name in tasks.split(",") if name]
    if not names and not perplexity:
        raise UsageError("nothing to do", "give --tasks, --perplexity, or both")
    from llmkit.io.run_layout import resolve_model
    from llmkit.model.pretrained.checkpoint import load_for_inference, load_info

    for model in models:  # every mistake is found before the first model is scored
        load_info(model)
        resolve_model(model)
    for name in perplexity or []:
        run.inputs([name], files_from=None)
    manager = None
    if names:
        from llmkit.evaluation.harness import task_names

        manager = task_names(names, include_path or [])
    if run.dry_run:
        run.note(f"would score {len(models)} models on {len(names)} tasks and {len(perplexity or [])} document sets")
        return
    if run.output:
        from llmkit.io.atomic import check_output

        check_output(run.output, run.force)
    results: dict[str, dict[str, Any]] = {}
    with ExitStack() as stack:
        documents = {name: _kept(stack) if name == STDIN and len(models) > 1 else name for name in perplexity or []}
        for model in models:
            run.detail(f"loading {model}")
            loaded = load_for_inference(model, dtype, device)
            scores: dict[str, Any] = {}
            for name, path in documents.items():
                scores.setdefault("perplexity", {})[name] = _perplexity(run, loaded, path, stride, limit)
            if names:
                scores["tasks"] = _tasks(run, loaded, names, manager, limit, shots, apply_chat_template)
            results[model] = scores
    _table(run, results)
    _write(run, {"llmkit": _version(), "options": run.options, "models": results})
    run.finish({"models": len(models), "tasks": len(names)}, f"{len(models)} models scored")


def _version() -> str:
    from llmkit import __version__

    return __version__


def _kept(stack: ExitStack) -> str:
    """A temporary file of what comes on stdin, since every model reads it."""
    file = stack.enter_context(tempfile.NamedTemporaryFile(prefix="llmkit-", suffix=".jsonl"))
    shutil.copyfileobj(open_raw(STDIN), file, 1 << 20)
    file.flush()
    return file.name


def _perplexity(
    run: Run, loaded: tuple[Decoder, LoadedModel], documents: str, stride: int | None, limit: int | None
) -> dict[str, Any]:
    from itertools import islice

    from llmkit.evaluation.harness import end_of_text_id
    from llmkit.evaluation.perplexity import perplexity
    from llmkit.model.pretrained.checkpoint import load_tokenizer

    model, info = loaded
    codec = load_tokenizer(info.tokenizer_files, info.path)
    codec.encode_special_tokens = True  # text is text: a literal "<|endoftext|>" in a document is no end of it
    texts = (document.text for document in run.reader([documents], files_from=None).documents())
    with run.progress(None, "documents") as bar:
        found = perplexity(
            model,
            lambda text: list(codec.encode(text, add_special_tokens=False).ids),
            islice(texts, limit),
            end_of_text_id(info),
            stride,
            bar.advance,
        )
    return found.figures()


def _tasks(
    run: Run,
    loaded: tuple[Decoder, LoadedModel],
    names: list[str],
    manager: Any,
    limit: int | None,
    shots: int | None,
    chat: bool,
) -> dict[str, dict[str, float]]:
    from llmkit.chat.templates import render
    from llmkit.evaluation.harness import DecoderLM, evaluate

    model, info = loaded
    with run.progress(None, "requests") as bar:
        lm = DecoderLM(
            model,
            info,
            lambda messages, prompt: render(messages, info.tokenizer_files, prompt),
            advance=bar.advance,
            seed=run.seed,
        )
        return evaluate(lm, names, manager, limit=limit, shots=shots, chat=chat, seed=run.seed)


def _table(run: Run, results: dict[str, dict[str, Any]]) -> None:
    """One column a model; scores with their standard error, the metrics of a task below each other."""
    rows: dict[str, dict[str, str]] = {}
    for model, scores in results.items():
        for documents, figures in scores.get("perplexity", {}).items():
            for metric in ("nats_per_token", "bits_per_byte", "perplexity"):
                rows.setdefault(f"{Path(documents).name} {metric}", {})[model] = f"{figures[metric]:.4f}"
        for task, metrics in scores.get("tasks", {}).items():
            for metric, value in metrics.items():
                if metric.partition(",")[0].endswith("_stderr") or metric in ("items", "sample_len"):
                    continue
                name, comma, filtered = metric.partition(",")
                error = metrics.get(f"{name}_stderr{comma}{filtered}")
                shown = f"{value:.4f}" + (f" ± {error:.4f}" if error is not None and error == error else "")
                rows.setdefault(f"{task} {metric}", {})[model] = shown
    run.table(
        "Scores", ["", *results], [[row, *(cells.get(model, "") for model in results)] for row, cells in rows.items()]
    )


def _write(run: Run, report: dict[str, Any]) -> None:
    text = jsonlib.dumps(report, indent=2, ensure_ascii=False) + "\n"
    if run.output:
        from llmkit.io.atomic import atomic_file

        with atomic_file(run.output, run.force) as sink:
            sink.write(text.encode())
    elif not sys.stdout.isatty() or run.as_json:
        sys.stdout.write(text)
        sys.stdout.flush()

"""`llmkit sft`: fine-tune a model on conversations, with the loss on the assistant's tokens."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from llmkit.alignment.options import RowOptions, SftOptions
from llmkit.chat.rows import CONVERSATIONS, schema_names
from llmkit.cli.shared.messages import counted
from llmkit.cli.shared.options import ModelPath, Run, command
from llmkit.errors import LlmkitError, UsageError
from llmkit.options import COMMON
from llmkit.training.options import held_out_paths

if TYPE_CHECKING:
    from llmkit.alignment.inspection import Segment
    from llmkit.chat.encode import Encode
    from llmkit.io.documents import ReadOptions

ROWS_OF_A_PAGE = 20


@command(
    examples=(
        "llmkit sft run/ chat.jsonl --epochs 2 -o sft/",
        "llmkit sft run/ chat.jsonl:x2 docs.jsonl:2k --too-long truncate -o sft3/",
        "llmkit sft run/ chat.jsonl --show 3",
        "llmkit sft run/ chat.jsonl --check -o report.json",
        "llmkit sft run/ chat.jsonl --lr 1e-3 --batch-size 4 --too-long truncate -o sft2/",
        "llmkit sft run/ chat.jsonl --lora 16 --lora-plus 4 --chat-template llama-3 -o lora/",
    ),
    reads=True,
    neutral=("show", "check"),
)
def main(
    run: Run,
    model: ModelPath,
    rows: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="ROWS",
            help=f"JSON lines or Parquet with {schema_names(CONVERSATIONS)}; PATH, or PATH with a weight (:0.6),"
            " multiplier (:x2) or token budget (:2M) (default: stdin)",
        ),
    ] = None,
    options: SftOptions = SftOptions(),
    show: Annotated[
        str | None,
        typer.Option(
            "--show",
            metavar="N|PAGE.html",
            help="Print the first N rows with the trained tokens marked, or write 20 as a page, and stop",
        ),
        COMMON,
    ] = None,
    check: Annotated[
        bool,
        typer.Option("--check", help="Report on all rows, by file, and stop: exit code 1 if some cannot be used"),
        COMMON,
    ] = False,
) -> None:
    """Fine-tune a model on conversations, instructions or plain text, with the loss on the assistant's tokens.

    Rows are formatted with the model's own chat template. A base model has none: --chat-template gives it a file or one
    by name. A name comes with its control tokens. Those that the tokenizer lacks are added to it and get rows in the
    model, which are trained, with --lora too, and start as the mean of the tokens that spelled them; the end of a turn
    becomes the tokenizer's eos_token. The loss covers only the assistant's content, tool calls and
    stop token; the loss of a step is the mean over these tokens. Rows are packed into sequences without attending to
    each other, or with --no-pack have one each. A message may have a `weight`, or `train: false`. Rows of which the
    template does not show a part, such as tool calls or reasoning, are refused. The resulting model stops at the end of
    its turn (generation_config.json). With --lora the weights stay as they are, quantised ones too, and the result is a
    directory of adapters for PEFT and llmkit; `llmkit average --merge-adapter` makes a model of it. In PEFT, load the
    model yourself, and resize its embeddings where tokens were added: -v prints the calls.

    Files with amounts make a mixture, as with `llmkit mix`: the weights are scaled until the first source that has one
    is exhausted, and a file without an amount is taken once. Amounts are tokens of encoded rows, of each epoch. What is
    no whole pass is a subset of rows, another one in each epoch until all had their turn.

    Of OASST trees, in one row or as messages in rows of their own, every path along the best-ranked answers is a
    conversation, and an answer that paths share is trained on once. What is left out of valid rows is counted.
    """
    if show is not None or check:
        _inspect(run, model, rows, options, show)
        return
    from llmkit.cli.shared.training_command import (
        launch_processes,
        paths_of,
        sources_of,
        train_or_plan,
        training_request,
    )

    held_out = held_out_paths(options.heldout.heldout)
    if launch_processes(run, options, [model, *paths_of(rows), *held_out]):
        return
    from llmkit.alignment.fine_tuning import prepare_fine_tuning
    from llmkit.training.runner import open_session

    request = training_request(run, options)
    with open_session(request) as session:
        prepared = prepare_fine_tuning(request, session, model, sources_of(run, rows))
        train_or_plan(run, request, session, prepared)


def _inspect(run: Run, model: str, rows: list[str] | None, options: SftOptions, show: str | None) -> None:
    """Show rows, or without `show` report on all of them."""
    from llmkit.alignment.fine_tuning import prepare_inspection
    from llmkit.cli.shared.training_command import sources_of, training_request

    is_page = show is not None and show.endswith(".html")
    if show is not None and not is_page and not (show.isdecimal() and int(show)):
        raise UsageError(f"--show {show!r}", "give a number of rows, or the name of a page that ends in .html")
    encode, names, files, length = prepare_inspection(training_request(run, options), model)
    paths = [file for source in sources_of(run, rows) for file in source.files]
    reading = replace(run.read_options(None), on_bad_line="skip", on_bad_file="skip")
    if show is not None:
        title = f"What sft trains on: {model}" if is_page else ""
        _show(run, paths, reading, encode, names, files, length, options.rows.too_long, show, title)
    else:
        _check(run, paths, reading, encode, names, length, options.rows)


def _show(
    run: Run,
    paths: list[str],
    reading: ReadOptions,
    encode: Encode,
    names: Mapping[str, str],
    files: Mapping[str, str],
    length: int,
    too_long: str,
    show: str,
    title: str,
) -> None:
    """Print rows, or with a `title` write them as a page."""
    from llmkit.alignment.inspection import page, segments, shown_rows
    from llmkit.io.atomic import atomic_file, check_output
    from llmkit.io.documents import DocumentReader

    with DocumentReader(paths, reading) as reader:
        found = shown_rows(reader, encode, names, ROWS_OF_A_PAGE if title else int(show), length, too_long)
        parts = [(where, segments(row, files)) for where, row in found]
    if reader.bad and not parts:
        raise LlmkitError(f"nothing to show: {counted(reader.bad, 'row')} cannot be used", "--check says why")
    if reader.bad:
        run.warn(f"{counted(reader.bad, 'row')} cannot be used: --check says why")
    if not title:
        _print_rows(parts)
        return
    check_output(show, run.force)
    with atomic_file(show, force=run.force) as sink:
        sink.write(page(parts, title).encode("utf-8", "backslashreplace"))
    run.note(f"{counted(len(parts), 'row')}: {show}")


def _check(
    run: Run,
    paths: list[str],
    reading: ReadOptions,
    encode: Encode,
    names: Mapping[str, str],
    length: int,
    options: RowOptions,
) -> None:
    """Report on all rows; LlmkitError if some cannot be used."""
    import orjson

    from llmkit.alignment.inspection import check_rows
    from llmkit.chat.fidelity import HARMLESS
    from llmkit.io.atomic import atomic_file, check_output

    if run.output:
        check_output(run.output, run.force)
    reports = check_rows(paths, reading, encode, names, length, options.too_long)
    content = {file: report.as_json() for file, report in reports.items()}
    for file, report in content.items():
        run.note(
            f"{file}: {counted(report['rows'], 'row')}, {counted(report['tokens'], 'token')},"
            f" {report['trained_share']:.1%} of them trained;"
            f" {report['too_long']:,} over {length:,} tokens ({report['dropped']:,} of them dropped),"
            f" {report['duplicates']:,} seen before"
        )
        for item in report["refused"]:
            run.warn(f"{file}:{item['first_line']}: {item['reason']} ({counted(item['rows'], 'row')})")
        for name, count in report["not_shown_by_the_template"].items():
            run.warn(f"{file}: the chat template does not show {name} ({counted(count, 'row')})")
        for what, count in report["left_out"].items():
            run.note(f"{file}: left out: {count:,} {what}")
        for name, count in report["unused_fields"].items():
            run.note(f"{file}: field {name:.60} is not used ({counted(count, 'row')})")
    text = orjson.dumps(content, option=orjson.OPT_INDENT_2) + b"\n"
    if run.output:
        with atomic_file(run.output, force=run.force) as sink:
            sink.write(text)
    elif not sys.stdout.isatty():
        sys.stdout.buffer.write(text)
    failed = sum(report["errors"] for report in content.values())
    lost = sum(count for report in reports.values() for name, count in report.lost.items() if name not in HARMLESS)
    if failed or (lost and not options.lossy) or not content:
        raise LlmkitError(
            f"{counted(failed, 'row')} cannot be used; fields that the chat template does not show: {lost:,}",
            "mend them, or train with --on-bad-line skip and --lossy",
        )
    rows, dropped = (sum(report[name] for report in content.values()) for name in ("rows", "dropped"))
    hint = "see --sequence-length and --too-long"
    if rows and dropped == rows:
        raise LlmkitError(f"every row has over {length:,} tokens and is dropped", hint)
    what = f"all but {counted(dropped, 'row')} of over {length:,} tokens" if dropped else "every row"
    run.finish({"rows": rows, "dropped": dropped}, f"{what} can be used" + (f" ({hint})" if dropped else ""))


def _print_rows(rows: Iterable[tuple[str, list[Segment]]]) -> None:
    from llmkit.alignment.inspection import marked
    from llmkit.io.names import printable

    for where, parts in rows:
        print(f"── {where}")
        if not sys.stdout.isatty() or "NO_COLOR" in os.environ:
            print(printable(marked(parts)))
            continue
        for part in parts:
            style = ("32" if part.weight else "2") + (";7" if part.is_control else "")
            print(f"\x1b[{style}m{printable(part.text)}\x1b[0m", end="")
        print()

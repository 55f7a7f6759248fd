"""`llmkit mix`: combine sources by weight into training order."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmkit.cli.options import Run, command, count_option
from llmkit.errors import LlmkitError, UsageError

if TYPE_CHECKING:
    from llmkit.io.lineage import Input
    from llmkit.io.order import Order, Plan
    from llmkit.tokens.mix import Spec
    from llmkit.tokens.pool import Count

STDIN = "-"


@command(
    reads=True,
    writes=True,
    examples=(
        "llmkit mix shards/:0.7 code/:0.3 --tokens 20k --seed 1 -o mixed/",
        "llmkit mix shards/ code/:x2 --plan -o mix.toml",
        "llmkit mix docs.jsonl.zst:1 clean.jsonl.zst:2 -o mixed.jsonl.zst",
    ),
)
def main(
    run: Run,
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SOURCE", help="PATH, PATH:0.6 (weight), PATH:x6 (times), PATH:2B (tokens); nothing is stdin"
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        count_option("--tokens", help="Tokens of the mix; without it, what the sources give with none repeated"),
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Write a small TOML that `train` follows, instead of the tokens")
    ] = False,
    tokenizer: Annotated[
        Path | None,
        typer.Option("--tokenizer", "-t", help="Count the tokens of documents with this tokenizer, not as bytes / 4"),
    ] = None,
) -> None:
    """Combine token shards (or documents) by weight into training order.

    Weights share what multipliers and token budgets leave of --tokens. Without --tokens they are scaled until the first source is used up.
    A source smaller than its budget is repeated, each pass in another order, with a warning; column `epoch` says how often a document was
    seen before. Sources are interleaved so that every stretch holds their shares. The order depends on the content of the sources, the
    budgets and --seed alone.

    -o DIRECTORY or FILE.arrow takes shards in training order; with --plan, -o FILE.toml or DIRECTORY takes a plan, which names the shards by
    path and digest and gives the same order to the bit. Sources of documents (JSON lines, Parquet) give documents; a directory of files
    is one source, and they are kept in a temporary file meanwhile. stdin is -, with an amount /dev/stdin:0.5.
    """
    from llmkit.io.atomic import check_output
    from llmkit.io.inputs import read_list
    from llmkit.tokens.mix import parse_spec

    given = list(sources or []) + (read_list(run.files_from) if run.files_from else [])
    specs = [parse_spec(text) for text in given or [STDIN]]
    if tokens is not None and tokens < 1:
        raise UsageError("--tokens 0", "ask for at least one token")
    if sum(spec.path == STDIN for spec in specs) > 1:
        raise UsageError("stdin ('-') is named more than once", "it can be read only once")
    if plan and any(spec.path == STDIN for spec in specs):
        raise UsageError(
            "--plan names its sources by path, and stdin has none", "store the shards first, or drop --plan"
        )
    kinds = {spec.path: _holds_tokens(spec.path) for spec in specs}
    if len(set(kinds.values())) > 1:
        names = [next(path for path, kind in kinds.items() if kind is wanted) for wanted in (True, False)]
        raise UsageError(
            f"{names[0]} holds tokens, {names[1]} documents", "mix either, not both: tokenize the documents"
        )
    run.options["specs"] = [spec.suffix for spec in specs]
    if not run.dry_run and run.up_to_date([spec.path for spec in specs]):
        return
    if run.output and not run.dry_run:
        check_output(run.output, run.force)  # before the sources are read
    if all(kinds.values()):
        if tokenizer:
            raise UsageError("--tokenizer is for documents; these sources hold tokens", "leave it out")
        _mix_shards(run, specs, tokens, plan)
    elif plan:
        raise UsageError("--plan is for token shards; these sources hold documents", "tokenize them first")
    else:
        _mix_documents(run, specs, tokens, tokenizer)


def _holds_tokens(path: str) -> bool:
    """Whether a source is token shards (True) or documents (False). LlmkitError where there is nothing."""
    from llmkit.io.inputs import peek_stdin

    if path == STDIN:
        return peek_stdin() == b"\xff"  # a byte that neither JSON lines nor a compressed stream start with
    if os.path.isdir(path):
        return any(name.endswith(".arrow") for name in os.listdir(path)) or not _has_documents(path)
    if any(mark in path for mark in "*?[") and not os.path.exists(path):
        raise UsageError(f"{path}: a pattern is not one source", "name the directory, or each file")
    return path.endswith(".arrow")


def _has_documents(path: str) -> bool:
    from llmkit.io.inputs import expand

    try:
        return bool(expand([path]))
    except LlmkitError:
        return False


def _mix_shards(run: Run, specs: list[Spec], tokens: int | None, as_plan: bool) -> None:
    import numpy as np

    from llmkit.io.gather import write_ordered
    from llmkit.io.order import OrderedTokens, Plan, PlannedSource
    from llmkit.io.shards import ShardWriter, TokenStore

    stores = [TokenStore.open(spec.path) for spec in specs]
    lengths = [np.diff(store.offsets) for store in stores]
    wanted = _budgets(run, specs, [store.tokens for store in stores], tokens)
    digests = [store.inputs[0].digest for store in stores]
    _refuse_repeats(specs, digests)
    made = Plan(
        tuple(
            PlannedSource(spec.path, digest, budget)
            for spec, digest, budget in zip(specs, digests, wanted, strict=True)
        ),
        run.seed,
        stores[0].tokenizer.digest,
    )
    inputs = [item for store in stores for item in store.inputs]
    ordered = OrderedTokens(made, stores, inputs)
    counts = _report(run, specs, lengths, ordered.order, wanted)
    if run.dry_run:
        pass
    elif as_plan:
        _write_plan(run, made, inputs, counts)
    else:
        lineage = run.lineage()
        with ShardWriter(run.output, ordered.tokenizer, lineage, force=run.force, epochs=True) as writer:
            with run.progress(ordered.documents, "documents") as bar:
                write_ordered(ordered, writer, bar.advance)
            writer.finish(_flat(counts), inputs)
    _finish(run, counts)


def _write_plan(run: Run, made: Plan, inputs: list[Input], counts: dict[str, Any]) -> None:
    """The plan under the output's name: a TOML file, or a directory that holds plan.toml; stdout where there is none."""
    from dataclasses import replace

    from llmkit.io.atomic import atomic_directory, atomic_file
    from llmkit.io.order import PLAN_NAME, plan_text

    def text(directory: str) -> bytes:
        home = os.path.realpath(directory)
        sources = [replace(s, path=os.path.relpath(os.path.realpath(s.path), home)) for s in made.sources]
        return plan_text(replace(made, sources=tuple(sources)), lineage.to_dict()).encode()

    lineage = run.lineage()
    lineage.inputs += inputs
    lineage.counts = _flat(counts)
    if run.output is None:
        sys.stdout.buffer.write(text("."))
        sys.stdout.buffer.flush()
    elif run.output.endswith(".toml"):
        with atomic_file(run.output, run.force) as sink:
            sink.write(text(os.path.dirname(run.output) or "."))
    else:
        with atomic_directory(run.output, run.force) as directory:
            (directory / PLAN_NAME).write_bytes(text(run.output))


def _mix_documents(run: Run, specs: list[Spec], tokens: int | None, tokenizer: Path | None) -> None:
    from functools import partial

    from llmkit.engine.local import ordered_map
    from llmkit.io.inputs import STDIN
    from llmkit.io.lineage import Input, base_name, digest_path
    from llmkit.io.order import Plan, PlannedSource, resolve
    from llmkit.io.tokenizer import load_tokenizer_info
    from llmkit.tokens.pool import DocumentPool, by_tokenizer, estimate, measure

    count: Count = estimate
    if tokenizer:
        count = by_tokenizer(load_tokenizer_info(tokenizer))
    pool = DocumentPool()
    lengths, inputs, bad = [], [], 0
    with run.progress(None, "documents read") as bar:
        for spec in specs:
            reader = run.reader([spec.path], files_from=None)

            def accepted(reader: Any = reader) -> Any:
                for part in ordered_map(
                    partial(measure, options=reader.options, count=count), reader.chunks(), run.jobs
                ):
                    reader.accept(part.bad)
                    bar.advance(len(part.sizes))
                    yield part

            lengths.append(pool.add(accepted()))
            bad += reader.bad
            if spec.path != STDIN and os.path.isdir(spec.path):
                inputs.append(Input("input", base_name(spec.path), digest_path(spec.path)))
            else:
                inputs += reader.inputs
    _refuse_repeats(specs, [item.digest for item in inputs])
    wanted = _budgets(run, specs, [int(sizes.sum()) for sizes in lengths], tokens)
    made = Plan(
        tuple(
            PlannedSource(spec.path, item.digest, budget)
            for spec, item, budget in zip(specs, inputs, wanted, strict=True)
        ),
        run.seed,
    )
    order = resolve(made, lengths)
    counts = _report(run, specs, lengths, order, wanted) | ({"bad_lines": bad} if bad else {})
    if not run.dry_run:
        with run.writer() as writer:
            with run.progress(len(order.document), "documents") as bar:
                for block, number in pool.blocks(order):
                    writer.write(block)
                    bar.advance(number)
            writer.finish(_flat(counts), inputs)
    _finish(run, counts)


def _refuse_repeats(specs: list[Spec], digests: list[str]) -> None:
    """UsageError where two sources are the same documents: `epoch` would not say how often one was seen."""
    for i, digest in enumerate(digests):
        if digest in digests[:i]:
            first, second = specs[digests.index(digest)].path, specs[i].path
            raise UsageError(f"{first} and {second} hold the same documents", "name them once, with one amount")


def _budgets(run: Run, specs: list[Spec], available: list[int], tokens: int | None) -> list[int]:
    """Tokens of each source, with a warning for those that are repeated without having been asked to."""
    from llmkit.tokens.mix import budgets

    wanted = budgets(specs, available, tokens)
    for spec, has, budget in zip(specs, available, wanted, strict=True):
        if budget > has and spec.kind != "times":
            run.warn(f"{spec.path} holds {has:,} tokens and gives {budget:,}: repeated, {budget / has:.2f} epochs")
    return wanted


def _report(run: Run, specs: list[Spec], lengths: list[Any], order: Order, wanted: list[int]) -> dict[str, Any]:
    """The table of sources on stderr, and the counts for lineage and summary."""
    import numpy as np

    taken = [order.source == i for i in range(len(specs))]
    totals = [int(sizes[order.document[mine]].sum()) for sizes, mine in zip(lengths, taken, strict=True)]
    total = sum(totals)
    if not total:
        raise LlmkitError(
            f"the mix is empty: {sum(wanted):,} tokens are less than one document", "ask for more --tokens"
        )
    rows: list[dict[str, Any]] = []
    for spec, sizes, mine, got, budget in zip(specs, lengths, taken, totals, wanted, strict=True):
        has = int(sizes.sum())
        if not got and budget:
            run.warn(f"{spec.path} gives nothing: its share of {budget:,} tokens is less than half a document")
        rows.append(
            {
                "source": spec.path,
                "start_tokens": has,
                "multiplier": got / has,
                "tokens": got,
                "share": got / total,
                "epochs": int(np.max(order.epoch[mine], initial=-1)) + 1,
            }
        )
    if not run.as_json:
        run.table(
            "sources",
            ["source", "start tokens", "multiplier", "total", "share", "epochs"],
            [
                [
                    row["source"],
                    row["start_tokens"],
                    f"{row['multiplier']:.3f}",
                    row["tokens"],
                    f"{row['share']:.2%}",
                    row["epochs"],
                ]
                for row in rows
            ],
        )
    documents = sum(len(sizes) for sizes in lengths)
    return {"documents": documents, "taken": len(order.document), "tokens": total, "sources": rows}


def _flat(counts: dict[str, Any]) -> dict[str, Any]:
    """The counts that lineage holds."""
    return {key: value for key, value in counts.items() if key != "sources"}


def _finish(run: Run, counts: dict[str, Any]) -> None:
    where = "nothing written (--dry-run)" if run.dry_run else f"written to {run.output or 'stdout'}"
    run.finish(
        counts,
        f"{counts['tokens']:,} tokens in {counts['taken']:,} documents from {len(counts['sources'])} sources; {where}",
    )

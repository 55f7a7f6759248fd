"""`llmkit mix`: combine sources by weight into training order."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmkit.cli.shared.options import Run, command, count_option
from llmkit.errors import LlmkitError, UsageError, unknown_name

if TYPE_CHECKING:
    from llmkit.io.record import Input
    from llmkit.mixing.document_pool import Count
    from llmkit.mixing.order import Order
    from llmkit.mixing.plan import Plan
    from llmkit.mixing.stages import Stage
    from llmkit.shards.reader import TokenStore

STDIN = "-"
HELD_OUT = "heldout"
ORDER, SHARDS, TEXT = "Order", "Token shards", "Documents as sources"

# fmt: off
Sources = Annotated[list[str] | None, typer.Argument(metavar="SOURCE", help="PATH, PATH:0.6 (weight), PATH:x6 (times), PATH:2B (tokens); nothing is stdin")]
Tokens = Annotated[int | None, count_option("--tokens", help="Tokens of the mix; without it, what the sources give with none repeated")]
AsPlan = Annotated[bool, typer.Option("--plan", help="Write a small TOML that `train` follows, instead of the tokens")]
Shuffle = Annotated[str, typer.Option("--shuffle", metavar="HOW", help="global; block (of about 256k tokens, for disks); none", rich_help_panel=ORDER)]
Stages = Annotated[Path | None, typer.Option("--stages", metavar="TOML", help="Sources, and what each stage takes of them", rich_help_panel=ORDER)]
NoRepeat = Annotated[bool, typer.Option("--no-repeat", help="Refuse where a source is smaller than what it is to give", rich_help_panel=ORDER)]
Pack = Annotated[str, typer.Option("--pack", metavar="HOW", help="concat cuts anywhere; best-fit only what is too long", rich_help_panel=SHARDS)]
SequenceLength = Annotated[int | None, typer.Option("--sequence-length", min=2, max=1 << 24, help="Tokens in a sequence, as it will be trained on", rich_help_panel=SHARDS)]
HoldOut = Annotated[str | None, typer.Option("--holdout", metavar="SHARE", help="Keep this share, by a hash of their ids, out; in OUTPUT/heldout", rich_help_panel=SHARDS)]
TokenizerPath = Annotated[Path | None, typer.Option("--tokenizer", "-t", help="Count tokens with this tokenizer, not as bytes / 4", rich_help_panel=TEXT)]
WeightBy = Annotated[str | None, typer.Option("--weight-by", metavar="FIELD", help="Repeat documents by a count that they hold: duplicates", rich_help_panel=ORDER)]
WeightMap = Annotated[str | None, typer.Option("--weight-map", metavar="RANGES", help="Times for ranges of counts: 1:1,2-5:2,6-100:3", rich_help_panel=ORDER)]
# fmt: on


@dataclass(frozen=True, slots=True)
class Asked:
    """What the call asks of the order."""

    stages: list[Stage]
    shuffle: str
    pack: str
    length: int | None
    no_repeat: bool


@command(
    reads=True,
    writes=True,
    neutral=("no_repeat",),
    examples=(
        "llmkit mix shards/:0.7 code/:0.3 --tokens 20k --seed 1 -o mixed/",
        "llmkit mix shards/ code/:x2 --plan -o mix.toml",
        "llmkit mix shards/ code/ --pack best-fit --sequence-length 128 --holdout 5% -o packed/",
        "llmkit mix docs.jsonl.zst:1 clean.jsonl.zst:2 -o mixed.jsonl.zst",
    ),
)
def main(
    run: Run,
    sources: Sources = None,
    tokens: Tokens = None,
    plan: AsPlan = False,
    shuffle: Shuffle = "global",
    stages: Stages = None,
    no_repeat: NoRepeat = False,
    pack: Pack = "concat",
    sequence_length: SequenceLength = None,
    holdout: HoldOut = None,
    tokenizer: TokenizerPath = None,
    weight_by: WeightBy = None,
    weight_map: WeightMap = None,
) -> None:
    """Combine token shards (or documents) by weight into training order.

    Weights share what multipliers and token budgets leave of --tokens. Without --tokens they are scaled until the first source is used up.
    A source smaller than its budget is repeated, each pass in another order, with a warning; column `epoch` says how often a document was
    seen before. Sources are interleaved so that every stretch holds their shares. The order depends on the content of the sources, the
    budgets and --seed alone. --stages makes a curriculum: stage after stage, each with its own amounts, passes going on where the last stage
    left them; sources on the command line then replace the paths in the file.

    -o DIRECTORY or FILE.arrow takes shards in training order; with --plan, -o FILE.toml or DIRECTORY takes a plan, which names the shards by
    path and digest and gives the same order to the bit. With --pack best-fit the order fills sequences of --sequence-length: padding has
    weight 0, and `train` takes no other length. --holdout goes by a hash of the id, and takes what has the same id or the same tokens with it: none
    of it is trained on in another form, and what is held out of one mix is so of every one (with as large a share). Sources of documents
    (JSON lines, Parquet) give documents; a directory of files is one source, and they are kept in a temporary file meanwhile. stdin is -, with
    an amount /dev/stdin:0.5.
    """
    from llmkit.io.atomic import check_output, is_special
    from llmkit.io.inputs import read_list
    from llmkit.mixing.plan import SHUFFLES
    from llmkit.mixing.specs import parse_share, parse_spec, parse_weight_map
    from llmkit.mixing.stages import one_stage, read_stages

    given = list(sources or []) + (read_list(run.files_from) if run.files_from else [])
    for kind, name, known in (("--shuffle", shuffle, SHUFFLES), ("--pack", pack, ("concat", "best-fit"))):
        if name not in known:
            raise unknown_name(kind, name, known)
    if pack == "best-fit" and not sequence_length:
        raise UsageError("--pack best-fit without --sequence-length", "name the length that will be trained with")
    if (weight_by is None) != (weight_map is None):
        raise UsageError("--weight-by and --weight-map go together", "--weight-by duplicates --weight-map 1:1,2-5:2")
    if pack == "concat":
        run.options.pop("sequence_length", None)  # it decides nothing but a table
    share = parse_share(holdout) if holdout else 0.0
    ranges = parse_weight_map(weight_map) if weight_map else []
    if tokens is not None and (tokens < 1 or stages):
        raise UsageError(f"--tokens {tokens}", "the stages say it" if stages else "ask for at least one token")
    if stages:
        paths, asked_stages = read_stages(stages, given)
    else:
        specs = [parse_spec(text) for text in given or [STDIN]]
        run.options["specs"] = [spec.suffix for spec in specs]
        paths, asked_stages = [spec.path for spec in specs], one_stage(specs, tokens)
    if paths.count(STDIN) > 1:
        raise UsageError("stdin ('-') is named more than once", "it can be read only once")
    if plan and STDIN in paths:
        raise UsageError(
            "--plan names its sources by path, and stdin has none", "store the shards first, or drop --plan"
        )
    kinds = {path: _holds_tokens(path) for path in paths}
    if len(set(kinds.values())) > 1:
        names = [next(path for path, kind in kinds.items() if kind is wanted) for wanted in (True, False)]
        raise UsageError(
            f"{names[0]} holds tokens, {names[1]} documents", "mix either, not both: tokenize the documents"
        )
    only = (
        {"--tokenizer": tokenizer, f"--weight-by {weight_by}": weight_by not in (None, "duplicates")}
        if all(kinds.values())
        else {
            "--plan": plan,
            "--holdout": holdout,
            "--pack best-fit": pack != "concat",
            "--sequence-length": sequence_length,
        }
    )
    for name, value in only.items():
        if value and all(kinds.values()):
            raise UsageError(f"{name} is for documents; these sources hold tokens", "leave it out")
        if value:
            raise UsageError(f"{name} is for token shards; these sources hold documents", "tokenize them first")
    output = run.output or ""
    if share and not run.dry_run and (not output or output.endswith((".toml", ".arrow")) or is_special(Path(output))):
        raise UsageError("--holdout writes a directory", "name one: -o mix/")
    if not run.dry_run and run.up_to_date(paths):
        return
    if run.output and not run.dry_run:
        check_output(run.output, run.force)  # before the sources are read
    asked = Asked(asked_stages, shuffle, pack, sequence_length, no_repeat)
    if all(kinds.values()):
        _mix_shards(run, paths, asked, ranges, share, plan)
    else:
        _mix_documents(run, paths, asked, tokenizer, weight_by, ranges)


def _holds_tokens(path: str) -> bool:
    """Whether a source is token shards (True) or documents (False). LlmkitError where there is nothing."""
    from llmkit.io.inputs import peek_stdin

    if path == STDIN:
        return peek_stdin() == b"\xff"  # a byte that neither JSON lines nor a compressed stream start with
    if os.path.isdir(path):
        return any(name.endswith(".arrow") for name in os.listdir(path)) or not _has_documents(path)
    if any(mark in path for mark in "*?[") and not os.path.exists(path):
        raise UsageError(f"{path}: a pattern is not one source", "name the directory, or each file")
    if not os.path.exists(path) and "://" not in path:
        raise LlmkitError(f"{path}: no such file or directory", "check the path")
    return path.endswith(".arrow")


def _has_documents(path: str) -> bool:
    from llmkit.io.inputs import expand

    try:
        return bool(expand([path]))
    except LlmkitError:
        return False


def _mix_shards(
    run: Run, paths: list[str], asked: Asked, ranges: list[tuple[int, int]], share: float, as_plan: bool
) -> None:
    import numpy as np

    from llmkit.mixing.gather import write_ordered
    from llmkit.mixing.holdout import held_out
    from llmkit.mixing.order import OrderedTokens, usable
    from llmkit.mixing.plan import Plan, PlannedSource
    from llmkit.shards.reader import TokenStore
    from llmkit.shards.writer import ShardWriter

    stores = [TokenStore.open(path) for path in paths]
    digests = [store.inputs[0].digest for store in stores]
    _refuse_repeats(paths, digests)
    if ranges and all(store.duplicates is None for store in stores):
        raise LlmkitError(f"{paths[0]}: no duplicates of its documents are kept", "tokenize with --keep-duplicates")
    kept_out = held_out(stores, share) if share else [()] * len(stores)
    if share and not any(kept_out):
        run.warn(f"nothing is held out: none of {sum(s.documents for s in stores):,} documents falls into {share:.3g}")
    copies = [usable(store, documents, ranges) for store, documents in zip(stores, kept_out, strict=True)]
    lengths = [np.diff(store.offsets) for store in stores]
    wanted = _budgets(run, paths, asked, _available(lengths, copies))
    made = Plan(
        tuple(PlannedSource(*fields) for fields in zip(paths, digests, wanted, kept_out, strict=True)),
        run.seed,
        stores[0].tokenizer.digest,
        asked.shuffle,
        asked.length if asked.pack == "best-fit" else None,
        tuple(ranges),
    )
    inputs = [item for store in stores for item in store.inputs]
    ordered = OrderedTokens(made, stores, inputs)
    packed = ordered.order if made.sequence_length else None
    counts = _report(run, asked, ordered.unpacked, paths, lengths, copies, packed)
    if ordered.padding is not None:
        counts["padding"] = ordered.tokens - counts["tokens"]
    if share:
        counts["held_out"] = sum(map(len, kept_out))
    if run.dry_run:
        pass
    elif as_plan:
        _write_plan(run, made, stores, inputs, counts)
    else:
        lineage = run.lineage()
        with ShardWriter(
            run.output,
            ordered.tokenizer,
            lineage,
            force=run.force,
            epochs=True,
            sequence_length=made.sequence_length,
            stages=ordered.stages,
        ) as writer:
            with run.progress(ordered.documents, "documents") as bar:
                write_ordered(ordered, writer, bar.advance)
            writer.finish(_flat(counts), inputs)
            _write_held_out(run, writer.directory, made, stores, inputs)
    _finish(run, counts)


def _write_held_out(
    run: Run, directory: Path | None, made: Plan, stores: list[TokenStore], inputs: list[Input]
) -> None:
    """Token shards of the documents that the mix keeps out, in the directory of the mix; nothing where there are none."""
    from llmkit.shards.writer import ShardWriter

    found = sum(len(source.held_out) for source in made.sources)
    if not found:
        return
    assert directory
    with ShardWriter(str(directory / HELD_OUT), stores[0].tokenizer, run.lineage()) as writer:
        for store, source in zip(stores, made.sources, strict=True):
            names = store.sources
            for i in source.held_out:
                writer.write(store.document(i), store.id(i), names[store.codes[i]])
        writer.finish({"documents": found}, inputs)


def _write_plan(run: Run, made: Plan, stores: list[TokenStore], inputs: list[Input], counts: dict[str, Any]) -> None:
    """The plan under the output's name: a TOML file, or a directory that holds plan.toml; stdout where there is none."""
    from dataclasses import replace

    from llmkit.io.atomic import atomic_file
    from llmkit.lineage.outputs import artefact_directory
    from llmkit.mixing.plan import PLAN_NAME, digest_of, plan_text

    def text(directory: str) -> bytes:
        home = os.path.realpath(directory)
        sources = [replace(s, path=os.path.relpath(os.path.realpath(s.path), home)) for s in made.sources]
        return plan_text(replace(made, sources=tuple(sources)), lineage.to_dict()).encode()

    lineage = run.lineage()
    lineage.inputs += inputs
    lineage.counts, lineage.digest = _flat(counts), digest_of(made)
    if run.output is None:
        sys.stdout.buffer.write(text("."))
        sys.stdout.buffer.flush()
    elif run.output.endswith(".toml"):
        with atomic_file(run.output, run.force) as sink:
            sink.write(text(os.path.dirname(run.output) or "."))
    else:
        with artefact_directory(run.output, run.force) as directory:
            (directory / PLAN_NAME).write_bytes(text(run.output))
            _write_held_out(run, directory, made, stores, inputs)


def _mix_documents(
    run: Run, paths: list[str], asked: Asked, tokenizer: Path | None, field: str | None, ranges: list[tuple[int, int]]
) -> None:
    from functools import partial

    from llmkit.engine.local import ordered_map
    from llmkit.io.inputs import STDIN
    from llmkit.io.record import Input, base_name
    from llmkit.lineage.formats import digest_path
    from llmkit.mixing.document_pool import DocumentPool, by_tokenizer, estimate, measure
    from llmkit.mixing.order import copies_by, resolve
    from llmkit.mixing.plan import Plan, PlannedSource
    from llmkit.shards.reader import load_tokenizer_info

    count: Count = estimate
    if tokenizer:
        count = by_tokenizer(load_tokenizer_info(tokenizer))
    pool = DocumentPool()
    lengths, inputs, bad = [], [], 0
    with run.progress(None, "documents read") as bar:
        for path in paths:
            reader = run.reader([path], files_from=None)

            def accepted(reader: Any = reader) -> Any:
                work = partial(measure, options=reader.options, count=count, field=field)
                for part in ordered_map(work, reader.chunks(), run.jobs):
                    reader.accept(part.bad)
                    bar.advance(len(part.sizes))
                    yield part

            lengths.append(pool.add(accepted()))
            bad += reader.bad
            if path != STDIN and os.path.isdir(path):
                inputs.append(Input("input", base_name(path), digest_path(path)))
            else:
                inputs += reader.inputs
    digests = [item.digest for item in inputs]
    _refuse_repeats(paths, digests)
    copies = [copies_by(ranges, counts) if field else None for counts in pool.counts]
    wanted = _budgets(run, paths, asked, _available(lengths, copies))
    sources = tuple(PlannedSource(*fields) for fields in zip(paths, digests, wanted, strict=True))
    order = resolve(Plan(sources, run.seed, shuffle=asked.shuffle), lengths, copies)
    counts = _report(run, asked, order, paths, lengths, copies) | ({"bad_lines": bad} if bad else {})
    if not run.dry_run:
        with run.writer() as writer:
            with run.progress(len(order.document), "documents") as bar:
                for block, number in pool.blocks(order):
                    writer.write(block)
                    bar.advance(number)
            writer.finish(_flat(counts), inputs)
    _finish(run, counts)


def _refuse_repeats(paths: list[str], digests: list[str]) -> None:
    """UsageError where two sources are the same documents: `epoch` would not say how often one was seen."""
    for i, digest in enumerate(digests):
        if digest in digests[:i]:
            first, second = paths[digests.index(digest)], paths[i]
            raise UsageError(f"{first} and {second} hold the same documents", "name them once, with one amount")


def _available(lengths: list[Any], copies: list[Any]) -> list[int]:
    """Tokens of one pass over each source."""
    return [int((sizes if many is None else sizes * many).sum()) for sizes, many in zip(lengths, copies, strict=True)]


def _budgets(run: Run, paths: list[str], asked: Asked, available: list[int]) -> list[tuple[int, ...]]:
    """Tokens of each source in each stage, with a warning for those that are repeated without having been asked to."""
    from llmkit.mixing.stages import stage_budgets

    wanted = stage_budgets(asked.stages, available)
    for i, (path, has, budget) in enumerate(zip(paths, available, map(sum, wanted), strict=True)):
        if budget > has and asked.no_repeat:
            raise UsageError(
                f"{path} holds {has:,} tokens, and is to give {budget:,}", "ask for less of it, or drop --no-repeat"
            )
        if budget > has and any(i in stage.specs and stage.specs[i].kind != "times" for stage in asked.stages):
            run.warn(f"{path} holds {has:,} tokens and gives {budget:,}: repeated, {budget / has:.2f} epochs")
    return wanted


def _report(
    run: Run,
    asked: Asked,
    order: Order,
    paths: list[str],
    lengths: list[Any],
    copies: list[Any],
    made: Order | None = None,
) -> dict[str, Any]:
    """The tables of what came out on stderr, and the counts for lineage and summary."""
    from llmkit.mixing import statistics

    stages = statistics.by_stage(order, paths, asked.stages)
    sources = statistics.by_source(order, paths, lengths, copies)
    packing = statistics.by_packing(order, asked.length, made) if asked.length else []
    for row in stages:
        if not row["tokens"]:
            to = f" to {row['stage']}" if row["stage"] else ""
            run.warn(f"{row['source']} gives nothing{to}: its share is less than half a document")
    if not run.as_json:
        _show(run, "sources", sources)
        if len(asked.stages) > 1:
            _show(run, "stages", stages)
        if packing:
            _show(run, f"sequences of {asked.length:,} (this mix: {asked.pack})", packing)
    found = {
        "documents": sum(map(len, lengths)),
        "taken": len(order.document),
        "tokens": int(order.size.sum()),
        "sources": sources,
    }
    return found | ({"stages": stages} if len(asked.stages) > 1 else {}) | ({"packing": packing} if packing else {})


COLUMNS = {"start_tokens": "start tokens", "tokens": "total", "cut": "documents cut"}
FORMS = {"multiplier": "{:.3f}", "share": "{:.2%}", "cut": "{:.2%}", "padding": "{:.3%}"}


def _show(run: Run, title: str, rows: list[dict[str, Any]]) -> None:
    columns = [COLUMNS.get(name, name) for name in rows[0]]
    run.table(title, columns, [[FORMS[k].format(v) if k in FORMS else v for k, v in row.items()] for row in rows])


def _flat(counts: dict[str, Any]) -> dict[str, Any]:
    """The counts that lineage holds."""
    return {key: value for key, value in counts.items() if key not in ("sources", "stages", "packing")}


def _finish(run: Run, counts: dict[str, Any]) -> None:
    where = "nothing written (--dry-run)" if run.dry_run else f"written to {run.output or 'stdout'}"
    kept_out = f", {counts['held_out']:,} held out" if "held_out" in counts else ""
    taken = f"{counts['tokens']:,} tokens in {counts['taken']:,} documents from {len(counts['sources'])} sources"
    run.finish(counts, f"{taken}{kept_out}; {where}")

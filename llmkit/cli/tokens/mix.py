"""`llmkit mix`: combine weighted sources into training order."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmkit.cli.shared.messages import counted
from llmkit.cli.shared.options import Run, command, count_option
from llmkit.errors import UsageError, unknown_name

if TYPE_CHECKING:
    from llmkit.mixing.request import MixRequest

STDIN = "-"
ORDER, SHARDS, TEXT = "Order", "Token shards", "Documents as sources"

Sources = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="SOURCE",
        help="PATH, or PATH with a weight (:0.6), multiplier (:x6) or token budget (:2B) (default: stdin)",
    ),
]
Tokens = Annotated[
    int | None,
    count_option("--tokens", help="Size of the mix in tokens (default: the largest without repeating a source)"),
]
CutLast = Annotated[
    bool,
    typer.Option(
        "--cut-last", help="Cut the last document of each source to take exactly its tokens", rich_help_panel=SHARDS
    ),
]
AsPlan = Annotated[
    bool, typer.Option("--plan", help="Write a small TOML plan that `train` follows, instead of the tokens")
]
Shuffle = Annotated[
    str,
    typer.Option(
        "--shuffle",
        metavar="HOW",
        help="global; block (about 256k tokens each, for disks); none",
        rich_help_panel=ORDER,
    ),
]
Stages = Annotated[
    Path | None,
    typer.Option(
        "--stages", metavar="TOML", help="File with the sources and each stage's amounts", rich_help_panel=ORDER
    ),
]
NoRepeat = Annotated[
    bool, typer.Option("--no-repeat", help="Fail if a source would have to be repeated", rich_help_panel=ORDER)
]
Packing = Annotated[
    str,
    typer.Option(
        "--pack",
        metavar="HOW",
        help="concat cuts documents anywhere; best-fit cuts only those that are too long",
        rich_help_panel=SHARDS,
    ),
]
SequenceLength = Annotated[
    int | None,
    typer.Option(
        "--sequence-length", min=2, max=1 << 24, help="Sequence length in training, in tokens", rich_help_panel=SHARDS
    ),
]
HoldOut = Annotated[
    str | None,
    typer.Option(
        "--holdout",
        metavar="SHARE",
        help="Hold out this share of the documents, chosen by a hash of the id, in OUTPUT/heldout",
        rich_help_panel=SHARDS,
    ),
]
TokenizerPath = Annotated[
    Path | None,
    typer.Option(
        "--tokenizer",
        "-t",
        help="Count tokens with this tokenizer instead of estimating bytes / 4",
        rich_help_panel=TEXT,
    ),
]
WeightBy = Annotated[
    str | None,
    typer.Option(
        "--weight-by",
        metavar="FIELD",
        help="Repeat documents by the count in this field: duplicates",
        rich_help_panel=ORDER,
    ),
]
WeightMap = Annotated[
    str | None,
    typer.Option(
        "--weight-map", metavar="RANGES", help="Copies by range of counts: 1:1,2-5:2,6-100:3", rich_help_panel=ORDER
    ),
]


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
    pack: Packing = "concat",
    sequence_length: SequenceLength = None,
    holdout: HoldOut = None,
    tokenizer: TokenizerPath = None,
    weight_by: WeightBy = None,
    weight_map: WeightMap = None,
    cut_last: CutLast = False,
) -> None:
    """Combine weighted token shards (or documents) into training order.

    Weights share what multipliers and token budgets leave of --tokens. Without --tokens they are scaled until the
    first source is exhausted. A source smaller than its budget is repeated, each pass in another order, with a
    warning; column `epoch` tells how often a document occurred before. Sources are interleaved so that every
    stretch has their shares. The order depends only on the content of the sources, the budgets and --seed.
    Documents stay whole, so that a budget is met to within half a document, with a warning if tokens or shares are off
    by over 1 %; --cut-last cuts the last one of each source and stage (the next stage starts with the rest), and names
    it in the summary. A piece keeps its id and does not end with the end-of-text token. --stages makes a curriculum:
    one stage after another, each with its own amounts; passes over a source continue from stage to stage. Sources on
    the command line then replace the paths in the file.

    -o DIRECTORY or FILE.arrow writes shards in training order; with --plan, -o FILE.toml or DIRECTORY writes a
    plan, which names the shards by path and digest and gives exactly the same order. With --pack best-fit the
    order fills sequences of --sequence-length: padding has weight 0, and `train` accepts no other length.
    --holdout selects by a hash of the id and includes all documents with the same id or the same tokens, so
    that none is trained on in another form; a document held out of one mix is held out of every mix with the
    same or a larger share. Sources of documents (JSON lines, Parquet) give documents; a directory of files is
    one source. The documents are spooled to a temporary file. stdin is -, or with an amount /dev/stdin:0.5.
    """
    from llmkit.io.atomic import check_output, is_special
    from llmkit.io.inputs import read_list
    from llmkit.mixing.plan import SHUFFLES
    from llmkit.mixing.request import PACKINGS, MixRequest, hold_tokens, resolve_sources
    from llmkit.mixing.specs import parse_fraction, parse_weight_map

    specs = list(sources or []) + (read_list(run.files_from) if run.files_from else [])
    for option, name, names in (("--shuffle", shuffle, SHUFFLES), ("--pack", pack, PACKINGS)):
        if name not in names:
            raise unknown_name(option, name, names)
    if pack == "best-fit" and not sequence_length:
        raise UsageError("--pack best-fit without --sequence-length", "give the sequence length used in training")
    if (weight_by is None) != (weight_map is None):
        raise UsageError("--weight-by and --weight-map go together", "--weight-by duplicates --weight-map 1:1,2-5:2")
    if pack == "concat":
        run.options.pop("sequence_length", None)  # it affects nothing but a table
    fraction = parse_fraction(holdout) if holdout else 0.0
    ranges = parse_weight_map(weight_map) if weight_map else []
    if not cut_last:
        run.options.pop("cut_last")  # as if the option did not exist
    if tokens is not None and (tokens < 1 or stages):
        raise UsageError(f"--tokens {tokens}", "the stages file sets it" if stages else "ask for at least one token")
    paths, mix_stages = resolve_sources(specs, stages, tokens)
    if not stages:
        run.options["specs"] = [spec.suffix for spec in mix_stages[0].specs.values()]
    if plan and STDIN in paths:
        raise UsageError(
            "--plan names its sources by path, and stdin has none", "store the shards first, or drop --plan"
        )
    shards = hold_tokens(paths)
    unsupported: dict[str, Any]  # options for the other kind of source
    if shards:
        unsupported = {"--tokenizer": tokenizer, f"--weight-by {weight_by}": weight_by not in (None, "duplicates")}
    else:
        unsupported = {
            "--plan": plan,
            "--holdout": holdout,
            "--pack best-fit": pack != "concat",
            "--sequence-length": sequence_length,
            "--cut-last": cut_last,
        }
    for option in (option for option, value in unsupported.items() if value):
        if shards:
            raise UsageError(f"{option} is for documents; these sources hold tokens", "leave it out")
        raise UsageError(f"{option} is for token shards; these sources hold documents", "tokenize them first")
    if not shards:
        run.check_documents(run.output)
    output = run.output or ""
    into_file = not output or output.endswith((".toml", ".arrow")) or is_special(Path(output))
    if fraction and not run.dry_run and into_file:
        raise UsageError("--holdout writes a directory", "name one: -o mix/")
    if not run.dry_run and run.up_to_date(paths):
        return
    if run.output and not run.dry_run:
        check_output(run.output, run.force)  # before the sources are read
    request = MixRequest(
        paths,
        mix_stages,
        run.seed,
        shuffle,
        pack,
        sequence_length,
        tuple(ranges),
        no_repeat,
        fraction,
        cut_last,
        documents=not shards,
    )
    if shards:
        _mix_shards(run, request, plan)
    else:
        _mix_documents(run, request, tokenizer, weight_by)


def _mix_shards(run: Run, request: MixRequest, as_plan: bool) -> None:
    from llmkit.mixing.shard_mix import ShardMix

    mix = ShardMix(request, run.warn)
    _show_tables(run, request, mix.counts)
    if not run.dry_run:
        if as_plan:
            mix.write_plan(run.output, run.lineage, force=run.force)
        else:
            mix.write_shards(run.output, run.lineage, run.progress, force=run.force)
    _finish(run, mix.counts)


def _mix_documents(run: Run, request: MixRequest, tokenizer: Path | None, field: str | None) -> None:
    from llmkit.mixing.document_mix import DocumentMix
    from llmkit.mixing.document_pool import count_with, estimate_tokens
    from llmkit.mixing.statistics import lineage_counts
    from llmkit.shards.reader import load_tokenizer_info

    mix = DocumentMix(request, count_with(load_tokenizer_info(tokenizer)) if tokenizer else estimate_tokens, field)
    with run.progress(None, "documents read") as bar:
        for path in request.paths:
            mix.read(path, run.reader([path], files_from=None), run.jobs, bar.advance)
    mix.resolve(run.warn)
    _show_tables(run, request, mix.counts)
    if not run.dry_run:
        with run.writer() as writer:
            with run.progress(len(mix.order.document), "documents") as bar:
                mix.write(writer, bar.advance)
            writer.finish(lineage_counts(mix.counts), mix.inputs)
    _finish(run, mix.counts)


COLUMNS = {"start_tokens": "start tokens", "tokens": "total", "cut": "documents cut"}
FORMATS = {"multiplier": "{:.3f}", "share": "{:.2%}", "cut": "{:.2%}", "padding": "{:.3%}"}


def _show_tables(run: Run, request: MixRequest, counts: dict[str, Any]) -> None:
    from llmkit.io.names import escape_names

    titles = {
        "sources": "sources",
        "stages": "stages",
        "packing": f"sequences of {request.sequence_length:,} (this mix: {request.packing})"
        if request.sequence_length
        else "",
    }
    for name, title in titles.items():
        rows = counts.get(name)
        if rows and not run.as_json:
            columns = [COLUMNS.get(column, column) for column in rows[0]]
            rows = escape_names(rows)
            cells = [[FORMATS[k].format(v) if k in FORMATS else v for k, v in row.items()] for row in rows]
            run.table(title, columns, cells)


def _finish(run: Run, counts: dict[str, Any]) -> None:
    where = "nothing written (--dry-run)" if run.dry_run else f"written to {run.output or 'stdout'}"
    held_out = f", {counts['held_out']:,} held out" if "held_out" in counts else ""
    for piece in counts.get("cut", []):
        run.note(f"cut {piece}")
    taken = (
        f"{counted(counts['tokens'], 'token')} in {counted(counts['taken'], 'document')}"
        f" from {counted(len(counts['sources']), 'source')}"
    )
    run.finish(counts, f"{taken}{held_out}; {where}")

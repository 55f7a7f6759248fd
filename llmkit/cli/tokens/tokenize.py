"""`llmkit tokenize`: turn documents into token ids, and ids from one format into another, and back."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmkit.cli.shared.options import InputPaths, Run, command, count_option
from llmkit.cli.shared.ray_files import EngineName, engine_of
from llmkit.errors import UsageError, unknown_name
from llmkit.shards.formats import FOREIGN_FORMATS

if TYPE_CHECKING:
    from llmkit.engine.local import Engine
    from llmkit.io.record import Input
    from llmkit.shards.token_block import TokenBlock
    from llmkit.shards.tokenizer_info import TokenizerInfo

    # Whose tokens, the documents, and the inputs for the lineage.
    Found = tuple[TokenizerInfo, Iterable[TokenBlock], list[Input]]

READ = ("documents", "shards", *FOREIGN_FORMATS)
WRITTEN = ("shards", "jsonl", *FOREIGN_FORMATS)
FOREIGN_FILES = [f"{name} ({form.files})" for name, form in FOREIGN_FORMATS.items()]
# Options that decide what becomes of stored tokens.
STORED = ("to", "decode", "source", "tokenizer", "max_tokens_per_shard")
FIM = "Fill-in-the-middle"
PART = 1 << 27  # tokens, where nothing else is asked for
SUFFIX_FIRST = 0.5  # of documents cut for it, likewise


@command(
    reads=True,
    writes=True,
    neutral=("engine", "stats"),
    examples=(
        "llmkit tokenize docs.jsonl.zst -t tok/ -o shards2/ --stats",
        "llmkit filter < docs.jsonl.zst | llmkit tokenize -t tok/ > tokens.arrow",
        "llmkit tokenize --decode shards/ --plain | head -1",
        "llmkit tokenize shards/ --to megatron -o corpus && llmkit tokenize corpus.idx --from megatron -t tok/ -o shards3/",
    ),
)
def main(
    run: Run,
    inputs: InputPaths = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            "--tokenizer", "-t", help="Tokenizer or model directory, tokenizer.json, or shards that carry one"
        ),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            "--source", metavar="NAME", help="Source of every document; else its field `source`, else its file"
        ),
    ] = None,
    source_key: Annotated[
        str, typer.Option("--source-key", metavar="FIELD", help="Field that names a document's source")
    ] = "source",
    bos: Annotated[bool, typer.Option("--bos", help="Begin each document with the beginning-of-text token")] = False,
    allow_special: Annotated[
        bool, typer.Option("--allow-special", help="Encode the names of special tokens in a text as those tokens")
    ] = False,
    max_tokens_per_shard: Annotated[
        int, count_option("--max-tokens-per-shard", help="Tokens in one part of a directory")
    ] = PART,
    from_: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="FORMAT",
            envvar="LLMKIT_TOKENIZE_FROM",
            help=f"{', '.join(READ)}; default: by the names of the inputs",
        ),
    ] = None,
    to: Annotated[
        str,
        typer.Option(
            "--to", metavar="FORMAT", help=", ".join(["shards", "jsonl (id, source, tokens)", *FOREIGN_FILES])
        ),
    ] = "shards",
    decode: Annotated[bool, typer.Option("--decode", help="Turn token ids back into documents")] = False,
    stats: Annotated[bool, typer.Option("--stats", help="Print documents, tokens and bytes of each source")] = False,
    keep_duplicates: Annotated[
        bool, typer.Option("--keep-duplicates", help="Keep how often dedup found a document, for mix --weight-by")
    ] = False,
    engine: EngineName = "local",
    fim_rate: Annotated[
        float, typer.Option("--fim-rate", help="Share of documents cut for fill-in-the-middle", rich_help_panel=FIM)
    ] = 0.0,
    fim_spm_rate: Annotated[
        float, typer.Option("--fim-spm-rate", help="Share of those with the suffix first", rich_help_panel=FIM)
    ] = SUFFIX_FIRST,
    fim_source: Annotated[
        list[str] | None,
        typer.Option(
            "--fim-source", metavar="NAME", help="Only documents of this source; may be repeated", rich_help_panel=FIM
        ),
    ] = None,
) -> None:
    """Encode documents with any Hugging Face tokenizer and store them as token shards.

    -o DIRECTORY takes part-00000.arrow, ... with the tokenizer beside them, -o FILE.arrow one file with the tokenizer inside; without -o one
    stream goes to stdout. Every document ends with the end-of-text token; documents without text are dropped and counted. The name of
    a special token inside a text is text like any other, unless --allow-special.

    Inputs may hold tokens already: directories of shards and .arrow files are known by their names, --from names other formats. --to
    writes other formats. --decode turns tokens into JSON lines with id, text and source.

    --fim-rate cuts that share of the documents at two random places into prefix, middle and suffix, which are stored in the order prefix,
    suffix, middle (PSM) or suffix, prefix, middle (SPM), each behind its token of the tokenizer. Which and where, --seed and the id decide.
    """
    at_work = engine_of(run, engine)
    for option, value, known in (("--to", to, WRITTEN), ("--from", from_ or READ[0], READ)):
        if value not in known:
            raise unknown_name(option, value, known)
    if max_tokens_per_shard < 1:
        raise UsageError("--max-tokens-per-shard 0", "give at least one token")
    kind = from_ or ("shards" if decode or _hold_shards(run, inputs) else "documents")
    if decode and (to != "shards" or kind == "documents"):
        raise UsageError("--decode turns tokens into documents", "leave out --to, and --from documents")
    if kind == to == "shards" and not decode:
        raise UsageError("the inputs are token shards already", "name another format with --to, or --decode them")
    if tokenizer is None and kind != "shards":
        raise UsageError("no tokenizer", "name one with -t, or train one with: llmkit vocab INPUT... -o tok/")
    form = "documents" if decode else to
    if max_tokens_per_shard != PART and form != "shards":
        raise UsageError("--max-tokens-per-shard: only token shards come in parts", "leave it out, or write shards")
    if fim_spm_rate != SUFFIX_FIRST and not fim_rate:
        raise UsageError("--fim-spm-rate without --fim-rate", "say how many of its documents, such as --fim-rate 0.5")
    if keep_duplicates and form != "shards":
        raise UsageError(
            f"--keep-duplicates: {'--decode' if decode else f'--to {to}'} has no place for them",
            "leave it out, or write shards",
        )
    if kind == "documents":
        how = {
            "allow_special": allow_special,
            "source": source,
            "source_key": source_key,
            "bos": bos,
            "keep_duplicates": keep_duplicates,
        }
        found = _encoded(run, form, inputs, tokenizer, how, (fim_rate, fim_spm_rate, fim_source or []), at_work)
    else:
        encoding = {
            "--engine": engine != "local",
            "--bos": bos,
            "--fim-rate": fim_rate,
            "--fim-source": fim_source,
            "--source-key": source_key != "source",
            "--allow-special": allow_special,
            "--keep-duplicates": keep_duplicates,
        }
        for option in (name for name, given in encoding.items() if given):
            raise UsageError(f"{option} is for encoding documents; the inputs hold tokens", "leave it out")
        found = _stored(run, form, kind, inputs, tokenizer, source)
    if found is not None:
        _write(run, form, *found, max_tokens_per_shard, keep_duplicates, stats)


def _hold_shards(run: Run, inputs: list[str] | None) -> bool:
    """Whether all are token shards: directories with .arrow files in them, .arrow files, or a stream that begins as one."""
    from llmkit.io.inputs import STDIN, peek_stdin

    if inputs in (None, [], [STDIN]):
        return run.files_from is None and peek_stdin() == b"\xff"
    return all(
        path.endswith(".arrow") or (os.path.isdir(path) and any(name.endswith(".arrow") for name in os.listdir(path)))
        for path in inputs or []
    )


def _encoded(
    run: Run,
    form: str,
    inputs: list[str] | None,
    tokenizer: Path | None,
    how: dict[str, Any],
    fim: tuple[float, float, list[str]],
    engine: Engine,
) -> Found | None:
    """Documents to be encoded; None where that was done before."""
    from llmkit.shards.reader import load_tokenizer_info
    from llmkit.tokens.encode import EncodeOptions, Encoder
    from llmkit.tokens.fill_in_the_middle import fill_in_the_middle

    assert tokenizer is not None
    info = load_tokenizer_info(tokenizer)
    if how["bos"] and info.bos_id is None:
        raise UsageError(f"{tokenizer}: no beginning-of-text token", "set bos_token in its tokenizer_config.json")
    rate, spm_rate, sources = fim
    options = EncodeOptions(**how, fim=fill_in_the_middle(info, rate, spm_rate, run.seed, sources))
    for name in ["from_"] if rate else ["from_", "seed", "fim_rate", "fim_spm_rate"]:
        run.options.pop(name, None)  # they decide nothing
    paths = run.inputs(inputs)
    if form not in FOREIGN_FORMATS and not run.dry_run and run.up_to_date(paths):
        return None
    reader = run.reader_of(paths)
    work = Encoder(info, reader.options, options)

    def blocks() -> Iterator[TokenBlock]:
        for block in engine.map(work, reader):
            reader.accept(block.bad)
            yield block

    return info, blocks(), reader.inputs


def _stored(
    run: Run, form: str, kind: str, inputs: list[str] | None, tokenizer: Path | None, source: str | None
) -> Found | None:
    """Tokens that are stored already; None where the output has them."""
    from llmkit.io.inputs import STDIN, read_list
    from llmkit.shards.reader import load_tokenizer_info
    from llmkit.tokens.convert import stored

    run.options = {name: value for name, value in run.options.items() if name in STORED} | {"from_": kind}
    paths = list(inputs or []) + (read_list(run.files_from) if run.files_from else [])
    if kind == "shards":
        paths = paths or [STDIN]
    elif not paths or STDIN in paths:
        raise UsageError(f"--from {kind} maps files, and stdin is none", "name the files")
    else:
        form_read = FOREIGN_FORMATS[kind]
        *others, suffix = form_read.suffixes
        named = [path + suffix if others and not os.path.exists(path) else path for path in paths]
        data_sets = form_read.data_sets(run.inputs(named, files_from=None, suffixes=(suffix,)))
        paths = [path for data_set in data_sets for path in form_read.paths(data_set)]
    info = load_tokenizer_info(tokenizer) if tokenizer else None
    if form not in FOREIGN_FORMATS and not run.dry_run and run.up_to_date(paths):
        return None
    return stored(kind, paths, info, source)


def _write(
    run: Run,
    form: str,
    info: TokenizerInfo,
    blocks: Iterable[TokenBlock],
    read: list[Input],
    max_tokens_per_shard: int,
    keep_duplicates: bool,
    stats: bool,
) -> None:
    """Store the blocks in that form, and say what they were. `read` is complete once they are used up."""
    from contextlib import ExitStack

    from llmkit.tokens.convert import Tally

    tally = Tally()
    with ExitStack() as stack:
        if not run.dry_run:
            writer, put = _writer(run, form, info, max_tokens_per_shard, keep_duplicates)
            stack.enter_context(writer)
        bar = stack.enter_context(run.progress(None, "documents"))
        for block in blocks:
            if not run.dry_run:
                put(block)
            bar.advance(tally.add(block))
        counts: dict[str, Any] = tally.counts()
        if not run.dry_run:
            writer.finish(dict(counts), read)
    if stats:
        columns = ["source", "documents", "tokens", *(["bytes"] if tally.bytes else [])]
        rows = [[name, *row][: len(columns)] for name, row in tally.sources.items()]
        run.table("sources", columns, rows)
        counts["sources"] = [dict(zip(columns, row, strict=True)) for row in rows]
    said = [f"{tally.documents - tally.empty:,} documents, {tally.tokens:,} tokens"]
    said += [f"{tally.bytes / tally.tokens:.2f} bytes each"] if tally.bytes else []
    said += [f"dropped {tally.empty:,} without text"] if tally.empty else []
    said += [f"{tally.ended:,} given the end-of-text token"] if tally.ended else []
    said += [f"{tally.bad_lines:,} bad lines passed over"] if tally.bad_lines else []
    where = "nothing written (--dry-run)" if run.dry_run else f"written to {run.output or 'stdout'}"
    run.finish(counts, f"{', '.join(said)}; {where}")


def _writer(
    run: Run, form: str, info: TokenizerInfo, max_tokens_per_shard: int, keep_duplicates: bool
) -> tuple[Any, Callable[[TokenBlock], None]]:
    """What stores documents in that form, a context manager, and how it is given a block of them."""
    import numpy as np

    from llmkit.shards.arrow import as_arrow, encode_sources
    from llmkit.shards.writer import ShardWriter
    from llmkit.tokens.convert import text_lines, token_lines

    if form in ("jsonl", "documents"):
        lines = token_lines if form == "jsonl" else text_lines(info)
        documents = run.writer()
        return documents, lambda block: documents.write(lines(block))
    if form != "shards":
        files = FOREIGN_FORMATS[form].load().Writer(run.output, info, force=run.force)
        return files, files.write
    how: dict[str, Any] = {"max_tokens_per_shard": max_tokens_per_shard, "duplicates": keep_duplicates}
    shards = ShardWriter(run.output, info, run.lineage(), force=run.force, **how)

    def put(block: TokenBlock) -> None:
        duplicates = np.array(block.duplicates, np.int64) if keep_duplicates else None
        shards.extend(
            block.tokens, block.lengths, as_arrow(block.ids), encode_sources(block.sources), duplicates=duplicates
        )

    return shards, put

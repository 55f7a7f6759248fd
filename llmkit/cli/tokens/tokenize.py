"""`llmkit tokenize`: encode documents to token ids, convert ids between formats, and decode them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmkit.cli.shared.messages import counted, skipped
from llmkit.cli.shared.options import COMMON, InputPaths, Run, command, count_option
from llmkit.cli.shared.ray_files import EngineName, engine_of
from llmkit.errors import UsageError, unknown_name
from llmkit.shards.formats import FOREIGN_FORMATS

if TYPE_CHECKING:
    from llmkit.engine.local import Engine
    from llmkit.io.record import Input
    from llmkit.shards.token_block import TokenBlock
    from llmkit.shards.tokenizer_info import TokenizerInfo

    # Tokenizer, blocks of documents, inputs for the lineage, and what the target does not hold of the inputs.
    TokenStream = tuple[TokenizerInfo, Iterable[TokenBlock], list[Input], list[str]]

FOREIGN = FOREIGN_FORMATS.names()
SOURCE_FORMATS = ("documents", "shards", *FOREIGN)
TARGET_FORMATS = ("shards", "jsonl", *FOREIGN)
FOREIGN_FILES = [f"{name} ({FOREIGN_FORMATS.get(name).files})" for name in FOREIGN]
# Options that affect the output where the inputs hold tokens.
STORED_OPTIONS = ("eos", "to", "decode", "lossy", "source", "tokenizer", "max_tokens_per_shard")
FIM = "Fill-in-the-middle"
DEFAULT_SHARD_TOKENS = 1 << 27
DEFAULT_SPM_RATE = 0.5


@command(
    reads=True,
    writes=True,
    neutral=("engine", "stats"),
    examples=(
        "llmkit tokenize docs.jsonl.zst -t tok/ -o shards2/ --stats",
        "llmkit filter < docs.jsonl.zst | llmkit tokenize -t tok/ > tokens.arrow",
        "llmkit tokenize --decode shards/ --plain | head -1",
        "llmkit tokenize shards/ --to megatron -o corpus && "
        "llmkit tokenize corpus.idx --from megatron -t tok/ -o shards3/",
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
        COMMON,
    ] = None,
    eos: Annotated[
        str | None,
        typer.Option("--eos", metavar="NAME", help="End-of-text token (default: the one that the tokenizer names)"),
        COMMON,
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            "--source", metavar="NAME", help="Source of every document (default: its field `source`, else its file)"
        ),
    ] = None,
    source_key: Annotated[
        str, typer.Option("--source-key", metavar="FIELD", help="Field with a document's source")
    ] = "source",
    bos: Annotated[bool, typer.Option("--bos", help="Start each document with the beginning-of-text token")] = False,
    allow_special: Annotated[
        bool, typer.Option("--allow-special", help="Encode names of special tokens in a text as those tokens")
    ] = False,
    max_tokens_per_shard: Annotated[
        int, count_option("--max-tokens-per-shard", help="Tokens per part in a directory of shards")
    ] = DEFAULT_SHARD_TOKENS,
    from_: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="FORMAT",
            envvar="LLMKIT_TOKENIZE_FROM",
            help=f"{', '.join(SOURCE_FORMATS)} (default: by the names of the inputs)",
        ),
        COMMON,
    ] = None,
    to: Annotated[
        str,
        typer.Option(
            "--to", metavar="FORMAT", help=", ".join(["shards", "jsonl (id, source, tokens)", *FOREIGN_FILES])
        ),
        COMMON,
    ] = "shards",
    decode: Annotated[bool, typer.Option("--decode", help="Decode token ids to documents"), COMMON] = False,
    lossy: Annotated[
        bool,
        typer.Option("--lossy", help="Export packed or cut documents to formats that cannot mark them as such"),
    ] = False,
    stats: Annotated[bool, typer.Option("--stats", help="Print documents, tokens and bytes by source"), COMMON] = False,
    keep_duplicates: Annotated[
        bool, typer.Option("--keep-duplicates", help="Keep the duplicate counts of dedup, for mix --weight-by")
    ] = False,
    engine: EngineName = "local",
    fim_rate: Annotated[
        float, typer.Option("--fim-rate", help="Share of documents split for fill-in-the-middle", rich_help_panel=FIM)
    ] = 0.0,
    fim_spm_rate: Annotated[
        float,
        typer.Option(
            "--fim-spm-rate", help="Share of the split documents that store the suffix first", rich_help_panel=FIM
        ),
    ] = DEFAULT_SPM_RATE,
    fim_source: Annotated[
        list[str] | None,
        typer.Option(
            "--fim-source", metavar="NAME", help="Split only documents of this source (repeatable)", rich_help_panel=FIM
        ),
    ] = None,
) -> None:
    """Encode documents with any Hugging Face tokenizer and store them as token shards.

    -o DIRECTORY writes part-00000.arrow, ... with the tokenizer beside them, -o FILE.arrow one file with the tokenizer
    inside; without -o a stream goes to stdout. Every document ends with the end-of-text token; documents without text
    are dropped and counted. The name of a special token inside a text is ordinary text, unless --allow-special.
    Parts of texts for which the tokenizer has no tokens, and characters that it reads as spaces, are counted, with a
    warning, and what it changes by design (such as upper case or white space) is named. If it has no tokens for any of
    the texts, nothing is written. No text holds the end-of-text token, unless --allow-special.

    Ids and sources that are not text, such as numbers, are kept as they are. Inputs may also hold tokens: directories
    of shards and .arrow files are recognised by name, and compared with their digests; other formats need --from. --to
    writes other formats. --decode writes JSON lines with id, text and source. What a format cannot hold is named in the
    summary, or refused: the sequences of a packed mix, and pieces of documents that mix cut. With --lossy they are
    exported without padding, each piece as a document.

    --fim-rate splits that share of the documents at two random positions into prefix, middle and suffix, stored in the
    order prefix, suffix, middle (PSM) or suffix, prefix, middle (SPM), each after its sentinel token. --seed and the id
    decide which documents are split, and where.
    """
    worker_engine = engine_of(run, engine)
    if not lossy:
        run.options.pop("lossy")  # as if the option did not exist
    for option, value, names in (
        ("--to", to, TARGET_FORMATS),
        ("--from", from_ or SOURCE_FORMATS[0], SOURCE_FORMATS),
    ):
        if value not in names:
            raise unknown_name(option, value, names)
    if max_tokens_per_shard < 1:
        raise UsageError("--max-tokens-per-shard 0", "allow at least one token")
    kind = from_ or ("shards" if decode or _hold_shards(run, inputs) else "documents")
    if eos is not None and tokenizer is None:
        raise UsageError("--eos without -t", "the shards know their end-of-text token")
    if decode and (to != "shards" or kind == "documents"):
        raise UsageError("--decode turns tokens into documents", "drop --to and --from documents")
    if kind == to == "shards" and not decode:
        raise UsageError("the inputs are already token shards", "choose another format with --to, or --decode")
    if tokenizer is None and kind != "shards":
        raise UsageError("no tokenizer", "name one with -t, or train one with: llmkit vocab INPUT... -o tok/")
    target = "documents" if decode else to
    if target in ("documents", "jsonl"):
        run.check_documents(run.output)
    if max_tokens_per_shard != DEFAULT_SHARD_TOKENS and target != "shards":
        raise UsageError("--max-tokens-per-shard applies to token shards only", "drop it, or write shards")
    if fim_spm_rate != DEFAULT_SPM_RATE and not fim_rate:
        raise UsageError("--fim-spm-rate without --fim-rate", "give a share of documents, such as --fim-rate 0.5")
    if keep_duplicates and target != "shards":
        raise UsageError(
            f"--keep-duplicates: {'--decode' if decode else f'--to {to}'} cannot store them",
            "drop it, or write shards",
        )
    if kind == "documents":
        options = {
            "allow_special": allow_special,
            "source": source,
            "source_key": source_key,
            "bos": bos,
            "keep_duplicates": keep_duplicates,
        }
        stream = _encode(
            run, target, inputs, tokenizer, eos, options, (fim_rate, fim_spm_rate, fim_source or []), worker_engine
        )
    else:
        encoding_options = {
            "--engine": engine != "local",
            "--bos": bos,
            "--fim-rate": fim_rate,
            "--fim-source": fim_source,
            "--source-key": source_key != "source",
            "--allow-special": allow_special,
            "--keep-duplicates": keep_duplicates,
        }
        for option in (name for name, value in encoding_options.items() if value):
            raise UsageError(f"{option} is for encoding documents; the inputs hold tokens", "drop it")
        stream = _read_stored(run, target, kind, inputs, (tokenizer, eos), source, lossy)
    if stream is not None:
        _write(run, target, *stream, max_tokens_per_shard, keep_duplicates, stats, lossy)


def _hold_shards(run: Run, inputs: list[str] | None) -> bool:
    """Whether all inputs are token shards: directories with .arrow files, .arrow files, or a stream of them."""
    from llmkit.io.inputs import STDIN, peek_stdin

    if inputs in (None, [], [STDIN]):
        return run.files_from is None and peek_stdin() == b"\xff"
    return all(
        path.endswith(".arrow") or (os.path.isdir(path) and any(name.endswith(".arrow") for name in os.listdir(path)))
        for path in inputs or []
    )


def _encode(
    run: Run,
    target: str,
    inputs: list[str] | None,
    tokenizer: Path | None,
    eos: str | None,
    encode_options: dict[str, Any],
    fim: tuple[float, float, list[str]],
    engine: Engine,
) -> TokenStream | None:
    """The documents, encoded while they are read; None where the output is up to date."""
    from llmkit.shards.reader import load_tokenizer_info
    from llmkit.tokens.encoder import DocumentEncoder, EncodeOptions
    from llmkit.tokens.fill_in_the_middle import make_fill_in_the_middle

    assert tokenizer is not None
    info = load_tokenizer_info(tokenizer, eos)
    if encode_options["bos"] and info.bos_id is None:
        raise UsageError(f"{tokenizer}: no beginning-of-text token", "set bos_token in its tokenizer_config.json")
    rate, spm_rate, sources = fim
    options = EncodeOptions(**encode_options, fim=make_fill_in_the_middle(info, rate, spm_rate, run.seed, sources))
    for name in ["from_"] if rate else ["from_", "seed", "fim_rate", "fim_spm_rate"]:
        run.options.pop(name, None)  # they do not affect the output
    paths = run.inputs(inputs)
    if target not in FOREIGN and not run.dry_run and run.up_to_date(paths):
        return None
    _warn_of_changes(run, info, str(tokenizer))
    reader = run.reader_of(paths)
    work = DocumentEncoder(info, reader.options, options)

    def blocks() -> Iterator[TokenBlock]:
        for block in engine.map(work, reader):
            reader.accept(block.bad)
            yield block

    return info, blocks(), reader.inputs, ["ids", "sources"] * (target in FOREIGN)


def _read_stored(
    run: Run,
    target: str,
    kind: str,
    inputs: list[str] | None,
    tokenizer: tuple[Path | None, str | None],
    source: str | None,
    lossy: bool,
) -> TokenStream | None:
    """Documents that are already tokens; None where the output is up to date."""
    from llmkit.io.inputs import STDIN, read_list
    from llmkit.shards.reader import load_tokenizer_info
    from llmkit.tokens.convert import read_stored

    run.options = {name: value for name, value in run.options.items() if name in STORED_OPTIONS} | {"from_": kind}
    paths = list(inputs or []) + (read_list(run.files_from) if run.files_from else [])
    if kind == "shards":
        paths = paths or [STDIN]
    elif not paths or STDIN in paths:
        raise UsageError(f"--from {kind} needs files, and stdin is not one", "name the files")
    else:
        foreign = FOREIGN_FORMATS.get(kind)
        *others, suffix = foreign.suffixes
        named = [path + suffix if others and not os.path.exists(path) else path for path in paths]
        data_sets = foreign.data_sets(run.inputs(named, files_from=None, suffixes=(suffix,), left_out=None))
        paths = [path for data_set in data_sets for path in foreign.paths(data_set)]
    path, eos = tokenizer  # and its end-of-text token
    info = load_tokenizer_info(path, eos) if path else None
    if target not in FOREIGN and not run.dry_run and run.up_to_date(paths):
        return None
    stream = read_stored(kind, paths, info, source, target, lossy)
    if target == "documents":
        _warn_of_changes(run, stream[0], str(path or "the tokenizer"), stored=True)
    return stream


def _warn_of_changes(run: Run, info: TokenizerInfo, name: str, *, stored: bool = False) -> None:
    from llmkit.tokens.losses import changes

    if changed := changes(info, stored=stored):
        run.warn(f"{name} changes texts, so that they do not decode to themselves: {', '.join(changed)}")


def _write(
    run: Run,
    target: str,
    info: TokenizerInfo,
    blocks: Iterable[TokenBlock],
    inputs: list[Input],
    not_held: list[str],
    max_tokens_per_shard: int,
    keep_duplicates: bool,
    stats: bool,
    lossy: bool,
) -> None:
    """Write the blocks in the target format and report the totals. `inputs` is complete after the last block."""
    from contextlib import ExitStack

    from llmkit.tokens.convert import TokenCounts, end_documents

    totals = TokenCounts()
    foreign = FOREIGN_FORMATS.get(target) if target in FOREIGN else None
    if foreign and (caveat := foreign.caveat(info)):
        run.warn(caveat)
    with ExitStack() as stack:
        if not run.dry_run:
            writer, put = _open_writer(run, target, info, max_tokens_per_shard, keep_duplicates)
            stack.enter_context(writer)
        bar = stack.enter_context(run.progress(None, "documents"))
        for block in blocks:
            if foreign:
                block = end_documents(block, info, flat=foreign.flat, lossy=lossy)
            if not run.dry_run:
                put(block)
            bar.advance(totals.add(block))
        counts: dict[str, Any] = totals.counts() | run.bad_file_counts()
        for warning in totals.check_losses():
            run.warn(warning)
        if not run.dry_run:
            writer.finish(dict(counts), inputs)
    if stats:
        columns = ["source", "documents", "tokens", *(["bytes"] if totals.bytes else [])]
        rows = [[name, *row][: len(columns)] for name, row in totals.sources.items()]
        run.table("sources", columns, rows)
        counts["sources"] = [dict(zip(columns, row, strict=True)) for row in rows]
    parts = [f"{counted(totals.documents - totals.empty, 'document')}, {counted(totals.tokens, 'token')}"]
    parts += [f"{totals.bytes / totals.tokens:.2f} bytes each"] if totals.bytes else []
    parts += [f"dropped {totals.empty:,} without text"] if totals.empty else []
    parts += [f"added the end-of-text token to {totals.ended:,}"] if totals.ended else []
    output = foreign.output_name(run.output) if foreign and run.output else run.output or "stdout"
    where = "nothing written (--dry-run)" if run.dry_run else f"written to {output}"
    if not_held:
        counts["not_held"] = not_held
        where += f"; not kept: {', '.join(not_held)}"
    run.finish(counts, f"{', '.join(parts)}{skipped(counts)}; {where}")


def _open_writer(
    run: Run, target: str, info: TokenizerInfo, max_tokens_per_shard: int, keep_duplicates: bool
) -> tuple[Any, Callable[[TokenBlock], None]]:
    """A writer for the target format, which is a context manager, and a function that writes a block to it."""
    import numpy as np

    from llmkit.shards.arrow import as_arrow, encode_sources
    from llmkit.shards.writer import ShardWriter
    from llmkit.tokens.convert import text_lines, token_lines

    if target in ("jsonl", "documents"):
        lines = token_lines if target == "jsonl" else text_lines(info)
        documents = run.writer()
        return documents, lambda block: documents.write(lines(block))
    if target != "shards":
        files = FOREIGN_FORMATS.get(target).writer(run.output, info, force=run.force)
        return files, files.write
    options: dict[str, Any] = {"max_tokens_per_shard": max_tokens_per_shard, "duplicates": keep_duplicates}
    shards = ShardWriter(run.output, info, run.lineage(), force=run.force, **options)

    def put(block: TokenBlock) -> None:
        duplicates = np.array(block.duplicates, np.int64) if keep_duplicates else None
        columns = block.tokens, block.lengths, as_arrow(block.ids), encode_sources(block.sources)
        shards.extend(*columns, duplicates=duplicates, json_marks=block.json_marks)

    return shards, put

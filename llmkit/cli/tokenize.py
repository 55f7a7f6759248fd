"""`llmkit tokenize`: turn documents into token shards, and back."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmkit.cli.options import InputPaths, Run, command, count_option
from llmkit.cli.spread import EngineName, engine_of
from llmkit.errors import UsageError

if TYPE_CHECKING:
    from llmkit.engine.local import Engine
    from llmkit.io.tokenizer import TokenizerInfo


@command(
    reads=True,
    writes=True,
    neutral=("engine",),
    examples=(
        "llmkit tokenize docs.jsonl.zst -t tok/ -o shards2/",
        "llmkit filter < docs.jsonl.zst | llmkit tokenize -t tok/ > tokens.arrow",
        "llmkit tokenize --decode shards/ --plain | head -1",
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
    allow_special: Annotated[
        bool, typer.Option("--allow-special", help="Encode the names of special tokens in a text as those tokens")
    ] = False,
    max_tokens_per_shard: Annotated[
        int, count_option("--max-tokens-per-shard", help="Tokens in one part of a directory")
    ] = 1 << 27,
    decode: Annotated[bool, typer.Option("--decode", help="Turn token shards back into documents")] = False,
    engine: EngineName = "local",
) -> None:
    """Encode documents with any Hugging Face tokenizer and store them as token shards.

    -o DIRECTORY takes part-00000.arrow, ... with the tokenizer beside them, -o FILE.arrow one file with the tokenizer inside; without -o one
    stream goes to stdout. Every document ends with the end-of-text token; documents without text are dropped and counted. The name of
    a special token inside a text is text like any other, unless --allow-special. --decode turns shards into JSON lines with id, text and source.
    """
    if decode:
        _decode(run, inputs, tokenizer)
        return
    from llmkit.io.tokenizer import load_tokenizer_info

    if tokenizer is None:
        raise UsageError("no tokenizer", "name one with -t, or train one with: llmkit vocab INPUT... -o tok/")
    if max_tokens_per_shard < 1:
        raise UsageError("--max-tokens-per-shard 0", "give at least one token")
    info = load_tokenizer_info(tokenizer)
    if not run.dry_run and run.up_to_date(run.inputs(inputs)):
        return
    counts = _encode(run, inputs, info, source, allow_special, max_tokens_per_shard, engine_of(run, engine))
    empty = f", dropped {counts['empty']:,} without text" if counts["empty"] else ""
    bad = f", {counts['bad_lines']:,} bad lines passed over" if counts.get("bad_lines") else ""
    ratio = f" ({counts['bytes'] / counts['tokens']:.2f} bytes each)" if counts["tokens"] else ""
    where = "nothing written (--dry-run)" if run.dry_run else f"written to {run.output or 'stdout'}"
    run.finish(
        counts,
        f"{counts['documents'] - counts['empty']:,} documents, {counts['tokens']:,} tokens{ratio}{empty}{bad}; {where}",
    )


def _encode(
    run: Run,
    inputs: list[str] | None,
    info: TokenizerInfo,
    source: str | None,
    allow_special: bool,
    max_tokens_per_shard: int,
    engine: Engine,
) -> dict[str, Any]:
    """Encode every document into shards; the counts for lineage and summary."""
    from contextlib import ExitStack

    from llmkit.io.shards import ShardWriter
    from llmkit.tokens.encode import Encoder

    reader = run.reader(inputs)
    work = Encoder(info, reader.options, allow_special=allow_special, source=source)
    totals: Counter[str] = Counter(documents=0, tokens=0, bytes=0, empty=0)
    with ExitStack() as stack:
        writer = None
        if not run.dry_run:
            writer = stack.enter_context(
                ShardWriter(run.output, info, run.lineage(), force=run.force, max_tokens_per_shard=max_tokens_per_shard)
            )
        bar = stack.enter_context(run.progress(None, "documents"))
        for part in engine.map(work, reader):
            reader.accept(part.bad)
            if writer:
                for tokens, id, name in part.documents():
                    writer.write(tokens, id, name)
            documents = len(part.ids) + part.empty
            totals.update(documents=documents, tokens=len(part.tokens), bytes=part.bytes, empty=part.empty)
            bar.advance(documents)
        counts: dict[str, Any] = dict(totals) | ({"bad_lines": reader.bad} if reader.bad else {})
        if writer:
            writer.finish(counts, reader.inputs)
    return counts


def _decode(run: Run, inputs: list[str] | None, tokenizer: Path | None) -> None:
    """Shards to documents."""
    from contextlib import ExitStack

    import orjson

    from llmkit.errors import LlmkitError
    from llmkit.io.shards import TokenStore, load_tokenizer_info
    from llmkit.tokens.encode import decode
    from llmkit.tokens.text_encoder import load

    store = TokenStore.open(list(inputs or ["-"]))
    info = store.tokenizer
    if tokenizer is not None:
        info = load_tokenizer_info(tokenizer)
        if info.digest != store.tokenizer.digest:
            raise LlmkitError(f"{tokenizer}: not the tokenizer of these shards", "leave -t out where they carry theirs")
    library = load(info)
    counts = {"documents": store.documents, "tokens": store.tokens}
    with ExitStack() as stack:
        writer = None if run.dry_run else stack.enter_context(run.writer())
        bar = stack.enter_context(run.progress(store.documents, "documents"))
        for i in range(store.documents):
            text = decode(library, store.document(i), info.eos_id)
            if writer:
                writer.write(orjson.dumps({"id": store.id(i), "text": text, "source": store.source(i)}) + b"\n")
            bar.advance()
        if writer:
            writer.finish(counts, store.inputs)
    where = "nothing written (--dry-run)" if run.dry_run else f"written to {run.output or 'stdout'}"
    run.finish(counts, f"{store.documents:,} documents decoded; {where}")

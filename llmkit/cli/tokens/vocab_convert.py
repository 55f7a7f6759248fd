"""`llmkit vocab convert`: turn a vocabulary of another library into a tokenizer directory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmkit.cli.shared.options import Run, command
from llmkit.errors import LlmkitError, UsageError


@command(
    examples=(
        "llmkit vocab convert gpt2/ --eos '<|endoftext|>' -o tok4/",
        "llmkit vocab convert ranks.tiktoken --pattern llama-bpe --eos '<|endoftext|>' -o tok5/",
    ),
)
def main(
    run: Run,
    vocabulary: Annotated[
        Path, typer.Argument(metavar="VOCABULARY", help="*.tiktoken, tekken.json, or a directory with vocab.json")
    ],
    pattern: Annotated[
        str | None,
        typer.Option("--pattern", "-p", metavar="NAME", help="How it splits text: llama-bpe, qwen2, gpt-2 or smollm"),
    ] = None,
    special: Annotated[
        list[str] | None,
        typer.Option("--special", metavar="NAME[=ID]", help="A special token that the file lacks (repeatable)"),
    ] = None,
    eos: Annotated[
        str | None,
        typer.Option("--eos", metavar="NAME[=ID]", help="The end-of-text token, added if missing"),
    ] = None,
) -> None:
    """Convert a byte-level vocabulary of tiktoken, Mistral (tekken.json) or GPT-2 to a tokenizer directory.

    A .tiktoken file holds neither the pattern by which it splits text (cl100k_base and Llama 3 have that of llama-bpe,
    Qwen that of qwen2) nor its special tokens: without =ID these get the next ids. SentencePiece models are not
    converted here; with -t, `tokenize` tells how.
    """
    from llmkit.io.atomic import check_output
    from llmkit.lineage.formats import describe_input
    from llmkit.lineage.outputs import artefact_directory
    from llmkit.shards.foreign_vocabulary import convertible_file, name_format
    from llmkit.shards.tokenizer_info import parse_tokenizer, with_eos
    from llmkit.tokens.convert_vocabulary import convert, special_ids

    if run.output is None:
        raise UsageError("no output", "name the tokenizer directory with -o")
    file = convertible_file(vocabulary)
    if file is None:
        named = name_format(vocabulary)
        reason = f"{named[0]}, which is not converted here" if named else "not a vocabulary of a known format"
        raise LlmkitError(f"{vocabulary}: {reason}", named[1] if named else "see llmkit vocab convert --help")
    source = file.parent if file.name == "vocab.json" else file
    if not run.dry_run:
        if run.up_to_date([str(source)]):
            return
        check_output(run.output, run.force)
    given = [*(special or []), *([eos] if eos else [])]
    content = convert(file, pattern, given)
    files = with_eos({"tokenizer.json": content}, next(iter(special_ids([eos], 0))) if eos else None)
    info = parse_tokenizer(files, str(vocabulary))
    lineage = run.lineage()
    lineage.inputs.append(describe_input(source))
    lineage.counts, lineage.digest = {"size": info.vocab_size}, info.digest
    if not run.dry_run:
        files = with_eos(files, None, lineage.to_dict())
        with artefact_directory(run.output, run.force) as directory:
            for name, text in files.items():
                (directory / name).write_bytes(text.encode())
    where = "nothing written (--dry-run)" if run.dry_run else f"written to {run.output}"
    run.finish({"size": info.vocab_size}, f"{info.vocab_size:,} tokens; {where}")

"""`llmkit vocab`: train a byte-level BPE tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import typer

from llmkit.cli.options import InputPaths, Run, command, count_option
from llmkit.errors import UsageError


@command(
    reads=True,
    examples=(
        "llmkit vocab docs.jsonl.zst --size 4096 -o tok2/",
        "llmkit vocab docs.jsonl.zst --size 2k --pattern smollm --min-frequency 3 -o tok3/",
    ),
)
def main(
    run: Run,
    inputs: InputPaths = None,
    size: Annotated[
        int, count_option("--size", "-s", help="Tokens in the vocabulary, special ones and the 256 bytes included")
    ] = 8192,
    pattern: Annotated[
        str, typer.Option("--pattern", "-p", metavar="NAME", help="llama-bpe, qwen2, gpt-2 or smollm")
    ] = "llama-bpe",
    min_frequency: Annotated[
        int, typer.Option("--min-frequency", min=1, help="A pair that occurs less often is not merged")
    ] = 2,
    multiple: Annotated[
        int, typer.Option("--multiple", min=1, help="Round the size up to a multiple of this; 1 leaves it")
    ] = 64,
) -> None:
    """Train a byte-level BPE tokenizer on documents and write it as a Hugging Face tokenizer directory.

    --pattern says how text is cut into words before merging: the four that llama.cpp has built in, so that a model can be exported to GGUF.
    Special tokens: <|endoftext|> (0), <|im_start|> and <|im_end|> for chat (ChatML, with its template), <|pad|>, and twelve reserved ones. The
    tokenizer depends on the texts and options alone, not on their order or on -j. Where the texts are too few for the size asked for,
    the vocabulary is smaller, and a warning says so.
    """
    from llmkit.io.atomic import atomic_directory, check_output
    from llmkit.io.tokenizer import parse_tokenizer
    from llmkit.tokens import vocabulary
    from llmkit.tokens.pretokenize import pattern as find_pattern

    if run.output is None:
        raise UsageError("no output", "name the tokenizer directory with -o")
    rounded = vocabulary.check_size(size, multiple)
    if rounded != size:
        run.note(f"{size:,} rounded up to {rounded:,}, a multiple of {multiple}")
    find_pattern(pattern)
    paths = run.inputs(inputs)
    if not run.dry_run and run.up_to_date(paths):
        return
    check_output(run.output, run.force)
    vocabulary.limit_threads(run.jobs)
    reader = run.reader(inputs)
    counted = {"documents": 0, "characters": 0}

    with run.progress(None, "documents") as bar:

        def texts() -> Iterator[str]:
            for document in reader.documents():
                counted["documents"] += 1
                counted["characters"] += len(document.text)
                bar.advance()
                yield document.text

        made = vocabulary.train(texts(), rounded, pattern, min_frequency, multiple)
    counts: dict[str, Any] = counted | {"size": made.size, "merges": made.merges}
    if reader.bad:
        counts["bad_lines"] = reader.bad
    if made.merges < made.merges_asked:
        run.warn(
            f"the texts hold {made.merges:,} merges of the {made.merges_asked:,} asked for "
            f"(pairs that occur {min_frequency} times or more): the vocabulary has {made.size:,} tokens"
        )
    if not run.dry_run:
        lineage = run.lineage()
        lineage.inputs += reader.inputs
        lineage.counts = counts
        lineage.digest = parse_tokenizer(made.files | {"tokenizer_config.json": "{}"}, run.output).digest
        files = made.files | {"tokenizer_config.json": vocabulary.tokenizer_config(lineage.to_dict())}
        with atomic_directory(run.output, run.force) as directory:
            for name, text in files.items():
                (directory / name).write_bytes(text.encode())
    where = "nothing written (--dry-run)" if run.dry_run else f"written to {run.output}"
    run.finish(
        counts,
        f"{made.size:,} tokens ({made.merges:,} merges) from {counted['documents']:,} documents, "
        f"{counted['characters']:,} characters; {where}",
    )

"""`llmkit vocab`: train a byte-level BPE tokenizer."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from llmkit.cli.shared.messages import counted
from llmkit.cli.shared.options import InputPaths, Run, command, count_option
from llmkit.errors import LlmkitError, UsageError, unknown_name

DIGITS = {"three": ("llama-bpe",), "single": ("qwen2", "smollm")}  # patterns by how they split numbers, default first


@command(
    reads=True,
    examples=(
        "llmkit vocab docs.jsonl.zst --size 4096 -o tok2/",
        "llmkit vocab docs.jsonl.zst --size 2k --digits single --min-frequency 3 --special '<think>' "
        "--sample 0.5 -o tok3/",
    ),
)
def main(
    run: Run,
    inputs: InputPaths = None,
    size: Annotated[
        int, count_option("--size", "-s", help="Vocabulary size in tokens, including special tokens and the 256 bytes")
    ] = 8192,
    pattern: Annotated[
        str | None,
        typer.Option("--pattern", "-p", metavar="NAME", help="llama-bpe, qwen2, gpt-2 or smollm (default: llama-bpe)"),
    ] = None,
    digits: Annotated[
        str | None,
        typer.Option(
            "--digits", metavar="HOW", help="Split numbers into groups of three (llama-bpe) or single digits (qwen2)"
        ),
    ] = None,
    min_frequency: Annotated[
        int, typer.Option("--min-frequency", min=1, help="Minimum frequency of a merged pair")
    ] = 2,
    sample: Annotated[
        float,
        typer.Option("--sample", help="Share of the documents to train on, by a hash of the id and --seed"),
    ] = 1.0,
    special: Annotated[
        list[str] | None,
        typer.Option("--special", metavar="NAME", help="Additional special token, such as <name> (repeatable)"),
    ] = None,
    multiple: Annotated[int, typer.Option("--multiple", min=1, help="Round the size up to a multiple of this")] = 64,
) -> None:
    """Train a byte-level BPE tokenizer on documents and write it as a Hugging Face tokenizer directory.

    --pattern selects how text is split into words before merging. Only the four patterns built into llama.cpp
    are offered, so that a model can be exported to GGUF. --digits selects a pattern by how it splits numbers:
    1234567 becomes 123 456 7 with three, 1 2 3 4 5 6 7 with single, and stays
    whole with gpt-2.
    Special tokens: <|endoftext|> (0), <|im_start|> and <|im_end|> for chat (ChatML, with its template),
    <|pad|>, three for fill-in-the-middle (<|fim_prefix|>, ...), four around tool calls (<tool_call>, ...),
    those given with --special, and five reserved ones less the number of those. The tokenizer depends only on
    the texts and options, not on the order of the texts or on -j, and its merges equal those of the
    `tokenizers` trainer. Where there is too little text for the requested size, the vocabulary is smaller, with
    a warning.
    """
    from llmkit.engine.local import Local
    from llmkit.io.atomic import check_output
    from llmkit.lineage.outputs import artefact_directory
    from llmkit.shards.tokenizer_info import parse_tokenizer
    from llmkit.tokens import vocabulary
    from llmkit.tokens.pretokenize import find_pattern

    if run.output is None:
        raise UsageError("no output", "name the tokenizer directory with -o")
    custom = special or []
    rounded = vocabulary.check_size(size, multiple, len(vocabulary.special_tokens(custom)))
    if rounded != size:
        run.note(f"{size:,} rounded up to {rounded:,}, a multiple of {multiple}")
    name = _pattern_name(pattern, digits)
    find_pattern(name)
    run.options["pattern"] = name
    if not 0 < sample <= 1:
        raise UsageError(f"--sample {sample:g}", "give a share of the documents, over 0 and at most 1")
    paths = run.inputs(inputs)
    if not run.dry_run and run.up_to_date(paths):
        return
    check_output(run.output, run.force)
    from llmkit.tokens.trainer import PieceCounter, PieceCounts

    reader = run.reader(inputs)
    counts: dict[str, Any] = {"documents": 0, "characters": 0}
    if sample < 1:
        counts["taken"] = 0
    pieces = PieceCounts()
    work = PieceCounter(name, reader.options, sample, run.seed, pieces if run.jobs == 1 else None)
    with run.progress(None, "documents") as bar:
        for chunk in Local(run.jobs).map(work, reader):
            reader.accept(chunk.bad)
            if chunk.pieces:
                pieces.add(chunk.pieces)
            counts["documents"] += chunk.documents
            counts["characters"] += chunk.characters
            if sample < 1:
                counts["taken"] += chunk.taken
            bar.advance(chunk.documents)
    if counts["documents"] and counts.get("taken") == 0:
        raise LlmkitError(
            f"--sample {sample:g} takes none of {counts['documents']:,} documents",
            "give more documents, or another --seed",
        )
    trained = vocabulary.train_on_counts(pieces, rounded, name, min_frequency, multiple, custom)
    counts |= {"size": trained.size, "merges": trained.merges}
    counts |= reader.counts()
    if trained.merges < trained.merges_requested:
        run.warn(
            f"the texts have only {trained.merges:,} of the {trained.merges_requested:,} merges requested "
            f"(pairs that occur {min_frequency} times or more): the vocabulary has {trained.size:,} tokens"
        )
    if not run.dry_run:
        lineage = run.lineage()
        lineage.inputs += reader.inputs
        lineage.counts = counts
        lineage.digest = parse_tokenizer(trained.files | {"tokenizer_config.json": "{}"}, run.output).digest
        files = trained.files | {"tokenizer_config.json": vocabulary.tokenizer_config(lineage.to_dict())}
        with artefact_directory(run.output, run.force) as directory:
            for file, text in files.items():
                (directory / file).write_bytes(text.encode())
    where = "nothing written (--dry-run)" if run.dry_run else f"written to {run.output}"
    run.finish(
        counts,
        f"{trained.size:,} tokens ({trained.merges:,} merges) "
        f"from {counted(counts.get('taken', counts['documents']), 'document')}, "
        f"{counts['characters']:,} characters; {where}",
    )


def _pattern_name(pattern: str | None, digits: str | None) -> str:
    """The pattern selected by both options, or the default. Raises UsageError where they contradict each other."""
    if digits is None:
        return pattern or "llama-bpe"
    if digits not in DIGITS:
        raise unknown_name("--digits", digits, DIGITS)
    if pattern is not None and pattern not in DIGITS[digits]:
        raise UsageError(
            f"--digits {digits} and --pattern {pattern} contradict each other",
            f"--digits {digits} goes with {' or '.join(DIGITS[digits])}; leave one of the options out",
        )
    return pattern or DIGITS[digits][0]

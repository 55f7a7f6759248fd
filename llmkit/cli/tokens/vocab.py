"""`llmkit vocab`: train a byte-level BPE tokenizer."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from llmkit.cli.shared.options import InputPaths, Run, command, count_option
from llmkit.errors import LlmkitError, UsageError, unknown_name

DIGITS = {"three": ("llama-bpe",), "single": ("qwen2", "smollm")}  # the patterns that cut numbers so, the default first


@command(
    reads=True,
    examples=(
        "llmkit vocab docs.jsonl.zst --size 4096 -o tok2/",
        "llmkit vocab docs.jsonl.zst --size 2k --digits single --min-frequency 3 --special '<think>' --sample 0.5 -o tok3/",
    ),
)
def main(
    run: Run,
    inputs: InputPaths = None,
    size: Annotated[
        int, count_option("--size", "-s", help="Tokens in the vocabulary, special ones and the 256 bytes included")
    ] = 8192,
    pattern: Annotated[
        str | None,
        typer.Option("--pattern", "-p", metavar="NAME", help="llama-bpe (the default), qwen2, gpt-2 or smollm"),
    ] = None,
    digits: Annotated[
        str | None,
        typer.Option("--digits", metavar="HOW", help="Numbers in groups of three (llama-bpe) or single digits (qwen2)"),
    ] = None,
    min_frequency: Annotated[
        int, typer.Option("--min-frequency", min=1, help="A pair that occurs less often is not merged")
    ] = 2,
    sample: Annotated[
        float,
        typer.Option("--sample", help="Share of the documents to learn from, taken by a hash of the id and --seed"),
    ] = 1.0,
    special: Annotated[
        list[str] | None,
        typer.Option("--special", metavar="NAME", help="A special token of your own, like <name>; repeatable"),
    ] = None,
    multiple: Annotated[
        int, typer.Option("--multiple", min=1, help="Round the size up to a multiple of this; 1 leaves it")
    ] = 64,
) -> None:
    """Train a byte-level BPE tokenizer on documents and write it as a Hugging Face tokenizer directory.

    --pattern says how text is cut into words before merging: the four that llama.cpp has built in, and no other, so that a model can be
    exported to GGUF. --digits picks one by how it cuts numbers: 1234567 is 123 456 7 with three, every digit alone with single, and stays whole with
    gpt-2. Special tokens: <|endoftext|> (0), <|im_start|> and <|im_end|> for chat (ChatML, with its template), <|pad|>, three to fill in the
    middle (<|fim_prefix|>, ...), four around tool calls (<tool_call>, ...), those of --special, and what these leave of five reserved ones. The
    tokenizer depends on the texts and options alone, not on their order or on -j, and its merges are those of the `tokenizers` trainer.
    Where the texts are too few for the size asked for, the vocabulary is smaller, and a warning says so.
    """
    from llmkit.engine.local import Local
    from llmkit.io.atomic import check_output
    from llmkit.lineage.outputs import artefact_directory
    from llmkit.shards.tokenizer_info import parse_tokenizer
    from llmkit.tokens import vocabulary
    from llmkit.tokens.pretokenize import pattern as find_pattern

    if run.output is None:
        raise UsageError("no output", "name the tokenizer directory with -o")
    own = special or []
    rounded = vocabulary.check_size(size, multiple, len(vocabulary.special_tokens(own)))
    if rounded != size:
        run.note(f"{size:,} rounded up to {rounded:,}, a multiple of {multiple}")
    name = _pattern(pattern, digits)
    find_pattern(name)
    run.options["pattern"] = name
    if not 0 < sample <= 1:
        raise UsageError(f"--sample {sample:g}", "give a share of the documents over 0, at most 1")
    paths = run.inputs(inputs)
    if not run.dry_run and run.up_to_date(paths):
        return
    check_output(run.output, run.force)
    from llmkit.tokens.trainer import Counter, Counts

    reader = run.reader(inputs)
    counts: dict[str, Any] = {"documents": 0, "characters": 0}
    if sample < 1:
        counts["taken"] = 0
    pieces = Counts()
    work = Counter(name, reader.options, sample, run.seed, pieces if run.jobs == 1 else None)
    with run.progress(None, "documents") as bar:
        for part in Local(run.jobs).map(work, reader):
            reader.accept(part.bad)
            if part.words:
                pieces.add(part.words)
            counts["documents"] += part.documents
            counts["characters"] += part.characters
            if sample < 1:
                counts["taken"] += part.taken
            bar.advance(part.documents)
    if counts["documents"] and counts.get("taken") == 0:
        raise LlmkitError(
            f"--sample {sample:g} takes none of {counts['documents']:,} documents", "give more, or another --seed"
        )
    made = vocabulary.made_of(pieces, rounded, name, min_frequency, multiple, own)
    counts |= {"size": made.size, "merges": made.merges}
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
        with artefact_directory(run.output, run.force) as directory:
            for file, text in files.items():
                (directory / file).write_bytes(text.encode())
    where = "nothing written (--dry-run)" if run.dry_run else f"written to {run.output}"
    run.finish(
        counts,
        f"{made.size:,} tokens ({made.merges:,} merges) from {counts.get('taken', counts['documents']):,} documents, "
        f"{counts['characters']:,} characters; {where}",
    )


def _pattern(pattern: str | None, digits: str | None) -> str:
    """The pattern that both options name, or the default; UsageError where they contradict each other."""
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

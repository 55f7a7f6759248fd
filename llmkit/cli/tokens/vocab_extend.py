"""`llmkit vocab extend`: add tokens to a tokenizer, and rows to its model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmkit.cli.shared.messages import counted
from llmkit.cli.shared.options import InputPaths, Run, command, count_option
from llmkit.errors import UsageError

if TYPE_CHECKING:
    from llmkit.io.documents import DocumentReader
    from llmkit.shards.tokenizer_info import TokenizerInfo
    from llmkit.tokens.extend import ExtendedTokenizer


@command(
    reads=True,
    examples=(
        "llmkit vocab extend tok/ heldout.jsonl --add 100 -o wider/",
        "llmkit vocab extend base/ heldout.jsonl --add 100 --model base/ -o bigger/",
    ),
)
def main(
    run: Run,
    tokenizer: Annotated[
        Path, typer.Argument(metavar="TOKENIZER", help="Tokenizer or model directory, or a tokenizer.json")
    ],
    inputs: InputPaths = None,
    add: Annotated[int | None, count_option("--add", help="Learn this many new merges from the documents")] = None,
    tokens: Annotated[
        Path | None, typer.Option("--tokens", metavar="FILE", help="Add the words in this file instead, one per line")
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option("--model", metavar="MODEL", help="Also extend this model, with embedding rows for the new tokens"),
    ] = None,
    min_frequency: Annotated[
        int, typer.Option("--min-frequency", min=1, help="Minimum frequency of a merged pair")
    ] = 2,
    multiple: Annotated[
        int, typer.Option("--multiple", min=1, help="Pad the size to a multiple of this with reserved tokens")
    ] = 64,
) -> None:
    """Add tokens to a byte-level BPE tokenizer, so that a trained model can be adapted to a new domain or language.

    --add learns new merges from the documents, ranked after the old ones; --tokens adds whole words. Old tokens
    keep their ids, new ones follow. With --model, -o is a model directory that includes the tokenizer. The rows
    of a new token are the mean of the rows of the old tokens that it replaces, and everything else is copied,
    so the logits of the old tokens do not change until training continues (llmkit anneal BIGGER DATA --lr X).
    """
    from llmkit.io.atomic import check_output
    from llmkit.lineage.formats import describe_input
    from llmkit.lineage.outputs import artefact_directory
    from llmkit.shards.reader import load_tokenizer_info
    from llmkit.tokens import extend
    from llmkit.tokens.pretokenize import gguf_warning

    if (add is None) == (tokens is None):
        raise UsageError(
            "give either --add or --tokens", "--add COUNT learns merges from the documents, --tokens FILE adds words"
        )
    if add is not None and add < 1:
        raise UsageError("--add 0", "add at least one token")
    if tokens is not None and (inputs or run.files_from):
        raise UsageError("--tokens reads no documents", "leave the documents out, or use --add")
    if run.output is None:
        raise UsageError("no output", "name the directory of the new tokenizer or model with -o")
    info = load_tokenizer_info(tokenizer)
    if warning := gguf_warning(str(tokenizer), extend.check_extendable(info, str(tokenizer))):
        run.warn(warning)
    paths = run.inputs(inputs) if tokens is None else []
    if not run.dry_run and run.up_to_date([str(tokenizer), *paths]):
        return
    check_output(run.output, run.force)
    if model is not None:
        from llmkit.model.pretrained.checkpoint import load_info, open_weights
        from llmkit.model.resize import check_match

        loaded = load_info(model)
        check_match(loaded, info, str(tokenizer))
        open_weights(loaded)
    reader = None
    if tokens is not None:
        words = extend.read_words(_read_text(tokens), str(tokens))
        extended = extend.with_words(info, str(tokenizer), words, multiple)
        if extended.added < len(set(words)):
            run.note(f"{len(set(words)) - extended.added:,} of the words are already tokens")
    else:
        reader = run.reader(inputs)
        extended = _learn(run, reader, info, str(tokenizer), add or 0, min_frequency, multiple)
    counts: dict[str, Any] = {"added": extended.added, "size": extended.size}
    if reader:
        counts |= reader.counts()
    if not run.dry_run:
        lineage = run.lineage()
        lineage.inputs += [describe_input(tokenizer), *(reader.inputs if reader else [])]
        lineage.counts = counts
        files = extend.tokenizer_files(extended, info, lineage)
        with artefact_directory(run.output, run.force) as directory:
            if model is not None:
                from llmkit.model.resize import write_resized

                with run.progress(loaded.config.parameters(), "weights") as bar:
                    rows = write_resized(
                        loaded, info.vocab_size, extended.pieces, directory, files, lineage.to_json(), bar.advance
                    )
                counts["rows"] = rows
            else:
                for name, text in files.items():
                    (directory / name).write_bytes(text.encode())
    where = "nothing written (--dry-run)" if run.dry_run else f"written to {run.output}"
    run.finish(counts, f"{counted(extended.added, 'token')} added, {info.vocab_size:,} to {extended.size:,}; {where}")


def _read_text(path: Path) -> str:
    from llmkit.errors import LlmkitError

    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise LlmkitError(
            f"{path}: invalid UTF-8 (byte {error.start})", "give a list of words, one per line"
        ) from error


def _learn(
    run: Run, reader: DocumentReader, info: TokenizerInfo, name: str, add: int, min_frequency: int, multiple: int
) -> ExtendedTokenizer:
    from llmkit.errors import LlmkitError
    from llmkit.tokens import extend

    with run.progress(None, "documents") as bar:

        def texts() -> Iterator[str]:
            for document in reader.documents():
                bar.advance()
                yield document.text

        merges = extend.learn_merges(info, texts(), add, min_frequency)
    if not merges:
        raise LlmkitError("the documents have no pair to merge", "give more text, or a lower --min-frequency")
    if len(merges) < add:
        run.warn(f"the documents have only {len(merges):,} of the {add:,} merges requested")
    return extend.with_merges(info, name, merges, multiple)

"""`llmkit dedup`: remove exact and near duplicates."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmkit.cli.options import InputPaths, Run, command
from llmkit.cli.stage import Rejects, announced, run_stage, summary_line
from llmkit.errors import UsageError

if TYPE_CHECKING:
    from llmkit.corpus.dedup.method import Decided
    from llmkit.io.documents import DocumentReader

NEAR = "Near duplicates (minhash)"
EXACT = "Exact duplicates (exact)"


@command(
    reads=True,
    writes=True,
    neutral=("rejects", "temp_dir"),
    examples=(
        "llmkit dedup docs.jsonl.zst --rejects copies.jsonl.zst -o unique.jsonl.zst",
        "llmkit dedup docs.jsonl.zst --method exact --normalise whitespace --plain | wc -l",
        "llmkit filter docs.jsonl.zst | llmkit dedup --threshold 0.8 -o unique.jsonl.zst",
    ),
)
def main(
    run: Run,
    inputs: InputPaths = None,
    method: Annotated[
        str, typer.Option("--method", metavar="NAME", help="minhash, exact, or several in order: exact,minhash")
    ] = "minhash",
    rejects: Rejects = None,
    threshold: Annotated[
        float, typer.Option("--threshold", help="Least similarity of duplicates, 0 to 1", rich_help_panel=NEAR)
    ] = 0.75,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify/--no-verify",
            help="Check candidates by the true similarity of their 5-grams",
            rich_help_panel=NEAR,
        ),
    ] = True,
    ngram: Annotated[int, typer.Option("--ngram", help="Words in a shingle", rich_help_panel=NEAR)] = 5,
    bands: Annotated[int, typer.Option("--bands", help="Bands of the signature", rich_help_panel=NEAR)] = 14,
    rows: Annotated[int, typer.Option("--rows", help="Hash functions in a band", rich_help_panel=NEAR)] = 8,
    temp_dir: Annotated[
        str | None,
        typer.Option(
            "--temp-dir", metavar="DIR", help="Where the shingles of kept documents wait", rich_help_panel=NEAR
        ),
    ] = None,
    key: Annotated[
        str | None,
        typer.Option(
            "--key",
            metavar="FIELD",
            help="Compare this field instead of the text (metadata.url: one inside another)",
            rich_help_panel=EXACT,
        ),
    ] = None,
    normalise: Annotated[
        str,
        typer.Option("--normalise", metavar="HOW", help="First: none, whitespace, or loose", rich_help_panel=EXACT),
    ] = "none",
) -> None:
    """Remove duplicates; of each group the first document in input order stays.

    minhash finds documents that share most of their word 5-grams, regardless of case, punctuation, numbers and diacritics. Candidates are
    found by 112 hash functions in 14 bands of 8 and verified: every removed document has a kept one whose Jaccard similarity is at least
    --threshold. Pairs just over the threshold may be missed (at 0.8 one in thirteen), equal texts never. Texts of fewer than 5 words are
    compared as a whole, in the same normalisation. exact compares texts, or a field, as they are or after --normalise; documents without
    the field stay.

    --rejects keeps what was removed with `reason`, `duplicate_of` (the id of the kept document) and `similarity`. The kept documents are known
    in memory: about 200 bytes each for exact, 350 to 600 for minhash, whose verification also takes a temporary file of about 0.7 bytes
    a byte of kept text.
    """
    from llmkit.corpus.dedup import METHODS, Deduplicator

    names = [name.strip() for name in method.split(",")]
    kinds = [METHODS.get(name) for name in names]
    for option, value in (("--key", key), ("--normalise", normalise != "none")):
        if value and "exact" not in names:
            raise UsageError(f"{option} is of --method exact", f"add it: --method exact,{method}")
    settings: dict[str, dict[str, Any]] = {
        "exact": {"key": key, "normalise": normalise},
        "minhash": {
            "threshold": threshold,
            "verify": verify,
            "ngram": ngram,
            "bands": bands,
            "rows": rows,
            "seed": run.seed,
            "temporary": temp_dir,
        },
    }
    methods = tuple(kind(**settings.get(name, {})) for name, kind in zip(names, kinds, strict=True))
    deduplicator = Deduplicator(methods, jobs=run.jobs, remember_ids=rejects is not None)

    def work(reader: DocumentReader) -> Iterator[Decided]:
        with announced(run):
            deduplicator.warm_up()
        yield from deduplicator.run(reader)

    counts = run_stage(run, inputs, rejects, work, deduplicator.counts)
    if counts is not None:
        run.finish(counts, summary_line(run, counts, "removed"))

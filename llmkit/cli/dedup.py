"""`llmkit dedup`: remove exact and near duplicates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmkit.cli.options import InputPaths, Run, command, count_option
from llmkit.cli.stage import Rejects, announced, run_stage, summary_line
from llmkit.errors import UsageError

if TYPE_CHECKING:
    from llmkit.corpus.dedup.method import Decided
    from llmkit.io.documents import DocumentReader

NEAR = "Near duplicates (minhash)"
EXACT = "Exact duplicates (exact)"
SURVIVORS = "Which stay"
INDEX = "Documents of earlier runs"
MACHINE = "Memory and disk"


@command(
    reads=True,
    writes=True,
    neutral=("rejects", "temp_dir", "memory", "index", "stats"),
    examples=(
        "llmkit dedup docs.jsonl.zst --rejects copies.jsonl.zst -o unique.jsonl.zst",
        "llmkit dedup docs.jsonl.zst --method exact --no-counts --plain | wc -l",
        "llmkit filter docs.jsonl.zst | llmkit dedup --threshold 0.8 --keep longest -o unique.jsonl.zst",
        "llmkit dedup docs.jsonl.zst --against heldout.jsonl -o new.jsonl.zst",
        "llmkit dedup docs.jsonl.zst --index seen.duckdb -o new.jsonl.zst",
        "llmkit dedup --index seen.duckdb --stats",
    ),
)
def main(
    run: Run,
    inputs: InputPaths = None,
    method: Annotated[
        str, typer.Option("--method", metavar="NAME", help="minhash, exact, or both: exact,minhash")
    ] = "minhash",
    rejects: Rejects = None,
    annotate: Annotated[
        bool, typer.Option("--annotate", help="Drop nothing: write on each document what it duplicates")
    ] = False,
    keep: Annotated[
        str,
        typer.Option(
            "--keep", metavar="WHICH", help="first, longest, or best:FIELD (largest number)", rich_help_panel=SURVIVORS
        ),
    ] = "first",
    clusters: Annotated[
        str,
        typer.Option(
            "--clusters",
            metavar="HOW",
            help="stars around survivors, or connected components",
            rich_help_panel=SURVIVORS,
        ),
    ] = "stars",
    group: Annotated[
        str | None,
        typer.Option(
            "--group", metavar="FIELD", help="Only within documents that agree in this field", rich_help_panel=SURVIVORS
        ),
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(
            "--against", metavar="PATH", help="Also remove what is in these (repeatable)", rich_help_panel=SURVIVORS
        ),
    ] = None,
    counts: Annotated[
        bool,
        typer.Option(
            "--counts/--no-counts",
            help="Write on survivors for how many they stand; without, exact runs in one pass",
            rich_help_panel=SURVIVORS,
        ),
    ] = True,
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
    bands: Annotated[
        int | None, typer.Option("--bands", help="Bands of the signature [default: by threshold]", rich_help_panel=NEAR)
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option("--rows", help="Hash functions in a band [default: by threshold]", rich_help_panel=NEAR),
    ] = None,
    bits: Annotated[
        int, typer.Option("--bits", help="Of the hash functions: 32, or 61 (half as fast)", rich_help_panel=NEAR)
    ] = 32,
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
    index: Annotated[
        str | None,
        typer.Option(
            "--index",
            metavar="FILE",
            help="Also remove what earlier runs kept; add what this keeps",
            rich_help_panel=INDEX,
        ),
    ] = None,
    index_full: Annotated[
        bool,
        typer.Option(
            "--index-full", help="In a new index 32 bits a hash function, not 8: twice the size", rich_help_panel=INDEX
        ),
    ] = False,
    stats: Annotated[
        bool, typer.Option("--stats", help="Show what is in the index, and do nothing else", rich_help_panel=INDEX)
    ] = False,
    memory: Annotated[int, count_option("--memory", help="Bytes for sorting", rich_help_panel=MACHINE)] = 4 << 30,
    temp_dir: Annotated[
        str | None,
        typer.Option("--temp-dir", metavar="DIR", help="Where documents and shingles wait", rich_help_panel=MACHINE),
    ] = None,
) -> None:
    """Remove duplicates; of each group one document stays, by default the first in input order.

    minhash finds documents that share most of their word 5-grams, regardless of case, punctuation, numbers and diacritics. Candidates are
    found by 112 hash functions in 14 bands of 8 (other thresholds: other bands) and verified: every removed document has a kept one whose Jaccard
    similarity is at least --threshold. Pairs just over the threshold may be missed, equal texts never. Texts of fewer than 5 words are
    compared as a whole, in the same normalisation. exact compares texts, or a field, as they are or after --normalise; documents without
    the field stay.

    A survivor that stands for others gets `duplicates` (how many there were, itself included; numbers from earlier runs add up) and `cluster`. --rejects
    keeps what was removed with `reason`, `duplicate_of` (the id of the kept document) and `similarity`.

    --index keeps a DuckDB file over many runs: an earlier night always wins. The run is added once its output is complete and in its place; killed before,
    nothing of it is there, and a repeated call makes the same output. About 250 bytes a document.

    All documents are measured before the first is written: lines and shingles wait in --temp-dir, about 1.5 bytes a byte of text; memory is 80 bytes a
    document and at most --memory. With --method exact --no-counts documents are written as they are read, at 130 to 200 bytes of memory each.
    """
    if stats:
        if index is None:
            raise UsageError("--stats shows an index", "name it: --index FILE")
        _show(run, index)
        return
    from llmkit.corpus.dedup.exact import Exact, Stream
    from llmkit.corpus.dedup.groups import Groups
    from llmkit.corpus.dedup.index import Index, settings_of
    from llmkit.corpus.dedup.method import METHODS
    from llmkit.corpus.dedup.minhash import MinHash, bands_for

    names = [name.strip() for name in method.split(",")]
    for name in names:
        METHODS.get(name)
    for option, value in (("--key", key), ("--normalise", normalise != "none")):
        if value and "exact" not in names:
            raise UsageError(f"{option} is of --method exact", f"add it: --method exact,{method}")
    exact = Exact(key, normalise) if "exact" in names else None
    chosen = bands_for(threshold) if 0 < threshold <= 1 else (1, 1)
    shape = {"bands": chosen[0] if bands is None else bands, "rows": chosen[1] if rows is None else rows}
    near = MinHash(threshold, verify, ngram, **shape, seed=run.seed, bits=bits) if "minhash" in names else None
    if index and clusters != "stars":
        raise UsageError("--index goes with --clusters stars", "a chain through earlier nights has no end")
    simple = keep == "first" and clusters == "stars" and not (near or counts or annotate or group or against or index)
    seen = run.inputs(against, files_from=None) if against else []
    for path in seen:
        run.reads("against", path)
    if simple and exact:
        stream = Stream(exact=exact, rejects=rejects is not None, jobs=run.jobs)
        _finish(run, run_stage(run, inputs, rejects, stream.run, stream.counts))
        return
    groups = Groups(
        exact=exact,
        near=near,
        keep=keep,
        clusters=clusters,
        group=group,
        annotate=annotate,
        counts_written=counts,
        jobs=run.jobs,
        rejects=rejects is not None,
        memory=memory,
        temporary=temp_dir,
    )

    def work(reader: DocumentReader) -> Iterator[Decided]:
        with announced(run):
            groups.warm_up()
        return groups.run(reader, run.reader_of(seen) if seen else None)

    with ExitStack() as stack:
        if index is None:
            known = durable = None
        else:
            settings = settings_of(near, exact, index_full) | {"group": group}
            groups.index = stack.enter_context(Index(index, settings, temp_dir))
            known, durable = groups.index.knows, groups.commit
        _finish(run, run_stage(run, inputs, rejects, work, groups.counts, known=known, durable=durable))


def _finish(run: Run, counts: dict[str, Any] | None) -> None:
    if counts is not None:
        run.finish(counts, summary_line(run, counts, "removed"))


def _show(run: Run, path: str) -> None:
    """Table and JSON of an index."""
    from llmkit.corpus.dedup.index import Index

    with Index(path, None) as index:
        found = index.stats()
    run.table(
        f"{path}", ["run", "documents", "kept"], [[row["run"], row["documents"], row["kept"]] for row in found["runs"]]
    )
    size = f"{found['bytes'] / 1e6:,.1f} MB, {found['bytes_per_document']} bytes each"
    run.finish(found, f"{found['kept']:,} documents of {len(found['runs']):,} runs in {path}, {size}")

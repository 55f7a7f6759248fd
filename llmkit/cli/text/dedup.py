"""`llmkit dedup`: remove exact and near duplicates, and cut repeats out of texts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from llmkit.cli.shared.document_command import Rejects, Resume, announced, is_directory, run_stage, summary_line
from llmkit.cli.shared.options import InputPaths, Run, command, count_option
from llmkit.cli.shared.ray_files import EngineName, engine_of
from llmkit.errors import UsageError

if TYPE_CHECKING:
    from llmkit.corpus.dedup.exact import Stream
    from llmkit.corpus.dedup.groups import Groups
    from llmkit.corpus.dedup.index import Index
    from llmkit.corpus.dedup.method import Decided
    from llmkit.corpus.dedup.passages import Passages
    from llmkit.corpus.dedup.substring import Substring
    from llmkit.io.documents import DocumentReader

NEAR = "Near duplicates (minhash)"
EXACT = "Exact duplicates (exact)"
PASSAGES = "Repeats inside texts (lines, paragraphs, substring)"
SURVIVORS = "Which stay"
INDEX = "Documents of earlier runs"
MACHINE = "Memory and disk"
REMOVING, KINDS = ("exact", "minhash"), ("lines", "paragraphs")
EDITING = (*KINDS, "substring")
THRESHOLD = 0.75


@command(
    reads=True,
    writes=True,
    neutral=("rejects", "temp_dir", "memory", "index", "stats", "against", "boilerplate", "resume", "engine"),
    examples=(
        "llmkit dedup docs.jsonl.zst --rejects copies.jsonl.zst -o unique.jsonl.zst",
        "llmkit dedup docs.jsonl.zst --method exact --no-counts --plain | wc -l",
        "llmkit filter docs.jsonl.zst | llmkit dedup --threshold 0.8 --keep longest -o unique.jsonl.zst",
        "llmkit dedup docs.jsonl.zst --against heldout.jsonl -o new.jsonl.zst",
        "llmkit dedup docs.jsonl.zst --index seen.duckdb -o new.jsonl.zst",
        "llmkit dedup --index seen.duckdb --stats",
        "llmkit dedup docs.jsonl.zst --method substring | llmkit dedup -o unique.jsonl.zst",
        "llmkit dedup docs.jsonl.zst --method lines --repeated 100 --min-characters 10 -o fresh.jsonl.zst",
    ),
)
def main(
    run: Run,
    inputs: InputPaths = None,
    method: Annotated[
        str,
        typer.Option(
            "--method",
            metavar="NAME",
            help="minhash, exact, or both: exact,minhash; or one of lines, paragraphs, substring",
        ),
    ] = "minhash",
    rejects: Rejects = None,
    resume: Resume = False,
    engine: EngineName = "local",
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
    ] = THRESHOLD,
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
        int, typer.Option("--bits", help="Of the hash functions: 32, or 61 (slower)", rich_help_panel=NEAR)
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
        str | None,
        typer.Option(
            "--normalise",
            metavar="HOW",
            help="First: none (default for texts), whitespace (for lines, paragraphs), or loose",
            rich_help_panel=EXACT,
        ),
    ] = None,
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
    repeated: Annotated[
        int | None,
        count_option(
            "--repeated",
            help="Cut all copies of what stands in so many documents [default: the first copy of anything stays]",
            rich_help_panel=PASSAGES,
        ),
    ] = None,
    boilerplate: Annotated[
        list[str] | None,
        typer.Option(
            "--boilerplate", metavar="FILE", help="Cut these lines everywhere (repeatable)", rich_help_panel=PASSAGES
        ),
    ] = None,
    min_characters: Annotated[
        int, typer.Option("--min-characters", min=1, help="Shorter ones always stay", rich_help_panel=PASSAGES)
    ] = 1,
    length: Annotated[
        int,
        typer.Option(
            "--length", metavar="N", help="Units of the shortest repeat that is cut", rich_help_panel=PASSAGES
        ),
    ] = 50,
    unit: Annotated[
        str, typer.Option("--unit", metavar="UNIT", help="words or bytes: of substring", rich_help_panel=PASSAGES)
    ] = "words",
    memory: Annotated[
        int,
        count_option("--memory", help="Bytes for sorting and for the windows of substring", rich_help_panel=MACHINE),
    ] = 4 << 30,
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

    A survivor that stands for others gets `duplicates` (how many there were, itself included; numbers from earlier runs add up) and `cluster`; with
    --annotate the others get `cluster` too. --rejects keeps what was removed with `reason`, `duplicate_of` (the id of the kept document) and `similarity`.

    --index keeps a DuckDB file over many runs: an earlier night always wins. The run is added once its output is complete and in its place; killed before,
    nothing of it is there, and a repeated call makes the same output. About 200 bytes a document. It holds signatures, not texts: similarity to
    documents of earlier nights is an estimate, with a standard error of 0.04.

    With -o DIRECTORY each file is deduplicated by itself, or with --index one after the other, as if each were a night. --engine ray joins bands over
    all machines of a cluster.

    All documents are measured before the first is written: lines and shingles wait in --temp-dir, about 2 bytes a byte of text; memory is
    200 MB, 350 bytes a document with what is mapped of these files, and at most --memory for sorting. With --method exact --no-counts documents
    are written as they are read, at 130 to 200 bytes of memory each.

    lines and paragraphs edit: whatever stood before, in this document or an earlier one, is cut out of the text. Blank lines stay. A document of which
    nothing is left is removed. One pass, at 11 to 23 bytes of memory a distinct line; two with --repeated, at 17 to 34. substring cuts any run of
    --length words or bytes that stood before, wherever it stands; documents wait in --temp-dir, as words in 8 bytes each.
    """
    if stats:
        if index is None:
            raise UsageError("--stats shows an index", "name it: --index FILE")
        _show(run, index)
        return
    from llmkit.corpus.dedup.exact import Exact, Stream
    from llmkit.corpus.dedup.method import METHODS

    names = [name.strip() for name in method.split(",")]
    if names != ["exact"]:  # the other methods are compiled, and take long to import
        from llmkit.corpus.dedup.minhash import MinHash, bands_for
        from llmkit.corpus.dedup.passages import Passages
        from llmkit.corpus.dedup.substring import Substring
    for name in names:
        METHODS.get(name)
    editing = next((name for name in names if name in EDITING), None)
    if editing and len(names) > 1:
        raise UsageError(
            f"--method {method}: {editing} edits texts, alone",
            f"in a pipe: llmkit dedup --method {editing} | llmkit dedup",
        )
    for option, given, of in (
        ("--key", key, ("exact",)),
        ("--normalise", normalise, ("exact", *KINDS)),
        ("--repeated", repeated is not None, KINDS),
        ("--boilerplate", boilerplate, KINDS),
        ("--min-characters", min_characters > 1, KINDS),
        ("--length", length != 50, ("substring",)),
        ("--unit", unit != "words", ("substring",)),
        ("--annotate", annotate, REMOVING),
        ("--keep", keep != "first", REMOVING),
        ("--clusters", clusters != "stars", REMOVING),
        ("--group", group, REMOVING),
        ("--against", against, REMOVING),
        ("--index", index, REMOVING),
        ("--threshold", threshold != THRESHOLD, ("minhash",)),
        ("--no-verify", not verify, ("minhash",)),
        ("--ngram", ngram != 5, ("minhash",)),
        ("--bands", bands is not None, ("minhash",)),
        ("--rows", rows is not None, ("minhash",)),
        ("--bits", bits != 32, ("minhash",)),
    ):
        if given and not set(of) & set(names):
            more = f"{of[0]},{method}" if of[0] == "exact" and not editing else of[0]
            raise UsageError(f"{option} is of --method {', '.join(of)}", f"give --method {more}")
    if index and clusters != "stars":
        raise UsageError("--index goes with --clusters stars", "a chain through earlier nights has no end")
    if index and not verify:
        raise UsageError("--index verifies by signatures: --no-verify does not go with it", "leave one of them out")
    if index_full and not index:
        raise UsageError("--index-full is of an index", "name it: --index FILE")
    if annotate and rejects is not None:
        raise UsageError("--annotate drops nothing, so there is nothing for --rejects", "leave one of them out")
    listed = run.inputs(boilerplate, files_from=None) if boilerplate else []
    where = engine_of(run, engine)

    def start() -> Groups | Passages | Stream | Substring:
        """The stage, with nothing counted yet."""
        common: dict[str, Any] = {"engine": where, "rejects": rejects is not None}
        if editing == "substring":
            return Substring(length=length, unit=unit, memory=memory, temporary=temp_dir, **common)
        if editing:
            return Passages(
                by=editing,
                normalise=normalise or "whitespace",
                repeated=repeated or 0,
                boilerplate=tuple(listed),
                min_characters=min_characters,
                temporary=temp_dir,
                **common,
            )
        exact = Exact(key, normalise or "none") if "exact" in names else None
        near = None
        if "minhash" in names:
            chosen = bands_for(threshold) if 0 < threshold <= 1 else (1, 1)
            shape = {"bands": chosen[0] if bands is None else bands, "rows": chosen[1] if rows is None else rows}
            near = MinHash(threshold, verify, ngram, **shape, seed=run.seed, bits=bits)
        simple = (
            keep == "first" and clusters == "stars" and not (near or counts or annotate or group or against or index)
        )
        if simple and exact:
            return Stream(exact=exact, **common)
        from llmkit.corpus.dedup.groups import Groups

        return Groups(
            exact=exact,
            near=near,
            keep=keep,
            clusters=clusters,
            group=group,
            annotate=annotate,
            counts_written=counts,
            memory=memory,
            temporary=temp_dir,
            index=seen_before,
            options=options,
            **common,
        )

    seen_before: Index | None = None
    options: dict[str, Any] = {}
    stage = start()  # senseless options are refused before anything is read
    seen = run.inputs(against, files_from=None) if against else []
    for role, paths in (("against", seen), ("boilerplate", listed)):
        for path in paths:
            run.reads(role, path)

    def work(reader: DocumentReader) -> Iterator[Decided]:
        nonlocal stage
        stage = start()
        if not isinstance(stage, Stream):
            with announced(run):
                stage.warm_up()
        yield from cast("Groups", stage).run(reader, run.reader_of(seen)) if seen else stage.run(reader)

    def finished(paths: list[str]) -> bool | None:
        """Of an output that this call has made: whether its run is in the index; None where it was made with another index, or state of it."""
        from llmkit.corpus.dedup.index import run_key
        from llmkit.lineage.formats import digest_path, read_lineage

        assert seen_before is not None and run.output is not None
        key = run_key([digest_path(path) for path in paths], options)
        made_with = [item["digest"] for item in (read_lineage(run.output) or {})["inputs"] if item["role"] == "index"]
        return seen_before.has(key) if made_with == [seen_before.history(seen_before.run_of(key))] else None

    if is_directory(run.output) and not index:
        run.note("each file by itself: what stands in two of them stays in both (one output, or --index, looks at all)")
    with ExitStack() as stack:
        if index:
            from llmkit.corpus.dedup.index import Index, settings_of

            groups = cast("Groups", stage)
            options = dict(run.options) | {"seen": [item.digest for item in run.lineage().inputs]}
            run.options["index"] = os.path.basename(index)
            settings = settings_of(groups.near, groups.exact, index_full) | {"group": group}
            seen_before = stack.enter_context(Index(index, settings, temp_dir))
        found = run_stage(
            run,
            inputs,
            rejects,
            work,
            lambda: stage.counts(),
            resume,
            known=finished if seen_before else None,
            durable=(lambda: cast("Groups", stage).commit()) if seen_before else None,
            spread=() if engine == "ray" and not index else None,
        )
    if found is not None:
        for option, field in (("--group", group), ("--key", key)):
            if field and stage.documents and stage.lacking[option] == stage.documents:
                run.warn(f"{option} {field}: no document has this field")
        verb = "removed"
        if editing:
            share = 100 * found["characters_cut"] / max(1, found["characters"])
            verb = f"edited {found['edited']:,}, cut {share:.1f} % of the characters, removed"
        run.finish(found, summary_line(run, found, verb))


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

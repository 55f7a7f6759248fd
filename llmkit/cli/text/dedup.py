"""`llmkit dedup`: remove exact and near duplicates, and cut repeats out of texts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Annotated, cast

import typer

from llmkit.cli.shared.document_command import (
    Job,
    Rejects,
    Resume,
    announce_compilation,
    is_directory,
    run_stage,
    summary_line,
)
from llmkit.cli.shared.messages import counted
from llmkit.cli.shared.options import COMMON, InputPaths, Run, command
from llmkit.cli.shared.ray_files import EngineName, engine_of
from llmkit.corpus.dedup.methods import DedupOptions, StageSettings, build_stage, select_methods, with_preset
from llmkit.corpus.dedup.normalise import DEFAULT, name_of, parts_of
from llmkit.errors import UsageError

if TYPE_CHECKING:
    from llmkit.corpus.dedup.index import Index
    from llmkit.corpus.dedup.results import ChunkResult
    from llmkit.corpus.dedup.two_pass import TwoPassDedup
    from llmkit.io.documents import DocumentReader


@command(
    reads=True,
    writes=True,
    neutral=("rejects", "resume", "engine"),
    examples=(
        "llmkit dedup docs.jsonl.zst --rejects copies.jsonl.zst -o unique.jsonl.zst",
        "llmkit dedup docs.jsonl.zst --method exact --no-counts --plain | wc -l",
        "llmkit filter docs.jsonl.zst | llmkit dedup --threshold 0.8 --keep longest -o unique.jsonl.zst",
        "llmkit dedup docs.jsonl.zst --preset code --rejects copies.jsonl.zst -o unique.jsonl.zst",
        "llmkit dedup docs.jsonl.zst --normalise loose -o unique.jsonl.zst",
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
        COMMON,
    ] = "minhash",
    rejects: Rejects = None,
    resume: Resume = False,
    engine: EngineName = "local",
    options: DedupOptions = DedupOptions(),
) -> None:
    """Remove duplicates. One document of each cluster is kept, by default the first in input order.

    minhash finds documents that share most of their word 5-grams, regardless of case, the diacritics of Latin, Greek
    and Cyrillic letters, and the marks of prose. Numbers, with the marks in them (1,234.5, 10:30, $.5), and operators
    (+ - * / % = < > & | ^ ~) count as words do: a page in which one number was edited is a near copy, a table with
    other numbers or a function with other operators is not. Candidates are found by 112 hash
    functions in 14 bands of 8 (other bands for other thresholds) and verified: every removed document has a kept one
    whose Jaccard similarity is at least --threshold. Pairs just above the threshold may be missed, equal texts never.
    Texts of fewer than 5 words are compared as a whole, after the same normalisation. exact compares texts, or a field,
    unchanged or after --normalise; documents without the field are kept.

    --normalise lists what makes no difference; loose is all of it, as in datatrove's MinHash and FineWeb, where all
    numbers are equal. With exact,minhash it applies to both. --preset prose ignores operators too, such as the marks of
    Markdown; code ignores whitespace only, at a threshold of 0.85; tables compares 3-grams that keep accents and
    operators, at 0.9. Languages without spaces need --shingle characters.

    The survivor of a cluster gets the fields `duplicates` (number of documents in the cluster, itself included; numbers
    from earlier runs add up) and `cluster`; with --annotate the other documents get `cluster` too. --rejects writes the
    removed documents with `reason`, `duplicate_of` (id of the kept document), `similarity`, and `rule`: the options
    that made them duplicates. A document that has one of these fields in another form than dedup's is a bad line, since
    the field would be lost.

    --index keeps a DuckDB file across runs: documents of earlier runs always win. A run is added once its output is
    complete and in place. If it is killed before, nothing of it is in the index. Repeating a run makes the same output
    again, with a warning where the index has it; the same content under another name is a new run, and gives only
    duplicates. The index takes about 200 bytes per document. It holds signatures, not texts: the similarity to
    documents of earlier runs is an estimate with a standard error of 0.04.

    With -o DIRECTORY each file is deduplicated separately; with --index, one after the other as if each were a run.
    --engine ray joins bands across all machines of a cluster.

    All documents are measured before the first is written. Lines and shingles are stored in --temp-dir, about 2 bytes
    per byte of text. Memory is 200 MB, plus 350 bytes per document including mapped pages of these files, plus at most
    --memory for sorting. With --method exact --no-counts documents are written as they are read, with 130 to 200 bytes
    of memory per document.

    lines and paragraphs edit texts: whatever occurred before, in the same or an earlier document, is cut. Blank lines
    are kept. A document of which nothing remains is removed. This takes one pass and 11 to 23 bytes of memory per
    distinct line, or with --repeated two passes and 17 to 34 bytes. substring cuts any run of at least --length words
    or bytes that occurred before, at any position. Documents are stored in --temp-dir, words as 8 bytes each.
    """
    survivors, indexing = options.survivors, options.indexing
    if indexing.stats:
        if indexing.index is None:
            raise UsageError("--stats shows an index", "name it: --index FILE")
        _show_index(run, indexing.index)
        return
    methods = select_methods(method, options)
    _record(run, [each.name for each in methods], with_preset(options))
    if indexing.index and survivors.clusters != "stars":
        raise UsageError("--index requires --clusters stars", "components would chain through all earlier runs")
    if indexing.index and not options.minhash.verify:
        raise UsageError("--index verifies by signatures and excludes --no-verify", "omit one of them")
    if indexing.index_full and not indexing.index:
        raise UsageError("--index-full requires an index", "name it: --index FILE")
    if survivors.annotate and rejects is not None:
        raise UsageError("--annotate drops nothing, so --rejects would be empty", "omit one of them")
    boilerplate = options.passages.boilerplate
    boilerplate_files = run.inputs(boilerplate, files_from=None) if boilerplate else []
    settings = StageSettings(run.seed, engine_of(run, engine), rejects is not None, tuple(boilerplate_files))
    new_stage = partial(build_stage, methods, options, settings)
    stage = new_stage()  # rejects invalid options before anything is read
    against = run.inputs(survivors.against, files_from=None) if survivors.against else []
    for role, paths in (("against", against), ("boilerplate", boilerplate_files)):
        for path in paths:
            run.reads(role, path)
    if is_directory(run.output) and not indexing.index:
        run.note("each file is deduplicated separately: use one output, or --index, to compare all of them")

    def work(reader: DocumentReader) -> Iterator[ChunkResult]:
        nonlocal stage
        stage = new_stage()
        with announce_compilation(run):
            stage.warm_up()
        yield from (
            cast("TwoPassDedup", stage).run(reader, run.reader_of(against, on_bad_file="stop"))
            if against
            else stage.run(reader)
        )
        if notice := getattr(stage, "notice", ""):
            run.warn(notice)

    def is_finished(job: Job) -> bool | None:
        """Whether the run that made an existing output is in the index; None if it used another state of the index."""
        from llmkit.io.record import Input, base_name
        from llmkit.lineage.fields import inputs_of
        from llmkit.lineage.formats import digest_path, read_lineage

        assert index is not None and job.output is not None
        read = [Input("input", base_name(path), digest_path(path)) for path in job.inputs]
        key = index.key_of(read, index_options)
        digests = [i["digest"] for i in inputs_of(read_lineage(job.output) or {}) if i["role"] == "index"]
        return index.has(key) if digests == [index.history(index.run_of(key))] else None

    with ExitStack() as stack:
        index: Index | None = None
        if indexing.index:
            from llmkit.corpus.dedup.index import Index, settings_of

            two_pass = cast("TwoPassDedup", stage)
            # All runs share the form of the shingles, so it does not identify one; former versions did not record it.
            shared = {"shingle", "normalise"} if two_pass.near and not two_pass.exact else {"shingle"}
            index_options = {name: value for name, value in run.options.items() if name not in shared}
            index_options["seen"] = [item.digest for item in run.lineage().inputs]
            run.options["index"] = os.path.basename(indexing.index)
            index_settings = settings_of(two_pass.near, two_pass.exact, indexing.index_full)
            index_settings |= {"group": survivors.group}
            index = stack.enter_context(Index(indexing.index, index_settings, options.storage.temp_dir))
            record = {key: value for key, value in run.lineage().to_dict().items() if key not in ("counts", "record")}
            new_stage = partial(new_stage, index=index, index_options=index_options, record=record)
        counts = run_stage(
            run,
            inputs,
            rejects,
            work,
            lambda: stage.counts(),
            resume,
            is_finished=is_finished if index else None,
            on_durable=(lambda: cast("TwoPassDedup", stage).commit()) if index else None,
            cluster_arguments=() if engine == "ray" and not index else None,
        )
    if index and index.log:
        run.warn(f"{index.log} is a part of the index, for which the disk is too full: keep them together")
    if counts is None:
        return
    for option, field in (("--group", survivors.group), ("--key", options.exact.key)):
        if field and stage.documents and stage.lacking[option] == stage.documents:
            run.warn(f"{option} {field}: no document has this field")
    verb = "removed"
    if "edited" in counts:
        share = 100 * counts["characters_cut"] / max(1, counts["characters"])
        verb = f"edited {counts['edited']:,}, cut {share:.1f} % of the characters, removed"
    run.finish(counts, summary_line(run, counts, verb))


def _record(run: Run, methods: list[str], options: DedupOptions) -> None:
    """Record in the lineage the options of minhash as they follow from --preset and the defaults."""
    near = options.minhash
    run.options |= {"threshold": near.threshold, "ngram": near.ngram}
    if "minhash" in methods:
        run.options["shingle"] = near.shingle
    if methods == ["minhash"]:  # exact has another default
        run.options["normalise"] = name_of(parts_of(options.normalising.normalise or DEFAULT))


def _show_index(run: Run, path: str) -> None:
    """Print the runs and the size of an index, as a table or JSON."""
    from llmkit.corpus.dedup.index import Index

    with Index(path, None) as index:
        stats = index.stats()
    rows = [[row["run"], row["documents"], row["kept"]] for row in stats["runs"]]
    run.table(path, ["run", "documents", "kept"], rows)
    size = f"{stats['bytes'] / 1e6:,.1f} MB, {stats['bytes_per_document']} bytes each"
    run.finish(stats, f"{counted(stats['kept'], 'document')} of {counted(len(stats['runs']), 'run')} in {path}, {size}")

"""`llmkit filter`: keep the documents that pass quality rules."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmkit.cli.shared.document_command import Rejects, Resume, announce_compilation, run_stage, summary_line
from llmkit.cli.shared.messages import counted
from llmkit.cli.shared.options import COMMON, InputPaths, Run, command
from llmkit.cli.shared.ray_files import EngineName, engine_of
from llmkit.errors import UsageError
from llmkit.options import NamesCode

if TYPE_CHECKING:
    from llmkit.corpus.chain import Chain, FilteredChunk, Statistics
    from llmkit.engine.local import Engine
    from llmkit.io.documents import DocumentReader

SHARES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)  # quantiles that --stats prints
FILTER_PANEL = "Filter shorthands"


def _filter(*names: str, metavar: str, help: str) -> Any:
    return typer.Option(*names, metavar=metavar, help=help, rich_help_panel=FILTER_PANEL)


@command(
    reads=True,
    writes=True,
    neutral=("rejects", "print_preset", "resume", "stats", "engine"),
    examples=(
        "llmkit filter docs.jsonl.zst --preset fineweb --rejects dropped.jsonl.zst -o clean.jsonl.zst",
        "llmkit filter < docs.jsonl.zst --rule gopher_quality.min_doc_words=20 --plain | head -1",
        "llmkit filter docs.jsonl.zst --preset fineweb --stats",
        "llmkit filter --preset c4 --print-preset > my.toml",
    ),
)
def main(
    run: Run,
    inputs: InputPaths = None,
    preset: Annotated[
        list[str] | None,
        typer.Option(
            "--preset",
            metavar="NAME",
            help="gopher, c4, fineweb, refinedweb, dolma, txt360, code, or a TOML file (repeatable; default: gopher)",
        ),
        COMMON,
    ] = None,
    filter: Annotated[
        list[str] | None,
        typer.Option("--filter", metavar="NAME", help="Add a filter after the presets (repeatable)"),
        COMMON,
    ] = None,
    rule: Annotated[
        list[str] | None,
        typer.Option(
            "--rule",
            metavar="FILTER.RULE=VALUE",
            help='Set a threshold ("off" disables its rule); FILE.py:FUNCTION adds a filter of your own',
        ),
        COMMON,
        NamesCode(r"\.py:"),
    ] = None,
    words: Annotated[
        str, typer.Option("--words", metavar="KIND", help="Definition of a word: unicode, whitespace or spacy")
    ] = "unicode",
    compat: Annotated[
        str | None, typer.Option("--compat", metavar="TOOL", help="Reproduce the decisions of this tool: datatrove")
    ] = None,
    languages: Annotated[
        str | None,
        _filter("--languages", metavar="CODES", help="Keep these languages (en,de), as identified by a model"),
        COMMON,
    ] = None,
    licence: Annotated[
        str | None, _filter("--licence", metavar="NAMES", help="Keep documents with these licences: cc-by,cc0")
    ] = None,
    respect_opt_out: Annotated[
        bool,
        typer.Option(
            "--respect-opt-out", help="Drop documents whose page opts out of being used", rich_help_panel=FILTER_PANEL
        ),
    ] = False,
    quality: Annotated[
        str | None,
        _filter("--quality", metavar="MODEL", help="Filter by a fastText classifier (llmkit filter train)"),
        COMMON,
    ] = None,
    decontaminate: Annotated[
        list[str] | None,
        _filter(
            "--decontaminate", metavar="FILE", help="Drop documents with items of this evaluation set (repeatable)"
        ),
        COMMON,
    ] = None,
    pii: Annotated[
        str | None,
        _filter(
            "--pii", metavar="ACTION", help="For personal data and secrets: redact, drop the document, or annotate"
        ),
        COMMON,
    ] = None,
    annotate: Annotated[
        bool,
        typer.Option("--annotate", help="Drop and edit nothing; write all statistics to the field `filter`"),
        COMMON,
    ] = False,
    stats: Annotated[
        bool, typer.Option("--stats", help="Print the distribution of statistics and what each rule would drop")
    ] = False,
    rejects: Rejects = None,
    resume: Resume = False,
    engine: EngineName = "local",
    print_preset: Annotated[
        bool, typer.Option("--print-preset", help="Print the rules as TOML and exit"), COMMON
    ] = False,
) -> None:
    """Keep the documents that pass quality rules; a document is dropped at the first rule that it breaks.

    The presets are published rule sets: gopher (repetition and quality), c4 (keeps the lines that read as sentences,
    and so edits the text), fineweb (both, then its own rules), refinedweb, dolma, txt360, and code. --preset and
    --filter can be combined. The filters run in the order given, presets first; the options for language, licence and
    opt-out run before them, those for quality, contamination and personal data after them. Kept documents that were
    not edited are passed on byte for byte. --rejects stores the dropped documents as they were, with `filter`,
    `reason` and the measured `value`. A document that has a field of its own where one is to be written is a bad line;
    a declared `language` is replaced. The rules are made for English; other languages need other thresholds.

    Memory for each worker: 250 MB plus at most 30 to 60 times the size of the longest line. Kernels are compiled on
    first use and cached.
    """
    from llmkit.corpus import chain_loader

    presets, singles, overrides = preset or [], list(filter or []), list(rule or [])
    first: list[str] = []
    for name, key, value, early in (
        ("licence", "allowed", licence, True),
        ("opt_out", "", "" if respect_opt_out else None, True),
        ("language", "languages", languages, True),
        ("quality", "model", quality, False),
        ("decontaminate", "files", decontaminate, False),
        ("pii", "action", pii, False),
    ):
        if value is not None and value != []:
            (first if early else singles).append(name)
            overrides = [
                f"{name}.{key}={item}" for item in ([value] if isinstance(value, str) else value) if key
            ] + overrides
    if not presets and not singles and not first and not any(map(chain_loader.is_function, overrides)):
        presets = run.options["preset"] = [chain_loader.DEFAULT_PRESET]
    chain = chain_loader.load_chain(presets, singles, overrides, words, compat or "", first)
    if print_preset:
        plain = not (singles or first or overrides or compat)
        sys.stdout.write(
            "\n".join(map(chain_loader.preset_text, presets)) if plain else chain_loader.describe_chain(chain)
        )
        return
    _record(run, chain, presets)
    backend = engine_of(run, engine)
    if stats:
        if annotate or rejects or run.output:
            raise UsageError("--stats writes no documents", "omit --annotate, --rejects and -o")
        _print_statistics(run, chain, _measure(run, chain, inputs, backend))
        return
    if annotate and rejects:
        raise UsageError("--annotate drops nothing", "omit --rejects")

    totals: Counter[str] = Counter()
    reasons: Counter[tuple[str, str]] = Counter()

    def work(reader: DocumentReader) -> Iterator[FilteredChunk]:
        from llmkit.corpus.chain import annotate_chunk, filter_chunk

        totals.clear()
        reasons.clear()
        work = annotate_chunk if annotate else partial(filter_chunk, rejects=rejects is not None)
        for result in _mapped(run, chain, work, reader, backend):
            for name in ("documents", "edited", "characters", "characters_kept"):
                totals[name] += getattr(result, name)
            reasons.update(result.dropped)
            yield result

    def count() -> dict[str, Any]:
        dropped = sum(reasons.values())
        return {
            "documents": totals["documents"],
            "kept": totals["documents"] - dropped,
            "dropped": dropped,
            "edited": totals["edited"],
            "characters": totals["characters"],
            "characters_kept": totals["characters_kept"],
            "reasons": {f"{name}.{reason}": n for (name, reason), n in sorted(reasons.items())},
        }

    counts = run_stage(run, inputs, rejects, work, count, resume, cluster_arguments=() if engine == "ray" else None)
    if counts is None:
        return
    if counts["reasons"]:
        rows: list[list[Any]] = [
            [name, n, f"{100 * n / counts['documents']:.1f} %"]
            for name, n in sorted(counts["reasons"].items(), key=lambda item: (-item[1], item[0]))
        ]
        run.table("dropped by", ["rule", "documents", "share"], rows)
    edited = f"edited {counts['edited']:,}, " if counts["edited"] else ""
    run.finish(counts, summary_line(run, counts, f"{edited}dropped"))


def _record(run: Run, chain: Chain, presets: list[str]) -> None:
    """Record in the lineage what determines the output: presets by name, everything read from files by digest."""
    from llmkit.corpus import chain_loader

    files = chain_loader.files_read(chain)
    if files or any(map(chain_loader.is_path, presets)):
        for option in (
            "preset",
            "compat",
            "languages",
            "licence",
            "respect_opt_out",
            "quality",
            "decontaminate",
            "pii",
        ):
            run.options.pop(option, None)
        run.options["filter"], run.options["rule"] = chain_loader.as_rules(chain)
        if not files:  # the record of the same rules without a preset
            run.options["respect_opt_out"] = False
    for rule, path in files:
        run.reads(f"rule {rule}", path)


def _mapped(
    run: Run, chain: Chain, work: Callable[..., FilteredChunk], reader: DocumentReader, engine: Engine
) -> Iterator[FilteredChunk]:
    """`work` on every chunk; the chain is warmed up before workers fork."""
    with announce_compilation(run):
        chain.warm_up()
    yield from engine.map(partial(work, options=reader.options, chain=chain), reader)


def _measure(run: Run, chain: Chain, inputs: list[str] | None, engine: Engine) -> Statistics:
    from llmkit.corpus.chain import Statistics, measure_chunk

    total = Statistics()
    reader = run.reader(inputs)
    with run.progress(None, "documents") as bar:
        for result in _mapped(run, chain, measure_chunk, reader, engine):
            reader.accept(result.bad)
            total.merge(result.statistics)
            bar.advance(result.documents)
    return total


def _print_statistics(run: Run, chain: Chain, statistics: Statistics) -> None:
    """Print two tables, what each rule drops and how each statistic is distributed; the summary contains both."""
    from llmkit.corpus.chain import quantiles

    names = [name for name, _ in chain.steps]
    rules = sorted(statistics.drops_alone, key=lambda rule: names.index(rule[0]))
    drops = {
        f"{n}.{r}": {"alone": statistics.drops_alone[n, r], "in_order": statistics.drops_in_order[n, r]}
        for n, r in rules
    }
    distributions = {f"{n}.{s}": quantiles(values, SHARES) for (n, s), values in statistics.values.items()}
    total = max(1, statistics.documents)
    kept = statistics.documents - sum(statistics.drops_in_order.values())
    lines = [f"{statistics.documents:,} documents, {kept:,} would be kept ({100 * kept / total:.1f} %)", ""]
    lines += [f"{'rule':<48}{'drops alone':>14}{'share':>9}{'in order':>12}{'share':>9}"]
    for name, n in drops.items():
        alone, in_order = n["alone"], n["in_order"]
        lines.append(f"{name:<48}{alone:>14,}{alone / total:>9.2%}{in_order:>12,}{in_order / total:>9.2%}")
    lines += [
        "",
        f"{'statistic, at these shares of the documents':<48}" + "".join(f"{share:>10.0%}" for share in SHARES),
    ]
    lines += [f"{name:<48}" + "".join(f"{value:>10.4g}" for value in row) for name, row in distributions.items()]
    print("\n".join(lines))
    counts = {"documents": statistics.documents, "kept": kept, "rules": drops}
    quantile = {name: dict(zip(map(str, SHARES), row, strict=True)) for name, row in distributions.items()}
    run.finish(counts | {"statistics": quantile}, f"measured {counted(statistics.documents, 'document')}")

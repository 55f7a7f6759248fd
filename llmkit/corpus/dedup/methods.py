"""The deduplication methods of `llmkit dedup`, and their options.

Options are fields of small dataclasses, one for each set of options that the same methods accept. `DedupOptions` holds
these groups in the order of --help. A method is one row of `METHODS`: the groups that it accepts, and how it is built.
A new option is one field; a new method is one row, with a group for its own options.

Compiled kernels are imported by the functions that build a method, so that --help and `--method exact` need none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from llmkit.corpus.dedup.normalise import DEFAULT
from llmkit.errors import UsageError, unknown_name
from llmkit.options import COMMON, NEUTRAL, count_option

if TYPE_CHECKING:
    from llmkit.corpus.dedup.exact import Exact, StreamingDedup
    from llmkit.corpus.dedup.index import Index
    from llmkit.corpus.dedup.minhash import MinHash
    from llmkit.corpus.dedup.passages import PassageDedup
    from llmkit.corpus.dedup.substring import SubstringDedup
    from llmkit.corpus.dedup.two_pass import TwoPassDedup
    from llmkit.engine.local import Engine

    Stage = StreamingDedup | TwoPassDedup | PassageDedup | SubstringDedup

_survivor = partial(typer.Option, rich_help_panel="Survivors")
_near = partial(typer.Option, rich_help_panel="Near duplicates (minhash)")
_exact = partial(typer.Option, rich_help_panel="Exact duplicates (exact)")
_compared = partial(typer.Option, rich_help_panel="What does not count (all but substring)")
_index = partial(typer.Option, rich_help_panel="Documents of earlier runs")
PASSAGES = "Repeats inside texts (lines, paragraphs, substring)"
_passage = partial(typer.Option, rich_help_panel=PASSAGES)
STORAGE = "Memory and disk"


@dataclass(frozen=True)
class SurvivorOptions:
    """Which document of a cluster is kept, and what is compared."""

    annotate: Annotated[
        bool, typer.Option("--annotate", help="Drop nothing; mark each duplicate with its cluster"), COMMON
    ] = False
    keep: Annotated[
        str,
        _survivor("--keep", metavar="WHICH", help="Document to keep: first, longest, or best:FIELD (largest number)"),
        COMMON,
    ] = "first"
    clusters: Annotated[
        str,
        _survivor(
            "--clusters",
            metavar="HOW",
            help="How to cluster: stars (around survivors) or components (connected documents)",
        ),
    ] = "stars"
    group: Annotated[
        str | None, _survivor("--group", metavar="FIELD", help="Compare only documents that agree in this field")
    ] = None
    against: Annotated[
        list[str] | None,
        _survivor("--against", metavar="PATH", help="Also remove duplicates of these documents (repeatable)"),
        NEUTRAL,
        COMMON,
    ] = None


@dataclass(frozen=True)
class CountOptions:
    """Counts on survivors."""

    counts: Annotated[
        bool,
        _survivor(
            "--counts/--no-counts",
            help="Write the size of its cluster to each survivor; without, exact takes a single pass",
        ),
        COMMON,
    ] = True


@dataclass(frozen=True)
class MinHashOptions:
    """Near duplicates."""

    preset: Annotated[
        str | None,
        _near(
            "--preset",
            metavar="NAME",
            help="Defaults of --threshold, --normalise and --ngram for a kind of text: prose, code or tables",
        ),
        COMMON,
    ] = None
    threshold: Annotated[
        float | None,
        _near("--threshold", help="Minimum similarity of duplicates, 0 to 1 (default: 0.75, or by preset)"),
        COMMON,
    ] = None
    verify: Annotated[
        bool, _near("--verify/--no-verify", help="Verify candidates by the true similarity of their shingles")
    ] = True
    shingle: Annotated[
        str | None,
        _near(
            "--shingle",
            metavar="UNIT",
            help="Units of shingles: words (default), or characters for languages without spaces",
        ),
        COMMON,
    ] = None
    ngram: Annotated[
        int | None, _near("--ngram", help="Words or characters per shingle (default: 5, or by preset)")
    ] = None
    bands: Annotated[int | None, _near("--bands", help="Bands of the signature (default: by threshold)")] = None
    rows: Annotated[int | None, _near("--rows", help="Hash functions per band (default: by threshold)")] = None
    bits: Annotated[int, _near("--bits", help="Width of the hash functions: 32, or 61 (slower)")] = 32


@dataclass(frozen=True)
class KeyOptions:
    """The field that is compared."""

    key: Annotated[
        str | None,
        _exact("--key", metavar="FIELD", help="Compare this field instead of the text (metadata.url: a nested field)"),
        COMMON,
    ] = None


@dataclass(frozen=True)
class NormaliseOptions:
    """Normalisation before comparing."""

    normalise: Annotated[
        str | None,
        _compared(
            "--normalise",
            metavar="PARTS",
            help="What makes no difference: case, accents, whitespace, punctuation, operators, numbers, separated by"
            " commas; none; or loose, all of them. Default: none for exact, whitespace for lines and paragraphs,"
            " case,accents,whitespace,punctuation for minhash",
        ),
        COMMON,
    ] = None


@dataclass(frozen=True)
class IndexOptions:
    """The index of earlier runs."""

    index: Annotated[
        str | None,
        _index(
            "--index", metavar="FILE", help="Also remove duplicates of earlier runs; add the documents kept by this run"
        ),
        NEUTRAL,
        COMMON,
    ] = None
    index_full: Annotated[
        bool, _index("--index-full", help="Create the index with 32 bits per hash function, not 8: twice the size")
    ] = False
    stats: Annotated[bool, _index("--stats", help="Show the contents of the index and exit"), NEUTRAL] = False


@dataclass(frozen=True)
class PassageOptions:
    """Repeated lines and paragraphs."""

    repeated: Annotated[
        int | None,
        count_option(
            "--repeated",
            help="Cut all copies of what occurs in at least this many documents (default: keep the first copy)",
            rich_help_panel=PASSAGES,
        ),
    ] = None
    boilerplate: Annotated[
        list[str] | None,
        _passage("--boilerplate", metavar="FILE", help="Cut the lines of this file everywhere (repeatable)"),
        NEUTRAL,
    ] = None
    min_characters: Annotated[int, _passage("--min-characters", min=1, help="Never cut passages shorter than this")] = 1


@dataclass(frozen=True)
class SubstringOptions:
    """Repeated runs of words or bytes."""

    length: Annotated[int, _passage("--length", metavar="N", help="Minimum length of a repeat, in units")] = 50
    unit: Annotated[str, _passage("--unit", metavar="UNIT", help="Unit of substring: words or bytes")] = "words"


@dataclass(frozen=True)
class StorageOptions:
    """Memory and temporary files."""

    memory: Annotated[
        int,
        count_option("--memory", help="Bytes for sorting and for the table of substring", rich_help_panel=STORAGE),
        NEUTRAL,
    ] = 4 << 30
    temp_dir: Annotated[
        str | None,
        typer.Option("--temp-dir", metavar="DIR", help="Directory for temporary files", rich_help_panel=STORAGE),
        NEUTRAL,
    ] = None


@dataclass(frozen=True)
class DedupOptions:
    """All options of the methods. A group that no method lists applies to every method."""

    survivors: SurvivorOptions = field(default_factory=SurvivorOptions)
    counting: CountOptions = field(default_factory=CountOptions)
    minhash: MinHashOptions = field(default_factory=MinHashOptions)
    exact: KeyOptions = field(default_factory=KeyOptions)
    normalising: NormaliseOptions = field(default_factory=NormaliseOptions)
    indexing: IndexOptions = field(default_factory=IndexOptions)
    passages: PassageOptions = field(default_factory=PassageOptions)
    substring: SubstringOptions = field(default_factory=SubstringOptions)
    storage: StorageOptions = field(default_factory=StorageOptions)


class Preset(NamedTuple):
    """Defaults of minhash for a kind of text."""

    normalise: str
    ngram: int = 5
    threshold: float = 0.75


STANDARD = Preset(DEFAULT)
PRESETS = {
    "prose": Preset("case,accents,whitespace,punctuation,operators"),  # marks of Markdown do not count
    "code": Preset("whitespace", threshold=0.85),  # every mark and capital counts; the threshold of The Stack
    "tables": Preset("case,whitespace,punctuation", ngram=3, threshold=0.9),  # short runs: one cell, few shingles
}


def with_preset(options: DedupOptions) -> DedupOptions:
    """The options with those of minhash that were not given set by its preset. UsageError for an unknown preset."""
    near = options.minhash
    if near.preset is not None and near.preset not in PRESETS:
        raise unknown_name("preset", near.preset, sorted(PRESETS))
    preset = PRESETS[near.preset] if near.preset else STANDARD
    return replace(
        options,
        minhash=replace(
            near,
            threshold=preset.threshold if near.threshold is None else near.threshold,
            ngram=preset.ngram if near.ngram is None else near.ngram,
            shingle=near.shingle or "words",
        ),
        normalising=NormaliseOptions(options.normalising.normalise or preset.normalise),
    )


@dataclass(frozen=True)
class StageSettings:
    """What a method needs besides its options. `boilerplate`: the files that --boilerplate names."""

    seed: int
    engine: Engine
    rejects: bool
    boilerplate: tuple[str, ...] = ()


@dataclass(frozen=True)
class Method:
    """A deduplication method.

    `accepts`: the groups of options that it uses. `build`: makes it from options and settings. `criterion`: the
    argument of `TwoPassDedup` that it becomes; such methods can be combined. Without, the method edits texts and is a
    whole stage.
    """

    name: str
    accepts: tuple[type, ...]
    build: Callable[[DedupOptions, StageSettings], Any]
    criterion: str | None = None


def _build_exact(options: DedupOptions, settings: StageSettings) -> Exact:
    from llmkit.corpus.dedup.exact import Exact

    return Exact(options.exact.key, options.normalising.normalise or "none")


def _build_minhash(options: DedupOptions, settings: StageSettings) -> MinHash:
    from llmkit.corpus.dedup.minhash import MinHash, bands_for

    options = with_preset(options)
    near = options.minhash
    assert near.threshold is not None and near.ngram is not None and near.shingle is not None
    bands, rows = bands_for(near.threshold) if 0 < near.threshold <= 1 else (1, 1)  # MinHash rejects other thresholds
    return MinHash(
        near.threshold,
        near.verify,
        near.ngram,
        bands=bands if near.bands is None else near.bands,
        rows=rows if near.rows is None else near.rows,
        seed=settings.seed,
        bits=near.bits,
        unit=near.shingle,
        normalise=options.normalising.normalise or DEFAULT,
    )


def _build_passages(by: str, options: DedupOptions, settings: StageSettings) -> PassageDedup:
    from llmkit.corpus.dedup.passages import PassageDedup

    return PassageDedup(
        by=by,
        normalise=options.normalising.normalise or "whitespace",
        repeated=options.passages.repeated or 0,
        boilerplate=settings.boilerplate,
        min_characters=options.passages.min_characters,
        temporary=options.storage.temp_dir,
        engine=settings.engine,
        rejects=settings.rejects,
    )


def _build_substring(options: DedupOptions, settings: StageSettings) -> SubstringDedup:
    from llmkit.corpus.dedup.substring import SubstringDedup

    return SubstringDedup(
        length=options.substring.length,
        unit=options.substring.unit,
        memory=options.storage.memory,
        temporary=options.storage.temp_dir,
        engine=settings.engine,
        rejects=settings.rejects,
    )


_REMOVING = (SurvivorOptions, IndexOptions)
_PASSAGES = (NormaliseOptions, PassageOptions)
METHODS = {
    method.name: method
    for method in (
        Method("exact", (KeyOptions, NormaliseOptions, *_REMOVING), _build_exact, criterion="exact"),
        Method("minhash", (MinHashOptions, NormaliseOptions, *_REMOVING), _build_minhash, criterion="near"),
        Method("lines", _PASSAGES, partial(_build_passages, "lines")),
        Method("paragraphs", _PASSAGES, partial(_build_passages, "paragraphs")),
        Method("substring", (SubstringOptions,), _build_substring),
    )
}


def select_methods(names: str, options: DedupOptions) -> list[Method]:
    """The methods of a comma-separated list. UsageError if they cannot be combined or do not accept a given option."""
    methods = []
    for name in (name.strip() for name in names.split(",")):
        if name not in METHODS:
            raise unknown_name("method", name, sorted(METHODS))
        methods.append(METHODS[name])
    editing = next((method.name for method in methods if method.criterion is None), None)
    if editing and len(methods) > 1:
        raise UsageError(
            f"--method {names}: {editing} edits texts and cannot be combined",
            f"use a pipe: llmkit dedup --method {editing} | llmkit dedup",
        )
    for group in (getattr(options, item.name) for item in fields(options)):
        accepting = [method for method in METHODS.values() if type(group) in method.accepts]
        if accepting and not any(method in accepting for method in methods) and (flags := _given_options(group)):
            raise UsageError(
                f"{flags[0]} applies only to --method {', '.join(method.name for method in accepting)}",
                f"use --method {_with_method(accepting[0], methods)}",
            )
    return methods


def _with_method(method: Method, methods: list[Method]) -> str:
    """The value of --method that adds `method` to `methods` if they can be combined, else replaces them."""
    combined = [method, *methods] if all(each.criterion for each in (method, *methods)) else [method]
    return ",".join(each.name for each in METHODS.values() if each in combined)


def _given_options(group: Any) -> list[str]:
    """The flags of the options in a group whose values are neither the default nor empty."""
    flags = []
    for item in fields(group):
        value = getattr(group, item.name)
        if value not in (item.default, getattr(STANDARD, item.name, None), "", [], None):
            flags.append(("--no-" if value is False else "--") + item.name.replace("_", "-"))
    return flags


def build_stage(
    methods: list[Method],
    options: DedupOptions,
    settings: StageSettings,
    index: Index | None = None,
    index_options: dict[str, Any] | None = None,
    record: dict[str, Any] | None = None,
) -> Stage:
    """A stage of these methods with all counts at zero. UsageError for invalid values of options.

    `index_options`: the options of the command that identify a run in the index; `record`: its lineage there.
    """
    if methods[0].criterion is None:
        stage: Stage = methods[0].build(options, settings)
        return stage
    criteria = {str(method.criterion): method.build(options, settings) for method in methods}
    survivors = options.survivors
    two_pass = survivors.keep != "first" or survivors.clusters != "stars" or "near" in criteria
    if not (
        two_pass
        or options.counting.counts
        or survivors.annotate
        or survivors.group
        or survivors.against
        or options.indexing.index
    ):
        from llmkit.corpus.dedup.exact import StreamingDedup

        return StreamingDedup(exact=criteria["exact"], engine=settings.engine, rejects=settings.rejects)
    from llmkit.corpus.dedup.two_pass import TwoPassDedup

    return TwoPassDedup(
        **criteria,
        keep=survivors.keep,
        clusters=survivors.clusters,
        group=survivors.group,
        annotate=survivors.annotate,
        write_counts=options.counting.counts,
        memory=options.storage.memory,
        temporary=options.storage.temp_dir,
        index=index,
        options=index_options or {},
        record=record or {},
        engine=settings.engine,
        rejects=settings.rejects,
    )

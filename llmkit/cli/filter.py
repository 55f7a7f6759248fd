"""`llmkit filter`: keep the documents that pass quality rules."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmkit.cli.options import InputPaths, Run, command
from llmkit.cli.stage import Rejects, run_stage, summary_line

if TYPE_CHECKING:
    from llmkit.corpus.chain import Filtered
    from llmkit.io.documents import DocumentReader


@command(
    reads=True,
    writes=True,
    neutral=("rejects", "print_preset"),
    examples=(
        "llmkit filter docs.jsonl.zst --preset fineweb --rejects dropped.jsonl.zst -o clean.jsonl.zst",
        "llmkit filter < docs.jsonl.zst --rule gopher_quality.min_doc_words=20 --plain | head -1",
        "llmkit filter --preset c4 --print-preset > my.toml",
    ),
)
def main(
    run: Run,
    inputs: InputPaths = None,
    preset: Annotated[
        list[str] | None,
        typer.Option(
            "--preset", metavar="NAME", help="gopher (the default), c4, fineweb, or a TOML file; may be repeated"
        ),
    ] = None,
    filter: Annotated[
        list[str] | None,
        typer.Option("--filter", metavar="NAME", help="One filter alone, after the presets; may be repeated"),
    ] = None,
    rule: Annotated[
        list[str] | None,
        typer.Option("--rule", metavar="FILTER.RULE=VALUE", help='Set one threshold; "off" switches the rule off'),
    ] = None,
    words: Annotated[
        str, typer.Option("--words", metavar="KIND", help="What counts as a word: unicode or whitespace")
    ] = "unicode",
    rejects: Rejects = None,
    print_preset: Annotated[bool, typer.Option("--print-preset", help="Print the rules as TOML and stop")] = False,
) -> None:
    """Keep the documents that pass quality rules; a document goes at its first failing rule.

    The presets hold published rule sets: gopher (repetition and quality), c4 (keeps the lines that read as sentences: it edits the text)
    and fineweb (both, then its own). --preset and --filter may be combined; the filters run in the order given, presets first. Kept
    documents whose text was not edited are passed on byte for byte. --rejects keeps what was dropped, as it came in, with `filter`,
    `reason` and the measured `value`. The rules are made for English.
    """
    from llmkit.corpus import chain as chains

    presets, singles = preset or [], filter or []
    if not presets and not singles:
        presets = run.options["preset"] = [chains.DEFAULT_PRESET]
    chain = chains.load_chain(presets, singles, rule or [], words)
    if print_preset:
        plain = not (singles or rule)
        sys.stdout.write("\n".join(map(chains.preset_text, presets)) if plain else chains.describe_chain(chain))
        return
    if any(map(chains.is_path, presets)):  # the lineage holds the rules themselves rather than a file's name
        run.options.pop("preset")
        run.options["filter"], run.options["rule"] = chains.spell_out(chain)

    totals: Counter[str] = Counter()
    reasons: Counter[tuple[str, str]] = Counter()

    def work(reader: DocumentReader) -> Iterator[Filtered]:
        from llmkit.engine.local import ordered_map

        judge = partial(chains.filter_chunk, options=reader.options, chain=chain)
        for result in ordered_map(judge, reader.chunks(), run.jobs):
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

    counts = run_stage(run, inputs, rejects, work, count)
    if counts is None:
        return
    if reasons and not run.as_json:
        rows: list[list[Any]] = [
            [f"{name}.{reason}", n, f"{100 * n / counts['documents']:.1f} %"]
            for (name, reason), n in sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
        ]
        run.table("dropped by", ["rule", "documents", "share"], rows)
    edited = f"edited {counts['edited']:,}, " if counts["edited"] else ""
    run.finish(counts, summary_line(run, counts, f"{edited}dropped"))

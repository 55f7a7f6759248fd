"""Stages of a mix: a TOML file with named sources, and the amounts that each stage takes of them, one stage
after another.

    [sources]                    # name = path, relative to this file's directory
    web = "shards/web"
    wiki = "shards/wiki"

    [[stage]]
    name = "main"                # optional
    tokens = "2B"                # size of the stage; by default the sum of its amounts
    mix = { web = 0.9, wiki = "x2" }

    [[stage]]
    tokens = "100M"
    mix = { web = 0.5, wiki = 0.5 }

Amounts are written as on the command line (mixing/specs.py): a number is a weight, "x6" a multiplier, "2B" a
token budget. The file may also hold the keys of a recipe (training/optim/recipe.py), so that one file describes
what each stage reads and how it trains.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmkit.errors import LlmkitError, UsageError, suggestion
from llmkit.io.inputs import STDIN, STDIN_PATH
from llmkit.mixing.plan import RECIPE_KEYS, STAGE_KEYS
from llmkit.mixing.specs import SourceSpec, parse_amount, source_budgets

HINT = "see examples/k2.toml for the form"


@dataclass(frozen=True, slots=True)
class MixStage:
    """One stage: its size in tokens (None: the sum of its amounts), and its specs by source number."""

    name: str
    tokens: int | None
    specs: dict[int, SourceSpec]


def single_stage(specs: Sequence[SourceSpec], tokens: int | None) -> list[MixStage]:
    """The one stage of a mix that is described on the command line alone."""
    return [MixStage("", tokens, dict(enumerate(specs)))]


def read_stages(path: Path, replacement_paths: Sequence[str]) -> tuple[list[str], list[MixStage]]:
    """Read (source paths, stages) from a stages file. `replacement_paths`, if any, replace its paths, in order.

    Raises UsageError where the file is invalid, LlmkitError where it cannot be read.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LlmkitError(f"{path}: {error.strerror}", "check the path and its permissions") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: invalid TOML ({error})", HINT) from error
    _check_keys(content, ("sources", "stage", *RECIPE_KEYS), str(path))
    sources, stages = content.get("sources"), content.get("stage")
    if not isinstance(sources, dict) or not sources or not all(isinstance(p, str) and p for p in sources.values()):
        raise UsageError(f"{path}: [sources] does not give names and paths", HINT)
    if not isinstance(stages, list) or not stages or not all(isinstance(stage, dict) for stage in stages):
        raise UsageError(f"{path}: no [[stage]]", HINT)
    if replacement_paths and len(replacement_paths) != len(sources):
        raise UsageError(
            f"{len(replacement_paths)} sources named, but {len(sources)} in {path}", "name all of them, or none"
        )
    named = list(replacement_paths) or [
        STDIN if p == STDIN else os.path.normpath(path.parent / p) for p in sources.values()
    ]
    paths = [STDIN if p == STDIN_PATH else p for p in named]
    return paths, [
        _parse_stage(path, i, table, dict(zip(sources, paths, strict=True))) for i, table in enumerate(stages)
    ]


def _parse_stage(path: Path, number: int, table: dict[str, Any], sources: dict[str, str]) -> MixStage:
    name = table.get("name", f"stage {number + 1}")
    context = f"{path}: {name}"
    _check_keys(table, ("name", "tokens", "mix", *STAGE_KEYS), context)
    mix = table.get("mix")
    if not isinstance(name, str):
        raise UsageError(f"{context}: a name must be a string", HINT)
    if not isinstance(mix, dict) or not mix:
        raise UsageError(f"{context}: takes nothing from any source", 'mix = { web = 0.9, wiki = "x2" }')
    _check_keys(mix, sources, context)
    tokens = table.get("tokens")
    if tokens is not None:
        kind, value = _parse_toml_amount(tokens, f"{context}: tokens")
        if kind == "times" or value != int(value):
            raise UsageError(f"{context}: tokens: {tokens!r} is not a count", 'such as 5000 or "2B"')
        tokens = int(value)
    specs = {}
    for i, (source, source_path) in enumerate(sources.items()):
        if source in mix:
            kind, value = _parse_toml_amount(mix[source], f"{context}: {source}")
            specs[i] = SourceSpec(source_path, kind, value)
    return MixStage(name, tokens, specs)


def _parse_toml_amount(value: Any, context: str) -> Any:
    if type(value) is int and abs(value) >> 128:  # from hexadecimal: Python refuses to write so many decimal digits
        value = float("inf")
    return parse_amount(str(value) if type(value) in (int, float, str) else "", context)


def _check_keys(table: dict[str, Any], names: Collection[str], context: str) -> None:
    for key in table:
        if key not in names:
            raise UsageError(f"{context}: unknown key {key!r}", suggestion(key, names))


def stage_budgets(
    stages: Sequence[MixStage], available: Sequence[int], *, exact: bool = False
) -> list[tuple[int, ...]]:
    """Token budgets by source, one per stage. `available` are the tokens in each source; see `source_budgets`."""
    rows = []
    for stage in stages:
        try:
            of_specs = [available[i] for i in stage.specs]
            budgets = source_budgets(list(stage.specs.values()), of_specs, stage.tokens, exact=exact)
        except UsageError as error:
            raise UsageError(f"{stage.name}: {error.message}" if stage.name else error.message, error.hint) from None
        by_source = dict(zip(stage.specs, budgets, strict=True))
        rows.append([by_source.get(i, 0) for i in range(len(available))])
    return list(zip(*rows, strict=True))

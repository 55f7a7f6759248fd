"""Stages of a mix: a TOML of named sources, and of what each stage takes of them, one after the other.

    [sources]                    # name = path, from this file's own directory
    web = "shards/web"
    wiki = "shards/wiki"

    [[stage]]
    name = "main"                # optional
    tokens = "2B"                # of the stage; without it, what the amounts come to
    mix = { web = 0.9, wiki = "x2" }

    [[stage]]
    tokens = "100M"
    mix = { web = 0.5, wiki = 0.5 }

Amounts are those of the command line (mixing/specs.py): a number is a weight, "x6" a multiplier, "2B" a token budget. The keys of a recipe
(training/recipe.py) may stand in the file too, so that one says what each stage reads and how it is trained on.
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
from llmkit.mixing.specs import Spec, budgets, parse_amount

HINT = "see examples/k2.toml for the form"


@dataclass(frozen=True, slots=True)
class Stage:
    """What one stage takes: how many tokens (None: what the specs come to), and of which sources, by their number."""

    name: str
    tokens: int | None
    specs: dict[int, Spec]


def one_stage(specs: Sequence[Spec], tokens: int | None) -> list[Stage]:
    """The stage that the command line alone asks for."""
    return [Stage("", tokens, dict(enumerate(specs)))]


def read_stages(path: Path, places: Sequence[str]) -> tuple[list[str], list[Stage]]:
    """Paths of the sources, and the stages. `places` replaces the paths, in order, if there are any. UsageError where the file is wrong."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LlmkitError(f"{path}: {error.strerror}", "check the path and its permissions") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: invalid TOML ({error})", HINT) from error
    _known(content, ("sources", "stage", *RECIPE_KEYS), str(path))
    sources, stages = content.get("sources"), content.get("stage")
    if not isinstance(sources, dict) or not sources or not all(isinstance(p, str) and p for p in sources.values()):
        raise UsageError(f"{path}: [sources] does not give names and paths", HINT)
    if not isinstance(stages, list) or not stages or not all(isinstance(stage, dict) for stage in stages):
        raise UsageError(f"{path}: no [[stage]]", HINT)
    if places and len(places) != len(sources):
        raise UsageError(f"{len(places)} sources named, but {len(sources)} in {path}", "name all of them, or none")
    found = list(places) or [STDIN if p == STDIN else os.path.normpath(path.parent / p) for p in sources.values()]
    paths = [STDIN if place == STDIN_PATH else place for place in found]
    return paths, [_stage(path, i, table, dict(zip(sources, paths, strict=True))) for i, table in enumerate(stages)]


def _stage(path: Path, number: int, table: dict[str, Any], sources: dict[str, str]) -> Stage:
    name = table.get("name", f"stage {number + 1}")
    what = f"{path}: {name}"
    _known(table, ("name", "tokens", "mix", *STAGE_KEYS), what)
    mix = table.get("mix")
    if not isinstance(name, str):
        raise UsageError(f"{what}: a name is a text", HINT)
    if not isinstance(mix, dict) or not mix:
        raise UsageError(f"{what}: takes nothing of any source", 'mix = { web = 0.9, wiki = "x2" }')
    _known(mix, sources, what)
    tokens = table.get("tokens")
    if tokens is not None:
        kind, value = _amount(tokens, f"{what}: tokens")
        if kind == "times" or value != int(value):
            raise UsageError(f"{what}: tokens: {tokens!r} is no count", 'such as 5000 or "2B"')
        tokens = int(value)
    specs = {}
    for i, (source, place) in enumerate(sources.items()):
        if source in mix:
            kind, value = _amount(mix[source], f"{what}: {source}")
            specs[i] = Spec(place, kind, value)
    return Stage(name, tokens, specs)


def _amount(value: Any, what: str) -> Any:
    if type(value) is int and abs(value) >> 128:  # from hexadecimal: Python writes no decimals of that length
        value = float("inf")
    return parse_amount(str(value) if type(value) in (int, float, str) else "", what)


def _known(table: dict[str, Any], names: Collection[str], what: str) -> None:
    for key in table:
        if key not in names:
            raise UsageError(f"{what}: unknown key {key!r}", suggestion(key, names))


def stage_budgets(stages: Sequence[Stage], available: Sequence[int]) -> list[tuple[int, ...]]:
    """Tokens of each source in each stage, of `available` ones."""
    rows = []
    for stage in stages:
        try:
            found = budgets(list(stage.specs.values()), [available[i] for i in stage.specs], stage.tokens)
        except UsageError as error:
            raise UsageError(f"{stage.name}: {error.message}" if stage.name else error.message, error.hint) from None
        taken = dict(zip(stage.specs, found, strict=True))
        rows.append([taken.get(i, 0) for i in range(len(available))])
    return list(zip(*rows, strict=True))

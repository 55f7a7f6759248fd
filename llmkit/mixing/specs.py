"""How much of each source a mix takes: specs such as `web/:0.7`, `wiki/:x6` or `code/:2B` become token budgets.

| spec | takes |
|---|---|
| `PATH:0.7` | a share, by weight, of what the other kinds leave of --tokens |
| `PATH:x6` | the whole source six times |
| `PATH:2B` | this many tokens (suffix k, M, B or T) |
| `PATH` | by size: the whole source, or with --tokens its share of what the others leave |

stdin is `-`, or with an amount `/dev/stdin:0.7`, since `-:0.7` would be parsed as an option.

Without --tokens the weights are scaled until the first source is exhausted, so that none is repeated.
mixing/order.py decides which documents make up a budget, and their order. This module loads neither torch nor
pyarrow.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from llmkit.errors import LlmkitError, UsageError
from llmkit.io.inputs import STDIN, STDIN_PATH
from llmkit.mixing.plan import MAX_COPIES

Kind = Literal["size", "weight", "times", "tokens"]
SUFFIXES = {"k": 10**3, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9, "T": 10**12}
AMOUNT = re.compile(r"(x?)([0-9]+\.?[0-9]*(?:e[+-]?[0-9]+)?|\.[0-9]+)([kKMBGT]?)")
MAX_AMOUNT = 1e30  # keeps every product and ratio of amounts and sizes finite
FORMS = "a source is PATH, PATH:0.6 (weight), PATH:x6 (multiplier) or PATH:2B (tokens)"


@dataclass(frozen=True, slots=True)
class SourceSpec:
    """A requested source: its path, the kind and value of its amount, and the suffix as typed ("" or ":0.6")."""

    path: str
    kind: Kind = "size"
    value: float = 1.0
    suffix: str = ""


def parse_spec(text: str) -> SourceSpec:
    """Parse a source from the command line. An existing path is never split at its colon.

    Raises UsageError where the amount is not a positive number.
    """
    path, colon, amount = text.rpartition(":")
    if not colon or not path or os.path.exists(text) or "/" in amount:
        return SourceSpec(STDIN if text == STDIN_PATH else text)
    kind, value = parse_amount(amount, text)
    return SourceSpec(STDIN if path == STDIN_PATH else path, kind, value, f":{amount}")


def parse_amount(amount: str, context: str) -> tuple[Kind, float]:
    """Parse `0.6`, `x6` or `2B`. Raises UsageError, prefixed with `context`, where it is not a positive number."""
    match = AMOUNT.fullmatch(amount)
    if not match or (match[1] and match[3]):
        raise UsageError(f"{context}: {amount!r} is not an amount", FORMS)
    value = float(match[2]) * SUFFIXES.get(match[3], 1)
    if not value:
        raise UsageError(
            f"{context}: {amount!r} is not above zero", "leave the source out, or give it a positive amount"
        )
    if not 1 / MAX_AMOUNT <= value <= MAX_AMOUNT:
        raise UsageError(
            f"{context}: {amount!r} is out of range", f"amounts are from {1 / MAX_AMOUNT:g} to {MAX_AMOUNT:g}"
        )
    kind: Kind = "times" if match[1] else "tokens" if match[3] else "weight"
    if kind == "tokens" and round(value) < 1:
        raise UsageError(f"{context}: {amount!r} is less than one token", FORMS)
    return kind, value


def parse_fraction(text: str) -> float:
    """Parse the value of --holdout, `0.5%` or `0.005`. Raises UsageError unless it is above 0 and below 1."""
    try:
        fraction = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        fraction = math.nan
    if not 0 < fraction < 1:
        raise UsageError(f"--holdout {text}: not a fraction between 0 and 1", "such as 0.5% or 0.005")
    return fraction


def parse_weight_map(text: str) -> list[tuple[int, int]]:
    """Parse `1:1,2-5:2` into (first count, copies) pairs; a count outside all ranges belongs to the range below."""
    ranges: list[tuple[int, int]] = []
    last = 0
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,18})(?:-(\d{1,18}))?:(\d{1,18})\s*", part, re.ASCII)
        low, high, copies = (int(match[1]), int(match[2] or match[1]), int(match[3])) if match else (0, 0, 0)
        if not last < low <= high or not 1 <= copies <= MAX_COPIES:
            raise UsageError(
                f"--weight-map: {part!r} is not a range with a number of copies",
                f"ascending ranges such as 1:1,2-5:2,6-100:3, with 1 to {MAX_COPIES} copies each",
            )
        ranges.append((low, copies))
        last = high
    return ranges


def source_budgets(
    specs: Sequence[SourceSpec], available: Sequence[int], total: int | None, *, exact: bool = False
) -> list[int]:
    """Token budget of each source. `available` are the tokens in each; `total` is the requested sum (None: the
    specs decide), which they then add up to if `exact`, and otherwise to within half a token per source.

    Raises UsageError where the specs contradict each other or `total`, LlmkitError where a source holds no tokens.
    """
    for spec, tokens in zip(specs, available, strict=True):
        if not tokens:
            raise LlmkitError(f"{spec.path}: no tokens in this source", "leave it out")
    kinds = {spec.kind for spec in specs}
    if {"size", "weight"} <= kinds:
        bare = next(spec for spec in specs if spec.kind == "size")
        raise UsageError(f"{bare.path}: no weight, but other sources have one", f"give it one: {bare.path}:0.5")
    budgets = [
        round(spec.value * (tokens if spec.kind == "times" else 1)) if spec.kind in ("times", "tokens") else 0
        for spec, tokens in zip(specs, available, strict=True)
    ]
    weighted = [i for i, spec in enumerate(specs) if spec.kind in ("size", "weight")]
    weights = {i: specs[i].value if specs[i].kind == "weight" else float(available[i]) for i in weighted}
    if total is None:
        if not weighted:
            return budgets
        scale = min(available[i] / weights[i] for i in weighted)
    else:
        remaining = total - sum(budgets)
        if remaining < 0 or (remaining == 0 and weighted) or (remaining > 0 and not weighted):
            raise UsageError(
                f"--tokens {total:,}, but the multipliers and budgets total {total - remaining:,}",
                "leave --tokens out, or change them" if not weighted else "raise --tokens",
            )
        scale = remaining / sum(weights.values()) if weighted else 0.0
    for i in weighted:
        budgets[i] = round(weights[i] * scale)
    if exact and total is not None and weighted:
        budgets[max(weighted, key=lambda i: budgets[i])] += total - sum(budgets)
    return budgets

"""How much of each source a mix takes: specs such as `web/:0.7`, `wiki/:x6` or `code/:2B` become token budgets.

| spec | takes |
|---|---|
| `PATH:0.7` | a share by weight of what the other kinds leave of --tokens |
| `PATH:x6` | the whole source six times |
| `PATH:2B` | so many tokens (suffix k, M, B or T) |
| `PATH` | by size: all of it, or with --tokens its share of what is left |

stdin is `-`, with an amount `/dev/stdin:0.7`, since `-:0.7` would be taken for an option.

Without --tokens the weights are scaled until the first source is used up, so that none is repeated. Which documents make up a budget, and
in which order, is decided by mixing/order.py.
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
from llmkit.mixing.plan import MOST_TIMES

Kind = Literal["size", "weight", "times", "tokens"]
SUFFIXES = {"k": 10**3, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9, "T": 10**12}
NUMBER = re.compile(r"(x?)([0-9]+\.?[0-9]*(?:e[+-]?[0-9]+)?|\.[0-9]+)([kKMBGT]?)")
MOST = 1e30  # so that no product or ratio of amounts and sizes is infinite
FORMS = "a source is PATH, PATH:0.6 (weight), PATH:x6 (times) or PATH:2B (tokens)"


@dataclass(frozen=True, slots=True)
class Spec:
    """One source as asked for: its path, what the amount means, and the suffix as it was typed ("" or ":0.6")."""

    path: str
    kind: Kind = "size"
    value: float = 1.0
    suffix: str = ""


def parse_spec(text: str) -> Spec:
    """A source of the command line. UsageError where the amount is not a positive number; a path that exists is never cut at its colon."""
    path, colon, amount = text.rpartition(":")
    if not colon or not path or os.path.exists(text) or "/" in amount:
        return Spec(STDIN if text == STDIN_PATH else text)
    kind, value = parse_amount(amount, text)
    return Spec(STDIN if path == STDIN_PATH else path, kind, value, f":{amount}")


def parse_amount(amount: str, what: str) -> tuple[Kind, float]:
    """What `0.6`, `x6` or `2B` asks for; UsageError naming `what` where it is not a positive number."""
    match = NUMBER.fullmatch(amount)
    if not match or (match[1] and match[3]):
        raise UsageError(f"{what}: {amount!r} is no amount", FORMS)
    value = float(match[2]) * SUFFIXES.get(match[3], 1)
    if not value:
        raise UsageError(f"{what}: {amount!r} is not above zero", "leave the source out, or give it a positive amount")
    if not 1 / MOST <= value <= MOST:
        raise UsageError(f"{what}: {amount!r} is beyond all measure", f"amounts are from {1 / MOST:g} to {MOST:g}")
    kind: Kind = "times" if match[1] else "tokens" if match[3] else "weight"
    if kind == "tokens" and round(value) < 1:
        raise UsageError(f"{what}: {amount!r} is less than a token", FORMS)
    return kind, value


def parse_share(text: str) -> float:
    """The part that `0.5%` or `0.005` is, above 0 and below 1; UsageError otherwise."""
    try:
        share = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        share = math.nan
    if not 0 < share < 1:
        raise UsageError(f"--holdout {text}: no share between 0 and 1", "such as 0.5% or 0.005")
    return share


def parse_weight_map(text: str) -> list[tuple[int, int]]:
    """(first count, times) of the ranges in `1:1,2-5:2,6-100:3`; a count between or behind them is of the range below it."""
    found: list[tuple[int, int]] = []
    last = 0
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,18})(?:-(\d{1,18}))?:(\d{1,18})\s*", part, re.ASCII)
        low, high, times = (int(match[1]), int(match[2] or match[1]), int(match[3])) if match else (0, 0, 0)
        if not last < low <= high or not 1 <= times <= MOST_TIMES:
            raise UsageError(
                f"--weight-map: {part!r} is no range with its times",
                f"rising ranges such as 1:1,2-5:2,6-100:3; from 1 to {MOST_TIMES} times",
            )
        found.append((low, times))
        last = high
    return found


def budgets(specs: Sequence[Spec], available: Sequence[int], total: int | None) -> list[int]:
    """Tokens that each source gives, of `available` ones each, for `total` altogether (None: as the specs say).

    Raises UsageError where the specs contradict each other or `total`, LlmkitError where a source holds no tokens.
    """
    for spec, tokens in zip(specs, available, strict=True):
        if not tokens:
            raise LlmkitError(f"{spec.path}: no tokens in this source", "leave it out")
    kinds = {spec.kind for spec in specs}
    if {"size", "weight"} <= kinds:
        bare = next(spec for spec in specs if spec.kind == "size")
        raise UsageError(f"{bare.path}: has no weight, while others have", f"give it one: {bare.path}:0.5")
    found = [
        round(spec.value * (tokens if spec.kind == "times" else 1)) if spec.kind in ("times", "tokens") else 0
        for spec, tokens in zip(specs, available, strict=True)
    ]
    shared = [i for i, spec in enumerate(specs) if spec.kind in ("size", "weight")]
    weights = {i: specs[i].value if specs[i].kind == "weight" else float(available[i]) for i in shared}
    if total is None:
        if not shared:
            return found
        scale = min(available[i] / weights[i] for i in shared)
    else:
        left = total - sum(found)
        if left < 0 or (left == 0 and shared) or (left > 0 and not shared):
            raise UsageError(
                f"--tokens {total:,}, but the multipliers and budgets come to {total - left:,}",
                "leave --tokens out, or change them" if not shared else "raise --tokens",
            )
        scale = left / sum(weights.values()) if shared else 0.0
    for i in shared:
        found[i] = round(weights[i] * scale)
    return found

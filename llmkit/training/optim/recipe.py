"""Recipes: how a model was trained, as TOML, scaled to a run of any length. Those of the package lie in recipes/; a path names one's own.

    batch_size = 2240          # sequences a step           } for what the command line leaves open
    sequence_length = 2048     # also betas, weight_decay, clip

    [[stage]]
    name = "main"              # optional
    tokens = "1.2T"            # of the stage; not needed where the data is a mix with as many stages, which then says it
    lr = 3e-4                  # highest rate; without it the rate stays what it was
    warmup = "9B"              # tokens over which it rises from 0; below 1 a share of the stage
    schedule = "cosine"        # linear, wsd (with decay = 0.2 and decay_shape = "sqrt"), or constant, the default
    final_lr = 3e-5            # 0 without it
    horizon = "1.5T"           # tokens after the stage's start at which final_lr would be reached, where that is beyond its end
    sequence_length = 8192     # from this stage on
    rope_theta = 500000.0      # from this stage on

Every count of tokens is scaled with its stage, so the curve has its shape over `--tokens` of any number. Rates are as they were published, for a
model of that size: `lr` of `schedule` stretches the whole curve to another peak. The batch shrinks with the run (`scaled_batch`): a batch of millions
of tokens would leave a run of ten million three steps. `llmkit mix --stages` reads the same file for what each stage is made of.
"""

from __future__ import annotations

import re
import tomllib
from bisect import bisect_right
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from importlib import resources
from itertools import accumulate
from pathlib import Path
from typing import Any

from llmkit.errors import LlmkitError, UsageError, suggestion, unknown_name
from llmkit.mixing.plan import RECIPE_KEYS, STAGE_KEYS
from llmkit.training.optim.schedule import NAMES, RAMPS, Schedule, Segment, segments, warmup_tokens

HINT = "see llmkit/training/optim/recipes/crystal.toml for the form"
MOST = 10**18
BATCH_POWER = 0.383  # of the tokens, by which the best batch grows (nanochat's fit)
COUNT = re.compile(r"(\d{1,18}(?:\.\d{1,18})?)([kKMBGT]?)", re.ASCII)
SUFFIXES = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9, "T": 10**12}
# Numbers of a recipe: lowest and highest value, and whether they are whole.
RANGES: dict[str, tuple[float, float, bool]] = {
    "batch_size": (1, 1 << 31, True), "sequence_length": (8, 1 << 24, True), "weight_decay": (0, 10, False), "clip": (0, 1e6, False),
    "tokens": (1, MOST, True), "horizon": (1, MOST, True), "lr": (1e-12, 10, False), "final_lr": (0, 10, False), "warmup": (0, MOST, False),
    "decay": (0, 1, False), "rope_theta": (1, 1e12, False),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage, in tokens of the recipe; None is what holds before it."""

    name: str
    tokens: int | None = None
    lr: float | None = None
    final_lr: float = 0.0
    schedule: str = "constant"
    warmup: float = 0.0
    decay: float = 0.2
    decay_shape: str = "linear"
    horizon: int | None = None
    sequence_length: int | None = None
    rope_theta: float | None = None


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a recipe says; `defaults` holds batch_size, sequence_length, betas, weight_decay and clip, as far as it names them."""

    name: str
    stages: tuple[Stage, ...]
    defaults: dict[str, Any] = field(default_factory=dict)

    def borders(self, total: int, ends: Sequence[int]) -> list[int]:
        """Token after which each stage ends in a run of `total` tokens, whose data has stages that end at `ends`."""
        if len(self.stages) == 1:
            return [total]
        if len(ends) == len(self.stages):
            if total != ends[-1]:
                raise UsageError(f"--tokens {total:,}, but the stages of the data come to {ends[-1]:,}", "leave it out")
            return list(ends)
        if len(ends) > 1:
            raise UsageError(f"{self.name} has {len(self.stages)} stages, the data {len(ends)}", "give both as many")
        own = [stage.tokens for stage in self.stages]
        if None in own:
            raise UsageError(
                f"{self.name}: {self.stages[own.index(None)].name} has no tokens, and the data has no stages",
                'tokens = "2B", or mix the data with --stages',
            )
        sums = list(accumulate(tokens or 0 for tokens in own))
        return [round(total * done / sums[-1]) for done in sums]

    def schedule(self, borders: Sequence[int], lr: float | None) -> Schedule | None:
        """The rates over the stages that end at `borders`, stretched to the peak `lr` if it is given; None where the recipe says no rates."""
        peaks = [stage.lr for stage in self.stages if stage.lr is not None]
        if not peaks:
            return None
        stretch = lr / max(peaks) if lr else 1.0
        found: list[Segment] = []
        start, rate = 0, 0.0
        for stage, end in zip(self.stages, borders, strict=True):
            scale = (end - start) / stage.tokens if stage.tokens else 1.0
            until = start + round(stage.horizon * scale) if stage.horizon else end
            warmup = warmup_tokens(stage.warmup, end - start) if stage.warmup < 1 else round(stage.warmup * scale)
            if warmup > end - start:
                raise UsageError(
                    f"{self.name}: {stage.name}: a warm-up of {warmup:,} tokens does not fit into {end - start:,}",
                    "give a smaller warmup",
                )
            peak, final = (rate, 0.0) if stage.lr is None else (stage.lr * stretch, stage.final_lr * stretch)
            found += segments(stage.schedule, peak, final, start, until, warmup, stage.decay, stage.decay_shape)
            start, rate = end, found[-1].rate(end)
        return Schedule(tuple(found))

    def lengths(self, borders: Sequence[int], length: int) -> list[tuple[int, int]]:
        """Tokens in a sequence of each stage, `length` where none is named so far, and the token until which it holds."""
        return list(zip(_held([stage.sequence_length for stage in self.stages], length), borders, strict=True))

    def thetas(self, borders: Sequence[int], theta: float) -> Thetas | None:
        """Base of the rotary embedding by token, `theta` where none is named so far; None where it stays that."""
        values = _held([stage.rope_theta for stage in self.stages], theta)
        return None if set(values) == {theta} else Thetas(tuple(values), tuple(borders))

    def scaled_batch(self, total: int) -> int | None:
        """Its batch for a run of `total` tokens: smaller with the power 0.383 of the tokens; None where the recipe says no batch or no tokens."""
        batch, own = self.defaults.get("batch_size"), [stage.tokens for stage in self.stages]
        if not batch or None in own:
            return batch
        return max(1, round(batch * min(1.0, total / sum(tokens or 0 for tokens in own)) ** BATCH_POWER))


@dataclass(frozen=True, slots=True)
class Thetas:
    """Values and the token until which each holds, the last for ever."""

    values: tuple[float, ...]
    borders: tuple[int, ...]

    def at(self, tokens: int) -> float:
        return self.values[min(bisect_right(self.borders, tokens), len(self.values) - 1)]


def _held(values: Sequence[Any], first: Any) -> list[Any]:
    """Each value, or the one before it where there is none."""
    return list(accumulate(values, lambda held, value: held if value is None else value, initial=first))[1:]


def is_path(recipe: str) -> bool:
    """Whether a recipe is given by path: it ends in .toml or has a directory part."""
    return recipe.endswith(".toml") or "/" in recipe


def builtin_recipes() -> list[str]:
    """Names of the recipes in the package."""
    return sorted(item.name[: -len(".toml")] for item in _directory().iterdir() if item.name.endswith(".toml"))


def _directory() -> Any:
    return resources.files("llmkit.training.optim").joinpath("recipes")


def read_recipe(name: str) -> Recipe:
    """A recipe of the package, or that of a file. UsageError where a key is unknown or a value out of range, LlmkitError where it cannot be read."""
    if not is_path(name) and name not in builtin_recipes():
        raise unknown_name("recipe", name, builtin_recipes())
    try:
        place = Path(name) if is_path(name) else _directory().joinpath(f"{name}.toml")
        content = tomllib.loads(place.read_text(encoding="utf-8"))
    except OSError as error:
        raise LlmkitError(f"{name}: {error.strerror}", "of the package: " + ", ".join(builtin_recipes())) from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{name}: invalid TOML ({error})", HINT) from error
    _known(content, ("stage", "sources", *RECIPE_KEYS), name)
    tables = content.get("stage")
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise UsageError(f"{name}: no [[stage]]", HINT)
    defaults = {key: _value(content, key, name) for key in RECIPE_KEYS if key in content}
    stages = tuple(_stage(table, i, name) for i, table in enumerate(tables))
    if stages[0].lr is None and any(stage.lr is not None for stage in stages):
        raise UsageError(f"{name}: {stages[0].name} has no lr", "the first stage needs one where any other has one")
    return Recipe(name, stages, defaults)


def _stage(table: dict[str, Any], number: int, name: str) -> Stage:
    title = table.get("name", f"stage {number + 1}")
    if not isinstance(title, str):
        raise UsageError(f"{name}: stage {number + 1}: a name is a text", HINT)
    what = f"{name}: {title}"
    _known(table, ("name", "tokens", "mix", *STAGE_KEYS), what)
    stage = Stage(title, **{key: _value(table, key, what) for key in ("tokens", *STAGE_KEYS) if key in table})
    if stage.lr is None and any(key in table for key in ("schedule", "final_lr", "warmup", "horizon")):
        raise UsageError(f"{what}: a curve without lr", "lr is its highest rate")
    if stage.lr is not None and stage.final_lr > stage.lr:
        raise UsageError(f"{what}: final_lr {stage.final_lr} is above lr {stage.lr}", "rates rise in the warm-up alone")
    if stage.horizon is not None and (stage.tokens is None or stage.horizon < stage.tokens):
        raise UsageError(f"{what}: horizon is not beyond the tokens of the stage", "leave it out where it is their end")
    return stage


def _value(table: dict[str, Any], key: str, what: str) -> Any:
    """The value of `key` as the program has it; UsageError where it is of another kind or out of range."""
    value = table[key]
    choices = {"schedule": NAMES, "decay_shape": RAMPS}.get(key)
    if choices:
        if value not in choices:
            raise UsageError(f"{what}: unknown {key} {_shown(value)}", suggestion(_shown(value), choices))
        return value
    if key == "betas":
        if (
            not isinstance(value, list)
            or len(value) != 2
            or not all(_number(beta, 0, 1) and beta < 1 for beta in value)
        ):
            raise UsageError(f"{what}: betas {_shown(value)} are not two numbers from 0 up to 1", "betas = [0.9, 0.95]")
        return tuple(map(float, value))
    low, high, whole = RANGES[key]
    match = COUNT.fullmatch(value) if isinstance(value, str) and key in ("tokens", "horizon", "warmup") else None
    number = Decimal(match[1]) * SUFFIXES[match[2]] if match else value
    if not _number(number, low, high) or (whole and number != int(number)):
        raise UsageError(
            f"{what}: {key} {_shown(value)} is no {'count' if whole else 'number'} from {low:g} to {high:g}", HINT
        )
    return int(number) if whole else float(number)


def _shown(value: Any) -> str:
    try:
        return repr(value)[:80]
    except ValueError:  # hexadecimal has more digits than Python writes in decimal
        return "so large a number"


def _number(value: Any, low: float, high: float) -> bool:
    return type(value) in (int, float, Decimal) and low <= value <= high  # which infinity and NaN are not


def _known(table: dict[str, Any], names: Collection[str], what: str) -> None:
    for key in table:
        if key not in names:
            raise UsageError(f"{what}: unknown key {key!r}", suggestion(key, names))

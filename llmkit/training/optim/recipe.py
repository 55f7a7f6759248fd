"""Recipes: published training runs as TOML, scaled to a run of any length.

The package's own are in recipes/; a path names a user's.

    batch_size = 2240          # sequences per step         } defaults for what the command line leaves open
    sequence_length = 2048     # also betas, weight_decay, clip

    [[stage]]
    name = "main"              # optional
    tokens = "1.2T"            # of the stage; not needed if the data is a mix with as many stages, whose tokens count
    lr = 3e-4                  # peak learning rate; without it the rate stays what it was
    warmup = "9B"              # tokens of the warm-up from 0; below 1 a share of the stage
    schedule = "cosine"        # a name in optim/schedule.py, wsd with decay and decay_shape; default constant
    final_lr = 3e-5            # default 0
    horizon = "1.5T"           # tokens from the stage's start at which final_lr would be reached, if after its end
    sequence_length = 8192     # from this stage on
    rope_theta = 500000.0      # from this stage on

All token counts are scaled with their stage, so the schedule keeps its shape for any `--tokens`. Learning
rates are as published, for a model of that size; the argument `lr` of `schedule` scales them to another peak.
The batch shrinks with the run (`scaled_batch_size`): batches of millions of tokens would leave a run of ten
million tokens three steps. `llmkit mix --stages` reads the sources of each stage from the same file.
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
from llmkit.training.optim.schedule import DECAY_SHAPES, SCHEDULES, Schedule, Segment, schedule_segments, warmup_tokens

HINT = "see llmkit/training/optim/recipes/crystal.toml for an example"
MAX_TOKENS = 10**18
BATCH_POWER = 0.383  # the best batch size grows with this power of the tokens (nanochat's fit)
COUNT = re.compile(r"(\d{1,18}(?:\.\d{1,18})?)([kKMBGT]?)", re.ASCII)
SUFFIXES = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9, "T": 10**12}
# Lowest and highest value of each number, and whether it is an integer.
RANGES: dict[str, tuple[float, float, bool]] = {
    "batch_size": (1, 1 << 31, True),
    "sequence_length": (8, 1 << 24, True),
    "weight_decay": (0, 10, False),
    "clip": (0, 1e6, False),
    "tokens": (1, MAX_TOKENS, True),
    "horizon": (1, MAX_TOKENS, True),
    "lr": (1e-12, 10, False),
    "final_lr": (0, 10, False),
    "warmup": (0, MAX_TOKENS, False),
    "decay": (0, 1, False),
    "rope_theta": (1, 1e12, False),
}


@dataclass(frozen=True, slots=True)
class RecipeStage:
    """One stage, in tokens of the recipe; None keeps the value of the stage before."""

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
    """A recipe; `defaults` holds batch_size, sequence_length, betas, weight_decay and clip, as far as it sets them."""

    name: str
    stages: tuple[RecipeStage, ...]
    defaults: dict[str, Any] = field(default_factory=dict)

    def stage_ends(self, total: int, data_ends: Sequence[int]) -> list[int]:
        """Tokens after which the stages end in a run of `total` tokens, whose data has stages that end at
        `data_ends`."""
        if len(self.stages) == 1:
            return [total]
        if len(data_ends) == len(self.stages):
            if total != data_ends[-1]:
                raise UsageError(
                    f"--tokens {total:,}, but the stages of the data total {data_ends[-1]:,}", "leave out --tokens"
                )
            return list(data_ends)
        if len(data_ends) > 1:
            raise UsageError(
                f"{self.name} has {len(self.stages)} stages, the data {len(data_ends)}", "use the same number for both"
            )
        stage_tokens = [stage.tokens for stage in self.stages]
        if None in stage_tokens:
            raise UsageError(
                f"{self.name}: {self.stages[stage_tokens.index(None)].name} has no tokens, and the data has no stages",
                'set tokens = "2B", or mix the data with --stages',
            )
        sums = list(accumulate(tokens or 0 for tokens in stage_tokens))
        return [round(total * tokens / sums[-1]) for tokens in sums]

    def schedule(self, ends: Sequence[int], lr: float | None) -> Schedule | None:
        """The schedule over stages that end at `ends`, scaled to the peak `lr` if given.

        None if the recipe sets no learning rates.
        """
        peaks = [stage.lr for stage in self.stages if stage.lr is not None]
        if not peaks:
            return None
        rate_scale = lr / max(peaks) if lr else 1.0
        segments: list[Segment] = []
        start, rate = 0, 0.0
        for stage, end in zip(self.stages, ends, strict=True):
            scale = (end - start) / stage.tokens if stage.tokens else 1.0
            horizon = start + round(stage.horizon * scale) if stage.horizon else end
            warmup = warmup_tokens(stage.warmup, end - start) if stage.warmup < 1 else round(stage.warmup * scale)
            if warmup > end - start:
                raise UsageError(
                    f"{self.name}: {stage.name}: a warm-up of {warmup:,} tokens does not fit into {end - start:,}",
                    "use a smaller warmup",
                )
            peak, final = (rate, 0.0) if stage.lr is None else (stage.lr * rate_scale, stage.final_lr * rate_scale)
            segments += schedule_segments(
                stage.schedule, peak, final, start, horizon, warmup, stage.decay, stage.decay_shape
            )
            start, rate = end, segments[-1].rate(end)
        return Schedule(tuple(segments))

    def sequence_lengths(self, ends: Sequence[int], length: int) -> list[tuple[int, int]]:
        """Tokens per sequence in each stage, and the token until which it applies.

        `length` before the first stage that sets it.
        """
        return list(zip(_fill_forward([stage.sequence_length for stage in self.stages], length), ends, strict=True))

    def rope_thetas(self, ends: Sequence[int], theta: float) -> RopeThetas | None:
        """Base of the rotary embedding by token, `theta` before the first stage that sets it.

        None if it is `theta` throughout.
        """
        values = _fill_forward([stage.rope_theta for stage in self.stages], theta)
        return None if set(values) == {theta} else RopeThetas(tuple(values), tuple(ends))

    def scaled_batch_size(self, total: int) -> int | None:
        """The recipe's batch size for a run of `total` tokens, scaled down with the power 0.383 of the tokens.

        None if it sets no batch size. Not scaled if a stage has no tokens.
        """
        batch_size, stage_tokens = self.defaults.get("batch_size"), [stage.tokens for stage in self.stages]
        if not batch_size or None in stage_tokens:
            return batch_size
        share = min(1.0, total / sum(tokens or 0 for tokens in stage_tokens))
        return max(1, round(batch_size * share**BATCH_POWER))


@dataclass(frozen=True, slots=True)
class RopeThetas:
    """Values and the token until which each applies; the last has no end."""

    values: tuple[float, ...]
    ends: tuple[int, ...]

    def at(self, tokens: int) -> float:
        return self.values[min(bisect_right(self.ends, tokens), len(self.values) - 1)]


def _fill_forward(values: Sequence[Any], initial: Any) -> list[Any]:
    """Replace each None by the value before it."""
    return list(accumulate(values, lambda previous, value: previous if value is None else value, initial=initial))[1:]


def is_path(recipe: str) -> bool:
    """Whether a recipe is given by path, which ends in .toml or has a directory part."""
    return recipe.endswith(".toml") or "/" in recipe


def builtin_recipes() -> list[str]:
    """Names of the package's recipes."""
    return sorted(item.name[: -len(".toml")] for item in _directory().iterdir() if item.name.endswith(".toml"))


def _directory() -> Any:
    return resources.files("llmkit.training.optim").joinpath("recipes")


def read_recipe(name: str) -> Recipe:
    """A recipe of the package, or from a file.

    Raises UsageError for an unknown key or a value out of range, LlmkitError for an unreadable file.
    """
    if not is_path(name) and name not in builtin_recipes():
        raise unknown_name("recipe", name, builtin_recipes())
    try:
        path = Path(name) if is_path(name) else _directory().joinpath(f"{name}.toml")
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LlmkitError(
            f"{name}: {error.strerror}", "recipes of the package: " + ", ".join(builtin_recipes())
        ) from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{name}: invalid TOML ({error})", HINT) from error
    _check_keys(content, ("stage", "sources", *RECIPE_KEYS), name)
    tables = content.get("stage")
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise UsageError(f"{name}: no [[stage]]", HINT)
    defaults = {key: _value(content, key, name) for key in RECIPE_KEYS if key in content}
    stages = tuple(_stage(table, i, name) for i, table in enumerate(tables))
    if stages[0].lr is None and any(stage.lr is not None for stage in stages):
        raise UsageError(f"{name}: {stages[0].name} has no lr", "the first stage needs one if any other has one")
    return Recipe(name, stages, defaults)


def _stage(table: dict[str, Any], number: int, name: str) -> RecipeStage:
    title = table.get("name", f"stage {number + 1}")
    if not isinstance(title, str):
        raise UsageError(f"{name}: stage {number + 1}: name must be a string", HINT)
    label = f"{name}: {title}"
    _check_keys(table, ("name", "tokens", "mix", *STAGE_KEYS), label)
    stage = RecipeStage(title, **{key: _value(table, key, label) for key in ("tokens", *STAGE_KEYS) if key in table})
    if stage.lr is None and any(key in table for key in ("schedule", "final_lr", "warmup", "horizon")):
        raise UsageError(f"{label}: a schedule without lr", "lr is its peak learning rate")
    if stage.lr is not None and stage.final_lr > stage.lr:
        raise UsageError(
            f"{label}: final_lr {stage.final_lr} is above lr {stage.lr}", "learning rates rise only in the warm-up"
        )
    if stage.horizon is not None and (stage.tokens is None or stage.horizon < stage.tokens):
        raise UsageError(f"{label}: horizon is not beyond the tokens of the stage", "leave out the horizon")
    return stage


def _value(table: dict[str, Any], key: str, label: str) -> Any:
    """The value of `key`, converted; raises UsageError if it has the wrong type or is out of range."""
    value = table[key]
    choices = {"schedule": tuple(SCHEDULES), "decay_shape": DECAY_SHAPES}.get(key)
    if choices:
        if value not in choices:
            raise UsageError(f"{label}: unknown {key} {_display(value)}", suggestion(_display(value), choices))
        return value
    if key == "betas":
        if (
            not isinstance(value, list)
            or len(value) != 2
            or not all(_in_range(beta, 0, 1) and beta < 1 for beta in value)
        ):
            raise UsageError(
                f"{label}: betas {_display(value)} are not two numbers from 0 up to 1", "betas = [0.9, 0.95]"
            )
        return tuple(map(float, value))
    low, high, is_integer = RANGES[key]
    match = COUNT.fullmatch(value) if isinstance(value, str) and key in ("tokens", "horizon", "warmup") else None
    number = Decimal(match[1]) * SUFFIXES[match[2]] if match else value
    if not _in_range(number, low, high) or (is_integer and number != int(number)):
        kind = "an integer" if is_integer else "a number"
        raise UsageError(f"{label}: {key} {_display(value)} is not {kind} from {low:g} to {high:g}", HINT)
    return int(number) if is_integer else float(number)


def _display(value: Any) -> str:
    try:
        return repr(value)[:80]
    except ValueError:  # hexadecimal has more digits than Python writes in decimal
        return "so large a number"


def _in_range(value: Any, low: float, high: float) -> bool:
    return type(value) in (int, float, Decimal) and low <= value <= high  # false for infinity and NaN


def _check_keys(table: dict[str, Any], names: Collection[str], label: str) -> None:
    for key in table:
        if key not in names:
            raise UsageError(f"{label}: unknown key {key!r}", suggestion(key, names))

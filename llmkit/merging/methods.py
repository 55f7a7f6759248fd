"""The merge methods. Each is one entry of METHODS: its help, its options, how the options are checked, and how
blocks are merged.

    merge = resolve_merge("ties", 2, density=[0.2])     # numbers of a call, checked, with defaults filled in
    for block in merged_blocks(models, name, merge): ...

The formulas with their sources are in `merging.formulas`. They are imported when blocks are merged, so that
help can list the methods without numpy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmkit.errors import UsageError, unknown_name

if TYPE_CHECKING:
    import numpy as np

    from llmkit.merging.streams import ModelSet

ALIASES = {"exponential": "ema"}


@dataclass(frozen=True, slots=True)
class Merge:
    """A method with its numbers, resolved for a number of models.

    `weights` are the shares of the running mean (see `shares`) for averages, else one weight per model;
    `densities` has one entry per model.
    """

    method: str
    weights: tuple[float, ...] = ()
    t: float = 0.5
    densities: tuple[float, ...] = ()
    scale: float = 1.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Numbers:
    """The numbers of a call; None or empty if not given."""

    weights: Sequence[float] = ()
    decay: float | None = None
    t: float | None = None
    density: Sequence[float] = ()
    scale: float | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Method:
    """One way to merge models.

    `options` are the options of `average` that only some methods take, those among them without which this one
    cannot work being `required`. `resolve(numbers, count)` checks the numbers of a call for `count` models.
    `blocks(models, tensor name, merge)` yields the merged tensor.
    """

    help: str
    resolve: Callable[[Numbers, int], Merge]
    blocks: Callable[[ModelSet, str, Merge], Iterator[np.ndarray]]
    options: tuple[str, ...] = ()
    required: tuple[str, ...] = ()


METHODS: dict[str, Method] = {}


def find_method(name: str) -> Method:
    """The method of that name; UsageError with the nearest names if there is none."""
    if name not in METHODS:
        raise unknown_name("method", name, METHODS)
    return METHODS[name]


def methods_with(option: str) -> list[str]:
    """Names of the methods that take an option."""
    return [name for name, method in METHODS.items() if option in method.options]


def check_options(method: str, given: Mapping[str, Any]) -> None:
    """UsageError for an option that `method` does not take; `given` maps options to values, None or [] if
    absent.
    """
    for option, value in given.items():
        names = methods_with(option)
        if value is not None and value != [] and method not in names:
            raise UsageError(f"--{option} only applies to --method {' or '.join(names)}", f"add --method {names[0]}")


def check_required(method: str, given: Mapping[str, Any]) -> None:
    """UsageError for a missing option that `method` requires."""
    for option in find_method(method).required:
        if not given[option]:
            raise UsageError(f"--method {method} needs --{option}", "see --help")


def resolve_merge(
    method: str,
    count: int,
    weights: Sequence[float] = (),
    decay: float | None = None,
    t: float | None = None,
    density: Sequence[float] = (),
    scale: float | None = None,
    seed: int = 0,
) -> Merge:
    """The merge of `count` models that a call describes; UsageError if a number is missing or out of range."""
    return find_method(method).resolve(Numbers(weights, decay, t, density, scale, seed), count)


def merged_blocks(models: ModelSet, name: str, merge: Merge) -> Iterator[np.ndarray]:
    """The merged tensor `name`, float32, in blocks of at most `streams.BLOCK` elements; each is valid until the
    next.
    """
    return METHODS[merge.method].blocks(models, name, merge)


# ---- averages


def shares(method: str, count: int, weights: Sequence[float] = (), decay: float = 0.9) -> list[float]:
    """How far the running mean moves towards each of `count` models; the first share is 1 (0 for leading models
    of weight 0).

    1/1, 1/2, 1/3, ... give the mean; wₖ / (w₁ + ... + wₖ) the weighted mean; 1 − d after the first the
    exponential moving average θ̄ ← d·θ̄ + (1 − d)·θ, which favours the last.
    """
    if method == "uniform":
        return [1 / k for k in range(1, count + 1)]
    if method == "ema":
        if not 0 <= decay < 1:
            raise UsageError(f"--decay {decay} is not between 0 and 1", "0.9 is usual")
        return [1.0] + [1 - decay] * (count - 1)
    if method != "weighted":
        raise unknown_name("method", method, METHODS)
    if len(weights) != count:
        raise UsageError(f"{len(weights)} weights for {count} models", "give one weight per model: --weights 1,1,2")
    total, result = 0.0, []
    for weight in weights:
        if not 0 <= weight < float("inf"):
            raise UsageError(f"weight {weight} is not a finite number of at least 0", "weights are relative: 1,1,2")
        total += weight
        result.append(weight / total if total else 0.0)
    if not total:
        raise UsageError("all weights are 0", "weights are relative: 1,1,2")
    return result


def _running_mean(models: ModelSet, name: str, merge: Merge) -> Iterator[np.ndarray]:
    from llmkit.merging import formulas

    for _, blocks in models.read(name, models.models):
        yield formulas.linear(blocks, merge.weights)


def _resolve_uniform(numbers: Numbers, count: int) -> Merge:
    return Merge("uniform", tuple(shares("uniform", count)))


def _resolve_weighted(numbers: Numbers, count: int) -> Merge:
    return Merge("weighted", tuple(shares("weighted", count, numbers.weights)))


def _resolve_ema(numbers: Numbers, count: int) -> Merge:
    return Merge("ema", tuple(shares("ema", count, decay=0.9 if numbers.decay is None else numbers.decay)))


METHODS["uniform"] = Method("the mean", _resolve_uniform, _running_mean)
METHODS["weighted"] = Method("the mean with --weights", _resolve_weighted, _running_mean, ("weights",))
METHODS["ema"] = Method(
    "start with the first model, move by 1 - DECAY towards each of the others", _resolve_ema, _running_mean, ("decay",)
)


# ---- SLERP


def _resolve_slerp(numbers: Numbers, count: int) -> Merge:
    t = 0.5 if numbers.t is None else numbers.t
    if count != 2:
        raise UsageError(f"slerp takes two models, not {count}", "name two; uniform and weighted take any number")
    if not 0 <= t <= 1:
        raise UsageError(f"--t {t} is not between 0 and 1", "0 is the first model, 1 the second")
    return Merge("slerp", t=t)


def _slerp(models: ModelSet, name: str, merge: Merge) -> Iterator[np.ndarray]:
    import numpy as np

    from llmkit.merging import formulas, streams

    sums, buffer = np.zeros(3), np.empty(streams.BLOCK)
    for _, (a, b) in models.read(name, models.models):
        sums += formulas.angle_sums(a, b, buffer[: len(a)])
    coefficients = formulas.arc(sums, merge.t)
    for _, (a, b) in models.read(name, models.models):
        yield formulas.slerp(a, b, coefficients, merge.t)


METHODS["slerp"] = Method("the point at --t of the arc between two models", _resolve_slerp, _slerp, ("t",))


# ---- sums of task vectors


def _task_merge(
    method: str, numbers: Numbers, count: int, *, density: float | None = None, elects: bool = False
) -> Merge:
    """Weights, scale, and densities (default `density`) of a method with a base; methods that elect signs take
    no negative weights.
    """
    scale = 1.0 if numbers.scale is None else numbers.scale
    if not abs(scale) < float("inf"):
        raise UsageError(f"--scale {scale} is not a finite number", "1 adds the changes unscaled")
    weights = _per_model("weight", numbers.weights or [1.0], count, "--weights 1,0.5")
    if any(not abs(weight) < float("inf") or (elects and weight < 0) for weight in weights):
        text = ",".join(f"{weight:g}" for weight in weights)
        raise UsageError(f"weights {text}: not all are finite{' and at least 0' if elects else ''}", "such as 1,0.5")
    if density is None:
        return Merge(method, weights, scale=scale)
    densities = _per_model("density", numbers.density or [density], count, "--density 0.2,0.5")
    for value in densities:
        if not 1e-6 <= value <= 1:  # the lower bound is below any useful density, and safe to divide by
            raise UsageError(
                f"--density {value:g} is not above 0 and at most 1", "it is the fraction of the changes that is kept"
            )
    return Merge(method, weights, densities=densities, scale=scale, seed=numbers.seed)


def _per_model(what: str, values: Sequence[float], count: int, example: str) -> tuple[float, ...]:
    """One number per model, from as many or from one for all."""
    if len(values) not in (1, count):
        plural = {"weight": "weights", "density": "densities"}[what]
        raise UsageError(f"{len(values)} {plural} for {count} models", f"give one {what} per model: {example}")
    return tuple(values) * (count // len(values))


def _task_vectors(models: ModelSet, name: str) -> Iterator[tuple[int, np.ndarray, list[np.ndarray]]]:
    """(start of the block, base, task vector of each model) of every block of a tensor."""
    assert models.base is not None
    for start, (base, *tasks) in models.read(name, [models.base, *models.models]):
        for task in tasks:
            task -= base
        yield start, base, tasks


def _task_arithmetic(models: ModelSet, name: str, merge: Merge) -> Iterator[np.ndarray]:
    from llmkit.merging import formulas

    for _, base, tasks in _task_vectors(models, name):
        yield formulas.task_arithmetic(tasks, base, merge.weights, merge.scale)


def _ties(models: ModelSet, name: str, merge: Merge) -> Iterator[np.ndarray]:
    from llmkit.merging import formulas

    thresholds = [_trim_threshold(models, name, i, density) for i, density in enumerate(merge.densities)]
    for _, base, tasks in _task_vectors(models, name):
        for i, task in enumerate(tasks):
            if (limit := thresholds[i]) is not None:
                thresholds[i] = (limit[0], formulas.trim(task, *limit))
        yield formulas.elect(tasks, base, merge.weights, merge.scale)


def _trim_threshold(models: ModelSet, name: str, index: int, density: float) -> tuple[float, int] | None:
    """`formulas.trim_threshold` of one model's task vector, from a pass over the tensor; None if nothing is
    trimmed.
    """
    import numpy as np

    from llmkit.merging import formulas

    assert models.base is not None
    if density == 1 or not models.layout[name].count:
        return None
    magnitudes = np.empty(models.layout[name].count, np.float32)
    for start, (base, task) in models.read(name, [models.base, models.models[index]]):
        task -= base
        np.abs(task, out=magnitudes[start : start + len(task)])
    return formulas.trim_threshold(magnitudes, density)


def _dare(models: ModelSet, name: str, merge: Merge) -> Iterator[np.ndarray]:
    from llmkit.merging import formulas

    join = formulas.elect if merge.method == "dare-ties" else formulas.task_arithmetic
    for start, base, tasks in _task_vectors(models, name):
        for i, task in enumerate(tasks):
            formulas.drop(task, merge.densities[i], merge.seed, name, i, start)
        yield join(tasks, base, merge.weights, merge.scale)


METHODS["task"] = Method(
    "add to --base what each model changed, times its weight",
    lambda numbers, count: _task_merge("task", numbers, count),
    _task_arithmetic,
    ("weights", "scale", "base"),
    ("base",),
)
METHODS["ties"] = Method(
    "add only the largest changes (--density, default 0.2), where most agree in sign",
    lambda numbers, count: _task_merge("ties", numbers, count, density=0.2, elects=True),
    _ties,
    ("weights", "density", "scale", "base"),
    ("base",),
)
METHODS["dare"] = Method(
    "add a random fraction of the changes (--density, default 0.5; --seed), scaled up in proportion",
    lambda numbers, count: _task_merge("dare", numbers, count, density=0.5),
    _dare,
    ("weights", "density", "scale", "base"),
    ("base",),
)
METHODS["dare-ties"] = Method(
    "dare, then only where most agree in sign",
    lambda numbers, count: _task_merge("dare-ties", numbers, count, density=0.5, elects=True),
    _dare,
    ("weights", "density", "scale", "base"),
    ("base",),
)


# ---- greedy soup: a mean of the models that `merging.greedy_soup` selects


METHODS["greedy"] = Method(
    "take the models from best to worst by loss on --heldout; keep each that does not make the mean worse",
    lambda numbers, count: Merge("greedy", tuple(shares("uniform", count))),
    _running_mean,
    ("heldout",),
    ("heldout",),
)

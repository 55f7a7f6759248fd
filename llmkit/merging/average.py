"""One model of several with the same architecture, streamed: averages, SLERP, task arithmetic, TIES, DARE.

Checkpoints of one run, or models fine-tuned from one start, lie close together, and a point between them is often a little better than each
(model soups, arXiv:2203.05482; LAWA, arXiv:2306.03241). Whether it is so here, `llmkit eval` says. The formulas are merge.py's, the choice of
models by held-out loss is soup.py's.

    merge = Merge("ties", weights=(1, 1), densities=(0.2, 0.2), scale=1.0)
    write_average([load_info("a"), load_info("b")], merge, Path("out"), base=load_info("base"))

Computed in float32 from any mixture of types and stored in the first model's. Cost: every model is read once (TIES and SLERP: twice, the second
time from the file cache where a tensor fits there), in blocks, so that memory is a few MB whatever the models are; TIES holds the magnitudes of
one tensor of one model. Nothing here loads torch, except for quantised models.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from llmkit.errors import LlmkitError, UsageError, unknown_name
from llmkit.merging import methods as formulas
from llmkit.model.config import ModelConfig
from llmkit.model.family import EMBEDDING, is_ignored
from llmkit.model.pretrained.directory import WEIGHTS, LoadedModel, save_description
from llmkit.model.pretrained.header import Stored, encode_header, file_order
from llmkit.model.pretrained.streamed import StreamedWeights, from_float32

METHODS = ("uniform", "weighted", "ema", "slerp", "task", "ties", "dare", "dare-ties", "greedy")
LINEAR = ("uniform", "weighted", "ema")
WITH_BASE = ("task", "ties", "dare", "dare-ties")
DENSITY = {"ties": 0.2, "dare": 0.5, "dare-ties": 0.5}  # methods that have one, and its default
# What may differ between models that are averaged: it does not change what a weight means.
FREE = ("max_position_embeddings", "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id")
CONFIG_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
BLOCK = 1 << 16  # elements at a time: of a few models they stay in cache. It is part of what DARE draws
AHEAD = 1 << 19  # elements of each model that are read at once, while those before are merged
FLUSH = 16 << 20  # bytes

Digests = Mapping[Path, str]


@dataclass(frozen=True, slots=True)
class Merge:
    """A method with its numbers. `weights` are the shares of a linear one, else a weight a model; `densities` one a model."""

    method: str
    weights: tuple[float, ...] = ()
    t: float = 0.5
    densities: tuple[float, ...] = ()
    scale: float = 1.0
    seed: int = 0


def choose(
    method: str,
    count: int,
    weights: Sequence[float] = (),
    decay: float | None = None,
    t: float | None = None,
    density: Sequence[float] = (),
    scale: float | None = None,
    seed: int = 0,
) -> Merge:
    """The merge that a call means for `count` models; UsageError where a number is missing or out of its range."""
    if method in LINEAR:
        return Merge(method, tuple(shares(method, count, weights, 0.9 if decay is None else decay)))
    if method not in METHODS:
        raise unknown_name("method", method, METHODS)
    if method == "slerp":
        t = 0.5 if t is None else t
        if count != 2:
            raise UsageError(
                f"slerp lies between two models, not {count}", "name two; uniform and weighted take any number"
            )
        if not 0 <= t <= 1:
            raise UsageError(f"--t {t} is not between 0 and 1", "0 is the first model, 1 the second")
        return Merge(method, t=t)
    scale = 1.0 if scale is None else scale
    if not abs(scale) < float("inf"):
        raise UsageError(f"--scale {scale} is not a number", "1 adds the changes as they are")
    weights = _one_each("weight", weights or [1.0], count, "--weights 1,0.5")
    elects = method in ("ties", "dare-ties")
    if any(not abs(weight) < float("inf") or (elects and weight < 0) for weight in weights):
        shown = ",".join(f"{weight:g}" for weight in weights)
        raise UsageError(f"weights {shown}: not all are numbers{' from 0 up' if elects else ''}", "such as 1,0.5")
    if method not in DENSITY:
        return Merge(method, weights, scale=scale)
    densities = _one_each("density", density or [DENSITY[method]], count, "--density 0.2,0.5")
    for value in densities:
        if not 1e-6 <= value <= 1:  # less than any model has use for, and finite when divided by
            raise UsageError(
                f"--density {value:g} is not above 0 and at most 1", "it is the share of the changes that stays"
            )
    return Merge(method, weights, densities=densities, scale=scale, seed=seed)


def _one_each(what: str, values: Sequence[float], count: int, example: str) -> tuple[float, ...]:
    """One number a model, from as many or from one for all."""
    if len(values) not in (1, count):
        plural = {"weight": "weights", "density": "densities"}[what]
        raise UsageError(f"{len(values)} {plural} for {count} models", f"give one {what} a model: {example}")
    return tuple(values) * (count // len(values))


def shares(method: str, count: int, weights: Sequence[float] = (), decay: float = 0.9) -> list[float]:
    """How far the running mean moves towards each of `count` models; the first share is 1 (of models with weight 0 before it, 0).

    With 1/1, 1/2, 1/3, ... that is the mean; with wₖ / (w₁ + ... + wₖ) the weighted mean; with 1 − d after the first the exponential moving
    average θ̄ ← d·θ̄ + (1 − d)·θ, which favours the last.
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
        raise UsageError(f"{len(weights)} weights for {count} models", "give one weight a model: --weights 1,1,2")
    total, result = 0.0, []
    for weight in weights:
        if not 0 <= weight < float("inf"):
            raise UsageError(f"weight {weight} is not a number from 0 up", "weights are relative: 1,1,2")
        total += weight
        result.append(weight / total if total else 0.0)
    if not total:
        raise UsageError("all weights are 0", "weights are relative: 1,1,2")
    return result


def check_alike(models: Sequence[LoadedModel]) -> None:
    """Refuse models whose weights do not mean the same: another architecture or size, another tokenizer. Names the first difference."""
    first = models[0]
    for other in models[1:]:
        before, now = asdict(first.config), asdict(other.config)
        for field in before:
            if field not in FREE and before[field] != now[field]:
                raise LlmkitError(
                    f"{other.path}: {field} is {now[field]!r}, in {first.path} it is {before[field]!r}",
                    "only models of one architecture and size can be averaged",
                )
        texts = [model.tokenizer_files.get("tokenizer.json") for model in (first, other)]
        if None not in texts and texts[0] != texts[1]:
            raise LlmkitError(
                f"{other.path}: another tokenizer than in {first.path}", "their embeddings do not correspond"
            )


class Opened:
    """Models that are read together, and the base of their task vectors; a context manager. LlmkitError where their tensors differ."""

    def __init__(self, models: Sequence[LoadedModel], base: LoadedModel | None = None, digesting: bool = True) -> None:
        check_alike([*models, *([base] if base else [])])
        self._stack = ExitStack()
        with ExitStack() as stack:
            self.models = [stack.enter_context(StreamedWeights(model, digesting)) for model in models]
            self.base = stack.enter_context(StreamedWeights(base, digesting)) if base else None
            first, *others = [_layout(weights, models[0].config) for weights in self._all()]
            for weights, layout in zip(self._all()[1:], others, strict=True):
                _check_tensors(self.models[0].path, first, weights.path, layout)
            self.layout = first
            self._ahead = stack.enter_context(ThreadPoolExecutor(1))
            _check_count(models[0], sum(entry.count for entry in first.values()))
            self._stack = stack.pop_all()

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _all(self) -> list[StreamedWeights]:
        return [*self.models, *([self.base] if self.base else [])]

    def digests(self) -> dict[Path, str]:
        """Digests of the files of all models."""
        return {path: digest for weights in self._all() for path, digest in weights.digests().items()}

    def blocks(self, name: str, merge: Merge) -> Iterator[np.ndarray]:
        """The merged tensor, float32, in blocks of at most BLOCK elements; each is valid until the next."""
        if merge.method in WITH_BASE:
            yield from self._from_base(name, merge)
        elif merge.method == "slerp":
            sums, wide = np.zeros(3), np.empty(BLOCK)
            for _, (a, b) in self._read(name, self.models):
                sums += formulas.angle_sums(a, b, wide[: len(a)])
            between = formulas.arc(sums, merge.t)
            for _, (a, b) in self._read(name, self.models):
                yield formulas.slerp(a, b, between, merge.t)
        else:
            for _, found in self._read(name, self.models):
                yield formulas.linear(found, merge.weights)

    def _from_base(self, name: str, merge: Merge) -> Iterator[np.ndarray]:
        assert self.base is not None
        least: list[tuple[float, int] | None] = [None] * len(self.models)
        if merge.method == "ties":
            least = [
                self._least_kept(name, model, density)
                for model, density in zip(self.models, merge.densities, strict=True)
            ]
        join = formulas.elect if merge.method in ("ties", "dare-ties") else formulas.task_arithmetic
        for start, (base, *tasks) in self._read(name, [self.base, *self.models]):
            for i, task in enumerate(tasks):
                task -= base
                if (limit := least[i]) is not None:
                    least[i] = (limit[0], formulas.trim(task, *limit))
                elif merge.method.startswith("dare"):
                    formulas.drop(task, merge.densities[i], merge.seed, name, i, start)
            yield join(tasks, base, merge.weights, merge.scale)

    def _least_kept(self, name: str, model: StreamedWeights, density: float) -> tuple[float, int] | None:
        """Which elements of a model's task vector stay by TIES (`merge.least_kept`); None if all do."""
        assert self.base is not None
        if density == 1 or not self.layout[name].count:
            return None
        magnitudes = np.empty(self.layout[name].count, np.float32)
        for start, (base, task) in self._read(name, [self.base, model]):
            task -= base
            np.abs(task, out=magnitudes[start : start + len(task)])
        return formulas.least_kept(magnitudes, density)

    def _read(self, name: str, weights: Sequence[StreamedWeights]) -> Iterator[tuple[int, list[np.ndarray]]]:
        """Where each block of a tensor starts, and that block of some models; what comes next is read in the meantime."""
        count = self.layout[name].count
        room = np.empty((2, len(weights), min(AHEAD, count)), np.float32)

        def fetch(start: int) -> np.ndarray:
            found: np.ndarray = room[start // AHEAD % 2, :, : count - start]
            for source, out in zip(weights, found, strict=True):
                source.read(name, start, out)
            return found

        # Another thread is not worth its while for a small tensor.
        coming = self._ahead.submit(fetch, 0) if count > AHEAD else None
        for start in range(0, count, AHEAD):
            found = coming.result() if coming else fetch(start)
            if start + AHEAD < count:
                coming = self._ahead.submit(fetch, start + AHEAD)
            for at in range(0, found.shape[1], BLOCK):
                yield start + at, list(found[:, at : at + BLOCK])


def _layout(weights: StreamedWeights, config: ModelConfig) -> dict[str, Stored]:
    """The tensors that belong to the model."""
    return {name: entry for name, entry in weights.layout.items() if not is_ignored(name, config)}


def _check_tensors(place: Path, first: Mapping[str, Stored], other: Path, layout: Mapping[str, Stored]) -> None:
    """LlmkitError naming the first tensor in which two models differ."""
    for name in sorted(first.keys() | layout.keys()):
        if name not in first or name not in layout:
            without, having = (place, other) if name not in first else (other, place)
            raise LlmkitError(
                f"{without}: missing tensor {name}, which {having} has",
                "only models of one architecture can be averaged",
            )
        if first[name].shape != layout[name].shape:
            raise LlmkitError(
                f"{other}: tensor {name} has shape {list(layout[name].shape)}, in {place} it is {list(first[name].shape)}",
                "only models of one architecture and size can be averaged",
            )


def _check_count(model: LoadedModel, found: int) -> None:
    """LlmkitError where a directory's configuration means another number of weights than its files hold."""
    if found != model.config.parameters():
        raise LlmkitError(
            f"{model.path}: config.json means {model.config.parameters():,} weights, the files hold {found:,}",
            "the directory is incomplete, or its config.json is another model's",
        )


def write_average(
    models: Sequence[LoadedModel],
    merge: Merge,
    directory: Path,
    record: Callable[[Digests | None], str] | None = None,
    advance: Callable[[int], None] | None = None,
    base: LoadedModel | None = None,
) -> None:
    """Fill `directory` (it exists; the caller makes it atomic) with the merged model.

    Configuration, tokenizer and type of the weights are the first model's. `record` makes the lineage of the digests of the models' files;
    it is asked once before they are known, with None, for its length. `advance` hears of each tensor's number of weights.
    """
    with (
        Opened(models, base, digesting=record is not None) as opened,
        open(directory / WEIGHTS, "wb", buffering=0) as sink,
    ):

        def header(digests: Digests | None) -> bytes:
            return encode_header(opened.layout, {"format": "pt"} | ({"llmkit": record(digests)} if record else {}))

        before = header(None)
        stored = sink.write(before)
        for name in file_order(opened.layout):
            for block in opened.blocks(name, merge):
                data = from_float32(block, opened.layout[name].dtype).view(np.uint8).data
                while len(data):
                    data = data[sink.write(data) :]
            if sink.tell() - stored > FLUSH:  # start to store what is written, rather than all of it at the end
                os.posix_fadvise(sink.fileno(), stored, sink.tell() - stored, os.POSIX_FADV_DONTNEED)
                stored = sink.tell()
            if advance:
                advance(opened.layout[name].count)
        if record:
            after = header(opened.digests())
            assert len(after) == len(before)
            sink.seek(0)
            sink.write(after)
        dtype = CONFIG_DTYPES[opened.layout[EMBEDDING].dtype]
    save_description(directory, models[0].config.to_hf(dtype), models[0].tokenizer_files, models[0].stop_ids)

"""Models of one architecture, opened together and read tensor by tensor in blocks of float32.

Cost: a few MB of memory, however large the models are. Nothing here loads torch, except for quantised models.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import numpy as np

from llmkit.errors import LlmkitError
from llmkit.model.config import ModelConfig
from llmkit.model.family import is_ignored
from llmkit.model.pretrained.directory import LoadedModel
from llmkit.model.pretrained.header import Stored
from llmkit.model.pretrained.streamed import StreamedWeights

# Fields in which averaged models may differ, and endings of others: they do not change the meaning of a weight.
MAY_DIFFER = (
    "max_position_embeddings", "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id", "dropout", "pdrop",
)  # fmt: skip
BLOCK = 1 << 16  # elements per block: blocks of a few models fit in cache. DARE's random numbers depend on it
AHEAD = 1 << 19  # elements of each model per read, while the previous ones are merged


def check_alike(models: Sequence[LoadedModel]) -> None:
    """Refuse models whose weights do not correspond: another architecture, size or tokenizer. Names the first
    difference.
    """
    first = models[0]
    for other in models[1:]:
        expected, actual = (asdict(model.config) | model.config.own for model in (first, other))
        for field in expected:
            if field != "own" and not field.endswith(MAY_DIFFER) and expected[field] != actual.get(field):
                raise LlmkitError(
                    f"{other.path}: {field} is {actual.get(field)!r}, in {first.path} it is {expected[field]!r}",
                    "only models of one architecture and size can be averaged",
                )
        texts = [model.tokenizer_files.get("tokenizer.json") for model in (first, other)]
        if None not in texts and texts[0] != texts[1]:
            raise LlmkitError(
                f"{other.path}: another tokenizer than in {first.path}", "their embeddings do not correspond"
            )


class ModelSet:
    """Models that are read together, and the base of their task vectors; a context manager. LlmkitError if
    their tensors differ.
    """

    def __init__(self, models: Sequence[LoadedModel], base: LoadedModel | None = None, digesting: bool = True) -> None:
        check_alike([*models, *([base] if base else [])])
        self._stack = ExitStack()
        with ExitStack() as stack:
            self.models = [stack.enter_context(StreamedWeights(model, digesting)) for model in models]
            self.base = stack.enter_context(StreamedWeights(base, digesting)) if base else None
            first, *others = [_merged_tensors(weights, models[0].config) for weights in self._all()]
            for weights, layout in zip(self._all()[1:], others, strict=True):
                _check_tensors(self.models[0].path, first, weights.path, layout)
            self.layout = first
            self._executor = stack.enter_context(ThreadPoolExecutor(1))
            _check_count(
                models[0], sum(entry.count for entry in first.values() if entry.shape)
            )  # constants are scalars
            self._stack = stack.pop_all()

    def __enter__(self) -> ModelSet:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _all(self) -> list[StreamedWeights]:
        return [*self.models, *([self.base] if self.base else [])]

    def digests(self) -> dict[Path, str]:
        """Digests of the files of all models."""
        return {path: digest for weights in self._all() for path, digest in weights.digests().items()}

    def read(self, name: str, weights: Sequence[StreamedWeights]) -> Iterator[tuple[int, list[np.ndarray]]]:
        """Start of each block of a tensor, and that block of each of `weights`, valid until the next. A thread
        reads ahead.
        """
        count = self.layout[name].count
        buffers = np.empty((2, len(weights), min(AHEAD, count)), np.float32)

        def fetch(start: int) -> np.ndarray:
            chunk: np.ndarray = buffers[start // AHEAD % 2, :, : count - start]
            for source, out in zip(weights, chunk, strict=True):
                source.read(name, start, out)
            return chunk

        # A thread does not pay off for a small tensor.
        pending = self._executor.submit(fetch, 0) if count > AHEAD else None
        for start in range(0, count, AHEAD):
            chunk = pending.result() if pending else fetch(start)
            if start + AHEAD < count:
                pending = self._executor.submit(fetch, start + AHEAD)
            for offset in range(0, chunk.shape[1], BLOCK):
                yield start + offset, list(chunk[:, offset : offset + BLOCK])


def _merged_tensors(weights: StreamedWeights, config: ModelConfig) -> dict[str, Stored]:
    """The tensors to merge, without those that directories hold although the model has none."""
    return {name: entry for name, entry in weights.layout.items() if not is_ignored(name, config)}


def _check_tensors(path: Path, first: Mapping[str, Stored], other: Path, layout: Mapping[str, Stored]) -> None:
    """LlmkitError naming the first tensor in which two models differ."""
    for name in sorted(first.keys() | layout.keys()):
        if name not in first or name not in layout:
            without, having = (path, other) if name not in first else (other, path)
            raise LlmkitError(
                f"{without}: missing tensor {name}, which {having} has",
                "only models of one architecture can be averaged",
            )
        if first[name].shape != layout[name].shape:
            raise LlmkitError(
                f"{other}: tensor {name} has shape {list(layout[name].shape)}, "
                f"in {path} it is {list(first[name].shape)}",
                "only models of one architecture and size can be averaged",
            )


def _check_count(model: LoadedModel, stored: int) -> None:
    """LlmkitError if a directory's configuration implies another number of weights than its files contain."""
    if stored != model.config.parameters():
        raise LlmkitError(
            f"{model.path}: config.json implies {model.config.parameters():,} weights, the files contain {stored:,}",
            "the directory is incomplete, or its config.json belongs to another model",
        )

"""Training on preference pairs without a reward model: log-probabilities, reference, batches, and the
objective.

The losses are in `alignment.preference`. The reference log-probabilities are constants, so they are computed
once and stored in the run: there is no second model in memory, and one forward pass less over the data in every
epoch.

Pairs are padded to the longest of their micro-batch. Those of a step are sorted by length, so there is little
padding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from llmkit.alignment.preference import LOSSES, PairLogProbabilities
from llmkit.chat.masks import EncodedRow
from llmkit.io.atomic import atomic_file
from llmkit.io.names import utf8_path
from llmkit.mixing.length_groups import length_grouped
from llmkit.seeds import derive
from llmkit.training.data import Batch, collate, padding_share
from llmkit.training.distributed.processes import Processes
from llmkit.training.objectives import (
    Objective,
    ObjectiveResult,
    counted_hidden_states,
    token_log_probabilities,
)

FIGURES = ("reward_chosen", "reward_rejected", "margin", "accuracy", "log_p_chosen", "log_p_rejected")


def preference_objective(beta: float, loss: str = "sigmoid") -> Objective:
    """A loss of `LOSSES` as an objective for batches of `PairSource`; figures are means over the pairs of the
    step (see FIGURES).
    """
    pair_loss = LOSSES.get(loss).function

    def objective(model: Any, batch: Batch, scale: float) -> ObjectiveResult:
        pairs = PairLogProbabilities(sequence_log_probabilities(model, batch).view(2, -1), batch.extra["reference"].T)
        total = pair_loss(pairs, beta).sum() * scale
        with torch.no_grad():
            rewards, margins = beta * pairs.ratios, beta * pairs.delta
            values = (*rewards, margins, (margins > 0).float(), *pairs.policy)
            figures = {name: value.sum() * scale for name, value in zip(FIGURES, values, strict=True)}
        return ObjectiveResult(total, figures)

    return objective


def sequence_log_probabilities(model: Any, batch: Batch) -> Tensor:
    """Σ log p over the positions of each row whose weight is not 0: float32 [R], with gradients."""
    hidden, index = counted_hidden_states(model, batch)
    targets = batch.targets.flatten()[index]
    log_p = token_log_probabilities(hidden, model.head_weight, targets, model.softcap, model.head_rows)
    # Scattering, then summing along rows, adds in a fixed order; index_add on a GPU does not.
    flat = log_p.new_zeros(batch.targets.numel()).index_put((index,), log_p)
    return flat.view(batch.targets.shape).sum(dim=1)


class PairSource:
    """Pairs by step: `batch_size` pairs each, in a new random order in every epoch. Implements
    training.data.Source.

    `rows` alternates chosen and rejected; `reference` is float32 [pairs, 2]. Every epoch has all pairs, or those in
    `taken`, with repeats. With `group_by_length` the pairs of a step are of similar length.
    """

    def __init__(
        self,
        rows: Sequence[EncodedRow],
        reference: Tensor,
        batch_size: int,
        *,
        epochs: int = 1,
        seed: int = 0,
        taken: Sequence[np.ndarray] | None = None,
        group_by_length: bool = False,
    ) -> None:
        self._rows, self._reference = rows, reference
        pairs = len(rows) // 2
        lengths = np.array([len(row.tokens) - 1 for row in rows], dtype=np.int64).reshape(pairs, 2)
        order = np.zeros(0, np.int64)
        for epoch in range(epochs):
            generator = np.random.default_rng(derive(seed, "pairs", epoch))
            own = np.arange(pairs) if taken is None else taken[epoch]
            if group_by_length:
                longer = lengths[own].max(axis=1)
                shuffled = own[length_grouped(longer, batch_size, generator, len(order) % batch_size)]
            else:
                shuffled = own[generator.permutation(len(own))]
            order = np.concatenate((order, shuffled))
        steps = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        self._steps = [step[np.argsort(lengths[step].max(axis=1), kind="stable")] for step in steps]
        self._tokens = np.concatenate([[0], np.cumsum([lengths[step].sum() for step in self._steps])]).tolist()
        self.steps = len(self._steps)
        self._lengths = lengths

    def rows(self, step: int) -> int:
        return len(self._steps[step])

    def tokens(self, step: int) -> int:
        return int(self._tokens[step])

    def length_ratio(self, step: int) -> int:
        return 1

    def padding(self, micro_batch: int) -> float:
        """Share of the positions that are padding, with forward passes of `micro_batch` pairs."""
        return padding_share(self, self._lengths[np.concatenate(self._steps)], micro_batch)

    def weight(self, step: int) -> float:
        return float(len(self._steps[step]))

    def batch(self, step: int, start: int, stop: int) -> Batch:
        pairs = self._steps[step][start:stop]
        return pair_batch(self._rows, pairs, self._reference[torch.from_numpy(pairs)])

    def document(self, step: int, row: int, position: int) -> tuple[str, np.ndarray]:
        pair = int(self._steps[step][row])
        return f"pair {pair + 1}", np.concatenate([self._rows[2 * pair + side].tokens for side in (0, 1)])


def pair_batch(rows: Sequence[EncodedRow], pairs: np.ndarray, reference: Tensor) -> Batch:
    """The chosen rows of `pairs`, then the rejected ones, padded to the longest; `extra["reference"]` [pairs,
    2].
    """
    selected = [rows[2 * i + side] for side in (0, 1) for i in pairs]
    length = max(len(row.tokens) for row in selected) - 1
    batch = collate([[(row.tokens, row.weights)] for row in selected], length)
    batch.extra["reference"] = reference
    return batch


def reference_log_probabilities(
    initial: Callable[[], Any],
    rows: Sequence[EncodedRow],
    processes: Processes,
    micro_batch: int,
    cache: Path,
    model_digest: str,
) -> Tensor:
    """log π_ref of each row, float32 [pairs, 2], from the model that `initial` loads; stored in `cache`
    (safetensors) for resumed runs.
    """
    from safetensors import safe_open
    from safetensors.torch import save

    digest = _digest(rows, model_digest)
    if cache.exists():
        with utf8_path(cache) as path, safe_open(path, "pt") as stored:
            if (stored.metadata() or {}).get("digest") == digest:
                return stored.get_tensor("reference")  # type: ignore[no-any-return]
    pairs = len(rows) // 2
    lengths = [max(len(rows[2 * i].tokens), len(rows[2 * i + 1].tokens)) for i in range(pairs)]
    by_length = np.argsort(lengths, kind="stable")
    reference = torch.zeros(pairs, 2)
    model = initial().eval()
    with torch.no_grad():
        for start, stop in processes.local_row_ranges(pairs, micro_batch):
            index = torch.from_numpy(by_length[start:stop])
            batch = pair_batch(rows, index.numpy(), reference[index]).to(processes.device)
            with processes.accelerator.autocast():
                log_p = sequence_log_probabilities(model, batch)
            reference[index] = log_p.view(2, -1).T.float().cpu()
    processes.all_reduce_tensor(reference)
    processes.barrier()  # until every process has looked for the cache
    if processes.is_main:
        with atomic_file(cache, force=True, follow=False) as sink:
            sink.write(save({"reference": reference}, {"format": "pt", "digest": digest}))
    return reference


def _digest(rows: Sequence[EncodedRow], model_digest: str) -> str:
    state = xxhash.xxh3_128(model_digest.encode())
    for row in rows:
        state.update(len(row.tokens).to_bytes(8, "little"))
        state.update(row.tokens.tobytes())
        state.update(row.weights.tobytes())
    return state.hexdigest()

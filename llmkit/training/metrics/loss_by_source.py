"""Token losses by source and by whether their document was seen before: mean losses and bits per byte of each.

tally = LossTally(source, token_bytes, device)
tally.add(batch, result)                                             # after each micro-batch
tally.means(processes.all_reduce(tally.sums()), "heldout", "heldout_bpb", "heldout_bpb")
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmkit.training.data import Batch
from llmkit.training.objectives import ObjectiveResult


class LossTally:
    """Σ weight · loss, Σ weight and Σ weight · bytes of text by group, float64 [3, 2 · sources], over the
    batches added.

    `token_bytes` int64 [V] are the bytes of text that each token stands for; None if unknown.
    """

    def __init__(self, source: Any, token_bytes: Tensor | None, device: torch.device) -> None:
        self.group_names: tuple[str, ...] = getattr(source, "group_names", ("",))
        self._has_groups = hasattr(source, "group_names")
        self._bytes = None if token_bytes is None else token_bytes.to(device)
        self._sums = torch.zeros(3, 2 * len(self.group_names), dtype=torch.float64, device=device)

    def add(self, batch: Batch, result: ObjectiveResult) -> None:
        """Add the token losses of a batch, if the objective provides them."""
        if result.token_losses is None or result.positions is None:
            return
        positions = result.positions
        weights = batch.weights.flatten()[positions].double()
        in_groups = "groups" in batch.extra
        codes = batch.extra["groups"].flatten()[positions].long() if in_groups else torch.zeros_like(positions)
        weights = torch.where(codes < 0, 0.0, weights)
        sizes = weights.new_zeros(()) if self._bytes is None else self._bytes[batch.targets.flatten()[positions]]
        values = torch.stack((weights * result.token_losses, weights, weights * sizes))
        self._sums.index_add_(1, codes.clamp(min=0), values)

    def sums(self) -> list[float]:
        """The sums of this process, to be all-reduced; always the same number of values."""
        return self._sums.flatten().tolist()  # type: ignore[no-any-return]

    def means(self, sums: list[float], loss: str, bits: str, total: str) -> dict[str, float]:
        """Metrics from the `sums` of all processes: mean losses `loss`/SOURCE, bits per byte `bits`/SOURCE, and
        bits per byte of all as `total`.

        With an empty `bits`, as in a training step, the losses on documents seen for the first time and seen
        again replace the bits per byte of the sources, and a single source gets no curve of its own.
        """
        losses, weights, sizes = np.array(sums).reshape(3, -1)
        metrics: dict[str, float] = {}

        def add_mean(name: str, groups: slice, denominators: Any, unit: float = 1.0) -> None:
            if (denominator := denominators[groups].sum()) > 0:
                metrics[name] = float(losses[groups].sum() / unit / denominator)

        separate = len(self.group_names) > 1 or (bits and self.group_names[0])
        for i, source in enumerate(self.group_names if separate else ()):
            add_mean(f"{loss}/{source}", slice(2 * i, 2 * i + 2), weights)
            if bits:
                add_mean(f"{bits}/{source}", slice(2 * i, 2 * i + 2), sizes, math.log(2))
        if not bits and self._has_groups:
            add_mean("loss_first", slice(0, None, 2), weights)
            add_mean("loss_repeated", slice(1, None, 2), weights)
        add_mean(total, slice(None), sizes, math.log(2))
        return metrics

"""Token losses summed by source and by whether their document was seen before: mean losses and bits per byte of each.

tally = LossTally(source, token_bytes, device)
tally.add(batch, result)                                             # after each micro-batch
tally.figures(processes.all_reduce(tally.numbers()), "heldout", "heldout_bpb", "heldout_bpb")
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmkit.training.data import Batch
from llmkit.training.objectives import Result


class LossTally:
    """Σ weight · loss, Σ weight and Σ weight · bytes of text by group, float64 [3, 2 · sources], of the batches that it was shown.

    `token_bytes` int64 [V] is the text that each token stands for, None where that is not known.
    """

    def __init__(self, source: Any, token_bytes: Tensor | None, device: torch.device) -> None:
        self.names: tuple[str, ...] = getattr(source, "group_names", ("",))
        self._told_apart = hasattr(source, "group_names")
        self._bytes = None if token_bytes is None else token_bytes.to(device)
        self._sums = torch.zeros(3, 2 * len(self.names), dtype=torch.float64, device=device)

    def add(self, batch: Batch, found: Result) -> None:
        """Add the token losses of a batch, where the objective knows them."""
        if found.token_losses is None or found.positions is None:
            return
        at = found.positions
        weights = batch.weights.flatten()[at].double()
        codes = batch.extra["groups"].flatten()[at].long() if "groups" in batch.extra else torch.zeros_like(at)
        weights = torch.where(codes < 0, 0.0, weights)
        sizes = weights.new_zeros(()) if self._bytes is None else self._bytes[batch.targets.flatten()[at]]
        values = torch.stack((weights * found.token_losses, weights, weights * sizes))
        self._sums.index_add_(1, codes.clamp(min=0), values)

    def numbers(self) -> list[float]:
        """What has to be added up over all processes; always as many numbers."""
        return self._sums.flatten().tolist()  # type: ignore[no-any-return]

    def figures(self, numbers: list[float], loss: str, bits: str, whole: str) -> dict[str, float]:
        """Mean losses as `loss`/SOURCE, bits a byte as `whole` and `bits`/SOURCE, from the `numbers` of all processes.

        With `bits` empty, as of a training step, losses on documents first seen and seen again stand in the place of the sources' bits, and a
        single source is not told apart.
        """
        sums, weights, sizes = np.array(numbers).reshape(3, -1)
        found: dict[str, float] = {}

        def mean(name: str, which: slice, by: Any, unit: float = 1.0) -> None:
            if (total := by[which].sum()) > 0:
                found[name] = float(sums[which].sum() / unit / total)

        for i, source in enumerate(self.names if len(self.names) > 1 or (bits and self.names[0]) else ()):
            mean(f"{loss}/{source}", slice(2 * i, 2 * i + 2), weights)
            if bits:
                mean(f"{bits}/{source}", slice(2 * i, 2 * i + 2), sizes, math.log(2))
        if not bits and self._told_apart:
            mean("loss_first", slice(0, None, 2), weights)
            mean("loss_repeated", slice(1, None, 2), weights)
        mean(whole, slice(None), sizes, math.log(2))
        return found

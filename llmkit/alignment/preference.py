"""Losses on preference pairs. Each is one function, registered here with its name and help; `dpo` lists and
finds them by name.

With y_w the chosen answer and y_l the rejected one, the losses are functions of

    Δ = [log π(y_w) − log π_ref(y_w)] − [log π(y_l) − log π_ref(y_l)]

where log π(y) is the sum over the assistant's tokens after the prompt, stop token included, and π_ref is the
model before the first step.

    @_loss("sigmoid", "DPO: −log σ(βΔ)")
    def sigmoid(pairs, beta): ...

    LOSSES.get("sigmoid").function(pairs, beta)

torch is only imported by the functions, so that help can list the losses without it. Batches of pairs are in
`alignment.pairs`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmkit.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class PairLogProbabilities:
    """log π of the model being trained, and of the reference: [2, pairs] each, the chosen answers in row 0."""

    policy: Tensor
    reference: Tensor

    @property
    def ratios(self) -> Tensor:
        """log π − log π_ref, [2, pairs]."""
        return self.policy - self.reference

    @property
    def delta(self) -> Tensor:
        """Δ of each pair, [pairs]."""
        chosen, rejected = self.ratios
        return chosen - rejected


LossFunction = Callable[[PairLogProbabilities, float], "Tensor"]


@dataclass(frozen=True, slots=True)
class PreferenceLoss:
    """`function` maps the log-probabilities of the pairs and β to the loss of each pair, [pairs]; `help` is its
    line in --help.
    """

    help: str
    function: LossFunction


LOSSES = Registry("preference loss")


def _loss(name: str, help: str) -> Callable[[LossFunction], LossFunction]:
    """Decorator: register a loss."""

    def register(function: LossFunction) -> LossFunction:
        LOSSES.register(name)(PreferenceLoss(help, function))
        return function

    return register


@_loss("sigmoid", "DPO: −log σ(βΔ)")
def sigmoid(pairs: PairLogProbabilities, beta: float) -> Tensor:
    """Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290); ln 2 at step 0, where Δ = 0."""
    import torch.nn.functional as F

    return -F.logsigmoid(beta * pairs.delta)

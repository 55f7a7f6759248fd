"""An embedding or output layer of which only the rows of some tokens are trained, as PEFT's trainable_token_indices.

    table = TokenTable(weight, ids)              # [V, D] and n ids, ascending
    x_BTD = table(input_ids)                     # as an embedding
    logits_BTV = hidden_BTD @ table.current().T  # as an output layer

The trained rows [n, D] are a parameter of their own under PEFT's name, so gradients and moments have n rows, not V. The
frozen matrix is never copied: as an output layer it takes the present values of the rows in place, and what computes
gradients asks for those of the `rows` alone (training/objectives.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TokenTable(nn.Module):
    """A frozen matrix [V, D] with trained rows, which start as those of the matrix."""

    ids: Tensor

    def __init__(self, weight: nn.Parameter, ids: Sequence[int]) -> None:
        super().__init__()
        self.weight = weight
        self.register_buffer("ids", torch.tensor(ids), persistent=False)
        self.token_adapter = nn.ParameterDict({"trainable_tokens_delta": nn.Parameter(weight.detach()[self.ids])})

    @property
    def rows(self) -> Tensor:
        """The trained rows [n, D], in the order of `ids`."""
        rows: Tensor = self.token_adapter["trainable_tokens_delta"]
        return rows

    def current(self) -> Tensor:
        """The matrix [V, D] with the present values of the trained rows, without a gradient."""
        self.weight.data[self.ids] = self.rows.data.to(self.weight.dtype)
        return self.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        """The rows [..., D] of ids [...]."""
        place = torch.searchsorted(self.ids, input_ids.contiguous()).clamp(max=len(self.ids) - 1)
        is_trained = (self.ids[place] == input_ids)[..., None]
        return torch.where(is_trained, F.embedding(place, self.rows), F.embedding(input_ids, self.weight))

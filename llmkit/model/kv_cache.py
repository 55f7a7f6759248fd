"""The key-value cache that generation keeps between tokens. Shape suffixes are those of decoder.py."""

from __future__ import annotations

import torch
from torch import Tensor


class KeyValueCache:
    """Keys and values of past tokens, [B, S, G, K] per layer, and their document ids [B, S]. Updated in place,
    so for inference only.

    Memory: 2 · layers · B · G · K · capacity elements. The capacity doubles when it is exhausted, so most steps
    copy nothing.
    """

    def __init__(self, layers: int, capacity: int = 256) -> None:
        self.document_ids: Tensor | None = None
        self._capacity = capacity
        self._buffers: list[tuple[Tensor, Tensor] | None] = [None] * layers
        self._lengths = [0] * layers

    @property
    def length(self) -> int:
        """Number of cached tokens."""
        return self._lengths[0]

    def with_documents(self, ids_BT: Tensor) -> Tensor:
        """The document ids of all tokens, [B, S], with those of new tokens appended."""
        self.document_ids = ids_BT if self.document_ids is None else torch.cat([self.document_ids, ids_BT], 1)
        return self.document_ids

    def extend(self, layer: int, k_BTGK: Tensor, v_BTGK: Tensor) -> tuple[Tensor, Tensor]:
        """Append new keys and values to a layer; returns all of the layer's, [B, S, G, K]."""
        past, new = self._lengths[layer], self._lengths[layer] + k_BTGK.shape[1]
        buffers = self._buffers[layer]
        if buffers is None or buffers[0].shape[1] < new:
            while self._capacity < new:
                self._capacity *= 2
            b, _, g, k = k_BTGK.shape
            # Contiguous per head, as attention reads them.
            new_k, new_v = k_BTGK.new_empty(2, b, g, self._capacity, k).transpose(2, 3)
            grown = (new_k, new_v)
            if buffers is not None:
                for old, larger in zip(buffers, grown, strict=True):
                    larger[:, :past] = old[:, :past]
            self._buffers[layer] = buffers = grown
        buffers[0][:, past:new] = k_BTGK
        buffers[1][:, past:new] = v_BTGK
        self._lengths[layer] = new
        return buffers[0][:, :new], buffers[1][:, :new]

    def keep_rows(self, rows: Tensor) -> None:
        """Keep only the rows of the batch with these indices."""
        self._buffers = [pair and (pair[0][rows], pair[1][rows]) for pair in self._buffers]
        if self.document_ids is not None:
            self.document_ids = self.document_ids[rows]

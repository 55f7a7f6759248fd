"""Which kept documents share a band with this one: an open-addressing table in numpy.

A slot holds a 64-bit band key (the band's number is mixed into it) and the newest document that has it; `_previous` chains each document,
band by band, to the one before it with the same key. Memory: 12 bytes a slot at a load of 1/3 to 2/3, 14 slots a document, and 56 bytes of chain: 310 to 560 bytes
a document. Cost: about 30 microseconds a document.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

MAX_CHAIN = 32  # documents looked at a band: bounds the work where very many unlike documents share one
MAX_CANDIDATES = 64
EMPTY = np.uint64(0)  # marks a free slot


class BandTable:
    """Documents 0, 1, ... by their band keys."""

    def __init__(self, bands: int, slots: int = 1 << 14) -> None:
        self.bands = bands
        self.documents = 0
        self._keys = np.zeros(slots, np.uint64)
        self._newest = np.zeros(slots, np.uint32)  # document + 1
        self._previous = np.zeros((1024, bands), np.uint32)  # document + 1, 0 ends the chain
        self._used = 0

    def candidates(self, keys: Any) -> list[int]:
        """Documents that share a band key with `keys` (uint64 [bands]): those that share more first, then earlier ones first.

        At most MAX_CHAIN a band are met, the newest, and MAX_CANDIDATES come back.
        """
        keys = _nonzero(keys)
        slots = self._slots(self._keys, keys)
        heads = np.where(self._keys[slots] == keys, self._newest[slots], 0)
        shared: Counter[int] = Counter()
        for band in np.flatnonzero(heads).tolist():
            document = int(heads[band])
            for _ in range(MAX_CHAIN):
                shared[document - 1] += 1
                document = int(self._previous[document - 1, band])
                if not document:
                    break
        return sorted(shared, key=lambda document: (-shared[document], document))[:MAX_CANDIDATES]

    def add(self, keys: Any) -> None:
        """File the next document under `keys`."""
        if 3 * (self._used + self.bands) > 2 * len(self._keys):
            self._grow()
        if self.documents == len(self._previous):
            self._previous = np.concatenate([self._previous, np.zeros_like(self._previous)])
        keys = _nonzero(keys)
        slots = self._slots(self._keys, keys)
        if len(set(slots.tolist())) == self.bands:
            self._file(np.arange(self.bands), keys, slots)
        else:  # two new keys want the same slot: one by one
            for band in range(self.bands):
                key = keys[band : band + 1]
                self._file(np.array([band]), key, self._slots(self._keys, key))
        self.documents += 1

    def _file(self, bands: Any, keys: Any, slots: Any) -> None:
        known = self._keys[slots] == keys
        self._previous[self.documents, bands] = np.where(known, self._newest[slots], 0)
        self._used += int(len(keys) - known.sum())
        self._keys[slots] = keys
        self._newest[slots] = self.documents + 1

    @staticmethod
    def _slots(table: Any, keys: Any) -> Any:
        """For each key the slot that holds it, or the empty one where it belongs."""
        mask = np.uint64(len(table) - 1)
        slots = keys & mask
        while True:
            there = table[slots]
            wrong = (there != keys) & (there != EMPTY)
            if not wrong.any():
                return slots
            slots = np.where(wrong, (slots + np.uint64(1)) & mask, slots)

    def _grow(self) -> None:
        """Twice the slots, every key put in anew, all at once: of those that want one slot one wins, the others go on."""
        old = np.flatnonzero(self._keys)
        keys, newest = self._keys[old], self._newest[old]
        self._keys = np.zeros(2 * len(self._keys), np.uint64)
        self._newest = np.zeros(len(self._keys), np.uint32)
        while len(keys):
            slots = self._slots(self._keys, keys)
            self._keys[slots] = keys
            won = self._keys[slots] == keys
            self._newest[slots[won]] = newest[won]
            keys, newest = keys[~won], newest[~won]


def _nonzero(keys: Any) -> Any:
    """Keys with 0, which marks a free slot, turned into 1."""
    return np.where(keys == EMPTY, np.uint64(1), keys)

"""Which kept documents share a band with this one: an open-addressing table in compact arrays.

A slot holds a 64-bit band key (the band's number is mixed into it) and the newest document that has it; `_previous` chains each document,
band by band, to the one before it with the same key. Memory: 12 bytes a slot at a load of 1/3 to 2/3, 14 slots a document, and 56 bytes of
chain: 310 to 560 bytes a document. Cost: some 30 microseconds a document.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence

MAX_CHAIN = 32  # documents met a band: bounds the work where very many unlike documents share one
MAX_CANDIDATES = 64
FREE = 0  # key of a free slot; a band key of 0 is filed as 1


class BandTable:
    """Documents 0, 1, ... by their band keys: `bands` integers of 64 bits each."""

    def __init__(self, bands: int, slots: int = 1 << 14) -> None:
        self.bands = bands
        self.documents = 0
        self._keys = array("Q", bytes(8 * slots))
        self._newest = array("I", bytes(4 * slots))  # document + 1
        self._previous = array("I")  # document + 1 at [document * bands + band]; 0 ends the chain
        self._used = 0

    def candidates(self, keys: Sequence[int]) -> list[int]:
        """Documents that share a band key: those that share more first, then earlier ones first.

        At most MAX_CHAIN a band are met, the newest, and MAX_CANDIDATES come back.
        """
        shared: Counter[int] = Counter()
        for band, key in enumerate(keys):
            document = self._newest[self._slot(key or 1)]
            for _ in range(MAX_CHAIN):
                if not document:
                    break
                shared[document - 1] += 1
                document = self._previous[(document - 1) * self.bands + band]
        return sorted(shared, key=lambda document: (-shared[document], document))[:MAX_CANDIDATES]

    def add(self, keys: Sequence[int]) -> None:
        """File the next document under `keys`."""
        if 3 * (self._used + self.bands) > 2 * len(self._keys):
            self._grow()
        self.documents += 1
        for key in keys:
            slot = self._slot(key or 1)
            if self._keys[slot] == FREE:
                self._keys[slot] = key or 1
                self._used += 1
            self._previous.append(self._newest[slot])
            self._newest[slot] = self.documents

    def _slot(self, key: int) -> int:
        """The slot that holds `key`, or the free one where it belongs."""
        keys = self._keys
        mask = len(keys) - 1
        slot = key & mask
        while (there := keys[slot]) != key and there != FREE:
            slot = (slot + 1) & mask
        return slot

    def _grow(self) -> None:
        """Twice the slots, every key put in anew."""
        keys, newest = self._keys, self._newest
        self._keys, self._newest = array("Q", bytes(16 * len(keys))), array("I", bytes(8 * len(keys)))
        for key, document in zip(keys, newest, strict=True):
            if key != FREE:
                slot = self._slot(key)
                self._keys[slot], self._newest[slot] = key, document

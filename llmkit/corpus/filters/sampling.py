"""Keep a share of the documents, the same ones in any order, in any split into files and for any -j.

    llmkit filter docs.jsonl --filter sample --rule sample.rate=0.1 --rule sample.seed=1

A document's place in [0, 1) is the xxh3-64 of its id with the seed; it stays if that is below `rate`, so that a smaller rate keeps a part of what a larger
one keeps, and different seeds keep independent parts. Without an id the xxh3-128 of the text stands for it, as everywhere; put this filter before those
that edit the text. Equal texts without ids stay or go together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import xxhash

from llmkit.corpus.filters import FILTERS, Check
from llmkit.corpus.lists import dotted
from llmkit.corpus.page import Page
from llmkit.errors import UsageError


@FILTERS.register("sample")
@dataclass(frozen=True, slots=True)
class Sample:
    """Reason `sampled_out`; its value is the document's place."""

    rate: float = 1.0
    seed: int = 0
    field: str = "id"

    def __post_init__(self) -> None:
        if not 0 <= self.rate <= 1:
            raise UsageError(f"sample.rate: {self.rate} is no share", "give a number from 0 to 1")
        if not (isinstance(self.seed, int) and 0 <= self.seed < 1 << 64):
            raise UsageError(f"sample.seed: {self.seed} is no seed", "give a whole number from 0 to 2^64 - 1")

    def __call__(self, page: Page) -> Iterator[Check]:
        found = dotted(page.fields, self.field)
        name = xxhash.xxh3_128_hexdigest(page.text.encode()) if found is None else str(found)
        digest = xxhash.xxh3_64_intdigest(name.encode(), seed=self.seed)
        place = (digest >> 11) / (1 << 53)  # 53 bits: below 1.0 in a float
        yield Check("sampled_out", place, place >= self.rate)

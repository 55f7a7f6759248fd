"""Keep a share of the documents: the same ones for any order, any split into files and any -j.

    llmkit filter docs.jsonl --filter sample --rule sample.rate=0.1 --rule sample.seed=1

A document's position in [0, 1) is the xxh3-64 of its id with the seed. It is kept if the position is below
`rate`, so that a smaller rate keeps a subset of what a larger rate keeps, and different seeds keep independent
samples. A document without an id is identified by the xxh3-128 of its text, as everywhere, so put this filter
before those that edit the text. Equal texts without ids are kept or dropped together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import xxhash

from llmkit.corpus.filters import FILTERS, Check
from llmkit.corpus.page import Page
from llmkit.errors import UsageError
from llmkit.io.splice import dotted


@FILTERS.register("sample")
@dataclass(frozen=True, slots=True)
class Sample:
    """Reason `sampled_out`; its value is the document's position in [0, 1)."""

    rate: float = 1.0
    seed: int = 0
    field: str = "id"

    def __post_init__(self) -> None:
        if not 0 <= self.rate <= 1:
            raise UsageError(f"sample.rate: {self.rate} is not a share", "use a number from 0 to 1")
        if not (isinstance(self.seed, int) and 0 <= self.seed < 1 << 64):
            raise UsageError(f"sample.seed: {self.seed} is not a seed", "use a whole number from 0 to 2^64 - 1")

    def __call__(self, page: Page) -> Iterator[Check]:
        document_id = dotted(page.fields, self.field)
        key = xxhash.xxh3_128_hexdigest(page.text.encode()) if document_id is None else str(document_id)
        digest = xxhash.xxh3_64_intdigest(key.encode(), seed=self.seed)
        position = (digest >> 11) / (1 << 53)  # 53 bits: below 1.0 in a float
        yield Check("sampled_out", position, position >= self.rate)

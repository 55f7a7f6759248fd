"""Repeated lines and paragraphs over a corpus: menus, licences, signatures, cut out of the texts.

    passages = Passages(by="lines")
    for outcome in passages.run(reader): ...          # edited documents, in input order

`lines` are split at "\\n", `paragraphs` at runs of two and more of it (what dolma calls paragraphs are our lines). They are compared after a named
normalisation, by a hash of 64 bits: among 10⁹ distinct lines the chance that another one is cut for one of them is 5·10⁻¹¹ each. What a normalisation
empties ("----" under `loose`) is compared with its whitespace collapsed alone. Blank ones, and those of fewer than `min_characters`, are never
cut, and count for nothing.

- by default the first of equal lines in input order stays and each later one is cut: one pass, and 11 to 23 bytes of memory a distinct line;
- `repeated=N` cuts all occurrences of lines that stand in at least N documents, and no others: two passes, 17 to 34 bytes a distinct line, and documents
  and hashes (8 bytes a line) wait in temporary files;
- `boilerplate` names lists of lines that are cut wherever they stand, besides.

When the table of hashes doubles, both are there for a moment. Cost: compiled, linear.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
from numpy.typing import NDArray

from llmkit.corpus.dedup.edits import Backlog, Edits, Ends, Hashes
from llmkit.corpus.dedup.hash_set import Seen
from llmkit.corpus.dedup.kernels import passages as kernels
from llmkit.corpus.dedup.kernels.normalise import tables
from llmkit.corpus.dedup.method import METHODS, Decided
from llmkit.corpus.dedup.normalise import NORMALISERS
from llmkit.corpus.kernels.characters import classes
from llmkit.corpus.lists import entries
from llmkit.errors import UsageError
from llmkit.io.documents import DocumentReader
from llmkit.kernels.utf8 import Bytes, hash_bytes

KINDS = ("lines", "paragraphs")
HOW = {"none": kernels.NONE, "whitespace": kernels.WHITESPACE, "loose": kernels.LOOSE}
EMPTY = np.frombuffer(b"", np.int32), np.frombuffer(b"", np.uint8)  # tables of no use


@dataclass
class Passages(Edits):
    """The stage. `boilerplate`: files of one line each."""

    by: str = "lines"
    normalise: str = "whitespace"
    repeated: int = 0  # documents; 0: the first occurrence stays
    boilerplate: tuple[str, ...] = ()
    min_characters: int = 1

    def __post_init__(self) -> None:
        NORMALISERS.get(self.normalise)  # unknown name: UsageError before any work
        if self.repeated < 0 or self.repeated == 1:
            raise UsageError(
                f"--repeated {self.repeated}", "a number of documents, 2 or more; without it the first stays"
            )
        if self.by not in KINDS:
            raise UsageError(f"--method {self.by}", "one of: " + ", ".join(KINDS))

    @cached_property
    def listed(self) -> Hashes:
        """Hashes of the boilerplate."""
        found = [self.hashes(entry) for _, entry in entries(self.boilerplate)]
        return np.unique(np.concatenate([np.empty(0, np.uint64), *found]))

    def split(self, data: Bytes) -> tuple[Ends, Ends]:
        """Where passages begin and end, in bytes."""
        starts, stops = kernels.spans(data, self.by == "paragraphs")
        return starts, stops

    @np.errstate(over="ignore")  # unsigned arithmetic that wraps, where nothing is compiled
    def hashes(self, text: str) -> Hashes:
        """One hash a passage; 0 for those that stay."""
        data, how = np.frombuffer(text.encode(), np.uint8), HOW[self.normalise]
        loosely = how == kernels.LOOSE
        if not (loosely and "Σ" in text):  # whose lower case depends on what is beside it
            found: Hashes
            more = classes(), *(tables() if loosely else EMPTY)
            found, done = kernels.hashes_of(data, self.by == "paragraphs", how, self.min_characters, *more)
            if done:
                return found
        return np.array([self._hash(data[a:b].tobytes().decode()) for a, b in zip(*self.split(data), strict=True)])

    def measure(self, text: str) -> tuple[Hashes, Hashes]:
        """Hashes of all passages; of the distinct ones, where documents are counted."""
        found = self.hashes(text)
        return found, np.unique(found) if self.repeated else found[:0]

    def _hash(self, passage: str) -> np.uint64:
        """The definition: the normalised passage, hashed."""
        collapsed = " ".join(passage.split())
        if len(collapsed) < max(1, self.min_characters):
            return np.uint64(0)
        data = np.frombuffer((NORMALISERS.get(self.normalise)(passage) or collapsed).encode(), np.uint8)
        return np.uint64(max(1, hash_bytes(data, 0, len(data))))

    def warm_up(self) -> None:
        """Compile before workers fork, and read the lists."""
        table, found = (
            Seen(np.uint32 if self.repeated else None),
            self.hashes("a line\n\nanother\n") | self.listed[:1].sum(),
        )
        table.add(np.resize(found, 1 << 13))
        if self.repeated:
            table.frequent(found, self.repeated)

    def run(self, reader: DocumentReader) -> Iterator[Decided]:
        """Outcomes of chunks in order; with `repeated` all documents are read before the first is written."""
        table = Seen(np.uint32 if self.repeated else None)
        decided = partial(self._decided, reader.options.text_key or "text")
        measured = self.measured(reader, self.measure)
        if not self.repeated:
            for part in measured:
                done = decided(part.lines, part.sizes, part.pieces, table.add(part.pieces))
                yield Decided(*done, part.bad, len(part.lines))
            return
        with closing(Backlog(np.uint64, self.temporary)) as waiting:
            for part in measured:
                table.add(part.more)
                waiting.append(part)
                yield Decided(b"", b"", part.bad, len(part.lines))
            for lines, sizes, start, stop in waiting:
                mine = waiting.pieces.array()[start:stop]
                yield Decided(*decided(lines, sizes, mine, table.frequent(mine, self.repeated)), [], 0)

    def _decided(
        self, key: str, lines: list[bytes], sizes: Ends, hashes: Hashes, cut: NDArray[np.bool_]
    ) -> tuple[bytes, bytes]:
        """Documents of so many passages each, without those that are to be cut."""
        if len(self.listed):
            cut |= np.isin(hashes, self.listed) & (hashes != 0)
        return self.edit(lines, sizes, cut, self.split, key, self.by)


for _kind in KINDS:
    METHODS.register(_kind)(partial(Passages, by=_kind))

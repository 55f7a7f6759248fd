"""Lines and paragraphs repeated across a corpus, such as menus, licences and signatures, cut out of the texts.

    dedup = PassageDedup(by="lines")
    for result in dedup.run(reader): ...          # edited documents, in input order

`lines` are separated by "\\n", `paragraphs` by runs of two or more (dolma's paragraphs are our lines). Passages are
compared after a named normalisation, by a 64-bit hash: among 10⁹ distinct lines the probability that a given other line
is cut by mistake is 5·10⁻¹¹. If the normalisation leaves nothing of a passage ("----" under `loose`), it is compared
with only its whitespace collapsed. Blank passages and those of fewer than `min_characters` are never cut or counted.

- By default the first of equal lines in input order is kept and each later one cut: one pass, and 11 to 23 bytes of
  memory per distinct line.
- `repeated=N` cuts all occurrences of lines that occur in at least N documents, and no others: two passes, 17 to 34
  bytes per distinct line, and documents and hashes (8 bytes per line) in temporary files.
- `boilerplate` names lists of lines that are cut wherever they occur, in addition.

While the table of hashes doubles, the old and the new one exist for a moment. Cost: compiled, linear.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
from numpy.typing import NDArray

from llmkit.corpus.dedup.editing import EditingDedup, Ends, Hashes, SpilledChunks
from llmkit.corpus.dedup.kernels import passages as kernels
from llmkit.corpus.dedup.kernels.hash_set import HashSet
from llmkit.corpus.dedup.kernels.normalise import UNUSED, tables
from llmkit.corpus.dedup.normalise import name_of, normaliser, parts_of
from llmkit.corpus.dedup.results import ChunkResult
from llmkit.corpus.kernels.characters import classes
from llmkit.corpus.lists import entries
from llmkit.errors import UsageError
from llmkit.io.documents import DocumentReader
from llmkit.kernels.utf8 import Bytes, hash_bytes

KINDS = ("lines", "paragraphs")
KERNEL_MODES = {"none": kernels.NONE, "whitespace": kernels.WHITESPACE}  # others: MORE


@dataclass
class PassageDedup(EditingDedup):
    """Cuts repeated passages. `boilerplate`: files with one line per entry."""

    by: str = "lines"
    normalise: str = "whitespace"
    repeated: int = 0  # documents; 0: the first occurrence is kept
    boilerplate: tuple[str, ...] = ()
    min_characters: int = 1

    def __post_init__(self) -> None:
        self.normalise = name_of(parts_of(self.normalise))  # unknown name: UsageError before any work
        if self.repeated < 0 or self.repeated == 1:
            raise UsageError(
                f"--repeated {self.repeated}", "a number of documents, 2 or more; without it the first copy is kept"
            )
        if self.by not in KINDS:
            raise UsageError(f"--method {self.by}", "one of: " + ", ".join(KINDS))

    @property
    def rule(self) -> str:
        repeated = f" --repeated {self.repeated}" if self.repeated else ""
        return f"--method {self.by} --normalise {self.normalise}{repeated}"

    @cached_property
    def boilerplate_hashes(self) -> Hashes:
        """Hashes of the boilerplate, ascending."""
        hashes = [self.hashes(entry) for _, entry in entries(self.boilerplate)]
        return np.unique(np.concatenate([np.empty(0, np.uint64), *hashes]))

    def split(self, data: Bytes) -> tuple[Ends, Ends]:
        """Start and end of each passage, in bytes."""
        starts, stops = kernels.spans(data, self.by == "paragraphs")
        return starts, stops

    @np.errstate(over="ignore")  # uncompiled kernels rely on unsigned arithmetic that wraps
    def hashes(self, text: str) -> Hashes:
        """One hash per passage; 0 for passages that are never cut."""
        data, mode = np.frombuffer(text.encode(), np.uint8), KERNEL_MODES.get(self.normalise, kernels.MORE)
        parts = parts_of(self.normalise)
        if mode != kernels.MORE or ("whitespace" in parts and not ("case" in parts and "Σ" in text)):
            # The lower case of a sigma depends on its neighbours.
            result: Hashes
            character_tables = classes(), *(tables(self.normalise, False) if mode == kernels.MORE else UNUSED)
            result, done = kernels.hashes_of(
                data, self.by == "paragraphs", mode, self.min_characters, *character_tables
            )
            if done:
                return result
        return np.array([self._hash(data[a:b].tobytes().decode()) for a, b in zip(*self.split(data), strict=True)])

    def measure(self, text: str) -> tuple[Hashes, Hashes]:
        """Hashes of all passages; and of the distinct ones if documents are counted."""
        hashes = self.hashes(text)
        return hashes, np.unique(hashes) if self.repeated else hashes[:0]

    def _hash(self, passage: str) -> np.uint64:
        """The definition: a hash of the normalised passage."""
        collapsed = " ".join(passage.split())
        if len(collapsed) < max(1, self.min_characters):
            return np.uint64(0)
        data = np.frombuffer((normaliser(self.normalise)(passage) or collapsed).encode(), np.uint8)
        return np.uint64(max(1, hash_bytes(data, 0, len(data))))

    def warm_up(self) -> None:
        """Compile the kernels and read the lists before workers fork."""
        table, hashes = (
            HashSet(np.uint32 if self.repeated else None),
            self.hashes("a line\n\nanother\n") | self.boilerplate_hashes[:1].sum(),
        )
        table.add(np.resize(hashes, 1 << 13))
        if self.repeated:
            table.frequent(hashes, self.repeated)

    def run(self, reader: DocumentReader) -> Iterator[ChunkResult]:
        """The results of the chunks, in order; with `repeated`, all documents are read before the first is written."""
        table = HashSet(np.uint32 if self.repeated else None)
        cut_passages = partial(self._cut_passages, reader.options.text_key or "text")
        measured = self.measure_chunks(reader, self.measure)
        if not self.repeated:
            for chunk in measured:
                edited = cut_passages(chunk.lines, chunk.sizes, chunk.pieces, table.add(chunk.pieces))
                yield ChunkResult(*edited, chunk.bad, len(chunk.lines))
            return
        with closing(SpilledChunks(np.uint64, self.temporary)) as spilled:
            for chunk in measured:
                table.add(chunk.more)
                spilled.append(chunk)
                yield ChunkResult(b"", b"", chunk.bad, len(chunk.lines))
            for lines, sizes, start, stop in spilled:
                hashes = spilled.pieces.array()[start:stop]
                yield ChunkResult(*cut_passages(lines, sizes, hashes, table.frequent(hashes, self.repeated)), [], 0)

    def _cut_passages(
        self, key: str, lines: list[bytes], sizes: Ends, hashes: Hashes, cut: NDArray[np.bool_]
    ) -> tuple[bytes, bytes]:
        """Documents of `sizes` passages each, without those marked in `cut` or listed as boilerplate."""
        if len(self.boilerplate_hashes):
            cut |= np.isin(hashes, self.boilerplate_hashes) & (hashes != 0)
        return self.edit(lines, sizes, cut, self.split, key, self.by)

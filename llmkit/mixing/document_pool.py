"""Documents kept on disk so that they can be written in any order: what `mix` needs of sources that are not token shards.

Lines go as they are into one temporary file, which no one else sees; memory holds 24 bytes a document. Their lengths in tokens are those of
a tokenizer, or a quarter of their UTF-8 bytes (rounded up), which is about right for English and a BPE vocabulary.
"""

from __future__ import annotations

import mmap
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from llmkit.io.compression import BLOCK
from llmkit.io.documents import BadLine, Chunk, ReadOptions, parse
from llmkit.shards.tokenizer_info import TokenizerInfo

if TYPE_CHECKING:
    from llmkit.mixing.order import Order

BYTES_PER_TOKEN = 4
Count = Callable[[list[str]], list[int]]  # tokens of each text


@dataclass(slots=True)
class Measured:
    """The documents of one chunk: their lines, the length of each line in bytes and of each text in tokens, and a count that a field holds."""

    lines: bytes
    sizes: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    bad: list[BadLine] = field(default_factory=list)


def estimate(texts: list[str]) -> list[int]:
    """Tokens of each text by its bytes alone."""
    return [-(-len(text.encode("utf-8", "surrogatepass")) // BYTES_PER_TOKEN) for text in texts]


def by_tokenizer(tokenizer: TokenizerInfo) -> Count:
    """Tokens of each text as `tokenize` makes them, the end of text included."""
    from llmkit.tokens.text_encoder import TextEncoder

    encode = TextEncoder(tokenizer)

    def count(texts: list[str]) -> list[int]:
        return [length + 1 for length in encode(texts)[1].tolist()]

    return count


def measure(chunk: Chunk, options: ReadOptions, count: Count, field: str | None = None) -> Measured:
    """Work of one worker: parse a chunk, count its tokens, and read the count that `field` holds, 1 where there is none."""
    documents, bad = parse(chunk, options)
    lines = [document.encode() for document in documents]
    counts = [document.count(field) for document in documents] if field else []
    return Measured(
        b"".join(lines), list(map(len, lines)), count([document.text for document in documents]), counts, bad
    )


class DocumentPool:
    """Lines of several sources on disk, to be read back in an `Order`."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="llmkit-mix-")  # closed with the pool
        # Where each document of a source starts in the file, and the last ends.
        self._sources: list[NDArray[np.int64]] = []
        self._written = 0
        self.counts: list[NDArray[np.int64]] = []  # of each source, empty without a field

    def add(self, measured: Iterable[Measured]) -> NDArray[np.int64]:
        """Append one source; returns the length of its documents in tokens."""
        sizes, tokens, counts = array("q"), array("q"), array("q")
        for part in measured:
            self._file.write(part.lines)
            sizes.extend(part.sizes)
            tokens.extend(part.tokens)
            counts.extend(part.counts)
        starts = np.concatenate(([self._written], self._written + np.cumsum(np.array(sizes, np.int64)))).astype(
            np.int64
        )
        self._written = int(starts[-1])
        self._sources.append(starts)
        self.counts.append(np.array(counts, np.int64))
        return np.array(tokens, np.int64)

    def blocks(self, order: Order) -> Iterator[tuple[bytes, int]]:
        """Lines in order, about 1 MiB at a time, and how many they are."""
        self._file.flush()
        if not len(order.document):
            return
        with mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            held: list[bytes] = []
            size = 0
            for source, document in zip(order.source.tolist(), order.document.tolist(), strict=True):
                starts = self._sources[source]
                line = content[int(starts[document]) : int(starts[document + 1])]
                held.append(line)
                size += len(line)
                if size >= BLOCK:
                    yield b"".join(held), len(held)
                    held, size = [], 0
            if held:
                yield b"".join(held), len(held)

"""Documents spooled to disk so that they can be written in any order, for mixes of sources that are not token shards.

Lines are copied unchanged into one anonymous temporary file; memory holds 24 bytes per document. Lengths in
tokens come from a tokenizer, or are estimated as a quarter of the UTF-8 bytes, rounded up, which is about right
for English and a BPE vocabulary.
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
CountTokens = Callable[[list[str]], list[int]]  # texts to the number of tokens of each


@dataclass(slots=True)
class MeasuredChunk:
    """The documents of one chunk: their lines, the bytes of each line, the tokens of each text, and the value
    of a count field.
    """

    lines: bytes
    sizes: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    bad: list[BadLine] = field(default_factory=list)


def estimate_tokens(texts: list[str]) -> list[int]:
    """Tokens of each text, estimated from its bytes."""
    return [-(-len(text.encode("utf-8", "surrogatepass")) // BYTES_PER_TOKEN) for text in texts]


def count_with(tokenizer: TokenizerInfo) -> CountTokens:
    """A function that counts the tokens of each text as `tokenize` would, the end of text included."""
    from llmkit.tokens.text_encoder import TextEncoder

    encode = TextEncoder(tokenizer)

    def count(texts: list[str]) -> list[int]:
        return [length + 1 for length in encode(texts)[1].tolist()]

    return count


def measure_chunk(chunk: Chunk, options: ReadOptions, count: CountTokens, field: str | None = None) -> MeasuredChunk:
    """Parse a chunk, count its tokens, and read the count in `field`, 1 where a document has none (in a worker)."""
    documents, bad = parse(chunk, options)
    lines = [document.encode() for document in documents]
    counts = [document.count(field) for document in documents] if field else []
    return MeasuredChunk(
        b"".join(lines), list(map(len, lines)), count([document.text for document in documents]), counts, bad
    )


class DocumentPool:
    """Lines of several sources on disk, to be read back in an `Order`."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="llmkit-mix-")  # deleted when the pool is closed
        # Offsets in the file, by source: the start of each document, and the end of the last.
        self._sources: list[NDArray[np.int64]] = []
        self._written = 0
        self.counts: list[NDArray[np.int64]] = []  # by source; empty without a count field

    def add(self, chunks: Iterable[MeasuredChunk]) -> NDArray[np.int64]:
        """Append one source. Returns the length of each of its documents in tokens, int64 [n]."""
        sizes, tokens, counts = array("q"), array("q"), array("q")
        for chunk in chunks:
            self._file.write(chunk.lines)
            sizes.extend(chunk.sizes)
            tokens.extend(chunk.tokens)
            counts.extend(chunk.counts)
        starts = np.concatenate(([self._written], self._written + np.cumsum(np.array(sizes, np.int64)))).astype(
            np.int64
        )
        self._written = int(starts[-1])
        self._sources.append(starts)
        self.counts.append(np.array(counts, np.int64))
        return np.array(tokens, np.int64)

    def blocks(self, order: Order) -> Iterator[tuple[bytes, int]]:
        """Yield the lines in order, about 1 MiB at a time, with the number of lines in each block."""
        self._file.flush()
        if not len(order.document):
            return
        with mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            lines: list[bytes] = []
            size = 0
            for source, document in zip(order.source.tolist(), order.document.tolist(), strict=True):
                starts = self._sources[source]
                line = content[int(starts[document]) : int(starts[document + 1])]
                lines.append(line)
                size += len(line)
                if size >= BLOCK:
                    yield b"".join(lines), len(lines)
                    lines, size = [], 0
            if lines:
                yield b"".join(lines), len(lines)

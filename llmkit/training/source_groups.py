"""Groups of documents whose losses are logged separately: by source, and by whether the document was seen
before.

    groups = document_groups(np.diff(stream.offsets), *stream.origins())          # of an OrderedTokens or TokenStore
    StreamSource(stream, 512, 8, total, groups=groups)

The code of a document is 2 · source + (1 if it was seen before). The 15 sources with the most tokens have a
number of their own; all others share one. Cost: one pass over the document table when a run starts; 2 bytes
per document.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmkit.shards.shard import PADDING_SOURCE

MAX_SOURCES = 15  # sources with a curve of their own
OTHER = "other"
PADDING_CODE = -1


@dataclass(frozen=True, slots=True)
class SourceGroups:
    """Sources by number, and the code of every document, int16 [documents]."""

    names: tuple[str, ...]
    codes: NDArray[np.int16]


def document_groups(
    sizes: NDArray[np.int64], codes: NDArray[np.int32], names: Sequence[str], epochs: NDArray[np.int32] | None
) -> SourceGroups:
    """The groups of documents, from the tokens and the source index of each document [documents], the names of
    the sources, and how often each document was seen before (None: never).

    The last three are what `origins()` of a TokenStore or OrderedTokens returns.
    """
    tokens = np.bincount(codes, sizes, minlength=len(names))
    by_size = [i for i in np.argsort(-tokens, kind="stable").tolist() if names[i] != PADDING_SOURCE]
    largest = sorted(by_size[:MAX_SOURCES])
    numbers = np.full(len(names) + 1, len(largest), np.int16)
    numbers[largest] = np.arange(len(largest))
    groups = 2 * numbers[codes] + (0 if epochs is None else (epochs > 0).astype(np.int16))
    if PADDING_SOURCE in names:
        groups[codes == list(names).index(PADDING_SOURCE)] = PADDING_CODE
    other = (OTHER,) * (len(by_size) > MAX_SOURCES)
    return SourceGroups((*(names[i] for i in largest), *other), groups.astype(np.int16))

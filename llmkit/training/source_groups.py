"""Which source a position of the batch is of, and whether its document was seen before: what losses are told apart by.

    groups = document_groups(np.diff(stream.offsets), *stream.origins())          # of an OrderedTokens or TokenStore
    StreamSource(stream, 512, 8, total, groups=groups)

The code of a document is 2 · source + (1 if it was seen before). The 15 sources with most tokens have a number of their own, all others share one.
Cost: one pass over the document table when a run starts; 2 bytes a document.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmkit.shards.shard import PADDING_SOURCE

MOST = 15  # sources with a curve of their own
OTHER = "other"
NOTHING = -1  # code of padding


@dataclass(frozen=True, slots=True)
class SourceGroups:
    """Sources by number, and the code of every document, int16 [documents]."""

    names: tuple[str, ...]
    codes: NDArray[np.int16]


def document_groups(
    sizes: NDArray[np.int64], codes: NDArray[np.int32], names: Sequence[str], epochs: NDArray[np.int32] | None
) -> SourceGroups:
    """The groups of documents: tokens and index of the source of each [documents], the sources, how often each was seen before (None: never).

    The last three are what `origins()` of a TokenStore or OrderedTokens says.
    """
    tokens = np.bincount(codes, sizes, minlength=len(names))
    real = [i for i in np.argsort(-tokens, kind="stable").tolist() if names[i] != PADDING_SOURCE]
    kept = sorted(real[:MOST])
    table = np.full(len(names) + 1, len(kept), np.int16)
    table[kept] = np.arange(len(kept))
    found = 2 * table[codes] + (0 if epochs is None else (epochs > 0).astype(np.int16))
    if PADDING_SOURCE in names:
        found[codes == list(names).index(PADDING_SOURCE)] = NOTHING
    more = (OTHER,) * (len(real) > MOST)
    return SourceGroups((*(names[i] for i in kept), *more), found.astype(np.int16))

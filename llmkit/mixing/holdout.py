"""Select the documents that a mix holds out, so that none of them is trained on in another form.

Documents with the same id or the same token ids form a group, across all sources, and groups that share a
document are joined. A group is held out as a whole or not at all. An id is the hash of the text unless the user
gave one, so a text stays on one side with or without fill-in-the-middle, with another tokenizer, or cut into
pieces by an earlier packing; the tokens identify a text stored under two ids. The lowest id hash of a group
decides, so a document that shares neither id nor tokens with another is held out of every mix with at least the
same fraction.

Cost: the tokens are read once, in place. Memory: about 100 bytes per document.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xxhash
from numpy.typing import NDArray

from llmkit.shards.arrow import string_data
from llmkit.shards.reader import TokenStore

Keys = NDArray[np.uint64]


def held_out_documents(stores: Sequence[TokenStore], fraction: float) -> list[tuple[int, ...]]:
    """Held-out documents of each store, about `fraction` of all; never the padding of an earlier packing."""
    ids, contents = map(np.concatenate, zip(*map(_document_keys, stores), strict=True))
    group = connected_groups([ids, contents])
    lowest = np.full(len(ids), np.iinfo(np.uint64).max)
    np.minimum.at(lowest, group, ids)
    selected = mix64(lowest[group]) < np.uint64(int(fraction * 2**64))
    held_out, first = [], 0
    for store in stores:
        mask = selected[first : first + store.documents]
        held_out.append(tuple(np.flatnonzero(mask if store.padding is None else mask & ~store.padding).tolist()))
        first += store.documents
    return held_out


def connected_groups(keys: Sequence[Keys]) -> NDArray[np.int64]:
    """The first row of each row's group, int64 [n]. Rows that share any of their keys, each uint64 [n], are connected.

    Each round gives a row, and the row that it points to, the lowest row that either key leads to, then halves
    all paths (as in FastSV, Zhang et al. 2020). The number of rounds grows with the logarithm of the longest
    chain; it is two where nothing is shared.
    """
    codes = [np.unique(each, return_inverse=True)[1] for each in keys]
    group = np.arange(len(codes[0]))
    while True:
        low = group
        for code in codes:
            lowest = np.full(len(low), len(low))
            np.minimum.at(lowest, code, low)
            low = lowest[code]
        parent = low.copy()
        np.minimum.at(parent, group, low)
        parent = parent[parent]
        if np.array_equal(parent, group):
            return group
        group = parent


def mix64(x: Keys) -> Keys:
    """The finaliser of splitmix64: its output is evenly distributed however `x` was chosen."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _document_keys(store: TokenStore) -> tuple[Keys, Keys]:
    """xxh3-64 of each document's id (of its tokens where it has none), and of its token ids."""
    by_id, by_content, first = [], [], 0
    for values, ids, _ in store.batches():
        offsets = ((store.offsets[first : first + len(ids) + 1] - store.offsets[first]) * values.itemsize).tolist()
        content = values.view(np.uint8).data
        hashes = [xxhash.xxh3_64_intdigest(content[a:b]) for a, b in zip(offsets, offsets[1:], strict=False)]
        id_starts, text = string_data(ids)
        spans = zip(id_starts.tolist(), id_starts[1:].tolist(), hashes, strict=False)
        id_hashes = [xxhash.xxh3_64_intdigest(text.data[a:b]) if a < b else hashed for a, b, hashed in spans]
        by_id.append(np.array(id_hashes, np.uint64))
        by_content.append(np.array(hashes, np.uint64))
        first += len(ids)
    empty = np.zeros(0, np.uint64)
    return np.concatenate((empty, *by_id)), np.concatenate((empty, *by_content))

"""Which documents a mix keeps out of training, so that none of them comes into it in another form.

Documents with the same id, or with the same token ids, are one group, across all sources, and so is what these have in common with others; a
group is held out whole or not at all. An id is the hash of the text unless the user gave one, so that a text with and without fill-in-the-middle,
by another tokenizer, or cut into pieces by an earlier packing stays on one side; the tokens tell what is stored under two ids. The lowest hash of
an id in a group decides: what shares neither id nor tokens with another is held out of every mix with as large a share.

Cost: the tokens are read once, in place. Memory: about 100 bytes a document.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xxhash
from numpy.typing import NDArray

from llmkit.shards.arrow import string_data
from llmkit.shards.reader import TokenStore

Keys = NDArray[np.uint64]


def held_out(stores: Sequence[TokenStore], share: float) -> list[tuple[int, ...]]:
    """Documents of each store that are held out, about `share` of all; never the padding of an earlier packing."""
    ids, contents = map(np.concatenate, zip(*map(_keys, stores), strict=True))
    group = grouped([ids, contents])
    lowest = np.full(len(ids), np.iinfo(np.uint64).max)
    np.minimum.at(lowest, group, ids)
    drawn = mixed(lowest[group]) < np.uint64(int(share * 2**64))
    found, first = [], 0
    for store in stores:
        mine = drawn[first : first + store.documents]
        found.append(tuple(np.flatnonzero(mine if store.padding is None else mine & ~store.padding).tolist()))
        first += store.documents
    return found


def grouped(keys: Sequence[Keys]) -> NDArray[np.int64]:
    """For each of n rows the first row of its group: rows that share any of their keys, each uint64 [n], and what is connected by them.

    Every round gives a row, and the row that it points to, the lowest row that either key leads to, then halves all paths (as in FastSV, Zhang et
    al. 2020): the rounds grow with the logarithm of the longest chain, and are two where nothing is shared.
    """
    codes = [np.unique(each, return_inverse=True)[1] for each in keys]
    group = np.arange(len(codes[0]))
    while True:
        low = group
        for code in codes:
            lowest = np.full(len(low), len(low))
            np.minimum.at(lowest, code, low)
            low = lowest[code]
        pointed = low.copy()
        np.minimum.at(pointed, group, low)
        pointed = pointed[pointed]
        if np.array_equal(pointed, group):
            return group
        group = pointed


def mixed(x: Keys) -> Keys:
    """The finaliser of splitmix64: as evenly spread whatever the choice of `x` was."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _keys(store: TokenStore) -> tuple[Keys, Keys]:
    """xxh3-64 of id (where there is none, of the tokens) and of token ids of each document."""
    by_id, by_content, at = [], [], 0
    for values, ids, _ in store.batches():
        cuts = ((store.offsets[at : at + len(ids) + 1] - store.offsets[at]) * values.itemsize).tolist()
        content = values.view(np.uint8).data
        hashes = [xxhash.xxh3_64_intdigest(content[a:b]) for a, b in zip(cuts, cuts[1:], strict=False)]
        starts, text = string_data(ids)
        named = zip(starts.tolist(), starts[1:].tolist(), hashes, strict=False)
        found = [xxhash.xxh3_64_intdigest(text.data[a:b]) if a < b else other for a, b, other in named]
        by_id.append(np.array(found, np.uint64))
        by_content.append(np.array(hashes, np.uint64))
        at += len(ids)
    nothing = np.zeros(0, np.uint64)
    return np.concatenate((nothing, *by_id)), np.concatenate((nothing, *by_content))

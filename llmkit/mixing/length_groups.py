"""Rows of similar length in the same step, in random order: little padding where rows are not packed.

A random permutation is cut into groups of GROUP_BATCHES batches, each is sorted by length and cut into batches, and
these are put in random order. A row may thus meet any other of its length within a group, and the lengths of
successive steps are independent, as with transformers' `group_by_length`. Cost: a sort.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

GROUP_BATCHES = 50  # more: less padding, but steps differ less from epoch to epoch

Numbers = NDArray[np.int64]


def length_grouped(lengths: Numbers, batch_size: int, generator: np.random.Generator, filled: int = 0) -> Numbers:
    """An order of the rows, int64 [n], whose batches have rows of similar length.

    The first rows complete a batch that has `filled` rows already, and the last ones may begin another.
    """
    order = generator.permutation(len(lengths))
    first = -filled % batch_size
    size = GROUP_BATCHES * batch_size
    groups = [order[start : start + size] for start in range(first, len(order), size)]
    ordered = [group[np.argsort(-lengths[group], kind="stable")] for group in groups]
    rest = np.concatenate([order[:0], *ordered])
    whole = len(rest) // batch_size * batch_size
    batches = rest[:whole].reshape(-1, batch_size)
    return np.concatenate((order[:first], generator.permutation(batches).ravel(), rest[whole:]))

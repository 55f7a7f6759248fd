"""Seeds that depend on their purpose, never on the order in which they are drawn.

`derive(seed, "mix", "web", 3)` is a 64-bit integer that is the same on every machine and independent of the
seeds for all other labels, so two parts of a run never share a random stream, and adding one does not shift
another.
"""

from __future__ import annotations

import xxhash


def derive(seed: int, *labels: str | int) -> int:
    """64-bit seed for the part of a run that `labels` name: xxh3-64 of the labels joined by NUL, seeded with `seed`."""
    return xxhash.xxh3_64_intdigest("\0".join(map(str, labels)).encode(), seed & 0xFFFF_FFFF_FFFF_FFFF)

"""What is wrong with a step's documents: noise, or one thing over and over. A text that is merely new to the model is neither.

A loss alone cannot tell random bytes from a language that the model has never seen: both are worse than a guess. But any text has an order. So the
pairs of neighbouring characters, and those of neighbouring tokens, are counted: text repeats more of them than a random permutation of the same
characters does, in whatever language (tests/bench/noise.md: 4 of 4,240 pieces in 532 languages are taken for noise, and 51 of 3,200 pieces of
random bytes for text). What has no such order and costs the model far more than its neighbours do is noise. One token or phrase over and over
is known by how few different tokens it has.

    suspects(losses, ids, decode)     # for the documents of one step

Cost: a few milliseconds a document; called for odd steps only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmkit.seeds import derive

FEWEST = 128  # tokens, or characters, that can be judged
LOOKED_AT = 512  # tokens of a document that are
PERMUTATIONS = 20
ORDERED = 2.5  # standard deviations beyond a random order
OUTLYING = 4.0  # robust standard deviations of a document's loss above those of its neighbours
FEW_DIFFERENT = 32  # one in so many; the least in those languages is one in nine
SPREAD = 1.4826
LEAST_SPREAD = 0.25  # nats


@dataclass(frozen=True, slots=True)
class Piece:
    """A document in a step: its name, all its tokens [n], the losses of those in the step float32 [m] (nan: not predicted)."""

    name: str
    tokens: NDArray[Any]
    losses: NDArray[np.float32]

    @property
    def loss(self) -> float:
        """Mean over what was predicted."""
        known = self.losses[~np.isnan(self.losses)]
        return float(known.mean()) if len(known) else float("nan")


def suspects(
    pieces: Sequence[Piece], usual: Sequence[float], decode: Callable[[list[int]], str] | None
) -> list[tuple[Piece, str]]:
    """Those of `pieces` that are broken, and why; `usual` are the losses of documents of a good step."""
    known = [loss for loss in usual if np.isfinite(loss)] or [p.loss for p in pieces if np.isfinite(p.loss)]
    if not known:
        return []
    middle = median(known)
    spread = max(SPREAD * median(abs(loss - middle) for loss in known), LEAST_SPREAD)
    found = []
    for piece in pieces:
        tokens = piece.tokens[:LOOKED_AT].astype(np.int64)
        if len(tokens) < FEWEST:
            continue
        start = tokens[: LOOKED_AT // 2]
        if len(np.unique(start)) * FEW_DIFFERENT <= len(start):
            found.append((piece, "repetition"))
        elif piece.loss > middle + OUTLYING * spread and not has_order(tokens, decode):
            found.append((piece, "noise"))
    return found


def has_order(tokens: NDArray[np.int64], decode: Callable[[list[int]], str] | None) -> bool:
    """Whether tokens [n] follow each other as in a text, and the characters that they stand for, where these are known and enough."""
    if order(tokens) < ORDERED:
        return False
    if decode is None:
        return True
    characters = np.frombuffer(decode(tokens.tolist()).encode("utf-32-le", "replace"), dtype="<u4")
    return len(characters) < FEWEST or order(characters.astype(np.int64)) >= ORDERED


def order(symbols: NDArray[np.int64]) -> float:
    """How many standard deviations fewer different pairs of neighbours `symbols` [n] have than random permutations of them."""
    codes = np.unique(symbols, return_inverse=True)[1].astype(np.int64)
    most = int(codes.max(initial=0)) + 1
    draw = np.random.default_rng(derive(len(codes), "order"))

    def pairs(row: NDArray[np.int64]) -> int:
        return len(np.unique(row[:-1] * most + row[1:]))

    at_random = [pairs(draw.permutation(codes)) for _ in range(PERMUTATIONS)]
    return float((np.mean(at_random) - pairs(codes)) / max(float(np.std(at_random)), 0.5))

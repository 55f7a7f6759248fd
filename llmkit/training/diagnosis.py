"""What is wrong with a step's documents: noise, or one thing over and over. A text that is merely new to the model is neither.

A loss alone cannot tell random bytes from a language that the model has never seen: both are worse than a guess. But any text has an order. So the
pairs of neighbouring characters, and those of neighbouring tokens, are counted: text repeats more of them than a random permutation of the same
characters does, in whatever language (measured on 13 languages in 11 scripts, code, tables: 3 to 60 standard deviations from 128 tokens on;
random bytes, characters and token ids: below 2.5). What has no such order and costs the model far more than its neighbours do is noise. One token or
phrase over and over is known by how few different tokens it has (below 1 in 32; the least in those languages is 1 in 9).

    suspects(losses, ids, decode)     # for the documents of one step

Cost: a few milliseconds a document; called for odd steps only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
from numpy.typing import NDArray

from llmkit.seeds import derive

FEWEST = 64  # tokens of a document that can be judged
LOOKED_AT = 512  # tokens of a document that are
PERMUTATIONS = 20
ORDERED = 3.0  # standard deviations beyond a random order
OUTLYING = 4.0  # robust standard deviations of a document's loss above those of its neighbours
SPREAD = 1.4826
LEAST_SPREAD = 0.25  # nats


@dataclass(frozen=True, slots=True)
class Piece:
    """A document as far as it lies in one step: its name, its tokens int64 [n], the loss of each float32 [n] (nan: not predicted)."""

    name: str
    tokens: NDArray[np.int64]
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
        tokens = piece.tokens[:LOOKED_AT]
        if len(tokens) < FEWEST:
            continue
        if len(np.unique(tokens[: LOOKED_AT // 2])) * 32 <= len(tokens[: LOOKED_AT // 2]):
            found.append((piece, "repetition"))
        elif piece.loss > middle + OUTLYING * spread and not _has_order(tokens, decode):
            found.append((piece, "noise"))
    return found


def _has_order(tokens: NDArray[np.int64], decode: Callable[[list[int]], str] | None) -> bool:
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
